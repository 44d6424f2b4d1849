"""Tiny video codecs for the latents of large ones, in the layout of github.com/madebyollin/taehv (MIT).

Parameters have the names of the published files, so these load strictly: `taew2_1` (Wan 2.1), `taew2_2` (Wan 2.2
5B) and `taehv1_5` (HunyuanVideo 1.5); the wider `_super` variants have another decoder. Latents are those that the
diffusion model sees, already normalised. Inside RGB is in [0, 1]; at the edges of this file it is in [-1, 1].

Time is crossed by `MemBlock`s alone, which see the step before. What they saw last is the state of a stream.

Decoding: each latent becomes four frames, of which those of latent 0 are the repeats of frame 0 but for the last.
Encoding: four frames become a latent. The published encoder learned to give Wan's latent i, which stands for
frames 4i-3 .. 4i, from the group of frames 4i .. 4i+3 and its memory of all before; the end of a clip is repeated to
fill a group. The three frames ahead hold nothing of the latent, and a stream does not have them yet. So latent i is
here what the published encoder gives for the clip that ends with frame 4i, that frame repeated three times: latent
0 is frame 0 alone, no latent sees a later frame, and a stream equals the whole clip. Every group then passes the
encoder twice: repeated for its latent, and as it really was for the memory.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minwm.core.config import ConfigError, UserError
from minwm.nets.codec import Latents, Pixels, State


@dataclass(frozen=True, kw_only=True)
class TaehvConfig:
    """Shape of a tiny codec; `TAEHV` has those of the published files."""

    kind: ClassVar[str] = "taehv"
    tiny: ClassVar[None] = None
    """It is one itself."""

    channels: int = 16
    """Channels of a latent."""
    patch: int = 1
    """Side of the square of pixels that is folded into channels before all else."""
    width: int = 64
    """Channels inside; the decoder begins with four times as many."""

    def __post_init__(self) -> None:
        for name in ("channels", "patch", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"codec.{name}={getattr(self, name)}: must be at least 1")

    @property
    def scale(self) -> int:
        """Rows and columns of pixels per row and column of latents."""
        return 8 * self.patch

    def build(self) -> "Taehv":
        return Taehv(self)


TAEHV = {
    "taew2_1": TaehvConfig(),
    "taew2_2": TaehvConfig(channels=48, patch=2),
    "taehv1_5": TaehvConfig(channels=32, patch=2),
}
"""The published codecs by the names of their files."""


def conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


class Clamp(nn.Module):
    """A soft limit of 3 standard deviations for latents."""

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m c h w"]:
        return 3 * torch.tanh(x / 3)


class MemBlock(nn.Module):
    """relu(x + f(x, past)), where `past` is the input of the step before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = conv(2 * width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width)
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "m d h w"], past: Float[Tensor, "m d h w"]) -> Float[Tensor, "m d h w"]:
        return torch.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class TPool(nn.Module):
    """Each `stride` steps become one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(stride * width, width, 1, bias=False)

    def forward(self, x: Float[Tensor, "m d h w"]) -> Float[Tensor, "k d h w"]:
        return self.conv(x.unflatten(0, (-1, self.stride)).flatten(1, 2))


class TGrow(nn.Module):
    """Each step becomes `stride`."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, stride * width, 1, bias=False)

    def forward(self, x: Float[Tensor, "m d h w"]) -> Float[Tensor, "k d h w"]:
        return self.conv(x).unflatten(1, (self.stride, -1)).flatten(0, 1)


class Stream(nn.Sequential):
    """Layers applied to every step by itself, but for those that change the rate and `MemBlock`."""

    def step(self, x: Float[Tensor, "b t c h w"], memory: State) -> tuple[Float[Tensor, "b k e H W"], State]:
        """Advance b streams by t steps; with an empty memory they begin, and what came before is zero."""
        batch, pasts = len(x), iter(memory)
        kept: list[Tensor] = []
        x = x.flatten(0, 1)
        for layer in self:
            if isinstance(layer, MemBlock):
                steps = x.unflatten(0, (batch, -1))
                past = next(pasts, torch.zeros_like(steps[:, 0]))
                kept.append(steps[:, -1])
                x = layer(x, torch.cat([past[:, None], steps[:, :-1]], dim=1).flatten(0, 1))
            else:
                x = layer(x)
        return x.unflatten(0, (batch, -1)), tuple(kept)


class Taehv(nn.Module):
    """Pixels in [-1, 1] to the latents of a large codec and back; see the head of the file."""

    stride = 4
    decoding: tuple[str, ...] = ("decoder",)
    encoding: str = ""
    grows: bool = False

    def __init__(self, cfg: TaehvConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.channels = cfg.channels
        self.scale = 8 * cfg.patch
        w, rgb = cfg.width, 3 * cfg.patch**2

        def memory(width: int) -> list[nn.Module]:
            return [MemBlock(width) for _ in range(3)]

        def down(stride: int) -> list[nn.Module]:
            return [TPool(w, stride), conv(w, w, stride=2, bias=False), *memory(w)]

        def up(width: int, outputs: int, stride: int) -> list[nn.Module]:
            grow = TGrow(width, stride), conv(width, outputs, bias=False)
            return [*memory(width), nn.Upsample(scale_factor=2), *grow]

        self.encoder = Stream(conv(rgb, w), nn.ReLU(), *down(2), *down(2), *down(1), conv(w, cfg.channels))
        stages = *up(4 * w, 2 * w, 1), *up(2 * w, w, 2), *up(w, w, 2)
        self.decoder = Stream(Clamp(), conv(cfg.channels, 4 * w), nn.ReLU(), *stages, nn.ReLU(), conv(w, rgb))

    def encode(self, pixels: Pixels) -> Latents:
        """Latents of whole clips of 4k + 1 frames."""
        if pixels.shape[1] % self.stride != 1:
            raise UserError(f"a clip of {pixels.shape[1]} frames: this codec takes 4k + 1, such as 1, 33 or 81")
        return self.encode_next(pixels)[0]

    def decode(self, latents: Latents) -> Pixels:
        """All 4 (f - 1) + 1 frames of whole clips; one latent after another, so length costs no memory."""
        state, parts = None, []
        for latent in latents.split(1, dim=1):
            pixels, state = self.decode_next(latent, state)
            parts.append(pixels)
        return torch.cat(parts, dim=1)

    def encode_next(self, pixels: Pixels, state: State | None = None) -> tuple[Latents, State]:
        """The latents of frames 0, 4, 8 .. among the next frames of streams, if any; no state starts anew."""
        height, width = pixels.shape[-2:]
        if height % self.scale or width % self.scale:
            raise UserError(f"frames of {height}x{width}: this codec takes multiples of {self.scale} pixels")
        pixels = pixels.to(next(self.parameters()))
        group, memory = (state[0], state[1:]) if state is not None else (pixels[:, :0], ())
        latents = [pixels.new_zeros(len(pixels), 0, self.channels, height // self.scale, width // self.scale)]
        for frame in pixels.unsqueeze(2).unbind(1):
            if not group.shape[1]:
                repeated = frame.expand(-1, self.stride, -1, -1, -1)
                latents.append(self._analyse(repeated, memory)[0])
            group = torch.cat([group, frame], dim=1)
            if group.shape[1] == self.stride:
                _, memory = self._analyse(group, memory)
                group = group[:, :0]
        return torch.cat(latents, dim=1), (group, *memory)

    def _analyse(self, group: Pixels, memory: State) -> tuple[Latents, State]:
        return self.encoder.step(F.pixel_unshuffle((group + 1) / 2, self.cfg.patch), memory)

    def decode_next(self, latents: Latents, state: State | None = None) -> tuple[Pixels, State]:
        """The frames of the next latents of streams: four each, but one for the first latent of a stream."""
        if latents.shape[2] != self.channels:
            raise UserError(
                f"latents of {latents.shape[2]} channels: this codec has {self.channels}, so they come from another"
            )
        drawn, memory = self.decoder.step(latents.to(next(self.parameters())), state or ())
        pixels = 2 * F.pixel_shuffle(drawn, self.cfg.patch).clamp(0, 1) - 1
        return pixels if state is not None else pixels[:, self.stride - 1 :], memory
