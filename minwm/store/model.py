"""What a model is: a network, a codec, and the config that says how they make video."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minwm.cameras.trajectory import Motion
from minwm.core.config import ConfigError
from minwm.core.runtime import pick_device
from minwm.data.spec import ClipSpec
from minwm.nets.attention import FAST_BFLOAT16
from minwm.nets.backbone import Backbone
from minwm.nets.chunks import Geometry, StreamConfig
from minwm.nets.codec import TinyDecoder
from minwm.nets.text import WordText
from minwm.render.base import Scene
from minwm.render.place import SCENES, SceneKind
from minwm.store.layouts import AnyCodec, AnyCodecConfig, NetworkConfig, TextConfig
from minwm.stream.solvers import Sampler

Prompts = list[str] | dict[str, Float[Tensor, "b _ _"]]
"""As text, or encoded already (`TextEncoder.encode`)."""
SQUARE_70 = (0.5 / math.tan(math.radians(35)), 0.5 / math.tan(math.radians(35)))
"""Focal lengths of square pictures, 70 degrees wide."""
LARGE_FRAME = 128
"""Tokens of a frame from which on products in bfloat16 gain a CPU more than the casts around them cost."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All that turns noise, a prompt and a trajectory into video, except the weights."""

    network: NetworkConfig
    sampler: Sampler
    codec: AnyCodecConfig
    motion: Motion = field(default_factory=Motion)
    """Speeds and frame rate: a key means the same motion for every model trained on them."""
    text: TextConfig = field(default_factory=WordText)
    negative: str | None = None
    """Prompt of the unconditional branch of guidance; None: states of zeros."""
    latents: int = 9
    """Latent frames per training clip."""
    height: int = 64
    width: int = 64
    focal: tuple[float, float] = SQUARE_70
    """fx / width and fy / height of the training cameras."""
    scenes: SceneKind = "worlds"
    """What is rendered where the model starts in a scene, or is compared with one."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """Chunks, and what a stream remembers of them."""

    def __post_init__(self) -> None:
        network, codec = self.network, self.codec
        if codec.channels != network.channels:
            raise ConfigError(
                f"codec.channels={codec.channels} of {codec.kind}, network.channels={network.channels} of "
                f"{network.kind}: latents of one do not fit the other; give another codec, or set both alike"
            )
        for part, shape in self.text.shapes.items():
            if (read := network.text_shapes.get(part)) != shape:
                takes = "takes none" if read is None else f"takes {read[0]} of width {read[1]}"
                raise ConfigError(
                    f"{type(self.text).__name__} gives {shape[0]} states of width {shape[1]} as {part}, network="
                    f"{network.kind} {takes}; set lengths and widths in text and network alike"
                )

    @property
    def geometry(self) -> Geometry:
        patch = self.scale * self.network.patch
        return self.stream.geometry(tokens=(self.height // patch) * (self.width // patch))

    @property
    def intrinsics(self) -> Float[np.ndarray, "4"]:
        return np.array([*self.focal, 0.5, 0.5])

    @property
    def frames(self) -> int:
        """Pixel frames per training clip."""
        return self.motion.stride * (self.latents - 1) + 1

    @property
    def image_start(self) -> bool:
        """Whether clips start from an image, which is the first latent, in training and after; else from text alone."""
        return self.stream.takes_image

    def scene(self, seed: int) -> Scene:
        """The scene of a seed."""
        return SCENES[self.scenes](seed)

    @property
    def scale(self) -> int:
        return self.codec.scale

    @property
    def clip_spec(self) -> ClipSpec:
        """What training clips must be like."""
        names = ("latents", "height", "width", "focal", "motion", "text", "scenes", "scale")
        return ClipSpec(channels=self.network.channels, **{name: getattr(self, name) for name in names})

    def encode_prompts(self, prompts: Prompts) -> dict[str, Tensor]:
        """States of prompts, and of the negative prompt if there is one: parts of a `Condition`."""
        if isinstance(prompts, list):
            every = prompts if self.negative is None else [*prompts, self.negative]
            # all at once: a large encoder is loaded once
            states = {name: x[: len(prompts)] for name, x in self.text.encode(every).items()}
        else:
            states = prompts
        null = self.negative_text()
        return states if null is None else {**states, "null": null.expand_as(states["text"])}

    def negative_text(self) -> Float[Tensor, "l d"] | None:
        """Text states of the negative prompt."""
        return None if self.negative is None else self.text.encode([self.negative])["text"][0]

    def latent_shape(self, batch: int, latents: int | None = None) -> tuple[int, int, int, int, int]:
        frames = latents or self.latents
        return batch, frames, self.network.channels, self.height // self.scale, self.width // self.scale


@dataclass(frozen=True)
class Model:
    """A network with what it needs around it."""

    config: ModelConfig
    net: Backbone
    codec: AnyCodec | TinyDecoder

    def ready(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Model":
        """The model, moved in place to a device (this machine's GPU, else its CPU) in a type of numbers.

        That type is by default bfloat16 where products of it are fast, and float32 elsewhere: on a GPU, and on a CPU
        with AVX512-BF16 if frames have `LARGE_FRAME` tokens.
        """
        device = torch.device(device) if device else pick_device()
        large = self.config.geometry.tokens >= LARGE_FRAME
        fast = device.type == "cuda" or (device.type == "cpu" and FAST_BFLOAT16 and large)
        dtype = dtype or (torch.bfloat16 if fast else torch.float32)
        for part in (self.net, self.codec):
            part.to(device, dtype)
        return self
