"""Verbs about checkpoints: what is in one, the same weights in another layout, and a model on the Hub."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from minwm.cli.base import Fields, Flag, Json, command, echo, numbers, parse_fields, write_numbers
from minwm.cli.models import inspect_model
from minwm.core.config import UserError, override, to_dict

if TYPE_CHECKING:
    from minwm.families.base import Origin, Published

Source = Annotated[Positional[Path], arg(metavar="SRC", help="checkpoint: a file or folder in any published layout")]
Role = Annotated[str | None, arg(metavar="NAME", help="the network to read, if a file holds several")]
Heads = Annotated[int | None, arg(metavar="N", help="if no config.json says, and they are not 128 wide")]


@command("inspect")
def inspect_weights(source: Source, role: Role = None, heads: Heads = None, json: Json = None) -> None:
    """Show what is in a checkpoint or a model folder, without loading it."""
    from minwm.core.weights import read_weights
    from minwm.store import layouts

    if (source / "model.json").exists():
        return inspect_model(source, json)
    weights = read_weights(source, role, dequantize=False)
    values: dict[str, Any] = {
        "file": str(weights.path),
        "holds": layouts.describe(weights.tensors),
        "role": weights.role,
        "roles": list(weights.roles),
        "wrappers": list(weights.wrappers),
        "tensors": len(weights.tensors),
        "parameters": sum(x.numel() for x in weights.tensors.values()),
        "dtypes": dict(Counter(str(x.dtype).removeprefix("torch.") for x in weights.tensors.values())),
        "quantised": len(weights.scales),
        "ignored": list(weights.ignored),
    }
    notes: tuple[str, ...] = ()
    if family := layouts.detect_family(weights.tensors):
        published = family.read_transformer(weights, heads, drop_action=False)
        camera = sum(name.endswith(family.CAMERA_PARAMETERS) for name in published.tensors)
        values |= {
            "layout": published.layout,
            "size": layouts.release_name(published.config),
            "camera_tensors": camera,
            "action_tensors": sum(name in family.ACTION_PARAMETERS for name in published.tensors),
            **{f"tensors {kind}": names for kind, names in published.mismatches().items()},
            "config": to_dict(published.config),
        }
        notes = (*published.notes, *(f"not supported: {what}" for what in published.unsupported))
    numbers({name: _short(value) for name, value in values.items() if value}, None)
    for note in notes:
        echo(f"note: {note}")
    return write_numbers(values | {"notes": list(notes)}, json)


def _short(value: Any) -> Any:
    """A list as a few of its items."""
    if not isinstance(value, list):
        return value
    return ", ".join(value[:3]) + (f" and {len(value) - 3} more" if len(value) > 3 else "")


@command("convert")
def convert_weights(
    source: Source,
    target: Annotated[Positional[Path], arg(metavar="DST", help="new folder, or file ending in .safetensors")],
    to: Annotated[
        Literal["minwm", "original", "diffusers"], arg(help="a model folder of ours, or whose names to write")
    ],
    preset: Annotated[
        str | None, arg(metavar="PIPELINE[/STAGE]", help="with --to minwm: how it samples, such as wan2.1-1.3b/dmd")
    ] = None,
    codec: Annotated[Path | None, arg(metavar="FILE", help="with --to minwm: the VAE, if it is not beside SRC")] = None,
    role: Role = None,
    heads: Heads = None,
    dtype: Annotated[Literal["keep", "bfloat16", "float32"], arg(help="type of the numbers")] = "keep",
    drop_action: Annotated[Flag, arg(help="leave out HY-WorldPlay's embedding of actions")] = False,
    adapter: Annotated[
        Path | None, arg(metavar="DIR", help="a LoRA in PEFT's layout, merged into the weights: adapter/ of a run")
    ] = None,
    fields: Fields = (),
) -> None:
    """Write a checkpoint or a model folder in another layout; with --to minwm, any field of the model can be set."""
    import torch

    from minwm.store.adapter import load_adapter
    from minwm.store.folder import load_model, save_merged, weights_origin
    from minwm.store.layouts import FAMILIES, open_published, published_origin

    ours, lora = (source / "model.json").exists(), adapter and load_adapter(adapter)
    if ours and lora and to == "minwm" and not (preset or codec or fields):
        save_merged(target, source, lora)
        return echo(f"{target}: {source} with {adapter}")
    published = None if ours else open_published(source, role, heads, drop_action)
    if published and lora:
        published = replace(published, tensors=lora.merge_into(published.tensors))
    if to == "minwm":
        if published is None:
            raise UserError(f"{source} is a model folder already; --adapter DIR alone merges a LoRA into it")
        return _write_model(published, preset, codec, target, fields)
    if preset or codec or fields:
        raise UserError("--preset, --codec and fields of the model go with --to minwm")
    if published is None:
        model = load_model(source)
        tensors, cfg, notes, origin = model.net.state_dict(), model.config.network, (), weights_origin(source)
        tensors = lora.merge_into(tensors) if lora else tensors
    else:
        tensors, cfg, notes = published.tensors, published.config, published.notes
        origin = published_origin(published)
    types = {"keep": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
    _echo_notes((*notes, *FAMILIES[cfg.kind].export(tensors, cfg, target, to, types[dtype])), origin)
    return echo(f"{target}: {len(tensors)} tensors in {to} names")


def _write_model(
    published: "Published", preset: str | None, codec: Path | None, target: Path, fields: tuple[str, ...]
) -> None:
    """A model folder from a published transformer, its VAE, and a preset for the rest."""
    from minwm.experiments import presets
    from minwm.store.folder import run_as, save_published
    from minwm.store.layouts import FAMILIES, published_origin, release_name

    file, family = published.weights.path, FAMILIES[published.config.kind]
    preset = preset or release_name(published.config)
    if preset is None:
        raise UserError(f"{file} is of no published size: give --preset, such as wan2.1-1.3b/dmd")
    config = presets.stage(preset, Path("runs")).model if "/" in preset else presets.published(preset)
    folders = [*file.parents][:3]  # tencent's VAE stands beside a folder of variants
    encoder = next((folder for folder in reversed(folders) if family.has_text_encoder(folder)), None)
    vaes = (folder / name for folder in folders for name in family.VAE_FILES)
    if codec is None and "vae" in published.weights.roles:
        codec = file
    codec = codec or next((path for path in vaes if path.exists()), None)
    if codec is None:
        raise UserError(f"no VAE ({', '.join(family.VAE_FILES)}) beside {file}: give --codec FILE")
    # at once, as they must fit: the file's network, the encoder beside it, and what is set
    own = {"network": run_as(published, config.network)} | ({"text.source": str(encoder)} if encoder else {})
    config = override(config, {**own, **parse_fields(fields)})
    save_published(target, config, published, codec)
    _echo_notes(published.notes, published_origin(published))
    echo(f"{target}: a model folder, codec from {codec}")


def _echo_notes(notes: Iterable[str], origin: "Origin | None") -> None:
    """Notes, and the licence of weights if it has limits."""
    limits = [f"weights of {origin.repo} are under {origin.license}"] if origin and origin.license.limits else []
    for note in (*notes, *limits):
        echo(f"note: {note}")


@command("push")
def push_model(
    repo: Annotated[Positional[str], arg(metavar="USER/NAME", help="repository on the Hugging Face Hub")],
    model: Annotated[Path, arg(metavar="DIR", help="model folder, such as runs/demo/dmd")],
    private: Annotated[Flag, arg(help="for nobody else to see")] = False,
    license: Annotated[str | None, arg(metavar="ID", help="of the weights, such as apache-2.0")] = None,
) -> None:
    """Put a model on the Hub, with a card that says what it is; log in first: hf auth login, or HF_TOKEN."""
    from minwm.store.hub import push

    echo(push(model, repo, private=private, license=license))
