"""Published checkpoints of Wan: in from any file, wrapping and naming, out in two layouts (`families.base.Family`).

`core/weights.py` finds the file, the network in it and its own parameter names. Here the layout is detected (whose
names they are), and the architecture from shapes, and from a config.json if there is one. Canonical names are those
of the original release, which `families/wan/transformer.py` has too.

Facts: Wan2.1 `wan/modules/model.py`, diffusers `scripts/convert_wan_to_diffusers.py`, minWM `wan_inference.py`,
HY-WorldPlay `wan/generate.py`.
"""

import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minwm.core.config import from_dict
from minwm.core.weights import CheckpointError, Weights
from minwm.families.base import Layout, Published, Release
from minwm.families.published import (
    SHARD,
    Inferred,
    check_config_json,
    check_whole,
    count_blocks,
    missed,
    read_config_json,
    read_renamed,
    rename,
    shape,
    write_published,
)
from minwm.families.wan.text import has_text_encoder as has_text_encoder
from minwm.families.wan.transformer import WanConfig

MARKS: dict[Layout, str] = {"original": "blocks.{}.self_attn.q.weight", "diffusers": "blocks.{}.attn1.to_q.weight"}
"""A parameter of every block, by which a layout is detected and blocks are counted."""
OTHERS = {
    r"blocks\.0\.pos_embedding\.embedding\.": "a UMT5 text encoder (original names)",
    r"encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention": "a UMT5 text encoder (transformers names)",
}
"""What is published beside the transformers, by how a parameter's name begins."""
RELEASES: Mapping[str, Release] = {
    "wan2.1-1.3b": Release("Wan-AI/Wan2.1-T2V-1.3B", WanConfig()),
    "wan2.1-14b": Release("Wan-AI/Wan2.1-T2V-14B", WanConfig(dim=5120, heads=40, layers=40, ffn=13824)),
    "wan2.2-ti2v-5b": Release(
        "Wan-AI/Wan2.2-TI2V-5B", WanConfig(dim=3072, heads=24, layers=30, ffn=14336, channels=48)
    ),
}
VAE_FILES: tuple[str, ...] = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth", "vae")
PROPE = ("prope_o.weight", "prope_o.bias")
CAMERA_PARAMETERS: tuple[str, ...] = (*PROPE, "plucker.weight", "plucker.bias")
"""Ends of the names of camera parameters."""
ACTION_PARAMETERS: tuple[str, ...] = (
    "action_embedding.0.weight",
    "action_embedding.0.bias",
    "action_embedding.2.weight",
    "action_embedding.2.bias",
)
"""HY-WorldPlay's embedding of discrete actions."""
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "it attends to an image (I2V)": ("img_emb.", ".k_img.", "image_embedder.", ".add_k_proj."),
    "it takes cameras through an adapter (Fun-Camera)": ("control_adapter.",),
    "it takes reference images (Fun-Control)": ("ref_conv.",),
    "it takes videos to edit (VACE)": ("vace_blocks.", "vace_patch_embedding."),
}
"""What variants that are not supported do, with parts of the names by which they are known, in either layout."""
HEAD_WIDTH = 128
"""Of every release."""

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_BLOCK = {
    "modulation": "scale_shift_table",
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    "self_attn.prope_o": "attn1.to_out_prope.0",  # this and actions: HY-WorldPlay's names, in the manner of diffusers
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
    "norm3": "norm2",  # the one norm with parameters is the third in the release and the second in diffusers
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_AROUND = {
    "plucker": "plucker",
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "action_embedding.0": "condition_embedder.action_embedder.linear_1",
    "action_embedding.2": "condition_embedder.action_embedder.linear_2",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}


def diffusers_names(layers: int) -> dict[str, str]:
    """Every parameter name of the release with its name in diffusers, one to one; cameras and actions included."""
    modules = _AROUND | {f"blocks.{i}.{ours}": f"blocks.{i}.{_BLOCK[ours]}" for i in range(layers) for ours in _BLOCK}
    return {ours + leaf: theirs + leaf for ours, theirs in modules.items() for leaf in _leaves(ours)}


def _leaves(module: str) -> tuple[str, ...]:
    if module.endswith("modulation"):
        return ("",)
    return (".weight",) if module.endswith(("norm_q", "norm_k")) else (".weight", ".bias")


def _names(layout: Layout, layers: int) -> dict[str, str]:
    """Canonical names with those of a layout."""
    names = diffusers_names(layers)
    return names if layout == "diffusers" else {name: name for name in names}


def detect_layout(names: Collection[str]) -> Layout | None:
    """The layout of a Wan transformer with such parameter names; None if they are of something else."""
    return next((layout for layout, mark in MARKS.items() if mark.format(0) in names), None)


def describe(names: Collection[str]) -> str | None:
    """What of Wan has such parameter names, in words; None if nothing."""
    if layout := detect_layout(names):
        return "; ".join((f"a Wan transformer ({layout} names)", *_variants(names)))
    return next((what for start, what in OTHERS.items() if any(re.match(start, name) for name in names)), None)


def _variants(names: Collection[str]) -> list[str]:
    return [what for what, parts in VARIANTS.items() if any(part in name for name in names for part in parts)]


def read_transformer(weights: Weights, heads: int | None = None, drop_action: bool = False) -> Published:
    """The Wan transformer in `weights`, under canonical names; its tensors are not read yet.

    `heads` serves a file without config.json whose heads are not 128 wide. `drop_action` leaves out HY-WorldPlay's
    embedding of discrete actions. Raises CheckpointError if the file does not tell the sizes of a network.
    """
    layout = detect_layout(weights.tensors)
    if layout is None:
        raise CheckpointError(f"{weights.path} is no Wan transformer")
    layers = count_blocks(weights.tensors, MARKS[layout])
    canonical = {theirs: ours for ours, theirs in _names(layout, layers).items()}
    tensors = rename(weights.tensors, lambda name: canonical.get(name, name), weights.path)
    infer = partial(_infer, layers=layers, layout=layout, path=weights.path, heads=heads)
    return read_renamed(weights, layout, tensors, ACTION_PARAMETERS if drop_action else (), infer)


def _infer(tensors: Mapping[str, Tensor], layers: int, layout: Layout, path: Path, heads: int | None) -> Inferred:
    """The architecture, from shapes and what config.json adds to them."""
    given = read_config_json(path)
    dim, channels, *patch = shape(tensors, "patch_embedding.weight", 5, path)
    out = shape(tensors, "head.head.weight", 2, path)[0] // patch[1] ** 2
    notes, unsupported = [], _variants(tensors)
    if patch != [1, patch[1], patch[1]] or channels != out:
        unsupported.append(
            f"it takes {channels} channels in patches of {patch} and gives {out}, where networks here have as many "
            "channels out as in, and square patches of one frame"
        )
    if heads is None:
        heads = given.get("num_heads" if layout == "original" else "num_attention_heads")
    if heads is None:
        if dim % HEAD_WIDTH:
            raise CheckpointError(f"{path}: no config.json says into how many heads {dim} channels part; give --heads")
        heads = dim // HEAD_WIDTH
        notes.append(f"heads={heads} is assumed, {HEAD_WIDTH} channels each as in all releases; no config.json says so")
    dual = any(name.endswith(PROPE) for name in tensors)
    inside = "dual" if dual else "plucker" if "plucker.weight" in tensors else "none"
    sizes = {
        "dim": dim,
        "heads": heads,
        "layers": layers,
        "ffn": shape(tensors, "blocks.0.ffn.0.weight", 2, path)[0],
        "channels": out,
        "text_dim": shape(tensors, "text_embedding.0.weight", 2, path)[1],
        "text_length": given.get("text_len", WanConfig.text_length),
        "freq_dim": shape(tensors, "time_embedding.0.weight", 2, path)[1],
        "patch": patch[1],
        "camera": "single" if inside == "none" and given.get("camera") == "single" else inside,
        "actions": any(name in tensors for name in ACTION_PARAMETERS),
    }
    config = from_dict(WanConfig, sizes)
    if not unsupported:
        check_config_json(path, given, {"camera": config.camera, **_config_json(config, layout)})
    return config, notes, tuple(unsupported)


def _config_json(cfg: WanConfig, layout: Layout) -> dict[str, Any]:
    """What config.json says of the architecture; `camera`, and `text_len` in diffusers, are ours, where they matter."""
    ours = {} if cfg.camera == "none" else {"camera": cfg.camera}
    both = {"ffn_dim": cfg.ffn, "freq_dim": cfg.freq_dim, "num_layers": cfg.layers, "eps": 1e-6, **ours}
    if layout == "original":
        ends = {"in_dim": cfg.channels, "out_dim": cfg.channels, "text_len": cfg.text_length}
        return {"dim": cfg.dim, "num_heads": cfg.heads, **ends, **both}
    heads = {"num_attention_heads": cfg.heads, "attention_head_dim": cfg.dim // cfg.heads}
    ends = {"in_channels": cfg.channels, "out_channels": cfg.channels, "patch_size": [1, cfg.patch, cfg.patch]}
    norms = {"qk_norm": "rms_norm_across_heads", "cross_attn_norm": True}
    image = {"image_dim": None, "added_kv_proj_dim": None}
    if cfg.text_length != WanConfig.text_length:
        both |= {"text_len": cfg.text_length}
    return {**heads, **ends, "text_dim": cfg.text_dim, **norms, **image, **both}


def export(
    tensors: Mapping[str, Tensor],
    config: WanConfig,
    target: Path,
    layout: Layout,
    dtype: torch.dtype | None = None,
    shard: int = SHARD,
) -> list[str]:
    """Write a Wan transformer by canonical names to a new folder with config.json, or to one .safetensors file.

    A folder in the layout of diffusers is what `WanTransformer3DModel.from_pretrained` takes. Returns sentences about
    what other readers will miss. Raises CheckpointError if the tensors are not exactly those of such a network, or if
    the target exists.
    """
    check_whole(tensors, config, target)
    name = {"_class_name": "WanModel", "model_type": "ti2v" if config.channels == 48 else "t2v"}
    if layout == "diffusers":
        name = {"_class_name": "WanTransformer3DModel"}
    names = _names(layout, config.layers)
    renamed = {names[name]: tensor for name, tensor in tensors.items()}
    write_published(target, renamed, {**name, **_config_json(config, layout)}, dtype, shard)
    return missed(config, layout, target, f"{config.heads} heads")
