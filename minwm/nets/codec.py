"""The contract of a video codec; a tiny decoder in place of a codec's own."""

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minwm.core.config import ConfigError

Pixels = Float[Tensor, "b n 3 H W"]
Latents = Float[Tensor, "b f c h w"]
State = tuple[Tensor, ...]
Decode = Callable[[Latents, State | None], tuple[Pixels, State]]
"""`VideoCodec.decode_next`."""


@runtime_checkable
class VideoCodec(Protocol):
    """Any codec: whole clips of stride * k + 1 frames, or a stream whose state the caller holds."""

    stride: int
    scale: int
    channels: int
    decoding: tuple[str, ...]
    """Submodules that only decode: training them leaves latents as they are."""
    encoding: str
    """What besides weights decides its latents, as a text, for codecs of which there are variants."""
    grows: bool
    """Whether the state of a stream grows with it, as keys and values of all that was seen do; no one graph can hold
    its steps then."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def encode(self, pixels: Pixels) -> Latents: ...

    def decode(self, latents: Latents) -> Pixels: ...

    def encode_next(self, pixels: Pixels, state: State | None = None) -> tuple[Latents, State]: ...

    def decode_next(self, latents: Latents, state: State | None = None) -> tuple[Pixels, State]: ...


def channels_last(codec: VideoCodec) -> None:
    """Lay out weights of convolutions with channels last, in place: what they make is laid out like them."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in codec.parameters():
        if memory_format := formats.get(parameter.ndim):
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


class TinyDecoder(nn.Module):
    """A codec that decodes as another one does: a tiny one for the same latents, instead of the large one's own."""

    decoding: tuple[str, ...] = ("tiny",)

    def __init__(self, codec: VideoCodec, tiny: VideoCodec) -> None:
        super().__init__()
        for name in ("channels", "scale", "stride"):
            if (ours := getattr(codec, name)) != (theirs := getattr(tiny, name)):
                raise ConfigError(f"the decoder is for other latents: their {name} is {theirs}, here it is {ours}")
        self.codec, self.tiny = codec, tiny
        self.channels, self.scale, self.stride = codec.channels, codec.scale, codec.stride
        self.encoding, self.grows = codec.encoding, tiny.grows

    def encode(self, pixels: Pixels) -> Latents:
        return self.codec.encode(pixels)

    def encode_next(self, pixels: Pixels, state: State | None = None) -> tuple[Latents, State]:
        return self.codec.encode_next(pixels, state)

    def decode(self, latents: Latents) -> Pixels:
        return self.tiny.decode(latents)

    def decode_next(self, latents: Latents, state: State | None = None) -> tuple[Pixels, State]:
        return self.tiny.decode_next(latents, state)
