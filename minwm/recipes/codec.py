"""Training the decoder of the small codec: reconstruction of rendered clips. No camera, no text, no diffusion."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.nets.codec import Codec
from minwm.recipes.base import Loss, pick


@dataclass(frozen=True, kw_only=True)
class CodecTraining:
    kind: ClassVar[str] = "codec"
    fit_clips: int = 256
    """Clips from which the encoder is found, in closed form; a codec that is continued keeps its encoder."""
    latents: int = 0
    """Latents of each clip that a step looks at, from anywhere on; 0: all of them."""


class CodecRecipe:
    """Role: student, the codec. Batches are pixels."""

    trained: ClassVar[tuple[str, ...]] = ("student",)

    def __init__(self, codec: Codec, cfg: CodecTraining = CodecTraining()) -> None:
        self.codec, self.cfg = codec, cfg

    @property
    def stateful(self) -> dict[str, Codec]:
        return {"student": self.codec}

    def loss(self, pixels: Float[Tensor, "b n 3 H W"], step: int, generator: torch.Generator) -> Loss:
        if self.cfg.latents:
            frames = self.codec.stride * (self.cfg.latents - 1) + 1
            start = pick(pixels.shape[1] - frames + 1, generator)
            pixels = pixels[:, start : start + frames]
        total, logs = self.codec.loss(pixels, generator)
        return Loss(total, "student", {"loss": float(total.detach()), **logs})
