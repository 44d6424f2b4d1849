"""Parts shared by the backbones: norms, modulation, rotary tables, patches, the time embedding."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn


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


class ProductLinear(nn.Linear):
    """x W^T + b, also of rows with a bias that is given."""

    def product(self, x: Float[Tensor, "n i"], bias: Tensor, out: Tensor | None = None) -> Float[Tensor, "n o"]:
        """x W^T + bias, of one row or of all, written into `out` if given."""
        return torch.addmm(bias, x, self.weight.t(), out=out)


def modulate(
    x: Float[Tensor, "b f p d"], shift: Float[Tensor, "#b #f 1 d"], scale: Float[Tensor, "#b #f 1 d"], eps: float = 1e-6
) -> Float[Tensor, "b f p d"]:
    """scale * layer_norm(x) + shift, in float32: adaptive norm, one shift and scale per frame, or one for all."""
    width = x.shape[-1:]
    if shift.numel() == x.shape[-1]:  # the norm's own affine map: one kernel
        return F.layer_norm(x.float(), width, scale.view(width), shift.view(width), eps).to(x.dtype)
    return torch.addcmul(shift, F.layer_norm(x.float(), width, eps=eps), scale).to(x.dtype)


def gated_residual(
    x: Float[Tensor, "b f p d"], change: Float[Tensor, "b f p d"], gate: Float[Tensor, "#b #f 1 d"]
) -> Float[Tensor, "b f p d"]:
    """x + gate * change, in float32."""
    return torch.addcmul(x.float(), change.float(), gate).to(x.dtype)


def can_write_in_place(x: Tensor) -> bool:
    """Whether results may be written into buffers: nothing is recorded for gradients, cast or compiled."""
    cast = torch.is_autocast_enabled(x.device.type)
    return not (torch.is_grad_enabled() or cast or torch.compiler.is_compiling())


def contiguous_copy(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x in the order of its axes, by one copy into new memory."""
    return x.new_empty(x.shape).copy_(x)


def sinusoid(t: Shaped[Tensor, "b f"], width: int) -> Float[Tensor, "b f {width}"]:
    """[cos | sin] of t at `width / 2` frequencies falling from 1 to 1e-4, in float64."""
    frequency = 1e4 ** (-torch.arange(width // 2, dtype=torch.float64, device=t.device) / (width // 2))
    angle = t.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def video_pairs(head_width: int) -> tuple[int, int, int]:
    """Of e/2 channel pairs, rows and columns get (e/2)//3 each and time the rest (Wan: 22, 21, 21)."""
    third = head_width // 2 // 3
    return head_width // 2 - 2 * third, third, third


@dataclass(frozen=True)
class Rope3D:
    """Rotary angles over (time, row, column); channel pairs are interleaved (2i, 2i+1).

    `pairs` are the channel pairs of each axis; each axis has frequencies of its own. Positions in time are any
    integers: a stream never runs out of them.
    """

    pairs: tuple[int, int, int]
    theta: float = 1e4

    def __call__(
        self, frames: Sequence[int], height: int, width: int, device: torch.device
    ) -> Float[Tensor, "s half 2"]:
        """(cos, sin) for the tokens of `frames` (positions in time) x height x width, float32."""
        return _rope_table(self, tuple(frames), height, width, device)


@lru_cache(maxsize=16)
def _rope_table(rope: Rope3D, frames: tuple[int, ...], height: int, width: int, device: torch.device) -> Tensor:
    """All passes over one chunk share a table, so it is kept. No buffer: a cast to bfloat16 would ruin it."""
    size = (len(frames), height, width)
    axes = []
    with torch.inference_mode(False):  # or training could not use a table that sampling made
        for axis, (count, places) in enumerate(zip(rope.pairs, (frames, range(height), range(width)), strict=True)):
            frequency = rope.theta ** (-torch.arange(count, dtype=torch.float64) / max(count, 1))
            angle = torch.tensor(list(places), dtype=torch.float64)[:, None] * frequency
            table = torch.stack([angle.cos(), angle.sin()], dim=-1).float().to(device)
            shape = [*(n if i == axis else 1 for i, n in enumerate(size)), count, 2]
            axes.append(table.view(shape).expand(*size, -1, -1))
        return torch.cat(axes, dim=-2).flatten(0, 2)


def rotate(
    x: Float[Tensor, "*b s a e"], table: Float[Tensor, "#s half 2"], *, back: bool = False
) -> Float[Tensor, "*b s a e"]:
    """Turn each pair (x_2i, x_2i+1) by its angle, or back, in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses these lines, but no product of complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), table[:, None].unbind(-1)
        sin = -sin if back else sin
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        turn = torch.view_as_complex(table[:, None])
        turned = torch.view_as_real(torch.view_as_complex(pairs) * (turn.conj() if back else turn))
    return turned.flatten(-2).to(x.dtype)


def halves_to_pairs(x: Float[Tensor, "*b e"], axes: int) -> Float[Tensor, "*b e"]:
    """Channels of every rotary axis from (first halves | second halves) to pairs (2i, 2i+1), as `rotate` takes them."""
    return x.unflatten(-1, (axes, 2, -1)).transpose(-1, -2).flatten(-3)


def pairs_to_halves(x: Float[Tensor, "*b e"], axes: int) -> Float[Tensor, "*b e"]:
    """The inverse of `halves_to_pairs`."""
    return x.unflatten(-1, (axes, -1, 2)).transpose(-1, -2).flatten(-3)


def patchify(x: Float[Tensor, "b f c h w"], patch: int) -> Float[Tensor, "b f p k"]:
    """Latents to tokens of (channel, patch row, patch column) features: what a convolution's weight is laid out for."""
    parts = x.unflatten(-2, (-1, patch)).unflatten(-1, (-1, patch))  # b f c h i w j
    return contiguous_copy(parts.permute(0, 1, 3, 5, 2, 4, 6)).flatten(4).flatten(2, 3)


def unpatchify(x: Float[Tensor, "b f p k"], height: int, width: int, patch: int) -> Float[Tensor, "b f c h w"]:
    """Tokens of (patch row, patch column, channel) features back to latents (Wan's order: channel last)."""
    parts = x.unflatten(-1, (patch, patch, -1)).unflatten(2, (height, width))  # b f h w i j c
    return contiguous_copy(parts.permute(0, 1, 6, 2, 4, 3, 5)).flatten(5).flatten(3, 4)
