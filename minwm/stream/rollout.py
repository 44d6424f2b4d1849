"""From noise to latents: all frames at once, or chunk by chunk with a KV cache.

One rollout serves generation, live play, the collection of ODE trajectories and the self-rollout of DMD.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.cameras.track import se3_inverse
from minwm.core.config import ConfigError
from minwm.core.flow import Latents, guide, interpolate
from minwm.core.types import Condition
from minwm.nets.attention import FULL, AttentionScope, Cached, Geometry, ReadOnlyCache
from minwm.nets.backbone import Backbone, Modulation, PreparedCondition, Timesteps
from minwm.stream.solvers import Noise, Sampler, few_step_predictions


def sample_bidirectional(net: Backbone, sampler: Sampler, noise: Latents, cond: Condition) -> Latents:
    """All frames at once; an image start is held clean at t = 0."""
    guided = sampler.guidance != 1
    prepared = net.prepare(Condition.stack(cond, cond.unconditional()) if guided else cond)
    given = 0 if cond.first_latent is None else 1

    def velocity(x: Latents, t: float) -> Latents:
        times = x.new_full(x.shape[:2], t)
        times[:, :given] = 0
        v = guided_velocity(net, x, times, prepared, FULL, sampler.guidance)
        v[:, :given] = 0
        return v

    start = noise if cond.first_latent is None else torch.cat([cond.first_latent.to(noise), noise[:, 1:]], dim=1)
    x = sampler.sample(velocity, start[None])
    return x if cond.first_latent is None else torch.cat([cond.first_latent.to(x), x[:, 1:]], dim=1)


def guided_velocity(
    net: Backbone, x: Latents, t: Timesteps | Modulation, cond: PreparedCondition, scope: AttentionScope, scale: float
) -> Latents:
    """Velocity under classifier-free guidance; `cond` holds [cond | uncond] stacked on the batch unless scale is 1."""
    if scale == 1:
        return net(x, t, cond, scope)
    both = t if isinstance(t, Modulation) else t.expand(len(x), -1).repeat(2, 1)
    v, v_uncond = net(x.repeat(2, 1, 1, 1, 1), both, cond, scope).chunk(2)
    return guide(v, v_uncond, scale)


REACH = 8.0
"""World units that a camera may be from the origin of its stream's cache before the cache is moved to it.

Projective keys and queries grow with that distance while their products do not; bfloat16 would lose the difference.
"""


class Stream:
    """A network unrolled chunk by chunk: its KV arena, its prompt, and the index of the current chunk.

    Of every chunk: `prepare_chunk` with its cameras, `next_chunk` to denoise it, `update_cache` to make it the past of
    later ones. The first may also move the cache to another world frame, and its sinks in time: attention sees only
    differences of positions and relative poses, so no result changes, but numbers stay small however far one walks.
    """

    def __init__(
        self, net: Backbone, cond: Condition, geometry: Geometry, guidance: float = 1.0, reach: float | None = REACH
    ) -> None:
        self.net, self.geometry, self.guidance, self.reach = net, geometry, guidance, reach
        self.text = net.project_text_kv(self._guidance_branches(cond).text)
        self.arena = net.arena(geometry, len(self._guidance_branches(cond).text))
        self._modulations: dict[float, Timesteps | Modulation] = {}
        self._reset(len(cond.text))

    def _reset(self, batch: int) -> None:
        self.chunk = 0
        self.origin = torch.eye(4, dtype=torch.float64).expand(batch, 4, 4)
        """Pose of the cache's world frame in the caller's."""
        self.sink_shift = 0
        """Latent frames by which the sinks have moved in time."""

    def restart(self, cond: Condition) -> None:
        """From the first chunk again, with the prompt of `cond` and the same memory."""
        self._reset(len(cond.text))
        self.set_prompt(cond)

    @torch.no_grad()
    def modulation(self, t: float) -> Timesteps | Modulation:
        """The network's modulation at timestep t, computed once."""
        if t not in self._modulations:
            one = torch.full((1, 1), t, dtype=torch.float64, device=self.arena.kv.device)
            self._modulations[t] = self.net.adaln_modulation(one)
        return self._modulations[t]

    def _guidance_branches(self, cond: Condition) -> Condition:
        return cond if self.guidance == 1 else Condition.stack(cond, cond.unconditional())

    @torch.no_grad()
    def set_prompt(self, cond: Condition) -> None:
        """Follow the prompt of `cond` from the next chunk on; what the cache holds has read the old one."""
        self.text = self.net.project_text_kv(self._guidance_branches(cond).text)

    def prepare_chunk(self, cond: Condition) -> PreparedCondition:
        """The stream's prompt and the cameras of the current chunk; the cache is moved to where these are."""
        origin = self.origin
        if cond.w2c is not None:
            w2c = cond.w2c.double().cpu()
            reach = None if self.net.needs_first_frame_coordinates else self.reach
            if reach and (w2c @ origin[:, None])[..., :3, 3].norm(dim=-1).max() > reach:
                origin = se3_inverse(w2c[:, 0].detach())
            cond = replace(cond, w2c=(w2c @ origin[:, None]).to(cond.w2c))
        self._move_cache(origin, self.geometry.sink_shift(self.chunk))
        return PreparedCondition(self.text, self.net.camera_matrices(self._guidance_branches(cond)))

    @torch.no_grad()
    def _move_cache(self, origin: Float[Tensor, "b 4 4"], sink_shift: int) -> None:
        """Express the cache in another world frame, and move its sinks in time."""
        geometry = self.geometry
        text, sinks = geometry.text_rows, geometry.slot_rows(geometry.sink)[0]
        if origin is not self.origin:
            frame = (se3_inverse(self.origin) @ origin).repeat(1 if self.guidance == 1 else 2, 1, 1)
            self.arena.transform_kv(lambda kv: self.net.change_world_frame(kv, frame), slice(text, None), values=True)
        if frames := sink_shift - self.sink_shift:
            rotated = partial(self.net.rotate_keys_in_time, frames=frames)
            self.arena.transform_kv(rotated, slice(text, sinks), values=False)
        self.origin, self.sink_shift = origin, sink_shift

    def snapshot(self) -> tuple[Any, ...]:
        """What `restore` needs to undo the next chunk: little, for only its slot will be overwritten.

        Undoing is exact where the cache is not moved for that chunk, and exact up to rounding where it is.
        """
        return self.arena.save_slot(self.chunk), self.chunk, self.origin, self.sink_shift

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        slot, self.chunk, origin, sink_shift = snapshot
        self._move_cache(origin, sink_shift)
        self.arena.restore_slot(self.chunk, slot)

    def next_chunk(self, cond: PreparedCondition, noise: Noise, sampler: Sampler) -> Latents:
        """The current chunk, denoised; `update_cache` is still to come. noise: `sampler.num_noise_samples` of them."""
        return sampler.sample(partial(self.velocity, cond), noise)

    def velocity(self, cond: PreparedCondition, x: Latents, t: float) -> Latents:
        """v of the current chunk at x_t, under guidance."""
        return guided_velocity(self.net, x, self.modulation(t), cond, Cached(self.arena, self.chunk), self.guidance)

    def few_step_with_grad(
        self, cond: PreparedCondition, noise: Noise, times: list[float], exit_step: int | None
    ) -> tuple[Latents, Latents | None]:
        """The denoised chunk without gradient, and x_0 as predicted at `exit_step` with gradient (self-rollout)."""

        def velocity(x: Latents, t: float) -> Latents:
            if exit_step is None or t != times[exit_step]:
                with torch.no_grad():
                    return self.velocity(cond, x, t)
            v = self.net(x, x.new_full(x.shape[:2], t), cond, ReadOnlyCache(self.arena, self.chunk))
            if self.geometry.merged_refresh and t == times[-1]:
                with torch.no_grad():  # the pass with gradient wrote nothing into the cache
                    self.cache_update_pass(cond, x, t)
            return v

        predictions = [*few_step_predictions(velocity, noise, times)]
        return predictions[-1].detach(), None if exit_step is None else predictions[exit_step]

    @torch.no_grad()
    def update_cache(self, cond: PreparedCondition, x: Latents, noise: Latents | None = None) -> None:
        """Write the finished chunk's keys and values into the cache, and go on to the next chunk.

        They are those of the clean chunk at t = 0. With `noise`, for a generated chunk, they are those of the chunk at
        `context_noise`; with `merged_refresh` those of the last denoising pass, which are there already.
        """
        if noise is None or not self.geometry.merged_refresh:
            level = 0.0 if noise is None else self.geometry.context_noise
            x = x if noise is None else interpolate(x, noise, x.new_full(x.shape[:2], level))
            self.cache_update_pass(cond, x, level)
        self.chunk += 1

    def cache_update_pass(self, cond: PreparedCondition, x: Latents, t: float = 0.0) -> None:
        """The forward pass of `update_cache`, whose output nobody needs."""
        x = x if self.guidance == 1 else x.repeat(2, 1, 1, 1, 1)
        self.net(x, self.modulation(t), cond, Cached(self.arena, self.chunk))


def sample_noise(shape: tuple[int, ...], draws: int, like: Tensor, generator: torch.Generator) -> Noise:
    """Noise for every pass of a rollout, drawn on the generator's device so that a seed means one video."""
    return torch.randn((draws, *shape), generator=generator, device=generator.device).to(like)


@torch.no_grad()
def stream_latents(
    net: Backbone, sampler: Sampler, noise: Noise, cond: Condition, geometry: Geometry
) -> Iterator[Latents]:
    """Chunks of latents as they are finished. With an image start the first chunk is the image itself."""
    stream = Stream(net, cond, geometry, sampler.guidance)
    for index, (a, b) in enumerate(geometry.chunks(noise.shape[2])):
        chunk = stream.prepare_chunk(cond.frames(a, b))
        if index == 0 and cond.first_latent is not None:
            x, context_noise = image_chunk(cond.first_latent, geometry), None
        else:
            x, context_noise = stream.next_chunk(chunk, noise[:, :, a:b], sampler), noise[-1, :, a:b]
        yield x
        stream.update_cache(chunk, x, context_noise)


@torch.no_grad()
def generate_latents(net: Backbone, sampler: Sampler, noise: Noise, cond: Condition, geometry: Geometry) -> Latents:
    """A whole clip with any sampler. noise: `sampler.num_noise_samples(geometry)` of them."""
    if sampler.causal:
        return torch.cat(list(stream_latents(net, sampler, noise, cond, geometry)), dim=1)
    return sample_bidirectional(net, sampler, noise[0], cond)


def self_rollout(
    net: Backbone,
    noise: Noise,
    cond: Condition,
    geometry: Geometry,
    times: list[float],
    exit_step: int | None,
    chunks_without_grad: int = 0,
) -> tuple[Latents, Latents]:
    """(clip, clip at exit): the network's own video, and its x_0 at `exit_step`, with gradient (Self-Forcing).

    Every chunk is denoised in full and that result, not the one at the exit step, becomes the context of later chunks;
    context carries no gradient, nor do the first `chunks_without_grad` chunks.
    """
    if net.checkpointing and exit_step is not None and len(geometry.chunks(noise.shape[2])) > geometry.slots:
        raise ConfigError(
            f"a self-rollout of {noise.shape[2]} latents overwrites its cache of {geometry.slots} chunks, which "
            "checkpointing reads again in the backward pass; raise window, or switch checkpointing off"
        )
    stream = Stream(net, cond, geometry, reach=None)
    clip, at_exit = [], []
    for index, (a, b) in enumerate(geometry.chunks(noise.shape[2])):
        chunk = stream.prepare_chunk(cond.frames(a, b))
        if index == 0 and cond.first_latent is not None:
            x, x0, context_noise = image_chunk(cond.first_latent, geometry), None, None
        else:
            exits = exit_step if index >= chunks_without_grad else None
            x, x0 = stream.few_step_with_grad(chunk, noise[:, :, a:b], times, exits)
            context_noise = noise[-1, :, a:b]
        clip.append(x)
        at_exit.append(x if x0 is None else x0)
        stream.update_cache(chunk, x, context_noise)
    return torch.cat(clip, 1), torch.cat(at_exit, 1)


def image_chunk(first: Latents, geometry: Geometry) -> Latents:
    """The image as the first chunk of a stream; ConfigError if that has another length."""
    if geometry.first_chunk_frames != 1:
        raise ConfigError(
            f"an image start is one latent frame, but the first chunk has {geometry.first_chunk_frames}; "
            "set stream.first_chunk=1"
        )
    return first
