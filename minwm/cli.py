"""The command line: every verb is a typed function that parses, builds and makes one call.

Parsing only binds the arguments; the work starts in `main`, which turns every `UserError` into one line and
the exit code 2. Heavy modules are imported inside the verbs, so that `minwm --help` is quick.
"""

import contextlib
import functools
import inspect
import io
import json as jsonlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from minwm.core.config import UserError, dumps, override, to_dict

if TYPE_CHECKING:
    from minwm.checkpoint import ModelConfig
    from minwm.core.camera import CameraTrack
    from minwm.core.trajectory import Trajectory

DESCRIPTION = """Camera-controlled, streaming video world models: data, training, generation, measurement.

  minwm pipeline demo                            every stage on a laptop, then a report
  minwm train demo/camera --optim.lr 5e-4 --out runs/mine
  minwm generate --model runs/demo/dmd --world 7 --trajectory "w*4,j*4" --out walk.mp4

Bad input gives one line and the exit code 2. An interrupted command continues when it is run again."""

Json = Annotated[Path | None, arg(metavar="FILE", help="write the numbers here too")]
Model = Annotated[Path, arg(metavar="DIR", help="model folder, such as runs/demo/dmd")]
Folder = Annotated[Positional[Path], arg(metavar="DIR")]
File = Annotated[Positional[Path], arg(metavar="FILE.json")]
Out = Annotated[Path, arg(metavar="DIR", help="folder to write; what is finished in it is kept")]
Route = Annotated[str, arg(metavar='"KEYS"|FILE.json', help='keys such as "w*4,j*4", or a pose file')]
Count = Annotated[int, arg(metavar="N")]
Flag = FlagCreatePairsOff[bool]
Show = Annotated[Flag, arg(help="print every field with its value, and stop")]
Fields = Annotated[
    Positional[tuple[str, ...]],
    arg(
        metavar="[--FIELD VALUE ...]", help="any field, dotted if nested: --optim.lr 1e-4; --show lists them"
    ),
]

app, data, camera = (tyro.extras.SubcommandApp() for _ in range(3))
app.command(data, name="data", help="Training clips: render, encode, check, report.")
app.command(camera, name="camera", help="Poses and trajectories: check a file, show a path.")


def command(
    group: tyro.extras.SubcommandApp, name: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a verb. Parsing returns the function with its arguments bound, not yet called."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
            return functools.partial(function, *args, **kwargs)

        group.command(bind, name=name)
        return function

    return register


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        _parse(list(sys.argv[1:] if argv is None else argv))()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        way_out = "nothing half-written is left; run the same command again to continue"
        print(f"interrupted: {way_out}", file=sys.stderr)
        return 130
    return 0


@command(app, "pipeline")
def pipeline(
    name: Annotated[Positional[str], arg(metavar="NAME", help="demo, demo-scratch or smoke")],
    out: Annotated[
        Path | None, arg(metavar="DIR", help="folder of everything; runs/NAME if not given")
    ] = None,
    until: Annotated[str | None, arg(metavar="STAGE", help="stop after this stage")] = None,
) -> None:
    """Run all stages, each from the one before, then write the report."""
    from minwm import presets
    from minwm.pipeline import run_pipeline

    out = out or Path("runs") / name
    plan = presets.pipeline(name, out)
    if until:
        plan.stage(until)
    run_pipeline(plan, out, say, until)


@command(app, "train")
def train(
    stage: Annotated[Positional[str], arg(metavar="PIPELINE/STAGE")],
    out: Annotated[
        Path | None, arg(metavar="DIR", help="folder of the run; PROJECT/STAGE if not given")
    ] = None,
    project: Annotated[
        Path | None,
        arg(metavar="DIR", help="folder with data and earlier stages; runs/PIPELINE if not given"),
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


@command(app, "generate")
def generate(
    model: Model,
    trajectory: Route,
    out: Annotated[Path, arg(metavar="FILE.mp4")],
    prompt: Annotated[
        str | None, arg(metavar="TEXT", help="what is seen; the world's caption if not given")
    ] = None,
    image: Annotated[Path | None, arg(metavar="PNG", help="start from this picture")] = None,
    world: Annotated[int | None, arg(metavar="SEED", help="start in this procedural world")] = None,
    keys: Annotated[Flag, arg(help="draw the keys on the video")] = False,
    compare: Annotated[Flag, arg(help="with --world: the true view beside it")] = False,
    seed: Annotated[int, arg(metavar="N", help="of the noise")] = 0,
) -> None:
    """Make a video from a first frame, a prompt and a trajectory."""
    import numpy as np

    from minwm.checkpoint import load_model
    from minwm.core.media import overlay_keys, read_image, write_video
    from minwm.core.runtime import pick_device
    from minwm.session import RendererEngine, generate_clips

    _unused(out, ".mp4")
    loaded = load_model(model)
    track, route = _track(trajectory, loaded.config)
    if keys and route is None:
        raise UserError(f"--keys: {trajectory} holds poses, not keys")
    if image and world is None and not compare and prompt is not None:
        first, truth = read_image(image), []
    elif world is not None and not image:
        place = RendererEngine.spawn(world, track, loaded.config)
        first, truth = place.start()[0], [place.advance(track.c2w)] if compare else []
        prompt = place.world.caption if prompt is None else prompt
    else:
        raise UserError("give --image PNG with --prompt TEXT, or --world SEED (which --compare needs)")
    if loaded.config.network.camera == "none":
        say("this model has no camera control: the trajectory only says how long the video is")
    start = time.monotonic()
    for part in (loaded.net, loaded.codec):
        part.to(pick_device())
    videos = [*truth, generate_clips(loaded, first[None], [prompt], [track], seed)[0]]
    seconds = time.monotonic() - start
    if keys and route:
        videos = [overlay_keys(video, route.keys_per_frame()) for video in videos]
    write_video(out, np.concatenate(videos, axis=2), loaded.config.motion.fps)
    say(f"{prompt!r}\n{out}: {len(track)} frames in {seconds:.1f} s")


@command(app, "eval")
def evaluate(model: Model, json: Json = None, clips: Count = 16, seed: Count = 1) -> None:
    """Measure camera following, quality and drift in worlds that no stage has seen."""
    from minwm.checkpoint import load_model
    from minwm.eval.suite import HeldOut, counterfactual, generate_held_out, measure

    loaded = load_model(model)
    held = HeldOut.make(loaded.config, clips)
    measured = measure(loaded.config, held, generate_held_out(loaded, held, seed))
    numbers(to_dict(replace(measured, confusion=counterfactual(loaded, seed)[2])), json)


@command(app, "bench")
def bench(model: Model, json: Json = None, repeats: Count = 5) -> None:
    """Measure latency and frames per second."""
    from minwm.checkpoint import load_model
    from minwm.eval.bench import bench_model

    numbers(to_dict(bench_model(load_model(model), repeats=repeats)), json)


@command(app, "inspect")
def inspect_model(folder: Folder, json: Json = None) -> None:
    """Say what is in a model folder: sizes, sampler, geometry, speeds of its keys."""
    from minwm.checkpoint import load_model

    model = load_model(folder)
    cfg, geometry = model.config, model.config.geometry
    per_latent = cfg.motion.stride / cfg.motion.fps
    sizes = {
        "parameters": sum(p.numel() for p in model.net.parameters()),
        "codec_parameters": sum(p.numel() for p in model.codec.parameters()),
        "passes": cfg.sampler.passes,
        "clip_frames": cfg.motion.stride * (cfg.latents - 1) + 1,
        "tokens_per_latent": geometry.tokens,
        "cache_rows": geometry.rows,
        "units_per_latent": cfg.motion.move * per_latent,
        "degrees_per_latent": cfg.motion.turn * per_latent,
    }
    numbers(sizes | to_dict(cfg), json)


@command(data, "render")
def data_render(
    out: Out, clips: Count = 64, workers: Count = 1, show: Show = False, fields: Fields = ()
) -> None:
    """Render clips of procedural worlds, with exact cameras."""
    from minwm.data.rerender import RenderConfig, render_worlds

    cfg = override(RenderConfig(), _pairs(fields))
    if show:
        return say(dumps(cfg))
    folder = render_worlds(out, cfg, clips=clips, workers=workers)
    return say(f"{out}: {len(folder.ids())} clips")


@command(data, "encode")
def data_encode(
    raw: Folder,
    codec: Annotated[Path, arg(metavar="DIR", help="codec folder, such as runs/demo/codec")],
    out: Out,
    show: Show = False,
    fields: Fields = (),
) -> None:
    """Turn raw clips into latent shards."""
    from minwm.checkpoint import load_codec
    from minwm.core.runtime import pick_device
    from minwm.data.encode import EncodeConfig, encode_clips
    from minwm.nets.text import WordText

    cfg, device = override(EncodeConfig(), _pairs(fields)), pick_device()
    if show:
        return say(dumps(cfg))
    made = encode_clips(raw, out, load_codec(codec).to(device), WordText(), device, cfg)
    return say(f"{out}: {made['counts']} clips; the codec reaches {made['codec_psnr']:.2f} dB")


@command(data, "check")
def data_check(folder: Folder, json: Json = None) -> None:
    """Look for anything wrong in raw clips or latent shards."""
    from minwm.data.clips import ClipFolder, check, read_manifest
    from minwm.data.dataset import check_shards
    from minwm.data.rerender import check_renders

    if read_manifest(folder, "minwm data render")["kind"] == "latent shards":
        problems = check_shards(folder)
    else:
        problems = check(folder) or check_renders(ClipFolder(folder))
    write_numbers({"problems": problems}, json)
    for problem in problems:
        say(problem)
    if problems:
        raise UserError(f"{folder}: problems found, {len(problems)} in all (listed above)")
    say(f"{folder}: nothing wrong")


@command(data, "report")
def data_report(
    folder: Folder,
    sheet: Annotated[Path | None, arg(metavar="PNG", help="draw some of the clips here")] = None,
    json: Json = None,
) -> None:
    """Count what a folder of raw clips holds."""
    from minwm.core.media import write_image
    from minwm.data import clips

    numbers(clips.report(folder), json)
    if sheet:
        write_image(sheet, clips.sheet(folder))


@command(camera, "check")
def camera_check(file: File, json: Json = None) -> None:
    """Check a pose file, and say in words what its camera does."""
    import numpy as np

    from minwm.core.camera import CameraTrack, so3_log
    from minwm.data.clips import actions

    track = CameraTrack.load(file)
    relative = track.relative()
    speed = np.linalg.norm(relative[:, :3, 3], axis=-1) * track.fps
    turn = np.degrees(np.linalg.norm(so3_log(relative[:, :3, :3]), axis=-1)) * track.fps
    ahead = float(relative[:, 2, 3].sum() * track.fps / max(speed.sum(), 1e-9))
    values = {
        "frames": len(track),
        "fps": track.fps,
        "field_of_view_deg": np.degrees(2 * np.arctan(0.5 / track.K[0, :2])).tolist(),
        f"path_length_{track.unit}": track.path_length(),
        f"fastest_{track.unit}_per_second": float(speed.max(initial=0)),
        "fastest_degrees_per_second": float(turn.max(initial=0)),
        "share_of_motion_straight_ahead": ahead,
    }
    if (len(track) - 1) % 4 == 0:
        values |= {"latents": (len(track) - 1) // 4 + 1, "motion": list(dict.fromkeys(actions(track)))}
    numbers(values, json)
    if "latents" not in values:
        say("note: models take 4 * k + 1 frames")
    if ahead < -0.5:
        say("note: it moves backwards; if it should not, these poses are world-to-camera: invert them")


@command(camera, "show")
def camera_show(
    trajectory: Annotated[Positional[str], arg(metavar='"KEYS"|FILE.json')],
    model: Annotated[Path | None, arg(metavar="DIR", help="take the speeds of this model's keys")] = None,
    out: Annotated[Path | None, arg(metavar="FILE.json", help="save the poses")] = None,
    json: Json = None,
) -> None:
    """Print where a trajectory leads, latent by latent."""
    import numpy as np

    from minwm.checkpoint import load_config
    from minwm.presets import tiny_model

    if out:
        _unused(out, ".json")
    cfg = load_config(model) if model else tiny_model()
    track, route = _track(trajectory, cfg)
    c2w = track.at_latent_rate(cfg.motion.stride).c2w
    x, y, z = c2w[:, :3, 2].T  # where the camera looks
    table = dict(zip(("right", "down", "forward"), c2w[:, :3, 3].T.tolist(), strict=True))
    table["heading"] = np.degrees(np.arctan2(x, z)).tolist()
    table["elevation"] = np.degrees(np.arcsin(-y.clip(-1, 1))).tolist()
    say(f"{route.describe() if route else trajectory}: {len(track)} frames at {track.fps:g} per second")
    say("".join(f"{name:>11}" for name in ("latent", *table)))
    for latent, row in enumerate(zip(*table.values(), strict=True)):
        say(f"{latent:>11}" + "".join(f"{value:>11.3f}" for value in row))
    write_numbers(table, json)
    if out:
        track.save(out)


OPEN = {("train",): train, ("data", "render"): data_render, ("data", "encode"): data_encode}
"""Verbs with `Fields`."""


def _parse(argv: list[str]) -> Callable[[], None]:
    """The command with its arguments bound. What tyro says about bad ones is a box; it becomes one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return app.cli(prog="minwm", description=DESCRIPTION, args=_fields_as_pairs(argv))
    except SystemExit as stop:
        if not stop.code:
            raise  # --help has been printed
        plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]+", " ", said.getvalue().partition("\n")[2])
        problem, _, way_out = " ".join(plain.split()).partition(" For full helptext, ")
        raise UserError(f"{problem}; {way_out or 'run minwm --help'}") from None


def _fields_as_pairs(argv: list[str]) -> list[str]:
    """For verbs with `Fields`: each `--name value` that is no option of the verb becomes one `name=value`."""
    words = next((words for words in OPEN if tuple(argv[: len(words)]) == words), None)
    if words is None:
        return argv
    own = inspect.signature(OPEN[words]).parameters
    positionals, options = [], []
    rest = iter(argv[len(words) :])
    for token in rest:
        name, equals, value = token.removeprefix("--").partition("=")
        if token in ("-h", "--help", "--show"):
            options.append(token)
        elif not token.startswith("--"):
            positionals.append(token)
        elif not equals and (value := next(rest, "--")).startswith("--"):
            raise UserError(f"{token} needs a value")
        elif name in own:
            options += [f"--{name}", value]
        else:
            positionals.append(f"{name.replace('-', '_')}={value}")
    return [*words, *positionals, *options]


def _pairs(fields: tuple[str, ...]) -> dict[str, str]:
    for field in fields:
        if "=" not in field:
            raise UserError(f"{field!r} is no field; write --FIELD VALUE, such as --steps 200")
    return dict(field.split("=", 1) for field in fields)


def _track(text: str, cfg: "ModelConfig") -> "tuple[CameraTrack, Trajectory | None]":
    """A pixel-rate track from the identity on, from keys or from a pose file; and the keys, if there are any."""
    from minwm.core.camera import CameraTrack
    from minwm.core.trajectory import parse

    if not text.endswith(".json"):
        route = parse(text, stride=cfg.motion.stride)
        return route.track(cfg.motion, cfg.intrinsics), route
    track = CameraTrack.load(text).anchored()
    if track.fps != cfg.motion.fps:
        say(f"{text}: {track.fps:g} poses per second, resampled to the model's {cfg.motion.fps:g}")
        track = track.resample(cfg.motion.fps)
    return track, None


def _unused(path: Path, suffix: str) -> None:
    """Refuse, before any work, a file that would be overwritten or whose name says another format."""
    if path.suffix.lower() != suffix:
        raise UserError(f"--out {path}: the name must end in {suffix}")
    if path.exists():
        raise UserError(f"--out {path} exists; delete it, or give another name")


def say(text: str) -> None:
    print(text, flush=True)


def numbers(values: Mapping[str, Any], file: Path | None) -> None:
    """Print values with four digits, a line each, and write them in full to `file`."""
    rounded = jsonlib.loads(jsonlib.dumps(values), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    for line in _flat(rounded, ""):
        say(line)
    write_numbers(values, file)


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}: {value}"


def write_numbers(values: Mapping[str, Any], file: Path | None) -> None:
    """Write values to `file`, if there is one, with what is needed to get them again."""
    from minwm.core.media import atomic
    from minwm.core.runtime import git_commit, versions

    if file:
        line = shlex.join(["minwm", *sys.argv[1:]])
        about = {"command": line, "commit": git_commit(), "versions": versions()}
        with atomic(file) as temporary:
            temporary.write_text(jsonlib.dumps({**about, **values}, indent=1) + "\n")
