"""Layers of HunyuanVideo-1.5's video autoencoder; those that cross time use the `Memory` of `nets/causal_vae.py`.

Before the first frame there are repeats of it, and beside a picture repeats of its edges. A first frame comes by
itself; layers that halve or double the number of frames let it through as one frame.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from minwm.nets.causal_vae import Causal, Memory, RMSNorm, Stream, Video, layout


class CausalConv(Causal):
    """3x3x3 convolution of a frame and the two before it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3)

    def forward(self, x: Video, memory: Memory) -> Video:
        return self.conv(repeat_edges(memory.recall(x, before="first")))


def repeat_edges(x: Video) -> Video:
    """One row and one column more at each side, laid out as x is."""
    if layout(x) is torch.contiguous_format:
        return F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate")
    return F.pad(x.movedim(1, -1), (0, 0, 1, 1, 1, 1), mode="replicate").movedim(-1, 1)


class Residual(Causal):
    """x + f(x), with f two causal convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = RMSNorm(width), CausalConv(width, width)
        self.norm2, self.conv2 = RMSNorm(width), CausalConv(width, width)

    def forward(self, x: Video, memory: Memory) -> Video:
        y = self.conv1(F.silu(self.norm1(x)), memory)
        return x + self.conv2(F.silu(self.norm2(y)), memory)


class Attention(Causal):
    """One head over the pixels of a latent and of the `past` latents before it (None: of all before it).

    x is one latent of each stream. Keys and values of the past are kept: of all latents, so that they grow, or of
    `past`, in memory of one size, with a mask for those that have not been there yet.
    """

    def __init__(self, width: int, past: int | None) -> None:
        super().__init__()
        self.past = past
        self.norm = RMSNorm(width)
        self.q, self.k, self.v = (nn.Conv3d(width, width, 1) for _ in range(3))
        self.proj_out = nn.Conv3d(width, width, 1)

    def forward(self, x: Video, memory: Memory) -> Video:
        y = self.norm(x)
        q, k, v = (rearrange(part(y), "b c t h w -> b 1 (t h w) c") for part in (self.q, self.k, self.v))
        length, seen = None if self.past is None else self.past * q.shape[2], None
        if self.past:
            seen = memory.recall_rows(torch.ones_like(k[..., 0], dtype=torch.bool), length)[:, :, None]
        if self.past != 0:
            k, v = memory.recall_rows(k, length), memory.recall_rows(v, length)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        y = rearrange(y, "b 1 (t h w) c -> b c t h w", h=x.shape[3], w=x.shape[4])
        return x + self.proj_out(y.contiguous(memory_format=layout(x)))


class Downsample(Causal):
    """Half the rows and columns, and, if temporal, half the frames; pixels are folded into channels.

    The shortcut is the mean over groups of neighbouring channels. A first frame is its own pair in the convolution.
    """

    def __init__(self, inputs: int, outputs: int, temporal: bool) -> None:
        super().__init__()
        self.frames = 1 + temporal
        self.conv = CausalConv(inputs, outputs // (4 * self.frames))

    def forward(self, x: Video, memory: Memory) -> Video:
        alone = memory.begins and self.frames == 2
        y = self.conv(x, memory)
        y = fold(torch.cat([y, y], dim=2) if alone else y, self.frames)
        y = y + group_means(fold(x, 1 if alone else self.frames), y.shape[1])
        return y.contiguous(memory_format=layout(x))


class Upsample(Causal):
    """Twice the rows and columns, and, if temporal, twice the frames; channels are unfolded into pixels.

    The shortcut repeats channels. Of the two frames that the convolution makes of a first one, it keeps half the
    channels of each pixel as the one frame.
    """

    def __init__(self, inputs: int, outputs: int, temporal: bool) -> None:
        super().__init__()
        self.frames, self.outputs = 1 + temporal, outputs
        self.conv = CausalConv(inputs, 4 * self.frames * outputs)

    def forward(self, x: Video, memory: Memory) -> Video:
        frames = 1 if memory.begins else self.frames
        y, shortcut = unfold(self.conv(x, memory), frames), unfold(x, frames)
        y = y[:, : self.outputs] + shortcut.repeat_interleave(self.outputs // shortcut.shape[1], dim=1)
        return y.contiguous(memory_format=layout(x))


def middle(width: int, past: int | None) -> Stream:
    """The layers at the resolution of latents."""
    return named(block_1=Residual(width), attn_1=Attention(width, past), block_2=Residual(width))


def resolution(width: int, depth: int, **step: Downsample | Upsample) -> Stream:
    """Residual blocks of one resolution, then the step to the next one, if there is one."""
    return named(block=Stream(*(Residual(width) for _ in range(depth))), **step)


def named(**layers: Causal) -> Stream:
    """Layers in a row, by their names in the release."""
    return Stream(OrderedDict(layers))


def fold(x: Video, frames: int) -> Video:
    """Blocks of `frames` x 2 x 2 pixels become channels, the place in the block before the channel."""
    return rearrange(x, "b c (t i) (h j) (w k) -> b (i j k c) t h w", i=frames, j=2, k=2)


def unfold(x: Video, frames: int) -> Video:
    """The inverse of `fold`."""
    return rearrange(x, "b (i j k c) t h w -> b c (t i) (h j) (w k)", i=frames, j=2, k=2)


def group_means(x: Video, groups: int) -> Video:
    """Means over groups of neighbouring channels."""
    return x.unflatten(1, (groups, -1)).mean(2)
