"""Stage 2b, causal consistency distillation: neighbours on a PF-ODE trajectory agree on its end (paper eq. 2)."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from minwm.core.flow import Latents, euler, guide, interpolate, schedule, x0_from_velocity
from minwm.core.types import Clip, Condition
from minwm.nets.attention import Geometry
from minwm.nets.backbone import Backbone, Context, teacher_forced
from minwm.recipes.base import (
    Loss,
    Recipe,
    frame_mse,
    loss_mask,
    noise_like,
    random_index,
    sample_image_start,
    self_conditioned_context,
    teacher_context,
)


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    kind: ClassVar[str] = "consistency"
    grid: int = 50
    """Steps of the discretised ODE."""
    shift: float = 5.0
    guidance: float = 3.0
    """Guidance of the teacher's ODE step."""
    image_start: float = 1.0
    """Chance, per batch, that the first latent is given."""
    self_conditioning: float = 0.0
    """Chance, per batch, that chunks are given the student's own predictions of the earlier ones."""
    target_decay: float = 0.99
    """EMA of the student that gives the target, from the first step on."""


def guided_teacher(
    teacher: Backbone, past: Context, cond: Condition, x: Latents, t: float, guidance: float, geometry: Geometry
) -> Latents:
    """Velocity of the autoregressive teacher on all chunks at time t, given real history, with guidance."""
    times = x.new_full(x.shape[:2], t)
    if guidance == 1:
        return teacher_forced(teacher, past, x, times, cond, geometry)
    both = Condition.stack(cond, cond.unconditional())
    latents, levels, noisy, times = (torch.cat([y, y]) for y in (past.latents, past.t, x, times))
    v, v_uncond = teacher_forced(teacher, Context(latents, levels), noisy, times, both, geometry).chunk(2)
    return guide(v, v_uncond, guidance)


class Consistency(Recipe):
    """|| f(x_i, t_i) - sg f_target(x_{i+1}, t_{i+1}) ||^2, f(x, t) = x - t v, all given real history.

    x_{i+1} is one guided Euler step of the teacher from x_i; the last pair ends at t = 0, where f is the identity.
    """

    frozen: ClassVar[tuple[str, ...]] = ("teacher",)

    cfg: ConsistencyConfig

    def __init__(self, cfg: ConsistencyConfig, networks: Mapping[str, Backbone], geometry: Geometry) -> None:
        super().__init__(cfg, networks, geometry)
        self.times = schedule(cfg.grid, cfg.shift)
        self.target_step: int | None = None
        self.networks["target"] = copy.deepcopy(self.networks["student"]).requires_grad_(False).eval()

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        if step != self.target_step:  # once per step, however many micro-batches it has
            self._update_target()
            self.target_step = step
        clip = sample_image_start(clip, self.cfg.image_start, generator)
        i = random_index(self.cfg.grid, generator)
        t, t_next = self.times[i], self.times[i + 1]
        eps = noise_like(clip.latents, generator)
        x = interpolate(clip.latents, eps, eps.new_full(eps.shape[:2], t))
        past = teacher_context(clip, self.geometry.context_noise, generator)
        if torch.rand((), generator=generator, device=generator.device) < self.cfg.self_conditioning:
            past = self_conditioned_context(
                self.networks["student"], clip, past, self.cfg.shift, self.geometry, generator
            )
        with torch.no_grad():
            v = guided_teacher(self.networks["teacher"], past, clip.cond, x, t, self.cfg.guidance, self.geometry)
            target = self._consistency_function(
                self.networks["target"], past, clip.cond, euler(x, v, t, t_next), t_next
            )
        total = frame_mse(
            self._consistency_function(self.networks["student"], past, clip.cond, x, t), target, loss_mask(clip)
        )
        return Loss(total, "student", {"loss": float(total.detach())})

    def _consistency_function(self, net: Backbone, past: Context, cond: Condition, x: Latents, t: float) -> Latents:
        """f(x, t): where the trajectory through x ends."""
        times = x.new_full(x.shape[:2], t)
        return x0_from_velocity(x, teacher_forced(net, past, x, times, cond, self.geometry), times)

    @torch.no_grad()
    def _update_target(self) -> None:
        """Move the target after the student; before the first update they are equal and this changes nothing."""
        for target, weight in zip(
            self.networks["target"].parameters(), self.networks["student"].parameters(), strict=True
        ):
            target.lerp_(weight, 1 - self.cfg.target_decay)
