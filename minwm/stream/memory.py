"""The memory of a stream whose context is recomputed: latents and cameras of all chunks, and which of them are seen.

A chunk sees the window, and before it as many known views as `StreamConfig.retrieved` says, those whose cameras are
nearest to its own. Without views it sees the sinks, the window, and as many older chunks whose field of view overlaps
most with its own, as in HY-WorldPlay (`hyvideo/utils/retrieval_context.py`). Overlap is measured on random points
around a camera as the share of those that it sees which the other sees too; field of view and distance are
HY-WorldPlay's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minwm.cameras.track import se3_inverse
from minwm.core.config import ConfigError
from minwm.core.flow import Latents
from minwm.core.types import Views
from minwm.nets.chunks import StreamConfig

POINTS = 50_000
"""In a ball around the camera; it sees one in twenty."""
DISTANCE = 8.0
"""World units up to which a camera sees points: the radius of the ball."""
FIELD_OF_VIEW = math.radians(60), math.radians(35)
"""Full angles across and down."""
DEGREES_PER_UNIT = 30.0
"""Between two cameras: a turn that changes what is seen about as much as a world unit does."""
SPARE = 0.2
"""A view that a stream has read stays while it is at most so many world units farther than those that a chunk would see
otherwise: to read another costs time, and as much for every view behind it."""
SPARE_AHEAD = 0.7
"""The same where views were read ahead for a camera that then went elsewhere: to read others now delays the chunk."""


@dataclass(frozen=True)
class RememberedChunk:
    """A finished chunk as the network is shown it."""

    x: Latents
    t: float
    """Timestep at which it is shown."""
    frames: dict[str, Tensor]
    """What its condition has for every frame (`Condition.per_frame`); w2c on the CPU in float64."""


def of_each_clip(past: Sequence[RememberedChunk], index: Sequence[int]) -> RememberedChunk:
    """A batch of chunks, of clip i that of `index[i]`."""

    def pick(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part[i : i + 1] for i, part in enumerate(parts)])

    chunks = [past[i] for i in index]
    frames = {name: pick([chunk.frames[name] for chunk in chunks]) for name in chunks[0].frames}
    return RememberedChunk(pick([chunk.x for chunk in chunks]), chunks[-1].t, frames)


def one_after_the_other(chunks: Sequence[RememberedChunk]) -> RememberedChunk:
    frames = {name: torch.cat([chunk.frames[name] for chunk in chunks], dim=1) for name in chunks[0].frames}
    return RememberedChunk(torch.cat([chunk.x for chunk in chunks], dim=1), chunks[-1].t, frames)


def sees(points: Float[Tensor, "*n p 3"]) -> Bool[Tensor, "*n p"]:
    """Whether a camera sees points, given in its coordinates."""
    x, y, z = points.unbind(-1)
    across, down = torch.atan2(x, z), torch.atan2(y, torch.hypot(x, z))
    return (
        (across.abs() < FIELD_OF_VIEW[0] / 2) & (down.abs() < FIELD_OF_VIEW[1] / 2) & (points.norm(dim=-1) < DISTANCE)
    )


@lru_cache(maxsize=1)
def seen_points() -> Float[Tensor, "p 3"]:
    """Those of `POINTS` uniform points in the ball that a camera sees, in its coordinates: always the same."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(POINTS, 3, generator=generator)
    radius = DISTANCE * torch.rand(POINTS, 1, generator=generator) ** (1 / 3)
    points = radius * torch.nn.functional.normalize(direction, dim=-1)
    return points[sees(points)]


def view_overlap(w2c: Float[Tensor, "q 4 4"], other: Float[Tensor, "k 4 4"]) -> Float[Tensor, "q k"]:
    """The share of what each camera sees that each of the others sees too."""
    pose = (other @ se3_inverse(w2c)[:, None]).float()  # q k 4 4: from a camera's coordinates to another's
    return sees(seen_points() @ pose[..., :3, :3].mT + pose[..., None, :3, 3]).float().mean(-1)


def view_distances(w2c: Float[Tensor, "4 4"], views: Views) -> Float[Tensor, " n"]:
    """How far each view's camera is from one; DEGREES_PER_UNIT between directions count as a world unit between
    positions."""
    camera = views.origin @ se3_inverse(w2c).to(views.origin)

    def far(positions: Float[Tensor, "k 3"], directions: Float[Tensor, "k 3"]) -> Float[Tensor, " k"]:
        degrees = torch.rad2deg((directions @ camera[:3, 2].float()).clamp(-1, 1).acos())
        away = torch.linalg.vector_norm(positions - camera[:3, 3].float(), dim=-1)
        return away + degrees / DEGREES_PER_UNIT

    distances = far(views.positions, views.directions)
    if views.image:
        pose = (views.origin @ se3_inverse(views.image[0])).float()
        distances = torch.cat([distances, far(pose[None, :3, 3], pose[None, :3, 2])])
    return distances


def retrieve_views(
    views: Sequence[Views],
    w2c: Float[Tensor, "b f 4 4"],
    like: Mapping[str, Tensor],
    count: int,
    cached: Sequence[list[int]] = (),
    ahead: bool = False,
) -> tuple[list[list[int]], list[RememberedChunk]]:
    """The views of each clip that are nearest to the last of its cameras: their indices, and as chunks of one latent.

    like: what the frames of a chunk have; a view has no action. cached: the views of each clip that a stream has read,
    of which it keeps those before the first that is far, with room for the nearest. ahead: these were read ahead for an
    expected camera, and are kept up to `SPARE_AHEAD`, without room for the nearest.
    """
    if (least := min(map(len, views))) < count:
        raise ConfigError(f"stream.retrieved={count}, and only {least} views are known of a world; give more")
    chosen, spare = list[list[int]](), SPARE_AHEAD if ahead else SPARE
    for clip, (pose, known) in enumerate(zip(w2c[:, -1], views, strict=True)):
        far = view_distances(pose, known)
        near = far.topk(count, largest=False).indices.tolist()
        close = {*(far <= far[near[-1]] + spare).nonzero()[:, 0].tolist()}
        kept = [*takewhile(close.__contains__, cached[clip] if cached else [])]
        kept = kept if ahead or near[0] in kept else kept[: count - 1]
        chosen.append([*kept, *(i for i in near if i not in kept)][:count])
    chunks = list[RememberedChunk]()
    for column in zip(*chosen, strict=True):
        seen = [(known.latents[i], *known.camera(i)) for known, i in zip(views, column, strict=True)]
        x, poses, K = (torch.stack(parts)[:, None] for parts in zip(*seen, strict=True))
        frames = {"w2c": poses, "K": K.to(like["K"])}
        if "actions" in like:
            frames["actions"] = torch.zeros_like(like["actions"][:, :1])
        chunks.append(RememberedChunk(x.to(like["K"].device), 0.0, frames))
    return chosen, chunks


def choose_context(
    past: Sequence[RememberedChunk], w2c: Float[Tensor, "b f 4 4"] | None, stream: StreamConfig, clips: int
) -> list[list[int]]:
    """Chunks of the past that the next chunk sees, in order, for every clip: all while they fit into the cache.

    w2c: cameras of the next chunk, on the CPU in float64. Of an older one the first and the middle frame count.
    """
    index = len(past)
    if index < stream.slots:
        return [[*range(index)]] * clips
    old, window = range(stream.sink, index - stream.window + 1), range(index - stream.window + 1, index)
    retrieved = [list[int]()] * clips
    if stream.retrieved:
        if w2c is None:
            raise ConfigError("stream.retrieved chooses chunks by what their cameras see; this stream has no cameras")
        views = torch.stack([past[i].frames["w2c"][:, (0, stream.chunk // 2)] for i in old], dim=1)
        retrieved = [_nearest(a, b, old, stream.retrieved) for a, b in zip(w2c, views, strict=True)]
    return [[*range(stream.sink), *chunks, *window] for chunks in retrieved]


def _nearest(w2c: Float[Tensor, "f 4 4"], views: Float[Tensor, "k 2 4 4"], old: range, count: int) -> list[int]:
    """Those of the chunks `old` whose views overlap most with those of w2c, in order; of equals the older ones."""
    overlap = view_overlap(w2c, views.flatten(0, 1)).mean(0).unflatten(0, (-1, 2)).mean(1)
    return sorted(old[i] for i in overlap.argsort(descending=True, stable=True)[:count].tolist())
