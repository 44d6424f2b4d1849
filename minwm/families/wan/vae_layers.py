"""Layers of Wan's video autoencoder; those that cross time use the `Memory` of `nets/causal_vae.py`.

Before the first frame there is nothing: convolutions see zeros, and layers that halve or double the number of frames
let a first frame, which comes by itself, through as it is.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from minwm.nets.causal_vae import Causal, Images, Memory, RMSNorm, Stream, Video


class CausalConv(nn.Conv3d, Causal):
    """3x3x3 convolution of a frame and the two before it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=(0, 1, 1))

    def forward(self, x: Video, memory: Memory) -> Video:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(memory.recall(x))


class Residual(Causal):
    """x + f(x), with f two causal convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.residual = Stream(
            *(RMSNorm(inputs), nn.SiLU(), CausalConv(inputs, outputs)),
            *(RMSNorm(outputs), nn.SiLU(), nn.Identity(), CausalConv(outputs, outputs)),  # the release drops out here
        )
        self.shortcut = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Video, memory: Memory) -> Video:
        return self.shortcut(x) + self.residual(x, memory)


class Attention(nn.Module):
    """One head over the pixels of each frame; frames do not see each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, axes=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Video) -> Video:
        return x + per_frame(self.attend, x)

    def attend(self, x: Images) -> Images:
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "m (qkv c) h w -> qkv m 1 (h w) c", qkv=3)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(y, "m 1 (h w) c -> m c h w", h=x.shape[2]))


class Downsample(Causal):
    """Half the rows and columns; if temporal, one frame of each two and the one before them.

    A first frame stays as it is, and is the past of the next two.
    """

    def __init__(self, width: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))
        self.time_conv = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Video, memory: Memory) -> Video:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        seen = memory.recall(x, length=1)
        return x if memory.begins else self.time_conv(seen)


class Upsample(Causal):
    """Twice the rows and columns; if temporal, two frames of each one and the two before it.

    A first frame stays as it is, and those after it do not see it here: their past begins with zeros.
    """

    def __init__(self, inputs: int, outputs: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.time_conv = nn.Conv3d(inputs, 2 * inputs, (3, 1, 1)) if temporal else None

    def forward(self, x: Video, memory: Memory) -> Video:
        if self.time_conv is not None and memory.begins:
            memory.recall(torch.zeros_like(x))
        elif self.time_conv is not None:
            steps = self.time_conv(memory.recall(x)).split(1, dim=2)
            x = torch.cat([frame for step in steps for frame in step.chunk(2, dim=1)], dim=2)  # laid out as it was
        return per_frame(self.resample, x)


class Down(Causal):
    """One resolution of Wan2.2's encoder: its layers, and means over blocks of channels and pixels past them."""

    def __init__(self, layers: list[nn.Module], outputs: int, temporal: bool | None) -> None:
        super().__init__()
        self.downsamples = Stream(*layers)
        self.outputs = outputs
        self.frames, self.pixels = (1, 1) if temporal is None else (1 + temporal, 2)

    def forward(self, x: Video, memory: Memory) -> Video:
        return self.downsamples(x, memory) + self.shortcut(x)

    def shortcut(self, x: Video) -> Video:
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.frames, 0))  # a first frame stands behind a black one
        i, j = self.frames, self.pixels
        x = rearrange(x, "b c (t i) (h j) (w k) -> b (c i j k) t h w", i=i, j=j, k=j)
        return x.unflatten(1, (self.outputs, -1)).mean(2)


class Up(Causal):
    """One resolution of Wan2.2's decoder: its layers, and copies of channels and pixels past all but the finest."""

    def __init__(self, layers: list[nn.Module], outputs: int, temporal: bool | None) -> None:
        super().__init__()
        self.upsamples = Stream(*layers)
        self.outputs = outputs
        self.frames = None if temporal is None else 1 + temporal

    def forward(self, x: Video, memory: Memory) -> Video:
        y = self.upsamples(x, memory)
        if self.frames is None:
            return y
        return y + self.shortcut(x, self.frames)[:, :, -y.shape[2] :]  # of the copies of a first frame, the last

    def shortcut(self, x: Video, frames: int) -> Video:
        x = x.repeat_interleave(4 * frames * self.outputs // x.shape[1], dim=1)
        return rearrange(x, "b (c i j k) t h w -> b c (t i) (h j) (w k)", i=frames, j=2, k=2)


def residuals(inputs: int, outputs: int, depth: int) -> list[nn.Module]:
    return [Residual(inputs, outputs), *(Residual(outputs, outputs) for _ in range(depth - 1))]


def middle(width: int) -> Stream:
    return Stream(Residual(width, width), Attention(width), Residual(width, width))


def head(width: int, outputs: int) -> Stream:
    return Stream(RMSNorm(width), nn.SiLU(), CausalConv(width, outputs))


def per_frame(layer: Callable[[Images], Images], x: Video) -> Video:
    """Apply a layer for images to each frame."""
    y = layer(x.transpose(1, 2).flatten(0, 1))
    # of a single image, unflatten makes strides that look like no layout, and what follows would choose another one
    return (y[None] if len(x) == 1 else y.unflatten(0, (len(x), -1))).transpose(1, 2)
