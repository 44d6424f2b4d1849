"""Flow matching: bidirectional (foundation, phase 1 with cameras) and autoregressive by teacher forcing (stage 1)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.core.flow import Times, bell_weight, interpolate, shift, velocity
from minwm.core.types import Clip
from minwm.nets.backbone import teacher_forced
from minwm.recipes.base import (
    Loss,
    Recipe,
    drop_text,
    frame_mse,
    given_image,
    held,
    hold_first,
    noise_like,
    own_past,
    past_of,
)


@dataclass(frozen=True, kw_only=True)
class TimeLaw:
    """How training times are drawn and weighted."""

    law: Literal["uniform", "logit_normal"] = "uniform"
    """u uniform (Wan) or sigmoid of a standard normal (HunyuanVideo); then shifted."""
    shift: float = 5.0
    weight: Literal["bell", "none", "clean"] = "bell"
    """Wan weights times by a bell around t = 1/2; HunyuanVideo by nothing. Clean: by t^2, which makes the error of the
    velocity that of the clean latents."""

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.law == "uniform":
            u = torch.rand(shape, generator=generator, device=generator.device)
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
class DiffusionConfig:
    """Fields shared by both flow-matching stages."""

    time: TimeLaw = TimeLaw()
    text_dropout: float = 0.1
    """Chance of the null prompt, per clip; guidance needs some."""
    image_start: float = 1.0
    """Chance, per batch, that the first latent is given clean; otherwise it is generated too."""

    def __post_init__(self) -> None:
        for name in ("text_dropout", "image_start"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: a probability lies between 0 and 1")

    def prepare(self, clip: Clip, generator: torch.Generator) -> Clip:
        """Draw the dropouts of one batch."""
        clip = replace(clip, cond=drop_text(clip.cond, self.text_dropout, generator))
        return given_image(clip, self.image_start, generator)


@dataclass(frozen=True, kw_only=True)
class BidirectionalConfig(DiffusionConfig):
    kind: ClassVar[str] = "bidirectional"


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig(DiffusionConfig):
    kind: ClassVar[str] = "autoregressive"
    own_past: float = 0.0
    """Chance, per batch, that chunks are given the network's own predictions of the earlier ones (`own_past`)."""


class Bidirectional(Recipe):
    """One time per clip, every frame sees every frame: || v(x_t, t) - (eps - x_0) ||^2 (paper, Sec. 2.1)."""

    cfg: BidirectionalConfig

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        clip = self.cfg.prepare(clip, generator)
        eps = noise_like(clip.latents, generator)
        level = self.cfg.time.draw((len(eps), 1), generator).to(eps).expand(eps.shape[:2])
        x, t = hold_first(interpolate(clip.latents, eps, level), level, clip.cond)
        v = self.networks["student"](x, t, clip.cond)
        total = frame_mse(v, velocity(clip.latents, eps), held(clip) * self.cfg.time.weigh(level))
        return Loss(total, "student", {"loss": float(total.detach())})


class Autoregressive(Recipe):
    """Teacher forcing: one time per chunk, every noisy chunk given the clean ones before it (paper, stage 1).

    With context noise the past is noised too, at times up to the one at which streams will keep it.
    """

    cfg: AutoregressiveConfig

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        clip = self.cfg.prepare(clip, generator)
        eps = noise_like(clip.latents, generator)
        chunks = self.geometry.chunks(eps.shape[1])
        sizes = torch.tensor([b - a for a, b in chunks], device=eps.device)

        def per_frame(per_chunk: Tensor) -> Tensor:  # output_size: or a GPU would be waited for
            return per_chunk.to(eps).repeat_interleave(sizes, dim=1, output_size=eps.shape[1])

        t = per_frame(self.cfg.time.draw((len(eps), len(chunks)), generator))
        level = per_frame(torch.rand((len(eps), len(chunks)), generator=generator, device=generator.device))
        past = past_of(clip, self.geometry.context_noise * level, generator)
        student = self.networks["student"]
        if torch.rand((), generator=generator, device=generator.device) < self.cfg.own_past:
            past = own_past(student, clip, past, self.cfg.time.shift, self.geometry, generator)
        v = teacher_forced(student, past, interpolate(clip.latents, eps, t), t, clip.cond, self.geometry)
        total = frame_mse(v, velocity(clip.latents, eps), held(clip) * self.cfg.time.weigh(t))
        return Loss(total, "student", {"loss": float(total.detach())})
