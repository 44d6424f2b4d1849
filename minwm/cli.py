"""The command line: every verb is a typed function that parses, builds and makes one call.

Parsing only binds the arguments; the work starts in `main`, which turns every `UserError` into one line and the exit
code 2. Heavy modules are imported inside the verbs, so that `minwm --help` is quick.
"""

import contextlib
import functools
import inspect
import io
import json as jsonlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from minwm.core.config import UserError, choose, dumps, override

if TYPE_CHECKING:
    import numpy as np

    from minwm.core.camera import CameraTrack
    from minwm.core.trajectory import Motion, Trajectory

DESCRIPTION = """Camera-controlled, streaming video world models: data, training, generation, measurement.

  minwm pipeline demo                            every stage on a laptop, then a report
  minwm train demo/camera --optim.lr 5e-4 --out runs/mine
  minwm generate --model runs/demo/dmd --world 7 --trajectory "w*4,j*4" --out walk.mp4

Bad input gives one line and the exit code 2. An interrupted command continues when it is run again."""

Json = Annotated[Path | None, arg(metavar="FILE", help="write the numbers here too")]
Model = Annotated[Path, arg(metavar="DIR", help="model folder, such as runs/demo/dmd")]
Folder = Annotated[Positional[Path], arg(metavar="DIR")]
Out = Annotated[Path, arg(metavar="DIR", help="folder to write; what is finished in it is kept")]
Video = Annotated[Path, arg(metavar="FILE.mp4")]
MaybeDir = Annotated[Path | None, arg(metavar="DIR")]
MaybeFile = Annotated[Path | None, arg(metavar="FILE")]
Seed = Annotated[int | None, arg(metavar="SEED", help="start in this procedural world")]
Show = Annotated[FlagCreatePairsOff[bool], arg(help="print all fields with their values, and stop")]
Fields = Annotated[
    Positional[tuple[str, ...]],
    arg(metavar="[--FIELD VALUE ...]", help="any field, dotted where it is nested: --optim.lr 1e-4; see --show"),
]

app, data_app, camera_app = (tyro.extras.SubcommandApp() for _ in range(3))
OPEN: dict[tuple[str, ...], Callable[..., None]] = {}
"""Verbs with `Fields`."""


def command(group: tyro.extras.SubcommandApp, *words: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the verb `words`. Parsing returns it with its arguments bound, not yet called."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
            return functools.partial(function, *args, **kwargs)

        group.command(bind, name=words[-1])
        if "fields" in inspect.signature(function).parameters:
            OPEN[words] = function
        return function

    return register


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        work = _parse(list(sys.argv[1:] if argv is None else argv))
        work()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing half-written is left; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


# ---------------------------------------------------------------------------------------------
# Data


@command(data_app, "data", "render")
def data_render(out: Out, clips: int = 64, workers: int = 1, show: Show = False, fields: Fields = ()) -> None:
    """Render clips of procedural worlds, with exact cameras."""
    from minwm.data.rerender import RenderConfig, render_worlds

    cfg = override(RenderConfig(), _pairs(fields))
    if show:
        return say(dumps(cfg))
    folder = render_worlds(out, cfg, clips=clips, workers=workers)
    return say(f"{out}: {len(folder.ids())} clips")


@command(data_app, "data", "encode")
def data_encode(raw: Folder, codec: Path, out: Out, show: Show = False, fields: Fields = ()) -> None:
    """Turn raw clips into latent shards, with the codec of a folder."""
    from minwm.checkpoint import load_codec
    from minwm.core.runtime import pick_device
    from minwm.data.encode import EncodeConfig, encode_clips
    from minwm.nets.text import WordText

    cfg = override(EncodeConfig(), _pairs(fields))
    if show:
        return say(dumps(cfg))
    device = pick_device()
    manifest = encode_clips(raw, out, load_codec(codec).to(device), WordText(), device, cfg)
    return say(f"{out}: {manifest['counts']} clips; the codec reaches {manifest['codec_psnr']:.2f} dB")


@command(data_app, "data", "check")
def data_check(folder: Folder, json: Json = None) -> None:
    """Look for anything wrong in raw clips or latent shards."""
    from minwm.data.clips import check, read_manifest
    from minwm.data.dataset import check_shards
    from minwm.data.rerender import check_renders
    from minwm.data.clips import ClipFolder

    if read_manifest(folder, "minwm data render")["kind"] == "latent shards":
        problems = check_shards(folder)
    else:
        problems = [*check(folder), *check_renders(ClipFolder(folder))]
    numbers({"problems": problems}, json, quiet=True)
    if problems:
        raise UserError("\n".join([f"{folder} has {len(problems)} problems:", *problems]))
    say(f"{folder}: nothing wrong")


@command(data_app, "data", "report")
def data_report(folder: Folder, sheet: MaybeFile = None, json: Json = None) -> None:
    """Count what a folder of raw clips holds; --sheet draws some of it."""
    from minwm.core.media import write_image
    from minwm.data import clips

    numbers(clips.report(folder), json)
    if sheet:
        write_image(sheet, clips.sheet(folder))


# ---------------------------------------------------------------------------------------------
# Cameras


@command(camera_app, "camera", "check")
def camera_check(file: Annotated[Positional[Path], arg(metavar="FILE")], json: Json = None) -> None:
    """Check a pose file, and say in words what its camera does."""
    import numpy as np

    from minwm.core.camera import CameraTrack, so3_log
    from minwm.data.clips import actions

    track = CameraTrack.load(file)
    relative = track.relative()
    steps, turns = relative[:, :3, 3], np.degrees(np.linalg.norm(so3_log(relative[:, :3, :3]), axis=-1))
    speed = np.linalg.norm(steps, axis=-1)
    latents, left = divmod(len(track) - 1, 4)
    numbers(
        {
            "frames": len(track),
            "fps": track.fps,
            "unit": track.unit,
            "fov_deg": np.degrees(2 * np.arctan(0.5 / track.K[0, :2])).tolist(),
            "path_length": track.path_length(),
            "fastest_per_second": float(speed.max(initial=0) * track.fps),
            "fastest_turn_deg_per_second": float(turns.max(initial=0) * track.fps),
            "forward_share": float(steps[:, 2].sum() / max(speed.sum(), 1e-9)),
            "latents": latents + 1 if not left else f"{left} frames more than {latents + 1} latents of 4 hold",
            "motion": " ".join(dict.fromkeys(actions(track))) if not left else "",
        },
        json,
    )
    if steps[:, 2].sum() < -0.5 * speed.sum():
        say("it moves backwards most of the time: a sign of world-to-camera poses; this format is camera-to-world")


@command(camera_app, "camera", "show")
def camera_show(
    trajectory: Annotated[Positional[str], arg(metavar='"TRAJECTORY"|FILE.json')],
    model: MaybeDir = None,
    out: MaybeFile = None,
    json: Json = None,
) -> None:
    """Print where a trajectory leads, latent by latent; --model takes that model's speeds, --out saves the poses."""
    import numpy as np

    from minwm.checkpoint import load_config
    from minwm.presets import tiny_model

    cfg = load_config(model) if model else tiny_model()
    if out:
        _unused(out, ".json")
    track, keys = _track(trajectory, cfg.motion, cfg.intrinsics)
    rows = track.at_latent_rate(cfg.motion.stride).c2w
    looks = rows[:, :3, 2]
    table = {
        "x_right": rows[:, 0, 3],
        "y_down": rows[:, 1, 3],
        "z_forward": rows[:, 2, 3],
        "heading_deg": np.degrees(np.arctan2(looks[:, 0], looks[:, 2])),
        "elevation_deg": np.degrees(np.arcsin(-looks[:, 1].clip(-1, 1))),
    }
    say(f"{keys.describe() if keys else trajectory}: {len(track) / track.fps:.2f} s at {track.fps:g} fps")
    say("".join(f"{name:>14}" for name in ("latent", *table)))
    for latent, values in enumerate(zip(*table.values(), strict=True)):
        say(f"{latent:>14}" + "".join(f"{value:>14.3f}" for value in values))
    numbers({name: values.tolist() for name, values in table.items()}, json, quiet=True)
    if out:
        track.save(out)


# ---------------------------------------------------------------------------------------------
# Training


@command(app, "train")
def train(
    stage: Annotated[Positional[str], arg(metavar="PIPELINE/STAGE")],
    out: Annotated[Path | None, arg(metavar="DIR", help="folder of the run (default: STAGE in the project)")] = None,
    project: Annotated[
        Path | None, arg(metavar="DIR", help="pipeline folder with the data and the earlier stages (runs/PIPELINE)")
    ] = None,
    json: Json = None,
    show: Show = False,
    fields: Fields = (),
) -> None:
    """Train one stage, such as demo/camera."""
    from minwm import presets
    from minwm.train import train as run_training

    project = project or Path("runs") / stage.partition("/")[0]
    run = override(presets.stage(stage, project), _pairs(fields))
    if show:
        return say(dumps(run))
    out = out or project / run.name
    say(f"{stage}: {run.recipe.kind}, {run.steps} steps of {run.batch * run.accumulate} clips -> {out}")
    return numbers(asdict(run_training(run, out)), json)


@command(app, "pipeline")
def pipeline(
    name: Annotated[Positional[str], arg(metavar="NAME")],
    out: Annotated[Path | None, arg(metavar="DIR", help="folder of everything (default: runs/NAME)")] = None,
    until: Annotated[str | None, arg(metavar="STAGE", help="stop after this stage")] = None,
) -> None:
    """Run all stages of a pipeline, each from the last, then the report."""
    from minwm import presets
    from minwm.pipeline import run_pipeline

    out = out or Path("runs") / name
    plan = presets.pipeline(name, out)
    if until:
        plan.stage(until)
    run_pipeline(plan, out, say, until)


# ---------------------------------------------------------------------------------------------
# Models


@command(app, "generate")
def generate(
    model: Model,
    trajectory: Annotated[str, arg(metavar='"KEYS"|FILE.json', help='keys such as "w*8", or a pose file')],
    out: Video,
    prompt: Annotated[str | None, arg(metavar="TEXT", help="default with --world: its caption")] = None,
    image: Annotated[Path | None, arg(metavar="PNG", help="start from this picture")] = None,
    world: Seed = None,
    keys: Annotated[FlagCreatePairsOff[bool], arg(help="draw the keys on the video")] = False,
    compare: Annotated[FlagCreatePairsOff[bool], arg(help="with --world: the true view beside it")] = False,
    seed: Annotated[int, arg(metavar="N", help="of the noise")] = 0,
) -> None:
    """Make a video from a first frame, a prompt and a trajectory."""
    import numpy as np

    from minwm.checkpoint import load_model
    from minwm.core.media import overlay_keys, read_image, write_video
    from minwm.core.runtime import pick_device
    from minwm.session import generate_clip

    if (image is None) == (world is None):
        raise UserError("give one first frame: --image PNG, or --world SEED")
    if image and (compare or prompt is None):
        raise UserError("--image needs a --prompt, and --compare a --world: nobody knows the truth behind a picture")
    _unused(out, ".mp4")
    loaded = load_model(model)
    cfg = loaded.config
    track, trajectory_keys = _track(trajectory, cfg.motion, cfg.intrinsics)
    if keys and not trajectory_keys:
        raise UserError(f"--keys: {trajectory} holds poses, not keys")
    truth: list[np.ndarray] = []
    if world is None:
        first = read_image(Path(str(image)))
    else:
        place = _place(world, track, cfg.height, cfg.width)
        prompt, first = prompt or place.caption, place.frames(1)[0]
        truth = [place.frames(len(track))] if compare else []
    start = time.monotonic()
    for part in (loaded.net, loaded.codec):
        part.to(pick_device())
    videos = [*truth, generate_clip(loaded, first, str(prompt), track, seed)]
    seconds = time.monotonic() - start
    if keys and trajectory_keys:
        videos = [overlay_keys(video, trajectory_keys.keys_per_frame()) for video in videos]
    write_video(out, np.concatenate(videos, axis=2), cfg.motion.fps)
    say(f"{prompt!r}\n{out}: {len(track)} frames in {seconds:.1f} s")


@command(app, "eval")
def evaluate(model: Model, json: Json = None, clips: int = 16, seed: int = 1) -> None:
    """Measure camera following, quality and drift in worlds that no stage has seen."""
    from minwm.checkpoint import load_model
    from minwm.evaluate import evaluate_model

    numbers(_plain(evaluate_model(load_model(model), clips=clips, seed=seed)), json)


@command(app, "bench")
def bench(model: Model, json: Json = None, repeats: int = 5) -> None:
    """Measure latency, frames per second and memory."""
    from minwm.checkpoint import load_model
    from minwm.eval.bench import bench_model

    numbers(_plain(bench_model(load_model(model), repeats)), json)


@command(app, "inspect")
def inspect_model(folder: Folder, json: Json = None) -> None:
    """Say what is in a model folder: sizes, sampler, geometry, speeds of its keys."""
    from minwm.checkpoint import load_model
    from minwm.core.config import to_dict

    model = load_model(folder)
    cfg, geometry = model.config, model.config.geometry
    count = {name: sum(p.numel() for p in net.parameters()) for name, net in vars(model).items() if name != "config"}
    numbers(
        {
            "parameters": count,
            "passes_per_chunk": cfg.sampler.passes,
            "frames_per_clip": cfg.motion.stride * (cfg.latents - 1) + 1,
            "arena": {"tokens_per_frame": geometry.tokens, "rows": geometry.rows, "slots": geometry.slots},
            "motion_per_latent": {
                "move": cfg.motion.move * cfg.motion.stride / cfg.motion.fps,
                "turn_deg": cfg.motion.turn * cfg.motion.stride / cfg.motion.fps,
            },
            **to_dict(cfg),
        },
        json,
    )
