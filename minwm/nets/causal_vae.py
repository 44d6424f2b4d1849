"""What causal video autoencoders share: layers that remember what they saw last, and streams made of groups of frames.

A stream is one frame by itself, then groups of `stride` frames. One pass of the encoder or the decoder is one such
group, in whole clips as well, so activations take no more memory for longer ones. Layers that cross time take what
they saw last from a `Memory`, and leave it there: this is the state of a stream.
"""

from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minwm.core.config import UserError
from minwm.nets.codec import Latents, Pixels, State

Images = Float[Tensor, "m _c _h _w"]
Video = Float[Tensor, "b _c _t _h _w"]
Rows = Shaped[Tensor, "b 1 _s *_e"]


class Memory:
    """What layers saw last, recalled and kept in the order in which they run; no pasts before the first frame."""

    def __init__(self, pasts: State) -> None:
        self.begins = len(pasts) == 0
        self.pasts = iter(pasts)
        self.kept: list[Tensor] = []

    def recall(self, x: Video, length: int = 2, before: Literal["zeros", "first"] = "zeros") -> Video:
        """x behind the `length` frames before it; keeps the last `length` of them all.

        Before a stream there are zeros, or repeats of its first frame.
        """
        if not self.begins:
            x = torch.cat([next(self.pasts), x], dim=2)
        elif before == "zeros":
            x = F.pad(x, (0, 0, 0, 0, length, 0))
        else:
            x = torch.cat([*[x[:, :, :1]] * length, x], dim=2)
        self.kept.append(x[:, :, -length:].clone(memory_format=layout(x)))  # one for all, or later graphs would differ
        return x

    def recall_rows(self, x: Rows, length: int | None) -> Rows:
        """Rows of keys, values or their mask behind the `length` rows before them, zeros at first; None: behind all."""
        past = x.new_zeros(*x.shape[:2], length or 0, *x.shape[3:]) if self.begins else next(self.pasts)
        x = torch.cat([past, x], dim=2)
        self.kept.append(x if length is None else x[:, :, -length:].clone())
        return x


def layout(x: Video) -> torch.memory_format:
    """Channels last in memory, or not."""
    last = torch.channels_last_3d
    return last if x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format


class Causal(nn.Module):
    """A layer that crosses time: `forward(x, memory)`."""


class Stream(nn.Sequential, Causal):
    """Layers in a row, of which those that cross time are given the memory."""

    def forward(self, x: Video, memory: Memory) -> Video:  # pyright: ignore[reportIncompatibleMethodOverride]
        for layer in self:
            x = layer(x, memory) if isinstance(layer, Causal) else layer(x)
        return x


class RMSNorm(nn.Module):
    """x / rms(x) * gamma over the channels of each pixel, normalised in float32 and scaled in the dtype of x."""

    def __init__(self, width: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * axes))

    def forward(self, x: Float[Tensor, "b c *axes"]) -> Float[Tensor, "b c *axes"]:
        return F.normalize(x.float(), dim=1).to(x.dtype) * (self.gamma * len(self.gamma) ** 0.5)


class CausalVae(nn.Module):
    """Pixels in [-1, 1] to latents as the diffusion network sees them, and back; the contract is `codec.VideoCodec`'s.

    A family says how one group is encoded and one latent decoded. A `State` is a value that the caller holds; its
    tensors have the batch first. It is never changed in place.
    """

    channels: int
    scale: int
    stride: int
    encoding: str = ""
    grows: bool = False

    @abstractmethod
    def encode_group(self, frames: Pixels, pasts: State) -> tuple[Latents, State]:
        """The latent of the first frame of streams (no pasts), or of the next `stride` frames."""

    @abstractmethod
    def decode_latent(self, latent: Float[Tensor, "b c h w"], pasts: State) -> tuple[Pixels, State]:
        """The frames of one latent, clamped to [-1, 1]: one for the first (no pasts), `stride` for all others."""

    def encode(self, pixels: Pixels) -> Latents:
        """Normalised posterior means of whole clips of stride * k + 1 frames.

        Raises UserError for another number of frames, or sizes that are no multiples of `scale`.
        """
        frames = pixels.shape[1]
        if (frames - 1) % self.stride:
            near = self.stride * round((frames - 1) / self.stride) + 1
            raise UserError(f"a clip of {frames} frames: the VAE takes {self.stride}k + 1 of them; {near} would do")
        return self.encode_next(pixels)[0]

    def decode(self, latents: Latents) -> Pixels:
        """All stride * (f - 1) + 1 frames of whole clips, clamped to [-1, 1]; raises UserError for foreign latents."""
        return self.decode_next(latents)[0]

    def encode_next(self, pixels: Pixels, state: State | None = None) -> tuple[Latents, State]:
        """The latents that the next frames of streams complete, if any; no state starts anew.

        The state holds the frames that wait for their group to be full, then the pasts of the encoder.
        """
        batch, _, _, height, width = pixels.shape
        if height % self.scale or width % self.scale:
            raise UserError(f"frames of {height}x{width}: the VAE takes multiples of {self.scale} pixels")
        waiting, pasts = (pixels[:, :0], ()) if state is None else (state[0], state[1:])
        frames = torch.cat([waiting, pixels], dim=1)
        latents = [frames.new_zeros(batch, 0, self.channels, height // self.scale, width // self.scale)]
        while frames.shape[1] >= (group := self.stride if pasts else 1):
            latent, pasts = self.encode_group(frames[:, :group], pasts)
            latents.append(latent)
            frames = frames[:, group:]
        return torch.cat(latents, dim=1), (frames.clone(memory_format=torch.contiguous_format), *pasts)

    def decode_next(self, latents: Latents, state: State | None = None) -> tuple[Pixels, State]:
        """The frames of the next latents of streams: `stride` each, but one for the first latent of a stream."""
        batch, _, channels, height, width = latents.shape
        if channels != self.channels:
            raise UserError(f"latents of {channels} channels: this VAE has {self.channels}, so they come from another")
        pasts: State = () if state is None else state
        pixels = [latents.new_zeros(batch, 0, 3, height * self.scale, width * self.scale)]
        for latent in latents.unbind(1):
            frames, pasts = self.decode_latent(latent, pasts)
            pixels.append(frames)
        return torch.cat(pixels, dim=1), pasts
