"""From noise to latents: all frames at once, or chunk by chunk with a KV cache.

One rollout serves generation, live play, the collection of ODE trajectories and the self-rollout of DMD.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.cameras.track import se3_inverse
from minwm.core.config import ConfigError
from minwm.core.flow import FirstLatent, Latents, guide, interpolate, with_first
from minwm.core.types import Condition, Views
from minwm.nets.attention import FULL, AttentionScope, Cached, ReadOnlyCache
from minwm.nets.backbone import Backbone, Modulation, PreparedCondition, Timesteps, keep_first_clean
from minwm.nets.chunks import Geometry
from minwm.stream.memory import RememberedChunk, choose_context, of_each_clip, one_after_the_other, retrieve_views
from minwm.stream.solvers import Noise, Sampler, few_step_predictions


def sample_bidirectional(net: Backbone, sampler: Sampler, noise: Latents, cond: Condition) -> Latents:
    """All frames at once; given first latents are held clean at t = 0."""
    guided = sampler.guidance != 1
    prepared = net.prepare(Condition.stack(cond, cond.unconditional()) if guided else cond)

    def velocity(x: Latents, t: float, t_end: float) -> Latents:
        times, ends = (x.new_full(x.shape[:2], time) for time in (t, t_end))
        times[:, : cond.given] = ends[:, : cond.given] = 0
        at = net.adaln_modulation(times[:1], ends[:1]) if net.takes_step_end else times
        v = guided_velocity(net, x, at, prepared, FULL, sampler.guidance)
        v[:, : cond.given] = 0
        return v

    x = sampler.sample(velocity, with_first(noise, cond.first_latents)[None])
    return with_first(x, cond.first_latents)


def guided_velocity(
    net: Backbone,
    x: Latents,
    t: Timesteps | Modulation,
    cond: Condition | PreparedCondition,
    scope: AttentionScope,
    scale: float,
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
    Attention to text at the front of the cache sees more than that, so there the world frame stays that of the first
    frame, and the cache moves in time, not the chunk being made (`Geometry.time_origin`).

    An image given as the first latent is clean in every pass, at `image_time`, whatever a sampler does to its place.

    Networks of mean velocities are asked for those of no duration, which is what they are trained for here.

    With `recompute` the past is kept as latents, and what is in the cache before a chunk is made again from those that
    this chunk sees: `chunk` is then its place among them.

    `views` of each clip's world, in its frame, are seen by all chunks, and are kept when the stream restarts. An image
    that the stream starts with is one more of them.
    """

    def __init__(
        self,
        net: Backbone,
        cond: Condition,
        geometry: Geometry,
        guidance: float = 1.0,
        reach: float | None = REACH,
        views: Sequence[Views] = (),
    ) -> None:
        self.known = tuple(views)
        if views and (geometry.retrieved < 1 or geometry.chunk != 1 or geometry.sink):
            raise ConfigError("known views are for streams of single latents with stream.retrieved and without sinks")
        self.net, self.guidance, self.reach = net, guidance, reach
        self.text = net.project_text_kv(self._guidance_branches(cond))
        self.arena = net.arena(geometry, len(self._guidance_branches(cond).text))
        self.geometry = self.arena.geometry
        self.arena.write_text_kv(self.text)
        self._modulations: dict[tuple[float, ...], Timesteps | Modulation] = {}
        self._reset(len(cond.text))

    def _reset(self, batch: int) -> None:
        self.chunk = 0
        self.views = self.known
        self.past: list[RememberedChunk] = []
        """All chunks, if the context is recomputed; with cameras and actions of the current one, and the image."""
        self.frames: dict[str, Tensor] = {}
        self.first_latent: FirstLatent | None = None
        self.stale = False
        """The cache holds something else than the past."""
        self.cached_views: list[list[int]] = []
        """Those of each clip that the cache holds."""
        self.cached_past: list[int] = []
        """Chunks of the past that it holds behind them."""
        self.has_read_ahead = False
        """Whether views were read ahead for the current chunk."""
        self.origin = torch.eye(4, dtype=torch.float64).expand(batch, 4, 4)
        """Pose of the cache's world frame in the caller's."""
        self.sink_shift = 0
        """Latent frames by which the sinks have moved in time."""
        self.time_origin = 0
        """Latent frame at position 0 in time."""

    def restart(self, cond: Condition) -> None:
        """From the first chunk again, with the prompt of `cond` and the same memory."""
        self._reset(len(cond.text))
        self.set_prompt(cond)

    @torch.no_grad()
    def modulation(self, *times: float) -> Timesteps | Modulation:
        """The network's modulation at the timesteps of a chunk's frames, or at one for all; computed once."""
        if times not in self._modulations:
            rows = torch.tensor([times], dtype=torch.float64, device=self.arena.kv.device)
            self._modulations[times] = self.net.adaln_modulation(rows)
        return self._modulations[times]

    def frame_times(self, cond: PreparedCondition, frames: int, t: float) -> tuple[float, ...]:
        """Timesteps of the frames of a chunk at t, one for all unless an image is given."""
        return (t,) if cond.first_latent is None else (self.geometry.image_time, *[t] * (frames - 1))

    def _guidance_branches(self, cond: Condition) -> Condition:
        return cond if self.guidance == 1 else Condition.stack(cond, cond.unconditional())

    @torch.no_grad()
    def set_prompt(self, cond: Condition) -> None:
        """Follow the prompt of `cond` from the next chunk on; what the cache holds has read the old one."""
        self.text = self.net.project_text_kv(self._guidance_branches(cond))
        self.arena.write_text_kv(self.text)
        self.cached_views, self.cached_past = [], []  # they have read the old one

    def prepare_chunk(self, cond: Condition) -> PreparedCondition:
        """The stream's prompt and the cameras of the current chunk; the cache is moved to where these are."""
        if cond.w2c is not None:
            cond = replace(cond, w2c=cond.w2c.double().cpu())
        if self.geometry.recompute != "never":
            known = self.geometry.retrieved if self.views else 0
            self.chunk, self.frames = min(known + len(self.past), self.geometry.slots - 1), cond.per_frame()
            if self.stale or self._recomputes(len(self.past)):
                self._recompute_context(cond)
        return self._prepare(cond)

    def read_ahead(self, cond: Condition) -> None:
        """Read what the next chunk sees of known views and the past if its cameras are those of `cond`, and nearly so
        otherwise: `prepare_chunk` then reads nothing, unless its cameras are far from these."""
        if self.views:
            self.prepare_chunk(cond)
            self.has_read_ahead = True

    def _prepare(self, cond: Condition) -> PreparedCondition:
        """`prepare_chunk` of the chunk that is to be at the place `chunk`; w2c is on the CPU in float64."""
        origin = self.origin
        if cond.w2c is not None:
            w2c, K = cond.cameras
            reach = None if self.net.needs_first_frame_coordinates else self.reach
            if reach and (w2c @ origin[:, None])[..., :3, 3].norm(dim=-1).max() > reach:
                origin = se3_inverse(w2c[:, 0].detach())
            cond = replace(cond, w2c=(w2c @ origin[:, None]).to(K))
        self._move_cache(origin, self.geometry.sink_shift(self.chunk), self.geometry.time_origin(self.chunk))
        branches = self._guidance_branches(cond)
        camera, actions = self.net.camera_matrices(branches), branches.actions if self.net.takes_actions else None
        whole = cond.given == self.geometry.start(self.chunk + 1) - self.geometry.start(self.chunk)
        given = cond.first_latents if whole else None
        return PreparedCondition(self.text, camera, first_latent=self._image(cond), given=given, actions=actions)

    def _recomputes(self, chunk: int) -> bool:
        return bool(self.views) or self.geometry.recomputes(chunk)

    def _seen(self, cond: Condition) -> tuple[list[RememberedChunk], int]:
        """What the current chunk sees of the past, and how much of it the cache holds already."""
        if not self.views:
            chosen = choose_context(self.past, cond.w2c, self.geometry, len(cond.text))
            return [of_each_clip(self.past, chunks) for chunks in zip(*chosen, strict=True)], 0
        cached = self.cached_views if self.geometry.recompute == "causal" else []
        w2c, frames, count = cond.cameras[0], cond.per_frame(), self.geometry.retrieved
        chosen, views = retrieve_views(self.views, w2c, frames, count, cached, self.has_read_ahead)
        past = [*range(len(self.past) - self.chunk + len(views), len(self.past))]
        before = [*zip(*cached, strict=True), *self.cached_past] if cached else []
        columns = zip([*zip(*chosen, strict=True), *past], before, strict=False)
        known = len([*takewhile(lambda pair: pair[0] == pair[1], columns)])  # what is before another has not seen it
        self.cached_views, self.cached_past = chosen, past
        return [*views, *(self.past[i] for i in past)], known

    @torch.no_grad()
    def _recompute_context(self, cond: Condition) -> None:
        """Write what the current chunk sees of the past into the cache."""
        geometry, arena, place = self.geometry, self.arena, self.chunk
        seen, known = self._seen(cond)
        if seen and not known and cond.w2c is not None and self.reach and not self.net.needs_first_frame_coordinates:
            self.origin = se3_inverse(seen[0].frames["w2c"][:, 0])
        keeps_image = geometry.sink or len(self.past) == place  # or else it has become a latent as any other
        # where finished keys and values are other ones, each is finished before others see it
        apart = geometry.recompute == "causal" and self.net.finished_kv is not None
        cond = replace(cond, first_latents=self.first_latent if keeps_image else None)
        for i, chunks in enumerate([[chunk] for chunk in seen[known:]] if apart else [seen[known:]], known):
            if chunks:
                self._read_chunks(cond, chunks, i)
        self.arena, self.chunk, self.stale = arena, place, False

    def _read_chunks(self, cond: Condition, chunks: Sequence[RememberedChunk], place: int) -> None:
        """Write chunks of the past into the cache, from a place on, in one pass: as parts of a single chunk."""
        geometry, read = self.geometry, one_after_the_other(chunks)
        frames = tuple(chunk.x.shape[1] for chunk in chunks)
        start, sink = geometry.start(place), max(geometry.sink, 1)
        single = replace(geometry, first_chunk=start or sum(frames), chunk=sum(frames), sink=sink)
        self.arena, self.chunk = self.arena.with_geometry(single), min(place, 1)
        context = self._prepare(replace(cond, **read.frames))
        times = [chunk.t for chunk, count in zip(chunks, frames, strict=True) for _ in range(count)]
        if context.first_latent is not None:
            times[0] = geometry.image_time
        same = len({*times}) == 1
        parts = frames if geometry.recompute == "causal" and len(frames) > 1 else ()
        self.cache_update_pass(context, read.x, tuple(times[:1] if same else times), parts)
        self._finish_slot()

    def _image(self, cond: Condition) -> FirstLatent | None:
        """The image of the current chunk, if one is given; ConfigError if the model takes none."""
        if self.chunk or cond.first_latent is None:
            return None
        if not self.geometry.takes_image and cond.given < self.geometry.first_chunk_frames:
            raise ConfigError(
                f"an image is given, and the first chunk of {self.geometry.first_chunk_frames} latents takes none; "
                "leave it out, or set stream.image_start=true for a model that was trained so"
            )
        return cond.first_latent if self.geometry.takes_image else None

    @torch.no_grad()
    def _move_cache(self, origin: Float[Tensor, "b 4 4"], sink_shift: int, time_origin: int) -> None:
        """Express the cache in another world frame, and move its sinks and all that it holds in time."""
        geometry = self.geometry
        text, sinks = geometry.text_rows, geometry.slot_rows(geometry.sink)[0]
        if origin is not self.origin:
            frame = (se3_inverse(self.origin) @ origin).repeat(1 if self.guidance == 1 else 2, 1, 1)
            self.arena.transform_kv(lambda kv: self.net.change_world_frame(kv, frame), slice(text, None), values=True)
        window_frames = self.time_origin - time_origin
        sink_frames = sink_shift - self.sink_shift + window_frames
        for frames, rows in ((sink_frames, slice(text, sinks)), (window_frames, slice(sinks, None))):
            if frames:
                rotated = partial(self.net.rotate_keys_in_time, frames=frames)
                self.arena.transform_kv(rotated, rows, values=False)
        self.origin, self.sink_shift, self.time_origin = origin, sink_shift, time_origin

    def snapshot(self) -> tuple[Any, ...]:
        """What `restore` needs to undo the next chunk: little, for only its slot will be overwritten.

        Undoing is exact where the cache is not moved for that chunk, and exact up to rounding where it is.
        """
        if self.geometry.recompute != "never":
            return (len(self.past),)
        return self.arena.save_slot(self.chunk), self.chunk, self.origin, self.sink_shift, self.time_origin

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        if self.geometry.recompute != "never":
            del self.past[snapshot[0] :]
            self.cached_past, self.has_read_ahead = [], False
            self.views = self.views if self.past else self.known
            self.stale = True
            return
        slot, self.chunk, *place = snapshot
        self._move_cache(*place)
        self.arena.restore_slot(self.chunk, slot)

    def next_chunk(self, cond: PreparedCondition, noise: Noise, sampler: Sampler) -> Latents:
        """The current chunk, denoised or as it is given; `update_cache` is still to come. noise:
        `sampler.num_noise_samples` of them."""
        if cond.given is not None:
            return cond.given
        return with_first(self.denoise(cond, noise, sampler), cond.first_latent)

    def denoise(self, cond: PreparedCondition, noise: Noise, sampler: Sampler) -> Latents:
        """The passes of `next_chunk`."""
        return sampler.at_chunk(self.chunk).sample(lambda x, t, _: self.velocity(cond, x, t), noise)

    def velocity(self, cond: PreparedCondition, x: Latents, t: float) -> Latents:
        """v of the current chunk at x_t, under guidance."""
        x, modulation = with_first(x, cond.first_latent), self.modulation(*self.frame_times(cond, x.shape[1], t))
        return guided_velocity(self.net, x, modulation, cond, Cached(self.arena, self.chunk), self.guidance)

    def few_step_with_grad(
        self, cond: PreparedCondition, noise: Noise, times: list[float], exit_step: int | None
    ) -> tuple[Latents, Latents | None]:
        """The denoised chunk without gradient, and x_0 as predicted at `exit_step` with gradient (self-rollout)."""
        if cond.given is not None:
            return cond.given, None
        first = cond.first_latent

        def velocity(x: Latents, t: float, _: float) -> Latents:
            if exit_step is None or t != times[exit_step]:
                with torch.no_grad():
                    return self.velocity(cond, x, t)
            x, frame_times = keep_first_clean(x, x.new_full(x.shape[:2], t), first, self.geometry)
            v = self.net(x, frame_times, cond, ReadOnlyCache(self.arena, self.chunk))
            if self.geometry.merged_refresh and t == times[-1]:
                with torch.no_grad():  # the pass with gradient wrote nothing into the cache
                    self.cache_update_pass(cond, x, self.frame_times(cond, x.shape[1], t))
            return v

        predictions = [with_first(x0, first) for x0 in few_step_predictions(velocity, noise, times)]
        return predictions[-1].detach(), None if exit_step is None else predictions[exit_step]

    @torch.no_grad()
    def update_cache(self, cond: PreparedCondition, x: Latents, noise: Latents | None = None) -> None:
        """Write the finished chunk's keys and values into the cache, and go on to the next chunk.

        They are those of the clean chunk at t = 0. With `noise`, for a generated chunk, they are those of the chunk at
        `context_noise`; with `merged_refresh` those of the last denoising pass, which are there already. A given chunk
        or image stays clean.
        """
        first, geometry = cond.first_latent, self.geometry
        noise = None if cond.given is not None else noise
        if noise is None or not self.geometry.merged_refresh:
            level = 0.0 if noise is None else geometry.context_noise
            x = with_first(x if noise is None else interpolate(x, noise, x.new_full(x.shape[:2], level)), first)
            t = level if geometry.context_time is None else geometry.context_time
            if geometry.recompute != "never":
                if self.known and not self.past and cond.given is not None:
                    image = zip(self.known, x[:, 0], self.frames["w2c"][:, 0], self.frames["K"][:, 0], strict=True)
                    self.views = tuple(known.with_view(*view) for known, *view in image)
                self.first_latent = self.first_latent if self.past else first
                self.past.append(RememberedChunk(x, t, self.frames))
            if geometry.recompute == "never" or not self._recomputes(len(self.past)):
                self.cache_update_pass(cond, x, self.frame_times(cond, x.shape[1], t))
        self._finish_slot()
        self.chunk += 1
        self.has_read_ahead = False

    def _finish_slot(self) -> None:
        """Apply `Backbone.finished_kv` to the current chunk's rows of the cache."""
        if self.net.finished_kv is not None:
            geometry = self.arena.geometry
            rows = slice(*geometry.slot_rows(geometry.slot(self.chunk)))
            self.arena.transform_kv(self.net.finished_kv, rows, values=True)

    def cache_update_pass(
        self, cond: PreparedCondition, x: Latents, times: tuple[float, ...] = (0.0,), parts: tuple[int, ...] = ()
    ) -> None:
        """The forward pass of `update_cache`, whose output nobody needs; parts: as in `Cached`."""
        x = x if self.guidance == 1 else x.repeat(2, 1, 1, 1, 1)
        self.net(x, self.modulation(*times), cond, Cached(self.arena, self.chunk, parts))


def sample_noise(shape: tuple[int, ...], draws: int, like: Tensor, generator: torch.Generator) -> Noise:
    """Noise for every pass of a rollout, drawn on the generator's device so that a seed means one video."""
    return torch.randn((draws, *shape), generator=generator, device=generator.device).to(like)


@torch.no_grad()
def stream_latents(
    net: Backbone,
    sampler: Sampler,
    noise: Noise,
    cond: Condition,
    geometry: Geometry,
    views: Sequence[Views] = (),
) -> Iterator[Latents]:
    """Chunks of latents as they are finished."""
    stream = Stream(net, cond, geometry, sampler.guidance, views=views)
    for a, b in geometry.chunks(noise.shape[2]):
        chunk = stream.prepare_chunk(cond.frames(a, b))
        x = stream.next_chunk(chunk, noise[:, :, a:b], sampler)
        yield x
        stream.update_cache(chunk, x, noise[-1, :, a:b])


@torch.no_grad()
def generate_latents(
    net: Backbone,
    sampler: Sampler,
    noise: Noise,
    cond: Condition,
    geometry: Geometry,
    views: Sequence[Views] = (),
) -> Latents:
    """A whole clip with any sampler. noise: `sampler.num_noise_samples(geometry)` of them."""
    if sampler.causal:
        return torch.cat(list(stream_latents(net, sampler, noise, cond, geometry, views)), dim=1)
    if views:
        raise ConfigError("known views are for streams; a bidirectional model makes whole clips without them")
    return sample_bidirectional(net, sampler, noise[0], cond)


RolloutOutput = Literal["final", "exit"]
"""What a rollout makes of a chunk: it is fully denoised, or predicted at the exit step."""


def self_rollout(
    net: Backbone,
    noise: Noise,
    cond: Condition,
    geometry: Geometry,
    sampler: Sampler,
    exit_step: int | None,
    chunks_without_grad: int = 0,
    context: RolloutOutput = "final",
    views: Sequence[Views] = (),
) -> tuple[Latents, Latents]:
    """(clip, clip at exit): the network's own video, and its x_0 at `exit_step`, with gradient (Self-Forcing).

    `exit_step` counts in `sampler.most_steps`; with None no pass has a gradient. Each chunk becomes the context of
    later ones, without gradient: fully denoised, or with `context="exit"` as it is at the exit step, where denoising
    then ends, so that this is the clip. The first `chunks_without_grad` chunks have no gradient.
    """
    if net.checkpointing and exit_step is not None and geometry.overwrites(len(geometry.chunks(noise.shape[2]))):
        raise ConfigError(
            f"a self-rollout of {noise.shape[2]} latents overwrites its cache of {geometry.slots} chunks, which "
            "checkpointing reads again in the backward pass; raise window, or switch checkpointing off"
        )
    stream = Stream(net, cond, geometry, reach=None, views=views)
    clip, at_exit = [], []
    for index, (a, b) in enumerate(geometry.chunks(noise.shape[2])):
        chunk = stream.prepare_chunk(cond.frames(a, b))
        times, step = sampler.at_chunk(index).times, None
        if exit_step is not None:
            step = sampler.step_at_chunk(exit_step, index)
            times = times[: step + 1] if context == "exit" else times
        graded = step if index >= chunks_without_grad else None
        x, x0 = stream.few_step_with_grad(chunk, noise[:, :, a:b], times, graded)
        clip.append(x)
        at_exit.append(x if x0 is None else x0)
        stream.update_cache(chunk, x, noise[-1, :, a:b])
    return torch.cat(clip, 1), torch.cat(at_exit, 1)
