"""The camera that a video shows, where nothing is known of its scene but the lens.

Points are followed through the video (`points`). Over every second, and every half of one, the camera between two
frames is found: a rotation alone, if that explains the points (an essential matrix would then be arbitrary); else a
rotation and a direction. How far it went is known up to a factor, which two spans share where points that both saw have
the same depth. One factor for the whole video remains, unless the depth of points in its first frame is known.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from minwm.cameras.track import Intrinsics, rigid, rotation_degrees, se3_inverse
from minwm.eval.camera.points import View, distances, follow_points, moved_camera

Array = np.ndarray
PER_SECOND = 4
"""Frames per second in which points are looked at."""
SPANS = (PER_SECOND, PER_SECOND // 2)
"""Lengths of the spans over which a camera is found, in such frames; the first is a second."""
LEAST_POINTS = 15
TOLERANCE = 0.5
"""Pixels by which a point may miss its place, as the video has them."""
STILL = 0.25
"""Median way of points in pixels below which a camera stood still."""
TURN_ERROR = 0.5
"""Median error in pixels of a rotation alone that still explains the points; or,"""
TURN_ERROR_RATIO = 2.5
"""so many times that of a camera that moved, which has one freedom more per point."""
LEAST_INLIERS = 0.4
"""Share of points that a camera has to explain."""
FAR = 200.0
"""Depth in units of the way beyond which a point says nothing of the way."""
LEAST_SHARED = 5
"""Points that two spans must share to be compared."""
AGREEMENT = 3.0
"""Degrees by which the rotation over a second may differ from those over its halves; with more it is lost."""
Kind = Literal["still", "turn", "move", "lost"]


@dataclass(frozen=True)
class Span:
    """What a camera did between two frames. `pose` is that of the last camera seen from the first; its distance is 1 if
    the camera moved, else 0."""

    first: int
    last: int
    kind: Kind
    pose: Float[Array, "4 4"]


class Ratio(NamedTuple):
    """Logarithm of the length of one span over that of another, and the number of points that say so."""

    one: int
    two: int
    log: float
    points: int


@dataclass(frozen=True)
class RecoveredCamera:
    """A video's camera, second by second. Lists have an entry per whole second."""

    ends: list[int]
    """Indices of the frames at the start and after each second."""
    kinds: list[Kind]
    poses: Float[Array, "s 4 4"]
    """Of the camera at the end of each second seen from that at its start; identity where it is lost. Units of the
    first frame's depth if that is known, else arbitrary, the same in the whole video."""
    linked: Bool[Array, " s"]
    """Whether the distance is in those units; no way was found where it is not, and the distance is 1."""
    anchored: bool
    """Whether the unit is that of the first frame's depth; or nothing moves, and none is needed."""
    failure: str = ""
    """Why no camera was found in the whole video, if an estimator says so."""

    @property
    def c2w(self) -> Float[Array, "k 4 4"]:
        """Poses at the start and after each second, relative to the first frame."""
        path = [np.eye(4)]
        for pose in self.poses:
            path.append(path[-1] @ pose)
        return np.stack(path)


def recover(
    frames: UInt8[Array, "n h w 3"],
    K: Intrinsics,
    fps: float,
    first_depth: Float[Array, "h w"] | None = None,
) -> RecoveredCamera:
    """The camera of a video. `first_depth`: z-depth of the first frame, inf or NaN where it is unknown."""
    pixel, every = 1 / (K[0] * frames.shape[2]), max(1, round(fps / PER_SECOND))
    views = follow_points(frames, K, every)
    spans = [
        camera_between(views, first, first + length, pixel) for length in SPANS for first in range(len(views) - length)
    ]
    spans = _agreeing(spans)
    known = {} if first_depth is None else _known_distances(views[0], K, first_depth)
    lengths, anchored = _lengths(views, spans, known)
    seconds = [i for i, span in enumerate(spans) if span.last - span.first == SPANS[0] and span.first % SPANS[0] == 0]
    poses = np.stack([spans[i].pose for i in seconds]) if seconds else np.zeros((0, 4, 4))
    found = np.array([lengths[i] for i in seconds])
    poses[:, :3, 3] *= np.where(np.isnan(found), 1.0, found)[:, None]
    ends = [every * SPANS[0] * i for i in range(len(seconds) + 1)]
    return RecoveredCamera(ends, [spans[i].kind for i in seconds], poses, ~np.isnan(found), anchored)


def camera_between(views: Sequence[View], first: int, last: int, pixel: float) -> Span:
    """The camera between two frames; `pixel` is the size of one in units of x/z."""
    a, b, _ = _shared(views[first], views[last])
    if len(a) < LEAST_POINTS:
        return Span(first, last, "lost", np.eye(4))
    if np.median(np.linalg.norm(b - a, axis=1)) < STILL * pixel:
        return Span(first, last, "still", np.eye(4))
    R, turn_errors = _rotation(a, b, pixel)
    error = float(np.median(turn_errors)) / pixel
    moved = None if error < TURN_ERROR else moved_camera(a, b, R.T, TOLERANCE * pixel)
    if moved is not None and np.mean(np.abs(moved[1]) < TOLERANCE * pixel) >= LEAST_INLIERS:
        if error > TURN_ERROR_RATIO * float(np.median(np.abs(moved[1]))) / pixel:
            return Span(first, last, "move", moved[0])
    elif error >= TURN_ERROR:
        return Span(first, last, "lost", np.eye(4))
    return Span(first, last, "turn", rigid(R, np.zeros(3)))


def _agreeing(spans: Sequence[Span]) -> list[Span]:
    """Spans of a second are lost where their halves show another rotation: either has been misled."""
    found = {(span.first, span.last): span for span in spans}
    checked = list[Span]()
    for span in spans:
        middle = (span.first + span.last) // 2
        one, two = found.get((span.first, middle)), found.get((middle, span.last))
        if one and two and "lost" not in (span.kind, one.kind, two.kind):
            R = one.pose[:3, :3] @ two.pose[:3, :3]
            angle = rotation_degrees(R.T @ span.pose[:3, :3])
            if angle > AGREEMENT:
                checked.append(Span(span.first, span.last, "lost", np.eye(4)))
                continue
        checked.append(span)
    return checked


def _shared(one: View, two: View) -> tuple[Float[Array, "p 2"], Float[Array, "p 2"], Array]:
    """Rays of the points that both see, and their ids."""
    ids, a, b = np.intersect1d(one.ids, two.ids, assume_unique=True, return_indices=True)
    return one.rays[a], two.rays[b], ids


def _unit(rays: Float[Array, "p 2"]) -> Float[Array, "p 3"]:
    directions = np.concatenate([rays, np.ones_like(rays[:, :1])], 1)
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def _rotation(a: Float[Array, "p 2"], b: Float[Array, "p 2"], pixel: float) -> tuple[Float[Array, "3 3"], Array]:
    """The rotation R with a = R b for unit rays, by iteratively reweighted least squares (Kabsch), and the angles that
    are left."""
    one, two, weight = _unit(a), _unit(b), np.ones(len(a))
    R, errors = np.eye(3), weight
    for _ in range(10):
        u, _, v = np.linalg.svd((one * weight[:, None]).T @ two)
        R = u @ np.diag([1, 1, np.linalg.det(u @ v)]) @ v
        errors = np.linalg.norm(one - two @ R.T, axis=1)
        weight = 1 / np.maximum(errors, 0.1 * pixel)
    return R, errors


def depth_at(rays: Float[Array, "p 2"], K: Intrinsics, depth: Float[Array, "h w"]) -> Float[Array, " p"]:
    """The z-depth that a depth map has where these rays (x/z, y/z) meet its picture."""
    column, row = ((rays * K[:2] + K[2:]) * depth.shape[::-1]).astype(int).T
    return depth[row.clip(0, depth.shape[0] - 1), column.clip(0, depth.shape[1] - 1)]


def _known_distances(view: View, K: Intrinsics, depth: Float[Array, "h w"]) -> dict[tuple[int, int], float]:
    """Of points from the first camera, by (0, point), where the depth of the first frame is known."""
    at = depth_at(view.rays, K, depth) * np.sqrt(1 + (view.rays**2).sum(1))
    return {(0, int(i)): float(z) for i, z in zip(view.ids, at, strict=True) if np.isfinite(z)}


def _places(count: int, spans: Sequence[Span]) -> list[int]:
    """For each frame the first one from whose place it was taken: those between which the camera did not move."""
    place = list(range(count))
    for span in spans:
        if span.kind in ("still", "turn"):
            one, two = sorted((place[span.first], place[span.last]))
            place = [one if at == two else at for at in place]
    return place


def _lengths(
    views: Sequence[View], spans: Sequence[Span], known: Mapping[tuple[int, int], float]
) -> tuple[Array, bool]:
    """How far the camera went in each span, in one unit; 0 where it did not move, NaN where the unit is not found.

    Two spans that share a place give a point there two distances, whose ratio is that of their lengths. Logarithms of
    the lengths solve a weighted least-squares problem over such pairs. `known` are distances by (place, point).
    """
    moving = [i for i, span in enumerate(spans) if span.kind == "move"]
    lengths = np.array([np.nan if span.kind in ("move", "lost") else 0.0 for span in spans])
    place, anchor = _places(len(views), spans), len(moving)
    found = [dict(_point_distances(views, spans[i], place)) for i in moving]
    ends = [{place[spans[i].first], place[spans[i].last]} for i in moving]
    pairs = [(one, two) for one, two in combinations(range(anchor), 2) if ends[one] & ends[two]]
    ratios = [Ratio(one, two, *_log_ratio(found[one], found[two])) for one, two in pairs]
    ratios += [Ratio(k, anchor, *_log_ratio(found[k], known)) for k in range(anchor) if 0 in ends[k]]
    ratios = [ratio for ratio in ratios if ratio.points >= LEAST_SHARED]
    group = _connected(anchor + 1, ratios, anchor)
    if group == {anchor}:
        group = max((_connected(anchor, ratios, k) for k in range(anchor)), key=len, default={anchor})
    for k, length in _solved([ratio for ratio in ratios if ratio.one in group], group).items():
        if k != anchor:
            lengths[moving[k]] = length
    return lengths, anchor in group and (len(group) > 1 or not moving)


def _solved(ratios: Sequence[Ratio], group: set[int]) -> dict[int, float]:
    """Lengths of spans of which that of the last is 1."""
    column = {k: i for i, k in enumerate(sorted(group))}
    system, right = np.zeros((len(ratios) + 1, len(group))), np.zeros(len(ratios) + 1)
    for i, ratio in enumerate(ratios):
        weight = np.sqrt(ratio.points)
        system[i, column[ratio.one]], system[i, column[ratio.two]] = weight, -weight
        right[i] = weight * ratio.log
    system[-1, -1] = 1.0
    logs = np.linalg.lstsq(system, right, rcond=None)[0]
    return {k: float(np.exp(logs[i])) for k, i in column.items()}


def _point_distances(
    views: Sequence[View], span: Span, place: Sequence[int]
) -> Iterator[tuple[tuple[int, int], float]]:
    """Of points by (place, point), in units of the span's length."""
    a, b, ids = _shared(views[span.first], views[span.last])
    motion = se3_inverse(span.pose)
    for i, (near, far) in zip(ids.tolist(), distances(a, b, motion[:3, :3], motion[:3, 3]).tolist(), strict=True):
        if min(near, far) > 0 and max(near, far) < FAR:
            yield (place[span.first], i), near
            yield (place[span.last], i), far


def _log_ratio(one: Mapping[tuple[int, int], float], two: Mapping[tuple[int, int], float]) -> tuple[float, int]:
    """See `Ratio`; from the distances of points in units of either length."""
    ratios = [np.log(two[key] / z) for key, z in one.items() if key in two]
    return (float(np.median(ratios)), len(ratios)) if ratios else (0.0, 0)


def _connected(count: int, ratios: Sequence[Ratio], start: int) -> set[int]:
    """The spans whose ratio to `start` is known, through others too."""
    neighbours: dict[int, set[int]] = {k: set() for k in range(count)}
    for ratio in ratios:
        if max(ratio.one, ratio.two) < count:
            neighbours[ratio.one].add(ratio.two)
            neighbours[ratio.two].add(ratio.one)
    part, edge = set[int](), {start}
    while edge:
        part |= edge
        edge = set().union(*(neighbours[k] for k in edge)) - part
    return part
