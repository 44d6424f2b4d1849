"""Training the decoder of the small codec: reconstruction of rendered clips. No camera, no text, no diffusion."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.data.dataset import BatchSource, RawDataset, Split
from minwm.data.noise import PoseNoise
from minwm.nets.small_codec import SmallCodec
from minwm.recipes.base import Loss, Recipe, RecipeConfig
from minwm.recipes.ops import random_index
from minwm.store.folder import save_codec
from minwm.store.model import AnyCodec, ModelConfig


@dataclass(frozen=True, kw_only=True)
class CodecTraining(RecipeConfig):
    kind: ClassVar[str] = "codec"
    trains_backbone: ClassVar[bool] = False
    validates: ClassVar[bool] = False
    weights_file: ClassVar[str] = "codec.safetensors"
    data_command: ClassVar[str] = "minwm data render"
    fit_clips: int = 256
    """Clips from which the encoder is computed in closed form; a codec that is continued keeps its encoder."""
    latents: int = 0
    """Latents of a random part of each clip that a step takes; 0: the whole clip."""

    def build(self, model: ModelConfig, networks: Mapping[str, SmallCodec]) -> "CodecRecipe":
        return CodecRecipe(self, model, networks)

    def check(self, model: ModelConfig) -> None:
        if not 0 <= self.latents <= model.latents:
            raise ConfigError(f"codec.latents={self.latents}: clips have {model.latents}; give 0 to {model.latents}")

    def network(self, model: ModelConfig) -> SmallCodec:
        codec = model.codec.build()
        if not isinstance(codec, SmallCodec):
            raise ConfigError(f"model.codec is {model.codec.kind!r}: only the small codec can be trained")
        return codec

    def dataset(self, path: Path, split: Split, model: ModelConfig, noise: PoseNoise | None = None) -> RawDataset:
        return RawDataset(path, split, spec=model.clip_spec)

    def example_batch(self, model: ModelConfig, batch: int) -> Float[Tensor, "b n 3 H W"]:
        return torch.rand(batch, model.frames, 3, model.height, model.width)

    def describe_clip(self, model: ModelConfig) -> str:
        return f"{model.frames} frames of {model.width}x{model.height}"

    def save(self, out: Path, model: ModelConfig, student: Any, codec: AnyCodec | None) -> None:
        save_codec(out, student)


class CodecRecipe(Recipe[SmallCodec]):
    """Role: student, the codec. Batches are pixels."""

    cfg: CodecTraining

    def fit(self, data: BatchSource[Any]) -> None:
        self.networks["student"].fit(data.batch([i]) for i in range(min(self.cfg.fit_clips, len(data))))

    def loss(self, clip: Float[Tensor, "b n 3 H W"], step: int, generator: torch.Generator) -> Loss:
        codec = self.networks["student"]
        if self.cfg.latents:
            frames = codec.stride * (self.cfg.latents - 1) + 1
            start = random_index(clip.shape[1] - frames + 1, generator)
            clip = clip[:, start : start + frames]
        total, logs = codec(clip, generator)
        return Loss(total, "student", {"loss": total.detach(), **logs})
