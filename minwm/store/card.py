"""The model card of a model folder (`modelcard_template.md`): what its files say of the model, its training and speed.

What no file knows is left out, or called unknown.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import minwm
from minwm.core.config import UserError, to_dict
from minwm.core.files import read_json, write_text
from minwm.core.hub import HubError, render_card
from minwm.core.weights import check, read_weights
from minwm.store.folder import FILES, load_config, weights_origin
from minwm.store.model import ModelConfig

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("modelcard_template.md")
MARK = "<!-- minwm writes what is above. What is below is yours, and kept when the card is written again. -->"
BENCH_KEYS = {"sampler", "passes", "parameters", "threads", "versions", "date"}
BENCH_KEYS |= {"fps", "chunk", "stages", "first_pixel", "allocated_gb"}
"""Keys of a file that `minwm bench --json` wrote."""
Record = dict[str, Any]
"""A run.json."""


def write_card(folder: Path, repo: str | None = None, license: str | None = None) -> None:
    """Write README.md of a model folder.

    Of one that is there the text below `MARK` stays, or all of it if it has no mark, and its license unless a new one
    is given.
    """
    path = folder / CARD
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    stated = re.search(r"^license: ([\w.-]+)$", before, re.MULTILINE)
    text = card(folder, repo, license or (stated and stated[1]))
    write_text(path, f"{text}\n\n{MARK}\n{before.rpartition(MARK)[2].lstrip()}")


def card(folder: Path, repo: str | None = None, license: str | None = None) -> str:
    """The model card, Markdown with YAML front matter; commands in it name `repo`, or the folder.

    Raises CheckpointError if the folder is no whole model, HubError for a license that is no identifier, UserError if
    what its run.json, or that of a model before it, says of the training cannot be read.
    """
    try:
        return _card(folder, repo, license)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # records are read by name, unchecked
        raise UserError(
            f"{folder}: no card can be made of the run.json there and of the models before it: one is damaged "
            f"({type(error).__name__}: {error}); delete that file, and the card says that the stage is not recorded"
        ) from error


def _card(folder: Path, repo: str | None, license: str | None) -> str:
    if license is not None and not re.fullmatch(r"[a-z0-9.-]+", license):
        raise HubError(f"license={license!r}: give an identifier of the Hub, such as apache-2.0")
    config, history, base = load_config(folder), _history(folder, {}), weights_origin(folder)
    runs = [record for record in history.values() if record]
    unrecorded = [path for path, record in history.items() if not record]
    camera, causal = config.network.camera != "none", config.sampler.causal
    tags = ["world-model", "video-generation", config.network.kind, config.sampler.kind.replace("_", "-")]
    metadata = {
        "license": license,
        "library_name": "minwm",
        "pipeline_tag": "image-to-video" if config.image_start else "text-to-video",
        "base_model": base and base.repo,
        "tags": tags + ["camera-control"] * camera + ["streaming"] * causal,
    }
    sizes = _sizes(folder, config)
    return render_card(
        TEMPLATE,
        metadata,
        title=(repo or folder.absolute().name).rpartition("/")[2],
        name=repo or str(folder),
        version=minwm.__version__,
        config=config,
        motion=config.motion,
        causal=causal,
        frames=config.motion.stride * (config.latents - 1) + 1,
        latent_seconds=config.motion.stride / config.motion.fps,
        fov=[math.degrees(2 * math.atan(0.5 / focal)) for focal in config.focal],
        trajectory=f"w*{config.latents - 1}",
        **sizes,
        stages=[_stage(record) for record in runs],
        last=runs[-1] if runs else None,
        unrecorded=unrecorded,
        base=base,
        clip_licences=_clip_licences(runs, unrecorded),
        measurements=_measurements(folder, config, sizes["parameters"]),
    )


def _sizes(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Parameters, types and sizes of a model, whose tensors are checked by name and shape and not read."""
    with torch.device("meta"):
        parts = config.network.build(), config.codec.build()
    tensors = [read_weights(folder / file).tensors for file in FILES[1:]]
    for part, file, found in zip(parts, FILES[1:], tensors, strict=True):
        check(part, found, folder / file)
    parameters, codec_parameters = (sum(p.numel() for p in part.parameters()) for part in parts)
    return {
        "parameters": parameters,
        "codec_parameters": codec_parameters,
        "dtypes": ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in tensors[0].values()})),
        "sizes": ", ".join(f"{name} {value}" for name, value in to_dict(config.network).items() if name != "kind"),
    }


def _history(folder: Path, found: dict[Path, Record | None]) -> dict[Path, Record | None]:
    """The folders from which a model was initialised, itself last, with their run.json if they have one."""
    path = folder / "run.json"
    record = found[folder] = read_json(path) if path.exists() else None  # at once, as folders may form a circle
    for before in record["run"]["init"].values() if record else ():
        if before and Path(before) not in found:
            _history(Path(before), found)
    found[folder] = found.pop(folder)  # behind those that it was made from
    return found


def _stage(record: Record) -> list[str]:
    """A row of the table of stages."""
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
        f"average, decay {run['ema']:g}" if run["ema"] else "of the last step",
        run.get("precision", "float32"),  # all there was before it was a field
        f"{clips:,} ({kind})" if clips and kind else "unknown",
        ", ".join(data.get("licences", ())) or "unknown",
    ]


def _data(record: Record) -> Mapping[str, Any]:
    """The manifest of a stage's clips when it began; for runs that did not note it, the manifest of today."""
    manifest = Path(record["run"]["data"]) / "manifest.json"
    return record.get("data") or (read_json(manifest) if manifest.exists() else {})


def _clip_licences(runs: list[Record], unrecorded: list[Path]) -> list[str]:
    names = [name for record in runs for name in _data(record).get("licences", ["unknown"])]
    names += [f"unknown for `{path.name}`" if runs else "unknown" for path in unrecorded]
    return list(dict.fromkeys(names))


def _measurements(folder: Path, config: ModelConfig, parameters: int) -> list[list[str]]:
    """Rows of what `minwm bench` measured of this model, from the JSON files in its folder."""
    model = {"sampler": config.sampler.kind, "passes": config.sampler.passes, "parameters": parameters}
    files = [read_json(path) for path in sorted(folder.glob("*.json"))]
    return [_measurement(x) for x in files if x.keys() >= BENCH_KEYS and x.items() >= model.items()]


def _measurement(found: Mapping[str, Any]) -> list[str]:
    hardware = found["versions"].get("gpu") or f"{found['versions']['cpu']}, {found['threads']} used"
    chunk, decode, first_pixel = found["chunk"], found["stages"]["decode"], found["first_pixel"]
    times = chunk["median_ms"], chunk["p90_ms"], decode["median_ms"], first_pixel["median_ms"]
    values = found["fps"], *times, found["allocated_gb"]
    cells = ("" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in values)
    return [hardware, found["versions"]["torch"], *cells, found["date"][:10]]
