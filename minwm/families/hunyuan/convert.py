"""Published checkpoints of HunyuanVideo-1.5: in from any file, wrapping and naming, out in two layouts.

Canonical names are the release's but for a dot: `double_blocks.0.img_attn_q` is `double_blocks.0.img.attn_q` here, as
the weights of video and of text are a module each. In diffusers two kinds of tensors are laid out differently too: the
refiner's queries, keys and values are three, and the final modulation has scale before shift.

Facts: diffusers `scripts/convert_hunyuan_video1_5_to_diffusers.py`, HunyuanVideo-1.5 `transformer/*/config.json`, minWM
`HY15/trainer`, HY-WorldPlay `worldplay_1_5_transformer.py`.
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
from minwm.families.base import TENCENT_LIMITS, Layout, License, Published, Release
from minwm.families.hunyuan.text import has_text_encoder as has_text_encoder
from minwm.families.hunyuan.transformer import HunyuanConfig
from minwm.families.published import (
    SHARD,
    Inferred,
    check_config_json,
    check_whole,
    count_blocks,
    missed,
    read_config_json,
    read_renamed,
    shape,
    write_published,
)

MARKS: dict[Layout, str] = {
    "original": "double_blocks.{}.img_attn_q.weight",
    "diffusers": "transformer_blocks.{}.attn.add_q_proj.weight",
}
"""A parameter of every block, by which a layout is detected and blocks are counted."""
LICENSE = License(
    "tencent-hunyuan-community",
    "https://huggingface.co/tencent/HunyuanVideo-1.5/blob/main/LICENSE",
    TENCENT_LIMITS,
)
RELEASES: Mapping[str, Release] = {
    "hunyuan1.5-8b": Release("tencent/HunyuanVideo-1.5", HunyuanConfig(), LICENSE),
    "hunyuan1.5-8b-step-distilled": Release("tencent/HunyuanVideo-1.5", HunyuanConfig(meanflow=True), LICENSE),
}
VAE_FILES: tuple[str, ...] = ("vae",)
CAMERA_PARAMETERS: tuple[str, ...] = ("img_attn_prope_proj.weight", "img_attn_prope_proj.bias")
"""Ends of the names of camera parameters."""
ACTION_PARAMETERS: tuple[str, ...] = (
    "action_in.mlp.0.weight",
    "action_in.mlp.0.bias",
    "action_in.mlp.2.weight",
    "action_in.mlp.2.bias",
)
"""HY-WorldPlay's embedding of discrete actions, which minWM's files may have too."""
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "it has blocks of a single stream (HunyuanVideo 1)": ("single_blocks.", "single_transformer_blocks."),
    "it is told the scale of guidance (guidance_embed)": ("guidance_in.", "guidance_embedder."),
}
"""What variants that are not supported do, with parts of the names by which they are known, in either layout."""
HEAD_WIDTH = 128
"""Of the release: how its heads are rotated is known without a config.json."""

_BLOCK = {
    "img.mod": "norm1",
    "txt.mod": "norm1_context",
    **{f"img.attn_{x}": f"attn.to_{x}" for x in "qkv"},
    **{f"txt.attn_{x}": f"attn.add_{x}_proj" for x in "qkv"},
    **{f"img.attn_{x}_norm": f"attn.norm_{x}" for x in "qk"},
    **{f"txt.attn_{x}_norm": f"attn.norm_added_{x}" for x in "qk"},
    "img.attn_proj": "attn.to_out.0",
    "txt.attn_proj": "attn.to_add_out",
    "img.mlp.fc1": "ff.net.0.proj",
    "img.mlp.fc2": "ff.net.2",
    "txt.mlp.fc1": "ff_context.net.0.proj",
    "txt.mlp.fc2": "ff_context.net.2",
    "img_attn_prope_proj": "attn.to_out_prope.0",  # HY-WorldPlay's Wan has this name in the manner of diffusers
}
_REFINER_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn_qkv": "attn.to_qkv",  # and then in three parts
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}
_TEXT_TIME = "context_embedder.time_text_embed"
_AROUND = {
    "img_in": "x_embedder",
    "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
    "time_r_in.mlp.0": "time_embed.timestep_embedder_r.linear_1",
    "time_r_in.mlp.2": "time_embed.timestep_embedder_r.linear_2",
    "action_in.mlp.0": "time_embed.action_embedder.linear_1",  # as HY-WorldPlay's Wan has it
    "action_in.mlp.2": "time_embed.action_embedder.linear_2",
    "txt_in.t_embedder.mlp.0": f"{_TEXT_TIME}.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": f"{_TEXT_TIME}.timestep_embedder.linear_2",
    "txt_in.c_embedder": f"{_TEXT_TIME}.text_embedder",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "byt5_in.layernorm": "context_embedder_2.norm",
    **{f"byt5_in.fc{i}": f"context_embedder_2.linear_{i}" for i in (1, 2, 3)},
    "vision_in.proj.0": "image_embedder.norm_in",
    "vision_in.proj.1": "image_embedder.linear_1",
    "vision_in.proj.3": "image_embedder.linear_2",
    "vision_in.proj.4": "image_embedder.norm_out",
    "cond_type_embedding": "cond_type_embed",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_STARTS = (
    ("double_blocks.", "transformer_blocks.", _BLOCK),
    (
        "txt_in.individual_token_refiner.blocks.",
        "context_embedder.token_refiner.refiner_blocks.",
        _REFINER_BLOCK,
    ),
)


def original_name(name: str) -> str:
    """The release's name of a parameter."""
    return re.sub(r"^(double_blocks\.\d+\.(?:img|txt))\.", r"\1_", name)


def canonical_name(original: str) -> str:
    """Our name of a parameter of the release."""
    return re.sub(r"^(double_blocks\.\d+\.(?:img|txt))_(?!attn_prope_proj)", r"\1.", original)


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by canonical name as diffusers names and keeps them."""
    renamed = dict[str, Tensor]()
    for name, x in tensors.items():
        theirs = _rename(name, back=False)
        if ".to_qkv." in theirs:
            renamed |= {theirs.replace("qkv", part): y for part, y in zip("qkv", x.chunk(3), strict=True)}
        else:
            renamed[theirs] = _swap_halves(x) if name.startswith("final_layer.adaLN") else x
    return renamed


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of diffusers' class by canonical name."""
    joined = dict(tensors)
    for first in [name for name in tensors if "refiner_blocks" in name and ".attn.to_q." in name]:
        parts = [joined.pop(first.replace("to_q", f"to_{part}")) for part in "qkv"]
        joined[first.replace("to_q", "to_qkv")] = torch.cat(parts)
    renamed = {_rename(name, back=True): x for name, x in joined.items()}
    return {name: _swap_halves(x) if name.startswith("final_layer.adaLN") else x for name, x in renamed.items()}


def _swap_halves(x: Tensor) -> Tensor:
    """(shift, scale) to (scale, shift), or back."""
    return x.roll(len(x) // 2, 0)


def _rename(name: str, back: bool) -> str:
    """A canonical name as in diffusers, or back; a name of neither stays."""
    for ours, theirs, modules in _STARTS:
        start, end = (theirs, ours) if back else (ours, theirs)
        if name.startswith(start):
            index, _, rest = name.removeprefix(start).partition(".")
            return f"{end}{index}.{_replace_module(rest, modules, back)}"
    return _replace_module(name, _AROUND, back)


def _replace_module(name: str, modules: Mapping[str, str], back: bool) -> str:
    for ours, theirs in modules.items():
        start, end = (theirs, ours) if back else (ours, theirs)
        if name.startswith(f"{start}."):
            return end + name.removeprefix(start)
    return name


def detect_layout(names: Collection[str]) -> Layout | None:
    """The layout of a HunyuanVideo-1.5 transformer with such parameter names; None if they are of something else.

    Other networks have blocks of the same names in diffusers, but no embedding of kinds of text.
    """
    if MARKS["diffusers"].format(0) in names and "cond_type_embed.weight" in names:
        return "diffusers"
    return "original" if MARKS["original"].format(0) in names else None


def describe(names: Collection[str]) -> str | None:
    """What of HunyuanVideo-1.5 has such parameter names, in words; None if nothing."""
    layout = detect_layout(names)
    return layout and "; ".join((f"a HunyuanVideo-1.5 transformer ({layout} names)", *_variants(names)))


def _variants(names: Collection[str]) -> list[str]:
    return [what for what, parts in VARIANTS.items() if any(part in name for name in names for part in parts)]


def read_transformer(weights: Weights, heads: int | None = None, drop_action: bool = False) -> Published:
    """The transformer in `weights`, under canonical names; of its tensors only the refiner's may be read.

    `drop_action` leaves out HY-WorldPlay's embedding of discrete actions. Raises CheckpointError if the file does not
    tell the sizes of a network, or if it has another number of heads than `heads`.
    """
    layout = detect_layout(weights.tensors)
    if layout is None:
        raise CheckpointError(f"{weights.path} is no HunyuanVideo-1.5 transformer")
    blocks = count_blocks(weights.tensors, MARKS[layout])
    if layout == "diffusers":
        tensors = from_diffusers(weights.tensors)
    else:
        tensors = {canonical_name(name): tensor for name, tensor in weights.tensors.items()}
    infer = partial(_infer, layers=blocks, layout=layout, path=weights.path, heads=heads)
    return read_renamed(weights, layout, tensors, ACTION_PARAMETERS if drop_action else (), infer)


def _infer(tensors: Mapping[str, Tensor], layers: int, layout: Layout, path: Path, heads: int | None) -> Inferred:
    """The architecture, from shapes and what config.json adds to them."""
    given = read_config_json(path)
    refiner = "txt_in.individual_token_refiner.blocks.{}.norm1.weight"

    def size(name: str, axis: int, axes: int = 2) -> int:
        return shape(tensors, name, axes, path)[axis]

    dim, taken, *patch = shape(tensors, "img_in.proj.weight", 5, path)
    channels, width = size("final_layer.linear.weight", 0), size("double_blocks.0.img.attn_q_norm.weight", 0, axes=1)
    unsupported = _variants(tensors)
    if patch != [1, 1, 1] or taken != 2 * channels + 1:
        unsupported.append(
            f"it takes {taken} channels in patches of {patch} and gives {channels}, where networks here have patches "
            "of one latent, and take the noise, an image and its mask"
        )
    if heads not in (None, dim // width):
        raise CheckpointError(f"{path} has {dim // width} heads by the width of its norms, {width}; leave out --heads")
    rope = given.get("rope_dim_list" if layout == "original" else "rope_axes_dim")
    if rope is None and width != HEAD_WIDTH:
        raise CheckpointError(f"{path}: no config.json says how heads of {width} channels are rotated (rope_dim_list)")
    sizes = {
        "dim": dim,
        "heads": dim // width,
        "layers": layers,
        "ffn": size("double_blocks.0.img.mlp.fc1.weight", 0),
        "refiner_layers": count_blocks(tensors, refiner),
        "channels": channels,
        "text_dim": size("txt_in.input_embedder.weight", 1),
        "glyph_dim": size("byt5_in.fc1.weight", 1),
        "glyph_hidden": size("byt5_in.fc1.weight", 0),
        "image_dim": size("vision_in.proj.1.weight", 1),
        "freq_dim": size("time_in.mlp.0.weight", 1),
        "rope": rope or HunyuanConfig.rope,
        "meanflow": any(name.startswith("time_r_in.") for name in tensors),
        "camera": "dual" if any(name.endswith(CAMERA_PARAMETERS) for name in tensors) else "none",
        "actions": any(name in tensors for name in ACTION_PARAMETERS),
    }
    config = from_dict(HunyuanConfig, sizes)
    if not unsupported:
        check_config_json(path, given, _config_json(config, layout))
    task = [str(given[key]) for key in ("ideal_resolution", "ideal_task") if key in given]
    return config, [f"it was made for {', '.join(task)}, by its config.json"] * bool(task), tuple(unsupported)


def _config_json(cfg: HunyuanConfig, layout: Layout) -> dict[str, Any]:
    """What config.json says of the architecture."""
    if layout == "diffusers":
        return {
            "in_channels": 2 * cfg.channels + 1,
            "out_channels": cfg.channels,
            "num_attention_heads": cfg.heads,
            "attention_head_dim": cfg.dim // cfg.heads,
            "num_layers": cfg.layers,
            "num_refiner_layers": cfg.refiner_layers,
            "mlp_ratio": cfg.ffn / cfg.dim,
            "patch_size": 1,
            "patch_size_t": 1,
            "qk_norm": "rms_norm",
            "text_embed_dim": cfg.text_dim,
            "text_embed_2_dim": cfg.glyph_dim,
            "image_embed_dim": cfg.image_dim,
            "rope_theta": 256.0,
            "rope_axes_dim": [*cfg.rope],
            "use_meanflow": cfg.meanflow,
        }
    return {
        "hidden_size": cfg.dim,
        "heads_num": cfg.heads,
        "mm_double_blocks_depth": cfg.layers,
        "mm_single_blocks_depth": 0,
        "mlp_width_ratio": cfg.ffn / cfg.dim,
        "mlp_act_type": "gelu_tanh",
        "patch_size": [1, 1, 1],
        "in_channels": cfg.channels,
        "out_channels": cfg.channels,
        "concat_condition": True,
        "qkv_bias": True,
        "qk_norm": True,
        "qk_norm_type": "rms",
        "rope_dim_list": [*cfg.rope],
        "rope_theta": 256,
        "text_states_dim": cfg.text_dim,
        "vision_states_dim": cfg.image_dim,
        "vision_projection": "linear",
        "glyph_byT5_v2": True,
        "use_cond_type_embedding": True,
        "use_meanflow": cfg.meanflow,
    }


def export(
    tensors: Mapping[str, Tensor],
    config: HunyuanConfig,
    target: Path,
    layout: Layout,
    dtype: torch.dtype | None = None,
    shard: int = SHARD,
) -> list[str]:
    """Write a transformer by canonical names to a new folder with config.json, or to one .safetensors file.

    A folder in the layout of diffusers is what `HunyuanVideo15Transformer3DModel.from_pretrained` takes. Returns
    sentences about what other readers will miss. Raises CheckpointError if the tensors are not exactly those of such a
    network, or if the target exists.
    """
    check_whole(tensors, config, target)
    if layout == "diffusers":
        renamed, kind = to_diffusers(tensors), "HunyuanVideo15Transformer3DModel"
    else:
        renamed = {original_name(name): tensor for name, tensor in tensors.items()}
        kind = "HunyuanVideo_1_5_DiffusionTransformer"
    write_published(target, renamed, {"_class_name": kind, **_config_json(config, layout)}, dtype, shard)
    return missed(config, layout, target, f"heads that are rotated by {config.rope}")
