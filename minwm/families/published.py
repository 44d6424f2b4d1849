"""What the `convert.py` of every family does alike: sizes from shapes, notes about a file, config.json, writing."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minwm.core.files import new_folder, read_json, write_json
from minwm.core.weights import (
    CheckpointError,
    Weights,
    describe_mismatches,
    mismatches,
    write_safetensors,
    write_shards,
)
from minwm.families.base import Layout, Published

SHARD = 10 * 10**9
"""Bytes of a file above which a folder gets several."""
Inferred = tuple[Any, list[str], tuple[str, ...]]
"""A network config, what was assumed, and what is not supported; the last two in words."""


def rename(tensors: Mapping[str, Tensor], name_of: Callable[[str], str], path: Path) -> dict[str, Tensor]:
    """Tensors under other names; CheckpointError if two get the same one."""
    renamed = {name_of(name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise CheckpointError(f"{path} mixes original and diffusers names")
    return renamed


def count_blocks(names: Collection[str], block: str) -> int:
    """How many blocks there are, at least one; `block` is the name of a parameter of each, {} their number."""
    count = 1
    while block.format(count) in names:
        count += 1
    return count


def shape(tensors: Mapping[str, Tensor], name: str, axes: int, path: Path) -> tuple[int, ...]:
    """The shape of a tensor; CheckpointError unless it is there and has so many axes."""
    if name not in tensors or tensors[name].ndim != axes:
        found = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is missing"
        raise CheckpointError(f"{path} does not tell the sizes of a network: {name} {found}")
    return tuple(tensors[name].shape)


def read_config_json(path: Path) -> dict[str, Any]:
    """The config.json beside a file of weights; empty if there is none."""
    file = path.with_name("config.json")
    return read_json(file) if file.is_file() else {}


def check_config_json(path: Path, given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise CheckpointError where config.json says something else than the tensors; it need not say all."""
    wrong = [f"{key}={given[key]}, not {value}" for key, value in expected.items() if given.get(key, value) != value]
    if wrong:
        file = path.with_name("config.json")
        raise CheckpointError(f"{file} contradicts {path.name} beside it: it has {', '.join(wrong)}")


def read_renamed(
    weights: Weights,
    layout: Layout,
    tensors: dict[str, Tensor],
    drop: Collection[str],
    infer: Callable[[Mapping[str, Tensor]], Inferred],
) -> Published:
    """The transformer with these tensors, by canonical name, but for those that are to be dropped."""
    ignored, notes = weights.ignored, []
    if len(weights.roles) > 1:
        others = [name for name in weights.roles if name != weights.role]
        notes.append(f"{weights.role} was read; {', '.join(others)} can be had with --role")
    if dropped := [name for name in tensors if name in drop]:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in drop}
        ignored = (*ignored, *dropped)
        notes.append(f"{len(dropped)} trained parameters are left out: the network will do something else")
    if weights.scales:
        notes.append(f"{len(weights.scales)} weights are quantised and are read as bfloat16")
    config, assumed, unsupported = infer(tensors)
    return Published(weights, layout, config, tensors, ignored, (*notes, *assumed), unsupported)


def check_whole(tensors: Mapping[str, Tensor], config: Any, target: Path) -> None:
    """Raise CheckpointError unless the tensors are exactly those of the network."""
    with torch.device("meta"):
        network = config.build()
    if problems := mismatches(network, tensors):
        raise CheckpointError(f"{target} is not written, as this is no whole network: {describe_mismatches(problems)}")


def write_published(
    target: Path,
    tensors: Mapping[str, Tensor],
    config_json: Mapping[str, Any],
    dtype: torch.dtype | None,
    shard: int = SHARD,
) -> None:
    """Write tensors by their published names to a new folder with config.json, or to one .safetensors file.

    Files of a folder are written one by one, so that memory-mapped tensors take `shard` bytes of memory at most;
    `dtype` converts them. Raises CheckpointError if the target exists.
    """
    if target.suffix == ".safetensors":
        if target.exists():
            raise CheckpointError(f"{target} exists; delete it, or give another name")
        write_safetensors(target, tensors, dtype)
        return
    with new_folder(target) as folder:
        write_shards(folder, "diffusion_pytorch_model", tensors, dtype, shard)
        write_json(folder / "config.json", config_json)


def missed(config: Any, layout: Layout, target: Path, unsaid: str) -> list[str]:
    """Sentences about what the readers of a written network will miss; `unsaid` is what config.json alone says."""
    reader = "diffusers" if layout == "diffusers" else "the original code"
    notes = []
    if config.camera != "none":
        notes.append(f"{reader} does not know of the cameras (camera={config.camera}) and runs without them")
    if config.actions:
        notes.append(f"{reader} does not know of the embedding of actions and runs without it")
    if target.suffix == ".safetensors":
        notes.append(f"a file has no config.json: readers must know of {unsaid}")
    return notes
