"""Stage 2b, causal consistency distillation: neighbours on a PF-ODE trajectory agree on its end (paper eq. 2)."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from minwm.core.flow import Latents, euler, guide, interpolate, schedule, x0_from_velocity
from minwm.core.types import Clip, Condition
from minwm.nets.attention import Geometry
from minwm.nets.backbone import Backbone, Past, teacher_forced
from minwm.recipes.base import Loss, Recipe, frame_mse, given_image, held, noise_like, own_past, past_of, pick


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
    own_past: float = 0.0
    """Chance, per batch, that chunks are given the student's own predictions of the earlier ones (`base.own_past`)."""
    target_decay: float = 0.99
    """EMA of the student that gives the target, from the first step on."""


def guided_teacher(
    teacher: Backbone, past: Past, cond: Condition, x: Latents, t: float, guidance: float, geometry: Geometry
) -> Latents:
    """Velocity of the autoregressive teacher on all chunks at time t, given real history, with guidance."""
    times = x.new_full(x.shape[:2], t)
    if guidance == 1:
        return teacher_forced(teacher, past, x, times, cond, geometry)
    both = Condition.stack(cond, cond.without_text())
    latents, levels, noisy, times = (torch.cat([y, y]) for y in (past.latents, past.t, x, times))
    v, v_uncond = teacher_forced(teacher, Past(latents, levels), noisy, times, both, geometry).chunk(2)
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
        self.followed: int | None = None
        self.networks["target"] = copy.deepcopy(self.networks["student"]).requires_grad_(False).eval()

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        if step != self.followed:  # once per step, however many micro-batches it has
            self._follow()
            self.followed = step
        clip = given_image(clip, self.cfg.image_start, generator)
        i = pick(self.cfg.grid, generator)
        t, t_next = self.times[i], self.times[i + 1]
        eps = noise_like(clip.latents, generator)
        x = interpolate(clip.latents, eps, eps.new_full(eps.shape[:2], t))
        past = past_of(clip, self.geometry.context_noise, generator)
        if torch.rand((), generator=generator, device=generator.device) < self.cfg.own_past:
            past = own_past(self.networks["student"], clip, past, self.cfg.shift, self.geometry, generator)
        with torch.no_grad():
            v = guided_teacher(self.networks["teacher"], past, clip.cond, x, t, self.cfg.guidance, self.geometry)
            target = self._end(self.networks["target"], past, clip.cond, euler(x, v, t, t_next), t_next)
        total = frame_mse(self._end(self.networks["student"], past, clip.cond, x, t), target, held(clip))
        return Loss(total, "student", {"loss": float(total.detach())})

    def _end(self, net: Backbone, past: Past, cond: Condition, x: Latents, t: float) -> Latents:
        """f(x, t): where the trajectory through x ends."""
        times = x.new_full(x.shape[:2], t)
        return x0_from_velocity(x, teacher_forced(net, past, x, times, cond, self.geometry), times)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the target after the student; before the first update they are equal and this changes nothing."""
        for target, weight in zip(
            self.networks["target"].parameters(), self.networks["student"].parameters(), strict=True
        ):
            target.lerp_(weight, 1 - self.cfg.target_decay)
