"""Parts shared by the backbones: norms, modulation, rotary tables, patches, the time embedding."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minwm.core.config import ConfigError


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 (Wan: over the full width, before the split into heads)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32, whatever the dtype of x."""

    def forward(self, input: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:  # noqa: A002 - torch's name
        weight = self.weight if self.weight is None else self.weight.float()
        bias = self.bias if self.bias is None else self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


def modulate(
    x: Float[Tensor, "b f p d"], shift: Float[Tensor, "b f d"], scale: Float[Tensor, "b f d"]
) -> Float[Tensor, "b f p d"]:
    """Adaptive norm, one shift and scale per frame."""
    return (x.float() * (1 + scale[:, :, None]) + shift[:, :, None]).to(x.dtype)


def sinusoid(t: Float[Tensor, "b f"], width: int) -> Float[Tensor, "b f {width}"]:
    """[cos | sin] of t at `width / 2` frequencies falling from 1 to 1e-4, in float64."""
    frequency = 1e4 ** (-torch.arange(width // 2, dtype=torch.float64, device=t.device) / (width // 2))
    angle = t.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def video_pairs(head_width: int) -> tuple[int, int, int]:
    """Of e/2 channel pairs, rows and columns get (e/2)//3 each and time the rest (Wan: 22, 21, 21)."""
    third = head_width // 2 // 3
    return head_width // 2 - 2 * third, third, third


class Rope3D(nn.Module):
    """Rotary tables over (time, row, column), real and precomputed; channel pairs are interleaved (2i, 2i+1).

    `pairs` are the channel pairs of each axis; each axis has frequencies of its own.
    """

    axis0: Tensor
    axis1: Tensor
    axis2: Tensor

    def __init__(self, pairs: tuple[int, int, int], max_positions: int = 1024, theta: float = 1e4) -> None:
        super().__init__()
        for axis, count in enumerate(pairs):
            frequency = theta ** (-torch.arange(count, dtype=torch.float64) / max(count, 1))
            angle = torch.arange(max_positions, dtype=torch.float64)[:, None] * frequency
            self.register_buffer(f"axis{axis}", torch.stack([angle.cos(), angle.sin()]).float(), persistent=False)

    def forward(self, frames: list[int], height: int, width: int) -> Float[Tensor, "2 s half"]:
        """cos and sin for the tokens of `frames` (positions in time) x height x width."""
        size = (len(frames), height, width)
        if (last := max(*frames, height - 1, width - 1)) >= self.axis0.shape[1]:
            raise ConfigError(
                f"position {last} lies beyond the rotary tables; raise max_positions={self.axis0.shape[1]}"
            )
        time = self.axis0[:, frames][:, :, None, None].expand(-1, *size, -1)
        row = self.axis1[:, :height][:, None, :, None].expand(-1, *size, -1)
        column = self.axis2[:, :width][:, None, None].expand(-1, *size, -1)
        return torch.cat([time, row, column], dim=-1).flatten(1, 3)


def rotate(x: Float[Tensor, "b s a e"], table: Float[Tensor, "2 s half"]) -> Float[Tensor, "b s a e"]:
    """Turn each pair (x_2i, x_2i+1) by its angle."""
    cos, sin = table[0, :, None], table[1, :, None]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def unpatchify(x: Float[Tensor, "b f p d"], height: int, width: int, patch: int) -> Float[Tensor, "b f c h w"]:
    """Tokens of (patch row, patch column, channel) features back to latents (Wan's order: channel last)."""
    return rearrange(x, "b f (h w) (i j c) -> b f c (h i) (w j)", h=height, w=width, i=patch, j=patch)
