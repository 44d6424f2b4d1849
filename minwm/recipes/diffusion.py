"""Flow matching: bidirectional (foundation, phase 1 with cameras) and autoregressive by teacher forcing (stage 1)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.core.flow import Times, bell_weight, interpolate, shift, velocity
from minwm.core.types import Clip
from minwm.nets.backbone import Backbone, keep_first_clean, teacher_forced
from minwm.recipes.base import Loss, Recipe, RecipeConfig, check_probabilities
from minwm.recipes.ops import (
    bernoulli,
    drop_text,
    frame_mse,
    loss_mask,
    noise_like,
    random_part,
    sample_image_start,
    self_conditioned_context,
    teacher_context,
)
from minwm.store.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class TimeLaw:
    """The distribution of training times and their weights in the loss."""

    law: Literal["uniform", "logit_normal"] = "uniform"
    """u uniform (Wan) or sigmoid of a standard normal (HunyuanVideo); then shifted."""
    shift: float = 5.0
    weight: Literal["bell", "none", "clean"] = "bell"
    """Wan weights times by a bell around t = 1/2; HunyuanVideo does not. Clean: by t^2, which makes the error of the
    velocity that of the clean latents."""

    u_min: float = 0.0
    u_max: float = 1.0
    """Bounds of a uniform u; minWM v0.2 leaves out both ends for Wan, 0.02 to 0.98. Streams start at one end."""

    def __post_init__(self) -> None:
        if not 0 <= self.u_min < self.u_max <= 1:
            raise ConfigError(f"time: u from {self.u_min} to {self.u_max} is no interval inside [0, 1]")
        if self.law != "uniform" and (self.u_min, self.u_max) != (0, 1):
            raise ConfigError(f"time.law={self.law} has no bounds; leave u_min and u_max at 0 and 1")

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.law == "uniform":
            u = torch.rand(shape, generator=generator, device=generator.device)
            u = self.u_min + (self.u_max - self.u_min) * u
        else:
            u = torch.randn(shape, generator=generator, device=generator.device).sigmoid()
        return shift(u, self.shift)

    def weigh(self, t: Times) -> Times:
        match self.weight:
            case "bell":
                return bell_weight(t, self.shift).to(t)
            case "clean":
                return t * t
        return torch.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(RecipeConfig):
    """Fields shared by both flow-matching stages."""

    time: TimeLaw = TimeLaw()
    text_dropout: float = 0.1
    """Probability of the unconditional prompt, per clip; classifier-free guidance needs some."""
    dropped_prompt: str | None = None
    """Prompt in place of a dropped one, such as "" for Wan; None: states of zeros. Never the negative prompt, which
    belongs to sampling."""
    image_start: float = 1.0
    """Probability, per batch, that the first latent is given clean; otherwise it is generated too."""
    latents: int = 0
    """Latents of a random part of each clip that a step takes, for many quick steps at first; 0: the whole clip. The
    first latent of a part from the middle stands for as many frames as the others."""

    def __post_init__(self) -> None:
        check_probabilities(self, "text_dropout", "image_start")

    def check(self, model: ModelConfig) -> None:
        lead, chunk = model.stream.first_chunk_frames, model.stream.chunk
        fits = [n for n in range(lead + chunk, model.latents + 1) if not self.teacher_forced or (n - lead) % chunk == 0]
        if self.latents and self.latents not in fits:
            raise ConfigError(f"{self.kind}.latents={self.latents}: give 0, or one of {', '.join(map(str, fits))}")
        if self.latents and model.image_start and "image_states" in model.text.shapes:
            raise ConfigError(
                f"{self.kind}.latents={self.latents}: a part of a clip starts with another frame than the one whose "
                "states its shard holds; give 0, for whole clips"
            )

    def clip_latents(self, model: ModelConfig) -> int:
        return self.latents or model.latents

    def null_text(self, model: ModelConfig) -> Float[Tensor, "l d"] | None:
        return None if self.dropped_prompt is None else model.text.encode([self.dropped_prompt])["text"][0]

    def augment(self, clip: Clip, generator: torch.Generator) -> Clip:
        """Take a random part of the clip; drop prompts and the first latent at random."""
        if self.latents:
            clip = random_part(clip, self.latents, generator)
        clip = replace(clip, cond=drop_text(clip.cond, self.text_dropout, generator))
        return sample_image_start(clip, self.image_start, generator)


@dataclass(frozen=True, kw_only=True)
class BidirectionalConfig(DiffusionConfig):
    kind: ClassVar[str] = "bidirectional"

    def build(self, model: ModelConfig, networks: Mapping[str, Backbone]) -> "BidirectionalDiffusion":
        return BidirectionalDiffusion(self, model, networks)


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig(DiffusionConfig):
    kind: ClassVar[str] = "autoregressive"
    teacher_forced: ClassVar[bool] = True
    self_conditioning: float = 0.0
    """Probability, per batch, that the context of chunks is the network's own predictions instead of the clean clip."""
    time_per: Literal["chunk", "clip"] = "chunk"
    """Chunks of a clip have times of their own (Wan), so that a pass trains at many; or one for all (HY)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probabilities(self, "self_conditioning")

    def build(self, model: ModelConfig, networks: Mapping[str, Backbone]) -> "AutoregressiveDiffusion":
        return AutoregressiveDiffusion(self, model, networks)


class BidirectionalDiffusion(Recipe[Backbone]):
    """|| v(x_t, t) - (eps - x_0) ||^2 with one t per clip; every frame attends to every frame (paper, Sec. 2.1)."""

    cfg: BidirectionalConfig

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        clip = self.cfg.augment(clip, generator)
        eps = noise_like(clip.latents, generator)
        t = self.cfg.time.draw((len(eps), 1), generator).to(eps).expand(eps.shape[:2])
        weight = loss_mask(clip) * self.cfg.time.weigh(t)
        x_t, times = keep_first_clean(interpolate(clip.latents, eps, t), t, clip.cond)
        v = self.networks["student"](x_t, times, clip.cond)
        total = frame_mse(v, velocity(clip.latents, eps), weight)
        return Loss(total, "student", {"loss": total.detach()})


class AutoregressiveDiffusion(Recipe[Backbone]):
    """|| v(x_t, t | clean earlier chunks) - (eps - x_0) ||^2 with one t per chunk: teacher forcing (paper, stage 1).

    With context noise the earlier chunks are noised too, at random times up to the stream's `context_noise`.
    """

    cfg: AutoregressiveConfig

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        clip = self.cfg.augment(clip, generator)
        eps = noise_like(clip.latents, generator)
        chunks = self.geometry.chunks(eps.shape[1])
        sizes = torch.tensor([b - a for a, b in chunks], device=eps.device)

        def per_frame(per_chunk: Tensor) -> Tensor:  # with output_size no GPU has to be waited for
            return per_chunk.to(eps).repeat_interleave(sizes, dim=1, output_size=eps.shape[1])

        times = len(chunks) if self.cfg.time_per == "chunk" else 1
        t = per_frame(self.cfg.time.draw((len(eps), times), generator).expand(-1, len(chunks)))
        u = per_frame(torch.rand((len(eps), len(chunks)), generator=generator, device=generator.device))
        context = teacher_context(clip, self.geometry, generator, u)
        student = self.networks["student"]
        if bernoulli(self.cfg.self_conditioning, generator):
            context = self_conditioned_context(student, clip, context, self.cfg.time.shift, self.geometry, generator, u)
        v = teacher_forced(student, context, interpolate(clip.latents, eps, t), t, clip.cond, self.geometry)
        total = frame_mse(v, velocity(clip.latents, eps), loss_mask(clip) * self.cfg.time.weigh(t))
        return Loss(total, "student", {"loss": total.detach()})
