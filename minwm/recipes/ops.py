"""Operations that several training stages share: random draws, conditions, contexts, masks and the squared error."""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.cameras.track import se3_inverse
from minwm.control.action import with_action_labels
from minwm.core.flow import Latents, Times, interpolate, shift
from minwm.core.types import Clip, Condition
from minwm.nets.backbone import Backbone, Context
from minwm.nets.chunks import Geometry, StreamConfig
from minwm.stream.memory import RememberedChunk, choose_context, of_each_clip, one_after_the_other, retrieve_views
from minwm.stream.rollout import sample_noise, self_rollout
from minwm.stream.solvers import FewStepSampler

_PROMPT = {"text", "glyphs"}
"""The parts of a condition that a prompt becomes."""


def drop_text(cond: Condition, rate: float, generator: torch.Generator) -> Condition:
    """Replace prompts by the unconditional one, clip by clip with probability `rate` (classifier-free guidance)."""
    keep = (_uniform(len(cond.text), generator) >= rate).to(cond.text.device)
    dropped, given = cond.unconditional().parts(), cond.parts()
    states = {name: torch.where(keep[:, None, None], given[name], dropped[name]) for name in _PROMPT & given.keys()}
    return replace(cond, **states)


def random_part(clip: Clip, frames: int, generator: torch.Generator, apart: int = 1, sink: bool = False) -> Clip:
    """So many latents of a clip, from a random one on, which becomes the first one and the world frame.

    Each is the same number of latents after the one before, at random up to `apart`, as far as the clip is long. With
    `sink` the first is any before the others, as in the cache of a stream that has gone on.
    """
    last, gaps = clip.latents.shape[1] - 1, frames - 1
    step = 1 + random_index(min(apart, last // gaps), generator)
    first = random_index(last - step * gaps + 1, generator)
    index = torch.arange(first, first + step * gaps + 1, step)
    if sink:
        index[0] = random_index(first + step, generator)
    latents = clip.latents[:, index]
    cond, views = clip.cond.at(index), clip.views
    if cond.w2c is not None:
        first = se3_inverse(cond.w2c[:, 0])
        cond = with_action_labels(replace(cond, w2c=cond.w2c @ first[:, None]))
        views = tuple(known.transformed(pose) for known, pose in zip(views, first, strict=bool(views)))
    if clip.cond.given:
        cond = replace(cond, first_latents=latents[:, :1])
    trajectory = None if clip.trajectory is None else clip.trajectory[:, :, index]
    return Clip(latents, cond, trajectory, views)


def with_views(clip: Clip, count: int, generator: torch.Generator) -> Clip:
    """The clip after so many views of its world, those nearest to a random one of its latents: as a stream sees it.

    They are given, and the rest of the clip is not; the first of them is the world frame.
    """
    w2c, _ = clip.cond.cameras
    frame = random_index(w2c.shape[1], generator)
    _, chunks = retrieve_views(clip.views, w2c[:, frame : frame + 1], clip.cond.per_frame(), count)
    views = one_after_the_other(chunks)
    frames = {name: torch.cat([views.frames[name].to(x), x], dim=1) for name, x in clip.cond.per_frame().items()}
    frames["w2c"] = frames["w2c"] @ se3_inverse(frames["w2c"][:, :1])
    cond = replace(clip.cond, **frames, first_latents=views.x.to(clip.latents))
    trajectory = clip.trajectory
    if trajectory is not None:
        trajectory = torch.cat([views.x.expand(len(trajectory), *views.x.shape).to(trajectory), trajectory], dim=2)
    return Clip(torch.cat([views.x.to(clip.latents), clip.latents], dim=1), cond, trajectory)


def remembered_part(clip: Clip, stream: StreamConfig, chunk: int) -> Clip:
    """A chunk of a clip after what its stream would have in the cache: one clip, without gaps in time."""
    cond, past = clip.cond, list[RememberedChunk]()
    for a, b in stream.chunks(clip.latents.shape[1])[: chunk + 1]:
        frames = cond.frames(a, b).per_frame()
        frames |= {"w2c": frames["w2c"].double().cpu()} if "w2c" in frames else {}
        past.append(RememberedChunk(clip.latents[:, a:b], 0.0, frames))
    chosen = choose_context(past[:chunk], past[chunk].frames.get("w2c"), stream, len(clip.latents))
    columns = [of_each_clip(past, column) for column in zip(*chosen, strict=True)]
    part = one_after_the_other([*columns, past[chunk]])
    frames = {name: x.to(cond.parts()[name]) for name, x in part.frames.items()}
    first = cond.first_latent if stream.sink or chunk < stream.slots else None
    return Clip(part.x, replace(cond, **frames, first_latents=first))


def sample_start(clip: Clip, image: float, video: float, stream: StreamConfig, generator: torch.Generator) -> Clip:
    """The clip with its first frame given, with probability `image`, or with probability `video` a random number of its
    first chunks, not all of them; else everything is generated."""
    clip = clip if bernoulli(image, generator) else replace(clip, cond=clip.cond.without_image())
    if not video or not bernoulli(video, generator):
        return clip
    chunks = stream.chunks(clip.latents.shape[1])
    given = chunks[random_index(len(chunks) - 1, generator)][1]
    return replace(clip, cond=replace(clip.cond, first_latents=clip.latents[:, :given]))


def loss_mask(clip: Clip) -> Float[Tensor, "b f"]:
    """1 for frames that are generated, 0 for first ones that are given."""
    mask = clip.latents.new_ones(clip.latents.shape[:2])
    mask[:, : clip.cond.given] = 0
    return mask


def teacher_context(clip: Clip, stream: StreamConfig, generator: torch.Generator, part: float | Times = 1.0) -> Context:
    """The clip as context for later chunks, with a part of the stream's context noise; given frames are clean."""
    mask = loss_mask(clip)
    times = mask * (stream.context_noise * part)
    shown = times if stream.context_time is None else mask * stream.context_time
    return Context(interpolate(clip.latents, noise_like(clip.latents, generator), times), shown)


@torch.no_grad()
def self_conditioned_context(
    net: Backbone,
    clip: Clip,
    timestep_shift: float,
    geometry: Geometry,
    generator: torch.Generator,
    part: float | Times = 1.0,
) -> Context:
    """Context that the network streamed itself, noised as `teacher_context` does: self-conditioning against drift.

    Each chunk is made in one pass from noise, given those that were made before it, as in a stream. A small error in
    the past grows from chunk to chunk there; true targets beside it teach the network to correct it.
    """
    sampler = FewStepSampler(steps=1, shift=timestep_shift)
    noise = sample_noise(clip.latents.shape, sampler.num_noise_samples(geometry), clip.latents, generator)
    x0, _ = self_rollout(net, noise, clip.cond, geometry, sampler, exit_step=None)
    return teacher_context(replace(clip, latents=x0), geometry, generator, part)


def frame_mse(a: Latents, b: Latents, weight: Float[Tensor, "b f"]) -> Float[Tensor, ""]:
    """Squared error, averaged within frames and then over frames with weight."""
    return ((a.float() - b.float()).square().mean(dim=(2, 3, 4)) * weight).sum() / (weight > 0).sum().clamp_min(1)


def noise_like(x: Latents, generator: torch.Generator) -> Latents:
    """Standard normal noise, drawn on the generator's device."""
    return torch.randn(x.shape, generator=generator, device=generator.device).to(x)


def uniform_times(
    count: int,
    timestep_shift: float,
    like: Tensor,
    generator: torch.Generator,
    between: tuple[float | Tensor, float | Tensor] = (0.0, 1.0),
) -> Float[Tensor, " n"]:
    """Uniform times between two, or in an interval for each clip, then shifted; one per clip."""
    low, high = between
    return shift(low + (high - low) * _uniform(count, generator), timestep_shift).to(like)


def _uniform(count: int, generator: torch.Generator) -> Float[Tensor, " n"]:
    return torch.rand(count, generator=generator, device=generator.device)


def bernoulli(probability: float, generator: torch.Generator) -> bool:
    """True with that probability; where tensors have no data, whenever it may be."""
    draw = torch.rand((), generator=generator, device=generator.device)
    return probability > 0 and bool(draw < probability)


Per = Literal["batch", "clip"]
"""What a random index is drawn for: all clips of a micro-batch together, or each."""


def random_indices(count: int, clips: int, per: Per, generator: torch.Generator) -> list[int]:
    """A uniform integer below count for every clip; `per` batch: the same one."""
    if per == "batch":
        return [random_index(count, generator)] * clips
    return [int(i) for i in torch.randint(count, (clips,), generator=generator, device=generator.device).tolist()]


def random_index(count: int, generator: torch.Generator) -> int:
    """A uniform integer below count."""
    return int(torch.randint(count, (), generator=generator, device=generator.device))
