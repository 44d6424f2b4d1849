"""Checkpoint files: read from safetensors, shards and pickles of any trainer; written as safetensors.

Tensors are memory-mapped: opening a file reads its header only. Pickles are opened with `weights_only=True`, so that a
file cannot run code.
"""

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minwm.core.config import UserError
from minwm.core.files import atomic, check_shape, read_json, write_json

PICKLES = (".pt", ".pth", ".ckpt", ".bin")
ROLES = ("generator_ema", "generator", "ema", "module", "model", "state_dict", "diffusion_model")
"""Keys under which trainers and ComfyUI store networks; the first that a file has is read."""
COMFYUI = {
    "model.diffusion_model.": "diffusion_model",
    "vae.": "vae",
    "first_stage_model.": "vae",
    "text_encoders.": "text_encoders",
}
"""Prefixes of parameter names by which ComfyUI keeps several networks in one state dict."""
PREFIXES = ("module", "model", "diffusion_model")
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that compiled, sharded and checkpointed modules insert into parameter names."""
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The number types of safetensors."""
GAN = ("_cls_pred_branch.", "_register_tokens.", "_gan_ca_blocks.")
"""Discriminator branches that some trainers (Self-Forcing, minWM) leave in the generator."""


SCALES = (".scale_weight", ".weight_scale")
"""Ends of the names of a quantised weight's scales: in ComfyUI's files, older and newer; LightX2V has the second."""
SCALED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
"""Types of weights that are quantised with one scale, or one for each output channel."""
QUANTISATION = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
"""Ends of the names of other entries that quantised files hold: scales of activations, and marks."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another architecture."""


@dataclass(frozen=True)
class Weights:
    """The memory-mapped tensors of one network in a file, under their names without the parts of wrappers."""

    path: Path
    """The file, or the index of shards."""
    roles: tuple[str, ...]
    """Keys of the networks in the file; empty if it holds a single state dict."""
    role: str | None
    """Key of the network that was read."""
    wrappers: tuple[str, ...]
    """Parts that were removed from names."""
    tensors: dict[str, Tensor]
    """Parameters and buffers by name."""
    ignored: tuple[str, ...]
    """Entries that were skipped: discriminator branches, marks of quantisation, and values that are no tensors."""
    scales: dict[str, Tensor]
    """Scales of quantised weights, by the name of the weight."""


def read_weights(path: Path, role: str | None = None, usual: Sequence[str] = ROLES, dequantize: bool = True) -> Weights:
    """Open a checkpoint file, or the one in a folder; `role` chooses among the networks in it.

    Without a role it is the first of `usual` that the file has. Quantised weights are multiplied by their scales, in
    memory, unless `dequantize` is off. Raises CheckpointError if there is no such file or role, if the file is damaged,
    needs arbitrary pickling, or is quantised in another way.
    """
    file = _find(path)
    content = _read(file)
    networks = _networks(content)
    role = _choose(networks, role, usual, file)
    state = networks[role] if role else content
    saved = _tensors(state)
    ignored = [str(key) for key in state if key not in saved]
    tensors: dict[str, Tensor] = {}
    wrappers: dict[str, None] = {}
    for key, tensor in saved.items():
        name, removed = _unwrap(key)
        wrappers |= dict.fromkeys(removed)
        if name.startswith(GAN) or name.endswith(QUANTISATION):
            ignored.append(name)
        elif name in tensors:
            raise CheckpointError(f"{file} holds {name} twice, once as {key}")
        else:
            tensors[name] = tensor
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors, but {', '.join(map(str, content)) or 'nothing'}")
    scales = {_scaled_name(name): tensors.pop(name) for name in list(tensors) if _scaled_name(name) in tensors}
    if dequantize:
        tensors |= {name: _dequantized(file, name, tensors[name], scale) for name, scale in scales.items()}
    return Weights(file, tuple(networks), role, tuple(wrappers), tensors, tuple(ignored), scales)


def _networks(content: Mapping[Any, Any]) -> dict[str, Mapping[str, Any]]:
    """The networks in a file by name; empty if it holds a single state dict without a name."""
    nested = {str(name): value for name, value in content.items() if isinstance(value, Mapping) and _tensors(value)}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        prefix = next((prefix for prefix in COMFYUI if str(key).startswith(prefix)), None)
        if prefix:
            parts.setdefault(COMFYUI[prefix], {})[key.removeprefix(prefix)] = value
    return nested or ({**parts} if "diffusion_model" in parts else {})


def _scaled_name(name: str) -> str:
    """The name of the weight that a scale of this name belongs to; empty if it is no scale."""
    end = next((end for end in SCALES if name.endswith(end)), "")
    return f"{name.removesuffix(end)}.weight" if end else ""


def _dequantized(file: Path, name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight times its scale (of the tensor, or of each output channel), in bfloat16."""
    if weight.dtype not in SCALED or scale.numel() not in (1, len(weight)):
        raise CheckpointError(
            f"{file} is quantised: {name} is {str(weight.dtype).removeprefix('torch.')} with {scale.numel()} scales, "
            "of which only FP8 and int8 by tensor or output channel are read; take the bfloat16 file of the same model"
        )
    return (weight.float() * scale.float().view(-1, *[1] * (weight.ndim - 1))).bfloat16()


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and isinstance(key, str)}


def _choose(
    networks: Mapping[str, Mapping[str, Any]], role: str | None, usual: Sequence[str], file: Path
) -> str | None:
    if role is not None and role not in networks:
        raise CheckpointError(
            f"{file} holds no {role!r}; it holds {', '.join(networks) or 'one network without a name'}"
        )
    if role is not None or not networks:
        return role
    if any("to_out_prope" in key for key in networks.get("generator", ())):
        return "generator"  # HY-WorldPlay's: its own loader takes this one, whatever else is there
    for known in usual:
        if known in networks:
            return known
    raise CheckpointError(f"{file} holds {', '.join(networks)}; choose one with --role")


def _unwrap(key: str) -> tuple[str, list[str]]:
    """A parameter's name without the parts of wrappers, and those parts."""
    parts = key.split(".")
    kept = [part for part in parts if part not in WRAPPERS]
    start = next((i for i, part in enumerate(kept) if part not in PREFIXES), 0)
    return ".".join(kept[start:]), [part for part in parts if part in WRAPPERS or part in kept[:start]]


def _find(path: Path) -> Path:
    """`path` itself, or the weights file of a folder; CheckpointError if there is none or more than one."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    if (path / "transformer").is_dir():
        return _find(path / "transformer")
    files = sorted(file for file in path.iterdir() if file.is_file())
    for kind in ((".safetensors.index.json",), (".safetensors",), PICKLES, (".gguf",)):
        found = [file for file in files if file.name.endswith(kind)]
        usual = [file for file in found if file.name.startswith(("diffusion_pytorch_model.", "model."))]
        if len(found) == 1 or len(usual) == 1:
            return (usual or found)[0]
        if found:
            raise CheckpointError(
                f"{path} holds several files of weights; name one: {', '.join(f.name for f in found)}"
            )
    inside = ", ".join(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
    hint = f"; name one of its folders: {inside}" if inside else ""
    raise CheckpointError(f"{path} holds no weights (.safetensors {' '.join(PICKLES)}){hint}")


def _read(file: Path) -> dict[Any, Any]:
    if file.name.endswith(".safetensors.index.json"):
        return _read_shards(file)
    if file.suffix == ".safetensors":
        return {**map_safetensors(file)}
    if file.suffix in PICKLES:
        return read_pickle(file)
    if file.suffix == ".gguf":
        raise CheckpointError(f"{file} is GGUF, a quantised format that is not read; take the safetensors file of it")
    raise CheckpointError(f"{file} is no checkpoint by its name (.safetensors {' '.join(PICKLES)})")


def map_safetensors(file: Path) -> dict[str, Tensor]:
    """Views of the mapped file; safetensors' own readers would read every tensor from the disk at once.

    Raises CheckpointError if it is missing or damaged.
    """
    if not file.exists():
        raise CheckpointError(f"{file} does not exist")
    try:
        with safe_open(file, framework="pt"), file.open("rb") as opened:  # safe_open checks the header
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            data = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)[8 + length :]
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}); restore it, or download it again") from error
    except RuntimeError as error:
        raise _unmapped(file, error) from error
    if unknown := {about["dtype"] for about in header.values()} - set(TYPES):
        raise CheckpointError(f"{file} holds numbers of type {', '.join(sorted(unknown))}, which are not supported")
    return {name: _view(data, about) for name, about in header.items()}


def load_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that `write_safetensors` wrote, in memory.

    Raises CheckpointError if it is missing or damaged.
    """
    if not file.exists():
        raise CheckpointError(f"{file} does not exist")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}); restore it, or make it again") from error


def _view(data: UInt8[Tensor, " n"], about: Mapping[str, Any]) -> Tensor:
    dtype, (begin, end) = TYPES[about["dtype"]], about["data_offsets"]
    raw = data[begin:end]
    if raw.storage_offset() % dtype.itemsize:  # few writers do not align
        raw = raw.clone()
    return raw.view(dtype).view(about["shape"])


def _unmapped(file: Path, error: RuntimeError) -> CheckpointError:
    size = file.stat().st_size / 1e9
    return CheckpointError(f"{file}, {size:.1f} GB, cannot be mapped into the memory of this machine ({error})")


def _read_shards(index: Path) -> dict[Any, Any]:
    listed = read_json(index, {"weight_map": dict})["weight_map"]
    check_shape(listed, dict.fromkeys(listed, str), f"{index}: weight_map")
    tensors: dict[Any, Any] = {}
    for name in sorted(set(listed.values())):
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.name} lists {name}, which is not in {index.parent}; download it too")
        tensors |= map_safetensors(index.parent / name)
    if lost := sorted(set(listed) - set(tensors)):
        raise CheckpointError(f"{index} lists {len(lost)} tensors that its files lack: {', '.join(lost[:3])}")
    return tensors


def read_pickle(file: Path) -> dict[Any, Any]:
    """The content of a torch pickle, without running code of it; CheckpointError if it is damaged or needs any."""
    try:  # files of old torch versions are no archives, and cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (
        *(pickle.UnpicklingError, EOFError, OSError, RuntimeError),
        *(ValueError, LookupError, TypeError, AttributeError, struct.error),  # of damaged pickles
    ) as error:
        if isinstance(error, RuntimeError) and "mmap" in str(error):
            raise _unmapped(file, error) from error
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{file} is not opened: besides tensors it holds {refused[1]}, and such files can run any code; "
                "whoever trusts it can save its tensors alone, best as safetensors"
            ) from error
        reason = str(error).partition("\n")[0].partition(".")[0] or "it ends too early"
        raise CheckpointError(f"{file} is damaged or no checkpoint ({reason}); download it again") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not tensors by name")
    return dict(content)


def mismatches(net: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Why `tensors` cannot be loaded strictly into `net`, by kind of mismatch; empty if they can."""
    wanted = net.state_dict()
    kinds = {
        "unexpected": sorted(set(tensors) - set(wanted)),
        "missing": sorted(set(wanted) - set(tensors)),
        "of another shape": [
            f"{key} is {tuple(found.shape)}, not {tuple(wanted[key].shape)}"
            for key, found in tensors.items()
            if key in wanted and found.shape != wanted[key].shape
        ],
    }
    return {kind: keys for kind, keys in kinds.items() if keys}


def describe_mismatches(problems: Mapping[str, list[str]]) -> str:
    """Mismatches in words: the count of each kind and its first three names."""
    return "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:3])}" for kind, keys in problems.items() if keys)


def check(
    net: nn.Module, tensors: Mapping[str, Tensor], source: Path, allow_missing: tuple[str, ...] = ()
) -> list[str]:
    """The missing parameters, whose names all end in one of `allow_missing`.

    Any other mismatch raises CheckpointError, naming `source`.
    """
    problems = mismatches(net, tensors)
    missing = problems.get("missing", [])
    new = [key for key in missing if allow_missing and key.endswith(allow_missing)]
    problems["missing"] = [key for key in missing if key not in new]
    if found := describe_mismatches(problems):
        raise CheckpointError(f"{source} is of another architecture than {type(net).__name__}: {found}")
    return new


def load_tensors(
    net: nn.Module, tensors: Mapping[str, Tensor], source: Path, allow_missing: tuple[str, ...] = ()
) -> list[str]:
    """Load strictly, as `check` demands; returns the parameters that keep their initialisation.

    This is how a zero-initialised camera branch joins a model without one.
    """
    new = check(net, tensors, source, allow_missing)
    net.load_state_dict(dict(tensors), strict=False)
    return new


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file atomically, in the tensors' own types or in `dtype`."""
    ready = {name: x.detach().to("cpu", dtype or x.dtype).contiguous() for name, x in tensors.items()}
    with atomic(file) as temporary:
        save_file(ready, temporary, metadata={"format": "pt"})  # transformers and diffusers insist on the metadata


def write_shards(folder: Path, stem: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, limit: int) -> None:
    """Write `stem.safetensors`, or, above `limit` bytes, shards of at most that size and their index."""
    sizes = {name: x.numel() * (dtype or x.dtype).itemsize for name, x in tensors.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > limit:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        return write_safetensors(folder / f"{stem}.safetensors", tensors, dtype)
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in names}, dtype)
        files |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
    return write_json(folder / f"{stem}.safetensors.index.json", index)
