"""Stage 2a, causal ODE distillation: collect the teacher's PF-ODE trajectories, regress their end (paper eq. 1)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.core.flow import Latents, euler, schedule, with_first, x0_from_velocity
from minwm.core.types import Clip
from minwm.nets.backbone import Backbone, PreparedCondition, teacher_forced
from minwm.recipes.base import Loss, Recipe, RecipeConfig
from minwm.recipes.ops import frame_mse, loss_mask, noise_like, random_index, teacher_context
from minwm.store.model import ModelConfig
from minwm.stream.rollout import Stream


@dataclass(frozen=True, kw_only=True)
class OdeConfig(RecipeConfig):
    kind: ClassVar[str] = "ode"
    teacher_forced: ClassVar[bool] = True
    needs_trajectories: ClassVar[bool] = True
    ode_steps: int = 48
    """Euler steps of the teacher; a multiple of the student's steps, which are those of the model's sampler."""
    guidance: float = 6.0
    """Guidance of the teacher along the trajectory."""

    def build(self, model: ModelConfig, networks: Mapping[str, Backbone]) -> "Ode":
        return Ode(self, model, networks)

    def check(self, model: ModelConfig) -> None:
        steps = len(model.sampler.times)
        if self.ode_steps % steps:
            near = max(1, round(self.ode_steps / steps)) * steps
            raise ConfigError(f"ode.ode_steps={self.ode_steps} is not a multiple of sampler.steps={steps}; try {near}")

    def example_batch(self, model: ModelConfig, batch: int) -> Clip:
        clip = super().example_batch(model, batch)
        return replace(clip, trajectory=torch.randn(len(model.sampler.times) + 1, *clip.latents.shape))

    @torch.no_grad()
    def collect_states(
        self, teacher: Backbone, clip: Clip, model: ModelConfig, generator: torch.Generator
    ) -> Float[Tensor, "k b f c h w"]:
        """States at the student's times, then the end. Each chunk follows its own ODE, given the real earlier ones.

        A uniform grid of `ode_steps`, shifted, contains the student's times exactly, every ode_steps / steps. The real
        clip is in a stream's KV cache: half the work of teacher-forced passes over all chunks at once.
        """
        context_noise, x = noise_like(clip.latents, generator), noise_like(clip.latents, generator)
        # sinks where the clip has them, and a cache of the real clip instead of the last denoising pass
        geometry = replace(model.geometry, rolling_sink=False, merged_refresh=False)
        stream, states = Stream(teacher, clip.cond, geometry, self.guidance, reach=None), []
        for a, b in geometry.chunks(x.shape[1]):
            cond = stream.prepare_chunk(clip.cond.frames(a, b))
            states.append(self._chunk_states(stream, cond, x[:, a:b], model))
            stream.update_cache(cond, clip.latents[:, a:b], context_noise[:, a:b])
        return torch.cat(states, dim=2)

    def _chunk_states(
        self, stream: Stream, cond: PreparedCondition, x: Latents, model: ModelConfig
    ) -> Float[Tensor, "k b f c h w"]:
        """States of the current chunk, from noise x, at the student's times and at t = 0; a given image is in all."""
        sampler, states = model.sampler, []
        for step, (t, t_next) in enumerate(pairwise(schedule(self.ode_steps, sampler.shift))):
            if step % (self.ode_steps // sampler.steps) == 0:
                states.append(x)
            x = euler(x, stream.velocity(cond, x, t), t, t_next)
        return with_first(torch.stack([*states, x]), cond.first_latent)


class Ode(Recipe[Backbone]):
    """|| G(x_t, t | real earlier chunks) - x_ODE ||^2 at one of the student's times; clips carry their trajectory."""

    cfg: OdeConfig

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        states, times = clip.trajectory, self.sampler.times
        if states is None or len(states) != len(times) + 1:
            found = 0 if states is None else len(states)
            raise ConfigError(
                f"stage 2a needs clips with {len(times) + 1} trajectory states, these have {found}; collect them"
            )
        k = random_index(len(times), generator)
        x_t, t = states[k], states.new_full(states.shape[1:3], times[k])
        context = teacher_context(clip, self.geometry.context_noise, generator)
        v = teacher_forced(self.networks["student"], context, x_t, t, clip.cond, self.geometry)
        total = frame_mse(x0_from_velocity(x_t, v, t), states[-1], loss_mask(clip))
        return Loss(total, "student", {"loss": total.detach()})
