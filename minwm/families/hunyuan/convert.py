"""Parameter names of HunyuanVideo-1.5: the release's, and those of diffusers, both one to one with ours.

Ours are the release's but for a dot: `double_blocks.0.img_attn_q` is `double_blocks.0.img.attn_q` here, as the weights
of video and of text are a module each. In diffusers two kinds of tensors are laid out differently too: the refiner's
queries, keys and values are three, and the final modulation has scale before shift.

Facts: diffusers `scripts/convert_hunyuan_video1_5_to_diffusers.py`.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from minwm.families.base import Release
from minwm.families.hunyuan.transformer import HunyuanConfig

RELEASES: Mapping[str, Release] = {"hunyuan1.5-8b": Release("tencent/HunyuanVideo-1.5", HunyuanConfig())}
CAMERA_PARAMETERS: tuple[str, ...] = ("img_attn_prope_proj.weight", "img_attn_prope_proj.bias")
"""Ends of the names of camera parameters."""

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
