"""Models on the Hugging Face Hub: a folder or USER/NAME in; model files and their card out.

The card says what the files of a run say. What none of them knows is left out, or called unknown.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import minwm
from minwm.core.config import to_dict
from minwm.core.files import read_json, write_text
from minwm.core.hub import HubError
from minwm.core.weights import check, read_weights
from minwm.store.folder import FILES, load_config
from minwm.store.layouts import FAMILIES, release_name
from minwm.store.model import ModelConfig

CARD = "README.md"
KEPT = "<!-- minwm writes what is above. What is below is yours, and kept when the card is written again. -->"
MEASURED = {"sampler", "passes", "parameters", "threads", "versions", "date"}
MEASURED |= {"fps", "chunk", "stages", "first_pixel", "allocated_gb"}
"""By which a file that `minwm bench --json` wrote is known."""


def write_card(folder: Path, repo: str | None = None, license: str | None = None) -> None:
    """Write README.md of a model folder. Of one that is there, what stands below the mark is kept, or else all of it,
    and its licence unless there is a new one.
    """
    path = folder / CARD
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    stated = re.search(r"^license: ([\w.-]+)$", before, re.MULTILINE)
    text = card(folder, repo, license or (stated and stated[1]))
    kept = before.rpartition(KEPT)[2].lstrip()
    write_text(path, "\n".join([text, KEPT, kept]))


def card(folder: Path, repo: str | None = None, license: str | None = None) -> str:
    """The model card, Markdown with YAML front matter; commands in it name `repo`, or the folder.

    Raises CheckpointError if the folder is no whole model, HubError for a license that is no identifier.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9.-]+", license):
        raise HubError(f"license={license!r}: give an identifier of the Hub, such as apache-2.0")
    facts = _Facts.read(folder)
    title = (repo or folder.absolute().name).rpartition("/")[2]
    sections = {
        "What it is": _network(facts),
        "Cameras": _cameras(facts.config),
        "How it was trained": _training(facts),
        "Licences": _licences(facts, license),
        "Speed": _speed(facts, folder, repo or str(folder)),
        "Use": _use(facts.config, repo or str(folder)),
        "Limits": _bullets(_limits(facts.config)),
        "Provenance": _provenance(facts),
    }
    body = [f"## {name}\n\n{text}\n" for name, text in sections.items() if text]
    return "\n".join([_front_matter(facts, license), f"# {title}\n", *body])


@dataclass(frozen=True)
class _Facts:
    config: ModelConfig
    parameters: int
    codec_parameters: int
    dtypes: str
    runs: list[dict[str, Any]]
    """run.json of the model and of all that it goes back to, itself last; empty if it was not trained here."""
    unknown: list[Path]
    """The folders without one to which they go back."""
    base: str | None
    """Hub name of the release that the network goes back to: a model not trained here, of those sizes."""

    @classmethod
    def read(cls, folder: Path) -> "_Facts":
        """Raises CheckpointError unless all tensors are there, by name and shape; they are not read."""
        config = load_config(folder)
        with torch.device("meta"):
            parts = config.network.build(), config.codec.build()
        tensors = [read_weights(folder / file).tensors for file in FILES[1:]]
        for part, file, found in zip(parts, FILES[1:], tensors, strict=True):
            check(part, found, folder / file)
        own, codec = (sum(p.numel() for p in part.parameters()) for part in parts)
        dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in tensors[0].values()})
        history = _history(folder, {})
        runs = [record for record in history.values() if record]
        unknown = [path for path, record in history.items() if not record]
        start = _first(folder, history)
        published = not history[start] and (start / "model.json").exists()
        release = release_name(config.network) if published else None
        base = release and FAMILIES[config.network.kind].RELEASES[release].repo
        return cls(config, own, codec, ", ".join(dtypes), runs, unknown, base)

    @property
    def streams(self) -> bool:
        return self.config.sampler.causal


History = dict[Path, dict[str, Any] | None]


def _history(folder: Path, found: History) -> History:
    """The folders that a model goes back to through `init`, itself last; with their run.json, if they have one."""
    path = folder / "run.json"
    record = found[folder] = read_json(path) if path.exists() else None  # in its place below; here against circles
    for before in record["run"]["init"].values() if record else ():
        if before and Path(before) not in found:
            _history(Path(before), found)
    found[folder] = found.pop(folder)
    return found


def _first(folder: Path, history: History) -> Path:
    """Where the network's weights began: the last folder from student to student."""
    for _ in history:  # no more than there are, as folders may have been renamed into a circle
        if record := history[folder]:
            folder = Path(record["run"]["init"]["student"] or folder)
    return folder


def _front_matter(facts: _Facts, license: str | None) -> str:
    cfg = facts.config
    tags = ["world-model", "video-generation", cfg.network.kind, cfg.sampler.kind.replace("_", "-")]
    tags += ["camera-control"] * (cfg.network.camera != "none") + ["streaming"] * facts.streams
    values = {
        "license": license,
        "library_name": "minwm",
        "pipeline_tag": "image-to-video" if cfg.geometry.first_chunk_frames == 1 else "text-to-video",
        "base_model": facts.base,
    }
    lines = [f"{name}: {value}" for name, value in values.items() if value]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""])


def _network(facts: _Facts) -> str:
    cfg, geometry, fps = facts.config, facts.config.geometry, facts.config.motion.fps
    sizes = ", ".join(f"{name} {value}" for name, value in to_dict(cfg.network).items() if name != "kind")
    unit = "chunk" if facts.streams else "clip"
    guidance = "" if cfg.sampler.guidance == 1 else f", both branches of guidance ({cfg.sampler.guidance:g}) counted"
    frames = cfg.motion.stride * cfg.stream.chunk
    first = (
        "1 latent, which an image can give"
        if geometry.first_chunk_frames == 1
        else f"{geometry.first_chunk_frames} latents"
    )
    rows = {
        "network": f"`{cfg.network.kind}`, {facts.parameters:,} parameters ({facts.dtypes}): {sizes}",
        "sampler": f"`{cfg.sampler.kind}`: {cfg.sampler.passes} network passes per {unit}{guidance}",
        "codec": f"`{cfg.codec.kind}`, {facts.codec_parameters:,} parameters; a latent has {cfg.codec.channels} "
        f"channels, and stands for {cfg.motion.stride} frames and {cfg.scale}x{cfg.scale} pixels",
        "prompts": f"`{cfg.text.kind}`, up to {cfg.text.length} states of width {cfg.text.dim}",
        "pictures": f"{cfg.width}x{cfg.height} pixels, {fps:g} frames per second",
        "clip": f"{_frames(cfg)} frames ({_frames(cfg) / fps:.3g} s), {cfg.latents} latents",
        "chunk": f"{cfg.stream.chunk} latents, {frames} frames ({frames / fps:.3g} s); the first one is {first}",
    }
    return _table(("", ""), [(name, rows[name]) for name in rows if name != "chunk" or facts.streams])


def _frames(cfg: ModelConfig) -> int:
    return cfg.motion.stride * (cfg.latents - 1) + 1


def _cameras(cfg: ModelConfig) -> str:
    if cfg.network.camera == "none":
        return "It has no camera control: a trajectory only says how long the video is."
    motion, latent = cfg.motion, cfg.motion.stride / cfg.motion.fps
    way, where = {
        "dual": ("by PRoPE", "in an attention branch of its own"),
        "single": ("by PRoPE", "in half of the channels of attention"),
        "plucker": ("as Plücker rays", "added to tokens"),
    }[cfg.network.camera]
    fields = " x ".join(f"{math.degrees(2 * math.atan(0.5 / focal)):.3g}" for focal in cfg.focal)
    points = [
        "Axes are OpenCV's: x to the right, y down, z forward.",
        "Files and the API take 4x4 camera-to-world matrices (c2w), one per frame, relative to the first frame. Latent "
        f"`i` is seen from the pose of frame `{motion.stride} i`.",
        f"Inside, cameras enter {way} (`camera={cfg.network.camera}`, {where}), from "
        "world-to-camera matrices (w2c) with normalised focal lengths.",
        f"Focal lengths of the training cameras: fx / width = {cfg.focal[0]:.4g}, fy / height = {cfg.focal[1]:.4g} "
        f"({fields} degrees), principal point in the middle. Other cameras are not what it knows.",
        f"A key that is held moves by {motion.move:g} units per second ({motion.move * latent:g} per latent), and "
        f"turns by {motion.turn:g} degrees per second ({motion.turn * latent:g} per latent). Units are those of the "
        "training poses.",
    ]
    return _bullets(points)


def _training(facts: _Facts) -> str:
    names = "stage", "recipe", "from", "steps", "clips per step and process", "learning rate", "precision", "clips"
    table = [_table((*names, "their licences"), [_stage(record) for record in facts.runs])] if facts.runs else []
    return "\n\n".join([*table, *(_unknown(path, facts) for path in facts.unknown)])


def _unknown(path: Path, facts: _Facts) -> str:
    it = f"`{path.name}`, with which it began," if facts.runs else "It"
    if not path.exists():
        return f"{it} is not here any more: what came before is unknown."
    known = f"; its sizes are those of {facts.base}" if facts.base and (path / "model.json").exists() else ""
    return f"{it} has no record of a training with minwm{known}."


def _stage(record: Mapping[str, Any]) -> list[str]:
    run, data = record["run"], _data(record)
    recipe = run["recipe"]["kind"]
    fresh = ["fresh weights"] * (not run["init"]["student"])
    roles = [f"{role} `{Path(path).name}`" for role, path in run["init"].items() if path]
    rates = [f"{run['optim']['lr']:g}"] + [f"critic {run['critic']['lr']:g}"] * bool(run["init"]["critic"])
    clips, kind = data.get("counts", {}).get("train", data.get("clips")), data.get("raw", data).get("kind")
    return [
        run["name"],
        recipe,
        ", ".join([*fresh, *roles]),
        f"{run['steps']:,}",
        str(run["batch"] * run["accumulate"]),
        ", ".join(rates),
        run.get("precision", "float32"),  # all there was before it was a field
        f"{clips:,} ({kind})" if clips and kind else "unknown",
        ", ".join(data.get("licences", ())) or "unknown",
    ]


def _data(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the manifest of a stage's clips said when it began; of runs that did not note it, what it says now."""
    manifest = Path(record["run"]["data"]) / "manifest.json"
    return record.get("data") or (read_json(manifest) if manifest.exists() else {})


def _licences(facts: _Facts, license: str | None) -> str:
    clips = [name for record in facts.runs for name in _data(record).get("licences", ["unknown"])]
    clips += [f"unknown for `{path.name}`" if facts.runs else "unknown" for path in facts.unknown]
    return _bullets([f"Weights: {license or 'not stated'}.", f"Training clips: {', '.join(dict.fromkeys(clips))}."])


def _speed(facts: _Facts, folder: Path, name: str) -> str:
    rows = [_measurement(found) for path in sorted(folder.glob("*.json")) if (found := _bench(facts, path))]
    if not rows:
        return f"Not measured. `minwm bench --model {name} --json bench.json` does; the file goes into the folder."
    names = "frames per second", "a chunk, ms", "90 % below", "decoding it, ms", "first frame, ms", "memory, GB"
    about = (
        "One stream, warm, from the encoded prompt to frames on the host. A chunk is its network passes and the one "
        "that commits it; of a bidirectional model, the clip's divided by its chunks."
    )
    return _table(("hardware", "torch", *names, "date"), rows) + "\n\n" + about


def _bench(facts: _Facts, path: Path) -> dict[str, Any] | None:
    """What `minwm bench` measured of this model, if that is in the file."""
    found, sampler = read_json(path), facts.config.sampler
    mine = {"sampler": sampler.kind, "passes": sampler.passes, "parameters": facts.parameters}
    return found if found.keys() >= MEASURED and found.items() >= mine.items() else None


def _measurement(found: Mapping[str, Any]) -> list[str]:
    where = found["versions"].get("gpu") or f"{found['versions']['cpu']}, {found['threads']} used"
    chunk, decode, first_pixel = found["chunk"], found["stages"]["decode"], found["first_pixel"]
    times = chunk["median_ms"], chunk["p90_ms"], decode["median_ms"], first_pixel["median_ms"]
    values = found["fps"], *times, found["allocated_gb"]
    shown = ("" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in values)
    return [where, found["versions"]["torch"], *shown, found["date"][:10]]


def _use(cfg: ModelConfig, name: str) -> str:
    route = f"w*{cfg.latents - 1}"
    code = ["import minwm", f'model = minwm.load("{name}").ready()']
    start, picture = (" --image first.png", ', "first.png"') if cfg.geometry.first_chunk_frames == 1 else ("", "")
    shell = [f'minwm generate --model {name} --prompt "a red tower"{start} --trajectory "{route}" --out walk.mp4']
    if not cfg.sampler.causal:
        code[1:1] = ["from minwm.session.generate import generate_clips"]
        code += [
            f'track = minwm.parse("{route}").track(model.config.motion, model.config.intrinsics)',
            'video = generate_clips(model, None, ["a red tower"], [track], seed=0)[0]  # n h w 3, uint8',
        ]
    else:
        code += [
            f'session = minwm.walk(model, "a red tower"{picture})',
            "first = session.start()",
            f'frames = session.step(minwm.Action.of("w"))  # n h w 3, uint8: ahead, {cfg.stream.chunk} latents',
        ]
        shell.append(f"minwm play --model {name}")
    return "\n".join(["```python", *code, "```", "", "```sh", *shell, "```"])


def _limits(cfg: ModelConfig) -> Iterator[str]:
    if not cfg.sampler.causal:
        yield f"It makes whole clips of {_frames(cfg)} frames, and cannot be steered while it does."
    else:
        yield (
            f"A clip of its training has {_frames(cfg)} frames. It streams on beyond that, and sees its last "
            f"{cfg.stream.window} chunks and its first {cfg.stream.sink}: what has left them is forgotten."
        )
    yield f"Pictures have {cfg.width}x{cfg.height} pixels and nothing else."
    if cfg.text.source:
        yield (
            f"The text encoder, {cfg.text.kind.upper()}, is not among the files: `text.source` in model.json names the "
            "folder in which it is looked for."
        )
    else:
        yield f"A prompt has at most {cfg.text.length} words, and those that training did not see mean nothing."
    yield "Nothing checks what is asked of it, or what it shows."


def _provenance(facts: _Facts) -> str:
    if not facts.runs:
        return f"The card was written by minwm {minwm.__version__}; when and where the weights were made is unknown."
    record = facts.runs[-1]
    versions = record["versions"]
    points = [
        f"Stage `{record['run']['name']}`, seed {record['run']['seed']}, begun {record['started']}",
        f"minwm at commit {record['commit'] or 'unknown'}; the card was written by minwm {minwm.__version__}",
        f"Python {versions['python']}, torch {versions['torch']}, {versions.get('gpu') or versions['cpu']}",
    ]
    return _bullets(points)


def _bullets(points: Sequence[str] | Iterator[str]) -> str:
    return "\n".join(f"- {point}" for point in points)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
