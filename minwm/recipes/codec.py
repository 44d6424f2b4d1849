"""Training the decoder of the small codec: reconstruction of rendered clips. No camera, no text, no diffusion."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.nets.codec import Codec
from minwm.recipes.base import Loss


@dataclass(frozen=True, kw_only=True)
class CodecTraining:
    kind: ClassVar[str] = "codec"
    fit_clips: int = 256
    """Clips from which the encoder is found, in closed form; a codec that is continued keeps its encoder."""


class CodecRecipe:
    """Role: student, the codec. Batches are pixels."""

    trained: ClassVar[tuple[str, ...]] = ("student",)

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    @property
    def stateful(self) -> dict[str, Codec]:
        return {"student": self.codec}

    def loss(self, pixels: Float[Tensor, "b n 3 H W"], step: int, generator: torch.Generator) -> Loss:
        total, logs = self.codec.loss(pixels, generator)
        return Loss(total, "student", {"loss": float(total.detach()), **logs})
