"""Stage 2a, causal ODE distillation: collect the teacher's PF-ODE trajectories, regress their end (paper eq. 1)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.core.flow import Latents, euler, guide, schedule, x0_from_velocity
from minwm.core.types import Clip, Condition
from minwm.nets.attention import Geometry
from minwm.nets.backbone import Backbone, Past, teacher_forced
from minwm.recipes.base import Loss, Recipe, frame_mse, held, noise_like, past_of, pick


@dataclass(frozen=True, kw_only=True)
class OdeConfig:
    kind: ClassVar[str] = "ode"
    steps: int = 4
    """Times of the student; trajectories are kept at these."""
    shift: float = 5.0
    ode_steps: int = 48
    """Euler steps of the teacher; a multiple of `steps`."""
    guidance: float = 6.0
    """Guidance of the teacher along the trajectory."""

    def __post_init__(self) -> None:
        if self.ode_steps % self.steps:
            near = max(1, round(self.ode_steps / self.steps)) * self.steps
            raise ConfigError(f"ode.ode_steps={self.ode_steps} is not a multiple of steps={self.steps}; try {near}")


@torch.no_grad()
def collect(
    teacher: Backbone, clip: Clip, cfg: OdeConfig, geometry: Geometry, generator: torch.Generator
) -> Float[Tensor, "k b f c h w"]:
    """States at the student's times, then the end point. Every chunk runs along its own ODE, given real history.

    A uniform grid of `ode_steps`, shifted, passes through the student's times exactly, every ode_steps / steps.
    """
    every, times = cfg.ode_steps // cfg.steps, schedule(cfg.ode_steps, cfg.shift)
    past = past_of(clip, geometry.context_noise, generator)
    x, states = noise_like(clip.latents, generator), []
    for step, (t, t_next) in enumerate(pairwise(times)):
        if step % every == 0:
            states.append(x)
        x = euler(x, guided_teacher(teacher, past, clip.cond, x, t, cfg.guidance, geometry), t, t_next)
    return torch.stack([*states, x])


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


class Ode(Recipe):
    """|| G(x_t, t | real history) - x_ODE ||^2 at one of the student's times; clips carry their trajectory."""

    cfg: OdeConfig

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        states, times = clip.trajectory, schedule(self.cfg.steps, self.cfg.shift)[:-1]
        if states is None or len(states) != len(times) + 1:
            found = 0 if states is None else len(states)
            raise ConfigError(
                f"stage 2a needs clips with {len(times) + 1} trajectory states, these have {found}; collect them"
            )
        k = pick(len(times), generator)
        t = states.new_full(states.shape[1:3], times[k])
        past = past_of(clip, self.geometry.context_noise, generator)
        v = teacher_forced(self.networks["student"], past, states[k], t, clip.cond, self.geometry)
        total = frame_mse(x0_from_velocity(states[k], v, t), states[-1], held(clip))
        return Loss(total, "student", {"loss": float(total.detach())})
