"""Cameras against the video that they belong to: points followed through the frames, and what other reading fits them.

A point that is followed from one frame to a later one must lie on its epipolar line, and in front of both cameras. The
residual of the line alone does not tell all wrong conventions apart; with the share in front it does. Neither sees the
scale of the translations, and both see the focal length only while the camera turns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import numpy as np
from jaxtyping import Float, UInt8

from minwm.cameras.track import CameraTrack, from_quaternion, quaternion, rigid, se3_inverse
from minwm.core.runtime import require

Array = np.ndarray
GAP = 8
"""Frames between the two views of a pair."""
PAIRS = 12
"""Most pairs that are compared, evenly spread over the clip."""
POINTS = 400
WORST = 3.0
"""Pixels to which a residual is cut, and which a point behind a camera costs."""
RESIDUAL, IN_FRONT = 1.0, 0.9
"""A fit is good up to this residual and from this share in front on: of pictures of 128 to 360 rows, compressed."""
CLEARLY = 0.8
"""Another reading is the right one if it costs less than this share of what the poses as they are cost."""
PARALLAX = 1.0
"""Pixels that a point must move, besides what rotation moves it, before it says which side of the camera it is on."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Points seen in two frames, in pixels from the upper left corner of the picture."""

    first: int
    second: int
    a: Float[Array, "m 2"]
    b: Float[Array, "m 2"]


@dataclass(frozen=True)
class Fit:
    """How well cameras explain the followed points."""

    residual: float
    """Median distance from the epipolar lines in pixels; the worst third of pairs counts, so that each must fit."""
    in_front: float
    """Share of the points with parallax that are in front of both cameras; 1 if none has any."""
    cost: float
    """Mean over points of the residual, cut at WORST, and WORST for points behind a camera."""

    @property
    def good(self) -> bool:
        return self.residual <= RESIDUAL and self.in_front >= IN_FRONT


def follow(frames: Sequence[UInt8[Array, "h w"]], gap: int = GAP, pairs: int = PAIRS) -> list[Pair]:
    """Corners followed through `gap` grey frames and back by KLT; those that do not return to a pixel are left out."""
    if len(frames) <= gap:
        return []
    starts = np.unique(np.linspace(0, len(frames) - 1 - gap, pairs).round().astype(int)).tolist()
    found = [_follow(frames[start : start + gap + 1], start) for start in starts]
    return [pair for pair in found if len(pair.a) >= 16]


def load_opencv() -> ModuleType:
    """OpenCV; MissingExtraError without it."""
    return require("cv2", "sfm")


def _follow(frames: Sequence[UInt8[Array, "h w"]], start: int) -> Pair:
    cv2 = load_opencv()
    corners = cv2.goodFeaturesToTrack(frames[0], POINTS, 0.01, 5)
    if corners is None:
        return Pair(start, start + len(frames) - 1, np.zeros((0, 2)), np.zeros((0, 2)))

    def through(sequence: Sequence[Array], points: Array) -> tuple[Array, Array]:
        good = np.ones(len(points), bool)
        for before, after in pairwise(sequence):
            points, status, _ = cv2.calcOpticalFlowPyrLK(before, after, points, None, winSize=(15, 15), maxLevel=3)
            good &= status[:, 0] == 1
        return points, good

    ends, good = through(frames, corners)
    back, returned = through(frames[::-1], ends)
    good &= returned & (np.abs(back - corners).max((1, 2)) < 1)
    # OpenCV counts from the middle of the first pixel, K from its corner
    return Pair(start, start + len(frames) - 1, corners[good, 0] + 0.5, ends[good, 0] + 0.5)


def fit(pairs: Sequence[Pair], c2w: Float[Array, "n 4 4"], K: Float[Array, "n 4"], size: tuple[int, int]) -> Fit:
    """How well poses explain pairs; `size` is (h, w) of the frames, K that of each pose."""
    residuals, sides = zip(*(_residuals(pair, c2w, K, size) for pair in pairs), strict=True)
    side, every = np.concatenate(sides), np.concatenate(residuals)
    medians = np.sort([np.median(one) for one in residuals])
    known = np.isfinite(side)
    cost = np.where(known & (side < 0), WORST, np.minimum(every, WORST)).mean()
    worst = float(np.median(medians[-max(1, len(medians) // 3) :]))
    return Fit(worst, float((side[known] > 0).mean()) if known.any() else 1.0, float(cost))


def _residuals(
    pair: Pair, c2w: Array, K: Array, size: tuple[int, int]
) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Distances from the epipolar lines (Sampson), and +1 or -1 for points in front or behind, NaN without parallax."""
    height, width = size
    scale = np.array([width, height, width, height])
    T = se3_inverse(c2w[pair.second]) @ c2w[pair.first]
    R, t = T[:3, :3], T[:3, 3]
    inverse_1, inverse_2 = (np.linalg.inv(_matrix(K[i] * scale)) for i in (pair.first, pair.second))
    ray_a, ray_b = ((_homogeneous(x) @ inverse.T)[:, :2] for x, inverse in ((pair.a, inverse_1), (pair.b, inverse_2)))
    turned = _homogeneous(ray_a) @ R.T @ _matrix(K[pair.second] * scale).T
    depth = np.where(np.abs(turned[:, 2]) < 1e-9, 1e-9, turned[:, 2])
    moved = np.where(depth > 0, np.linalg.norm(turned[:, :2] / depth[:, None] - pair.b, axis=1), np.inf)
    centres = c2w[:, :3, 3]
    if np.linalg.norm(t) <= 1e-4 * np.ptp(centres, axis=0).max() + 1e-6 * np.abs(centres).max():  # it only turned
        return moved, np.full(len(moved), np.nan)
    fundamental = inverse_2.T @ np.cross(t, R, axisb=0, axisc=0) @ inverse_1
    front = (distances(ray_a, ray_b, R, t) > 0).all(1)
    return np.abs(sampson(fundamental, pair.a, pair.b)), np.where(moved > PARALLAX, np.where(front, 1.0, -1.0), np.nan)


def triangulate(
    pairs: Sequence[Pair], c2w: Float[Array, "n 4 4"], K: Float[Array, "n 4"], size: tuple[int, int]
) -> Float[Array, "m 3"]:
    """World points of pairs that have parallax, meet their epipolar lines to a pixel, and are in front of both."""
    height, width = size
    found = [np.zeros((0, 3))]
    for pair in pairs:
        residual, side = _residuals(pair, c2w, K, size)
        T = se3_inverse(c2w[pair.second]) @ c2w[pair.first]
        a, b = (
            (points / (width, height) - K[i, 2:]) / K[i, :2]
            for points, i in ((pair.a, pair.first), (pair.b, pair.second))
        )
        away = distances(a, b, T[:3, :3], T[:3, 3])[:, 0]
        rays = _homogeneous(a) / np.linalg.norm(_homogeneous(a), axis=1, keepdims=True)
        good = (side > 0) & (residual < RESIDUAL)
        found.append((away[:, None] * rays)[good] @ c2w[pair.first, :3, :3].T + c2w[pair.first, :3, 3])
    return np.concatenate(found)


def sampson(F: Float[Array, "*n 3 3"], a: Float[Array, "p 2"], b: Float[Array, "p 2"]) -> Float[Array, "*n p"]:
    """Signed first-order distance (Sampson) of pairs of points from b^T F a = 0, in the units of the points."""
    one, two = _homogeneous(a), _homogeneous(b)
    line_b, line_a = one @ F.swapaxes(-2, -1), two @ F
    slopes = np.sqrt((line_a[..., :2] ** 2).sum(-1) + (line_b[..., :2] ** 2).sum(-1))
    return (two * line_b).sum(-1) / np.maximum(slopes, 1e-12)


def distances(
    a: Float[Array, "p 2"], b: Float[Array, "p 2"], R: Float[Array, "3 3"], t: Float[Array, "3"]
) -> Float[Array, "p 2"]:
    """Of points from both cameras (x_b = R x_a + t), where their rays come nearest; negative behind a camera."""
    one, two = _homogeneous(a) @ R.T, _homogeneous(b)
    aa, bb, ab = (one * one).sum(1), (two * two).sum(1), (one * two).sum(1)
    along = np.stack([ab * (two @ t) - bb * (one @ t), aa * (two @ t) - ab * (one @ t)], 1)
    return along * np.sqrt(np.stack([aa, bb], 1)) / np.maximum(aa * bb - ab * ab, 1e-12)[:, None]


def _homogeneous(x: Float[Array, "p 2"]) -> Float[Array, "p 3"]:
    return np.concatenate([x, np.ones_like(x[:, :1])], 1)


def _matrix(k: Float[Array, "4"]) -> Float[Array, "3 3"]:
    return np.array([[k[0], 0, k[2]], [0, k[1], k[3]], [0, 0, 1]])


# ---------------------------------------------------------------------------------------------
# Other readings of the same poses


@dataclass(frozen=True)
class Reading:
    """Another way in which the numbers of a pose file may have been meant."""

    fault: str
    """What is wrong with the poses if this reading fits."""
    cure: str
    poses: Callable[[Float[Array, "n 4 4"]], Float[Array, "n 4 4"]]
    mirrored: bool = False
    """Whether the pixels are mirrored, not the poses."""


FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])


def _reordered(c2w: Array, roll: int) -> Array:
    return rigid(from_quaternion(np.roll(quaternion(c2w[:, :3, :3]), roll, axis=-1)), c2w[:, :3, 3])


def _negated(c2w: Array) -> Array:
    return rigid(c2w[:, :3, :3], -c2w[:, :3, 3])


READINGS = (
    Reading(
        "the poses are world-to-camera, read as camera-to-world",
        "name a format that is world-to-camera, or invert every pose",
        se3_inverse,
    ),
    Reading(
        "the poses have OpenGL axes (y up, z backwards), read as OpenCV",
        "negate the y and the z column of every camera-to-world matrix",
        lambda c2w: c2w @ FLIP,
    ),
    Reading(
        "the poses are world-to-camera with OpenGL axes",
        "invert every pose, then negate the y and the z column",
        lambda c2w: se3_inverse(c2w) @ FLIP,
    ),
    Reading(
        "the quaternions are in the order w x y z, read as x y z w",
        "put the first number of every quaternion last",
        lambda c2w: _reordered(c2w, -1),
    ),
    Reading(
        "the quaternions are in the order x y z w, read as w x y z",
        "put the last number of every quaternion first",
        lambda c2w: _reordered(c2w, 1),
    ),
    Reading(
        "the quaternions of world-to-camera poses are in the order w x y z, read as x y z w",
        "put the first number of every quaternion last",
        lambda c2w: se3_inverse(_reordered(se3_inverse(c2w), -1)),
    ),
    Reading(
        "the quaternions of world-to-camera poses are in the order x y z w, read as w x y z",
        "put the last number of every quaternion first",
        lambda c2w: se3_inverse(_reordered(se3_inverse(c2w), 1)),
    ),
    Reading("the translations have the wrong sign", "negate them", _negated),
    Reading("the poses run backwards in time", "reverse their order", lambda c2w: c2w[::-1]),
    Reading(
        "the pixels are mirrored, or the poses are",
        "mirror the video, or the poses (S R S and S t with S = diag(-1, 1, 1), cx to 1 - cx)",
        lambda c2w: MIRROR @ c2w @ MIRROR,
        mirrored=True,
    ),
)


@dataclass(frozen=True)
class Explanation:
    """A reading of the poses and how well it fits."""

    fault: str
    cure: str
    fit: Fit
    plain: Fit
    """The fit of the poses as they are, on the same pairs."""
    offset: bool = False
    """Whether it is a shift in time."""

    @property
    def gain(self) -> float:
        """By how much it costs less than the poses as they are."""
        return self.plain.cost - self.fit.cost

    @property
    def clear(self) -> bool:
        return self.fit.good and self.fit.cost < CLEARLY * self.plain.cost and self.gain > 0.05


def explain(pairs: Sequence[Pair], track: CameraTrack, size: tuple[int, int], lags: int = 32) -> Iterator[Explanation]:
    """Every other reading: of the convention, up to `lags` frames late or early, and of another focal length."""
    c2w, K = track.c2w, track.K
    plain = fit(pairs, c2w, K, size)
    for reading in READINGS:
        k = np.concatenate([K[:, :2], 1 - K[:, 2:3], K[:, 3:]], 1) if reading.mirrored else K
        yield Explanation(reading.fault, reading.cure, fit(pairs, reading.poses(c2w), k, size), plain)
    for factor in (0.6, 0.7, 0.8, 0.9, 1.11, 1.25, 1.43, 1.67):
        fault = f"the focal length is {factor:g} times that of K"
        better = fit(pairs, c2w, K * np.array([factor, factor, 1, 1]), size)
        yield Explanation(fault, "correct K: was the picture cropped or resized without it?", better, plain)
    for lag in sorted({*range(-lags, lags + 1)} - {0}, key=abs):
        inside = [p for p in pairs if p.first + lag >= 0 and p.second + lag < len(track)]
        if len(inside) >= 3:
            shifted = [Pair(p.first + lag, p.second + lag, p.a, p.b) for p in inside]
            fault = f"the poses come about {abs(lag)} frames too {'late' if lag > 0 else 'early'}"
            cure = f"drop the first {lag} poses" if lag > 0 else f"drop the first {-lag} frames of the video"
            yield Explanation(fault, cure, fit(shifted, c2w, K, size), fit(inside, c2w, K, size), offset=True)


def best(pairs: Sequence[Pair], track: CameraTrack, size: tuple[int, int]) -> list[Explanation]:
    """The readings that clearly fit better than the poses as they are, and equally well; at most one shift in time."""
    clear = [e for e in explain(pairs, track, size) if e.clear]
    least = min((e.fit.cost for e in clear), default=0.0)
    equal = [e for e in clear if e.fit.cost < least + 0.03]
    conventions = sorted((e for e in equal if not e.offset), key=lambda e: e.fit.cost)
    return conventions[:3] or equal[:1]
