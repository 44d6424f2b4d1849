"""Stage 2a, causal ODE distillation: collect the teacher's PF-ODE trajectories, regress their end (paper eq. 1)."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.core.flow import Latents, euler, schedule, x0_from_velocity
from minwm.core.types import Clip
from minwm.nets.attention import Geometry
from minwm.nets.backbone import Backbone, PreparedCondition, teacher_forced
from minwm.recipes.base import Loss, Recipe, frame_mse, loss_mask, noise_like, random_index, teacher_context
from minwm.stream.rollout import Stream


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

    A uniform grid of `ode_steps`, shifted, passes through the student's times exactly, every ode_steps / steps. The
    history is the cache of a stream: half the work of passes that take all chunks at once, each behind its clean copy.
    """
    hidden, x = noise_like(clip.latents, generator), noise_like(clip.latents, generator)
    true = replace(
        geometry, rolling_sink=False, merged_refresh=False
    )  # sinks where they were, chunks as the clip has them
    stream, parts = Stream(teacher, clip.cond, true, cfg.guidance, reach=None), []
    for a, b in geometry.chunks(x.shape[1]):
        bound = stream.prepare_chunk(clip.cond.frames(a, b))
        parts.append(_trajectory(stream, bound, x[:, a:b], cfg))
        given = a == 0 and clip.cond.first_latent is not None
        stream.update_cache(bound, clip.latents[:, a:b], None if given else hidden[:, a:b])
    return torch.cat(parts, dim=2)


def _trajectory(stream: Stream, bound: PreparedCondition, x: Latents, cfg: OdeConfig) -> Float[Tensor, "k b f c h w"]:
    """States of the current chunk, from noise x, at the student's times and at the end."""
    every, states = cfg.ode_steps // cfg.steps, []
    for step, (t, t_next) in enumerate(pairwise(schedule(cfg.ode_steps, cfg.shift))):
        if step % every == 0:
            states.append(x)
        x = euler(x, stream.velocity(bound, x, t), t, t_next)
    return torch.stack([*states, x])


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
        k = random_index(len(times), generator)
        t = states.new_full(states.shape[1:3], times[k])
        past = teacher_context(clip, self.geometry.context_noise, generator)
        v = teacher_forced(self.networks["student"], past, states[k], t, clip.cond, self.geometry)
        total = frame_mse(x0_from_velocity(states[k], v, t), states[-1], loss_mask(clip))
        return Loss(total, "student", {"loss": float(total.detach())})
