"""Flow matching: bidirectional (foundation, phase 1 with cameras) and autoregressive by teacher forcing (stage 1)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.core.flow import Latents, Times, bell_weight, interpolate, shift, velocity
from minwm.core.types import Clip, Condition
from minwm.nets.attention import Masked, chunk_causal
from minwm.nets.backbone import Backbone, keep_first_clean, teacher_forced
from minwm.nets.chunks import StreamConfig
from minwm.recipes.base import ClipConfig, Loss, Recipe, check_probabilities
from minwm.recipes.ops import (
    bernoulli,
    drop_text,
    frame_mse,
    loss_mask,
    noise_like,
    random_index,
    remembered_part,
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
class DiffusionConfig(ClipConfig):
    """Fields shared by both flow-matching stages."""

    time: TimeLaw = TimeLaw()
    text_dropout: float = 0.1
    """Probability of the unconditional prompt, per clip; classifier-free guidance needs some."""
    dropped_prompt: str | None = None
    """Prompt in place of a dropped one, such as "" for Wan; None: states of zeros. Never the negative prompt, which
    belongs to sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probabilities(self, "text_dropout")

    def null_text(self, model: ModelConfig) -> Float[Tensor, "l d"] | None:
        return None if self.dropped_prompt is None else model.text.encode([self.dropped_prompt])["text"][0]

    def augment(self, clip: Clip, stream: StreamConfig, generator: torch.Generator) -> Clip:
        """Drop prompts at random; take a random part of the clip, with what is given of it."""
        clip = replace(clip, cond=drop_text(clip.cond, self.text_dropout, generator))
        return self.sample_clip(clip, stream, generator)


@dataclass(frozen=True, kw_only=True)
class BidirectionalConfig(DiffusionConfig):
    kind: ClassVar[str] = "bidirectional"

    def build(self, model: ModelConfig, networks: Mapping[str, Backbone]) -> "BidirectionalDiffusion":
        return BidirectionalDiffusion(self, model, networks)


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig(DiffusionConfig):
    kind: ClassVar[str] = "autoregressive"
    forcing: Literal["teacher", "diffusion"] = "teacher"
    """What chunks see of earlier ones. Teacher forcing: a clean copy, which is what they are in a stream. Diffusion
    forcing (HY-WorldPlay): the same copy, with noise at times of their own."""
    memory: float = 0.0
    """Probability, per batch, that clips are what a stream would have in its cache for a random chunk of theirs, with
    chunks retrieved from the past before it, and that this chunk alone is learned (HY-WorldPlay: 0.8); else they are
    their first latents, as many. For streams with `recompute`, on clips that are longer than what these see."""
    memory_times: tuple[float, float] = (0.016, 0.5)
    """Between which times the past then lies in diffusion forcing."""
    memory_grows: int = 0
    """Step from which on that chunk is taken from whole clips; before, from a first part that grows with the step."""
    self_conditioning: float = 0.0
    """Probability, per batch, that the context of chunks is what the network streams itself, in one pass per chunk,
    instead of the clean clip."""
    time_per: Literal["chunk", "clip"] = "chunk"
    """Chunks of a clip have times of their own (Wan), so that a pass trains at many; or one for all (HY)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probabilities(self, "self_conditioning", "memory")
        low, high = self.memory_times
        if not 0 <= low <= high < 1:
            raise ConfigError(f"autoregressive.memory_times={low},{high}: give two times in [0, 1), the smaller first")
        if self.forcing == "diffusion" and self.self_conditioning:
            raise ConfigError("autoregressive.self_conditioning is for forcing=teacher: else no context is apart")

    @property
    def teacher_forced(self) -> bool:
        return self.forcing == "teacher"

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        seen = model.stream.start(model.stream.slots)
        if not self.memory:
            model.stream.check_one_pass(self.clip_latents(model))
        elif self.latents or model.stream.recompute == "never" or model.latents <= seen:
            raise ConfigError(
                f"autoregressive.memory={self.memory} needs stream.recompute=causal (or full), clips longer than the "
                f"{seen} latents that a chunk sees, and latents=0; here recompute={model.stream.recompute}, clips of "
                f"{model.latents}, latents={self.latents}"
            )

    def clip_latents(self, model: ModelConfig) -> int:
        return model.stream.start(model.stream.slots) if self.memory else super().clip_latents(model)

    def build(self, model: ModelConfig, networks: Mapping[str, Backbone]) -> "AutoregressiveDiffusion":
        return AutoregressiveDiffusion(self, model, networks)


class BidirectionalDiffusion(Recipe[Backbone]):
    """|| v(x_t, t) - (eps - x_0) ||^2 with one t per clip; every frame attends to every frame (paper, Sec. 2.1)."""

    cfg: BidirectionalConfig

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        clip = self.cfg.augment(clip, self.geometry, generator)
        eps = noise_like(clip.latents, generator)
        t = self.cfg.time.draw((len(eps), 1), generator).to(eps).expand(eps.shape[:2])
        weight = loss_mask(clip) * self.cfg.time.weigh(t)
        x_t, times = keep_first_clean(interpolate(clip.latents, eps, t), t, clip.cond.first_latents)
        v = self.networks["student"](x_t, times, clip.cond)
        total = frame_mse(v, velocity(clip.latents, eps), weight)
        return Loss(total, "student", {"loss": total.detach()})


class AutoregressiveDiffusion(Recipe[Backbone]):
    """|| v(x_t, t | earlier chunks) - (eps - x_0) ||^2 with one t per chunk; in teacher forcing the earlier chunks are
    clean (paper, stage 1).

    With context noise they are noised too, at random times up to the stream's `context_noise`.
    """

    cfg: AutoregressiveConfig

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        remembered = self.cfg.memory > 0 and bernoulli(self.cfg.memory, generator)
        if self.cfg.memory:
            clip = self._remembered(clip, step, generator) if remembered else self._start(clip)
        clip = self.cfg.augment(clip, self.geometry, generator)
        eps = noise_like(clip.latents, generator)
        chunks = len(self.geometry.chunks(eps.shape[1]))
        times = chunks if self.cfg.time_per == "chunk" else 1
        t = self._per_frame(self.cfg.time.draw((len(eps), times), generator).expand(-1, chunks), eps)
        u = self._per_frame(torch.rand((len(eps), chunks), generator=generator, device=generator.device), eps)
        mask = loss_mask(clip)
        if remembered:
            mask[:, : -self.geometry.chunk] = 0
        if self.cfg.forcing == "diffusion":
            low, high = self.cfg.memory_times
            t = torch.where(mask > 0, t, low + (high - low) * u) if remembered else t
            v = self._diffusion_forced(interpolate(clip.latents, eps, t), t, clip.cond)
        else:
            v = self._teacher_forced(clip, interpolate(clip.latents, eps, t), t, u, generator)
        total = frame_mse(v, velocity(clip.latents, eps), mask * self.cfg.time.weigh(t))
        return Loss(total, "student", {"loss": total.detach()})

    def _per_frame(self, per_chunk: Float[Tensor, "b chunks"], like: Latents) -> Times:
        sizes = torch.tensor([b - a for a, b in self.geometry.chunks(like.shape[1])], device=like.device)
        # with output_size no GPU has to be waited for
        return per_chunk.to(like).repeat_interleave(sizes, dim=1, output_size=like.shape[1])

    def _remembered(self, clip: Clip, step: int, generator: torch.Generator) -> Clip:
        seen, chunks = self.geometry.slots, len(self.geometry.chunks(clip.latents.shape[1]))
        grown = min(step / self.cfg.memory_grows, 1.0) if self.cfg.memory_grows else 1.0
        later = 1 + int(grown * (chunks - seen - 1))
        return remembered_part(clip, self.geometry, seen + random_index(later, generator))

    def _start(self, clip: Clip) -> Clip:
        frames = self.geometry.start(self.geometry.slots)
        return replace(clip, latents=clip.latents[:, :frames], cond=clip.cond.frames(0, frames))

    def _diffusion_forced(self, x_t: Latents, t: Times, cond: Condition) -> Latents:
        x_t, t = keep_first_clean(x_t, t, cond.first_latents, self.geometry)
        return self.networks["student"](x_t, t, cond, Masked(chunk_causal(self.geometry), x_t.shape[1]))

    def _teacher_forced(self, clip: Clip, x_t: Latents, t: Times, u: Times, generator: torch.Generator) -> Latents:
        student = self.networks["student"]
        if bernoulli(self.cfg.self_conditioning, generator):
            context = self_conditioned_context(student, clip, self.cfg.time.shift, self.geometry, generator, u)
        else:
            context = teacher_context(clip, self.geometry, generator, u)
        return teacher_forced(student, context, x_t, t, clip.cond, self.geometry)
