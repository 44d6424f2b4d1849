"""Parts of HunyuanVideo-1.5's transformer around its blocks: embeddings of time, text, glyphs and pictures; the head.

Parameter names are those of the release. Source: HunyuanVideo-1.5 `hyvideo/models/transformers`.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from minwm.nets.attention import softmax_attention
from minwm.nets.backbone import ShiftScaleGate
from minwm.nets.fp8 import Linear
from minwm.nets.layers import LayerNorm, modulate, sinusoid

States = Float[Tensor, "b l d"]
Valid = Bool[Tensor, "b l"]


class Mlp(nn.Module):
    """fc2(act(fc1(x))) of width `hidden`; silu in the refiner, a gelu elsewhere."""

    def __init__(self, dim: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = Linear(dim, hidden), act, Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.fc2(self.act(self.fc1(x)))


class TimestepEmbedder(nn.Module):
    """An MLP of the sinusoid of timesteps from 0 to 1000, or of the labels of actions."""

    def __init__(self, dim: int, freq_dim: int) -> None:
        super().__init__()
        first = nn.Linear(freq_dim, dim)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, x: Shaped[Tensor, "b f"]) -> Float[Tensor, "b f d"]:
        weight = self.mlp.get_parameter("0.weight")
        return self.mlp(sinusoid(x, weight.shape[1]).to(weight.dtype))


class AdaLN(nn.Module):
    """Modulation: `parts` vectors per frame, a linear map of silu(time)."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, parts * dim)
        self.parts = parts

    def forward(self, time: Float[Tensor, "b f d"]) -> ShiftScaleGate:
        return shift_scale_gate(self.linear(F.silu(time)), self.parts)


def shift_scale_gate(x: Float[Tensor, "b f k"], parts: int) -> ShiftScaleGate:
    """Vectors of (shift, scale, gate, shift, …) in float32; 1 is added to scales."""
    vectors = x.float()[:, :, None].chunk(parts, dim=-1)
    return tuple(1 + vector if i % 3 == 1 else vector for i, vector in enumerate(vectors))


def visible_keys(valid: Valid) -> Bool[Tensor, "b 1 1 l"]:
    """The keys of text that text attends to: those that are tokens, or all if there is none, as a softmax over nothing
    is no number."""
    return (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]


class RefinerBlock(nn.Module):
    """Self-attention and feed-forward; the modulation has gates only."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(dim, eps=1e-6), LayerNorm(dim, eps=1e-6)
        self.self_attn_qkv, self.self_attn_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 4 * dim, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.heads = heads

    def forward(self, x: States, c: Float[Tensor, "b 1 d"], visible: Bool[Tensor, "b 1 1 l"]) -> States:
        attention_gate, gate = self.adaLN_modulation(c).chunk(2, dim=-1)
        q, k, v = self.self_attn_qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = softmax_attention(q, k, v, visible).transpose(1, 2).flatten(2)
        x = x + self.self_attn_proj(out) * attention_gate
        return x + self.mlp(self.norm2(x)) * gate


class TextProjection(nn.Module):
    """linear_2(silu(linear_1(x))) of the mean text state."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(text_dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b text_dim"]) -> Float[Tensor, "b d"]:
        return self.linear_2(F.silu(self.linear_1(x)))


class TokenRefiner(nn.Module):
    """States of the language model to tokens: they attend to each other, modulated by time and their mean."""

    def __init__(self, text_dim: int, dim: int, heads: int, layers: int, freq_dim: int) -> None:
        super().__init__()
        self.t_embedder, self.c_embedder = TimestepEmbedder(dim, freq_dim), TextProjection(text_dim, dim)
        self.input_embedder = nn.Linear(text_dim, dim)
        blocks = nn.ModuleList(RefinerBlock(dim, heads) for _ in range(layers))
        self.individual_token_refiner = nn.ModuleDict({"blocks": blocks})

    def forward(self, text: States, t: Float[Tensor, "b 1"], valid: Valid) -> Float[Tensor, "b l dim"]:
        tokens = valid[..., None].to(text)
        mean = (text * tokens).sum(dim=1) / tokens.sum(dim=1).clamp(min=1)
        c = self.t_embedder(1000 * t) + self.c_embedder(mean)[:, None]
        x, visible = self.input_embedder(text), visible_keys(valid)
        for block in self.individual_token_refiner.get_submodule("blocks").children():
            x = block(x, c, visible)
        return x


class GlyphMapper(nn.Module):
    """States of ByT5 to tokens."""

    def __init__(self, glyph_dim: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.layernorm = LayerNorm(glyph_dim)
        self.fc1, self.fc2, self.fc3 = nn.Linear(glyph_dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, dim)

    def forward(self, glyphs: States) -> Float[Tensor, "b l dim"]:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(self.layernorm(glyphs))))))


def image_projection(image_dim: int, dim: int) -> nn.Sequential:
    """States of the image encoder to tokens."""
    first, second = nn.Linear(image_dim, image_dim), nn.Linear(image_dim, dim)
    layers = nn.Sequential(LayerNorm(image_dim), first, nn.GELU(), second, LayerNorm(dim))
    return nn.Sequential(OrderedDict(proj=layers))


class FinalLayer(nn.Module):
    """Modulated norm and projection to latents."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.linear = nn.Linear(dim, channels)

    def adaln_modulation(self, time: Float[Tensor, "b f d"]) -> ShiftScaleGate:
        return shift_scale_gate(self.adaLN_modulation(time), 2)

    def forward(
        self, x: Float[Tensor, "b f p d"], time: Float[Tensor, "b f d"] | ShiftScaleGate
    ) -> Float[Tensor, "b f p c"]:
        shift, scale = shift_scale_gate(self.adaLN_modulation(time), 2) if isinstance(time, Tensor) else time
        return self.linear(modulate(x, shift, scale))


def zero(*linears: nn.Module) -> None:
    """Zero all parameters."""
    with torch.no_grad():
        for linear in linears:
            for parameter in linear.parameters():
                parameter.zero_()
