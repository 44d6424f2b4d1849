"""Parts of Wan's transformer around its self-attention: attention to the prompt, modulation, the head.

Parameter names are those of the release. Source: Wan2.1 `wan/modules/model.py`.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minwm.nets.attention import TextKV, softmax_attention
from minwm.nets.backbone import ShiftScaleGate
from minwm.nets.fp8 import Linear
from minwm.nets.layers import RMSNorm, halves_to_pairs, modulate, pairs_to_halves, rotate


class CrossAttention(nn.Module):
    """Attention to the prompt."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (kind(dim, dim) for kind in (Linear, nn.Linear, nn.Linear, Linear))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def project_kv(self, text: Float[Tensor, "b l d"]) -> TextKV:
        k, v = (rearrange(y, "b l (a e) -> b a l e", a=self.heads) for y in (self.norm_k(self.k(text)), self.v(text)))
        return TextKV(k, v)

    def forward(self, x: Float[Tensor, "b f p d"], text: Float[Tensor, "b l d"] | TextKV) -> Float[Tensor, "b f p d"]:
        k, v, _ = self.project_kv(text) if isinstance(text, Tensor) else text
        q = self.norm_q(self.q(x)).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = softmax_attention(q, k, v).transpose(1, 2)
        return self.o(out.flatten(2)).view_as(x)


class Head(nn.Module):
    """Modulated norm and projection to patch features; `time` is the time embedding before its projection."""

    def __init__(self, dim: int, out: int, rounded: bool) -> None:
        super().__init__()
        self.head = nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.rounded = rounded

    def adaln_modulation(self, time: Float[Tensor, "b f d"]) -> ShiftScaleGate:
        return adaln(self.modulation, time[:, :, None], self.rounded)

    def forward(
        self, x: Float[Tensor, "b f p d"], time: Float[Tensor, "b f d"] | ShiftScaleGate
    ) -> Float[Tensor, "b f p k"]:
        shift, scale = adaln(self.modulation, time[:, :, None], self.rounded) if isinstance(time, Tensor) else time
        return self.head(modulate(x, shift, scale))


def rotate_halves(
    x: Float[Tensor, "*b s a e"], table: Float[Tensor, "#s half 2"], *, back: bool = False
) -> Float[Tensor, "*b s a e"]:
    """RoPE over columns, then rows, in the layout of PRoPE's authors: of each axis, first halves and second halves."""
    return pairs_to_halves(rotate(halves_to_pairs(x, 2), table, back=back), 2)


def adaln(learned: Float[Tensor, "1 k d"], time: Float[Tensor, "b f _ d"], rounded: bool) -> ShiftScaleGate:
    """Learned plus timestep modulation, split; 1 is added to scales, the second of every (shift, scale, gate)."""
    both = (learned.bfloat16() + time.bfloat16()).float() if rounded else learned.float() + time
    parts = both.split(1, dim=2)
    return tuple(1 + part if i % 3 == 1 else part for i, part in enumerate(parts))
