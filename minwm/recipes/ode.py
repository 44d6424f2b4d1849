"""Stage 2a, causal ODE distillation: collect the teacher's PF-ODE trajectories, regress their end (paper eq. 1)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isclose
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.core.flow import Latents, euler, schedule, with_first, x0_from_velocity
from minwm.core.types import Clip
from minwm.nets.backbone import Backbone, PreparedCondition, teacher_forced
from minwm.recipes.base import ClipConfig, Loss, Recipe
from minwm.recipes.ops import Per, frame_mse, loss_mask, noise_like, random_indices, teacher_context
from minwm.store.model import ModelConfig
from minwm.stream.rollout import Stream


@dataclass(frozen=True, kw_only=True)
class OdeConfig(ClipConfig):
    kind: ClassVar[str] = "ode"
    needs_trajectories: ClassVar[bool] = True
    ode_steps: int = 48
    """Euler steps of the teacher on a shifted grid; a student's time that is not on it is a step more. The times are
    those of the model's sampler."""
    guidance: float = 6.0
    """Guidance of the teacher along the trajectory."""
    index: Per = "batch"
    """One of the student's steps for all clips of a micro-batch, as the release has it, or one for each: they differ
    only where these hold more than one clip."""

    @property
    def teacher_forced(self) -> bool:
        return True

    def build(self, model: ModelConfig, networks: Mapping[str, Backbone]) -> "Ode":
        return Ode(self, model, networks)

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        model.stream.check_one_pass(self.clip_latents(model))
        _ = model.sampler.times  # an error if it is no few-step sampler

    def example_batch(self, model: ModelConfig, batch: int) -> Clip:
        clip = super().example_batch(model, batch)
        return replace(clip, trajectory=torch.randn(model.sampler.most_steps + 1, *clip.latents.shape))

    @torch.no_grad()
    def collect_states(
        self, teacher: Backbone, clip: Clip, model: ModelConfig, generator: torch.Generator
    ) -> Float[Tensor, "k b f c h w"]:
        """States at the student's times, then the end. Each chunk follows its own ODE, given the real earlier ones.

        The real clip is in a stream's KV cache: half the work of teacher-forced passes over all chunks at once.
        """
        context_noise, x = noise_like(clip.latents, generator), noise_like(clip.latents, generator)
        # sinks where the clip has them, and a cache of the real clip instead of the last denoising pass
        geometry = replace(model.geometry, rolling_sink=False, merged_refresh=False)
        stream, states = Stream(teacher, clip.cond, geometry, self.guidance, reach=None, views=clip.views), []
        for a, b in geometry.chunks(x.shape[1]):
            cond = stream.prepare_chunk(clip.cond.frames(a, b))
            states.append(self._chunk_states(stream, cond, x[:, a:b], model))
            stream.update_cache(cond, clip.latents[:, a:b], context_noise[:, a:b])
        return torch.cat(states, dim=2)

    def _chunk_states(
        self, stream: Stream, cond: PreparedCondition, x: Latents, model: ModelConfig
    ) -> Float[Tensor, "k b f c h w"]:
        """States of the current chunk, from noise x, at the student's times and at t = 0; a chunk with fewer times
        than the first repeats them, and a given image is in all."""
        sampler, states = model.sampler, []
        times = sampler.at_chunk(stream.chunk).times
        for t, t_next in pairwise(self._grid(times, sampler.shift)):
            if any(isclose(t, other) for other in times):
                states.append(x)
            x = euler(x, stream.velocity(cond, x, t), t, t_next)
        steps = [sampler.step_at_chunk(k, stream.chunk) for k in range(sampler.most_steps)]
        return with_first(torch.stack([*(states[k] for k in steps), x]), cond.first_latent)

    def _grid(self, times: list[float], shift: float) -> list[float]:
        """The teacher's times from 1 to 0, with the student's `times` among them."""
        grid = schedule(self.ode_steps, shift)
        return sorted([*grid, *(t for t in times if not any(isclose(t, g) for g in grid))], reverse=True)


class Ode(Recipe[Backbone]):
    """|| G(x_t, t | real earlier chunks) - x_ODE ||^2 at one of the student's times; clips carry their trajectory."""

    cfg: OdeConfig

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        clip = self.cfg.sample_clip(clip, self.geometry, generator)
        states, steps = clip.trajectory, self.sampler.most_steps
        if states is None or len(states) != steps + 1:
            found = 0 if states is None else len(states)
            raise ConfigError(
                f"stage 2a needs clips with {steps + 1} trajectory states, these have {found}; collect them"
            )
        clips = len(clip.latents)
        k = random_indices(steps, clips, self.cfg.index, generator)
        x_t, t = states[k, range(clips)], self._frame_times(states)[k]
        context = teacher_context(clip, self.geometry, generator)
        v = teacher_forced(self.networks["student"], context, x_t, t, clip.cond, self.geometry)
        total = frame_mse(x0_from_velocity(x_t, v, t), states[-1], loss_mask(clip))
        return Loss(total, "student", {"loss": total.detach()})

    def _frame_times(self, states: Float[Tensor, "k b f c h w"]) -> Float[Tensor, "steps f"]:
        """Times of every state but the last, for each frame: those of its chunk."""
        sampler, chunks = self.sampler, self.geometry.chunks(states.shape[2])
        times = [
            [
                sampler.at_chunk(i).times[sampler.step_at_chunk(k, i)]
                for i, (a, b) in enumerate(chunks)
                for _ in range(a, b)
            ]
            for k in range(sampler.most_steps)
        ]
        return states.new_tensor(times)
