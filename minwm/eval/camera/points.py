"""Points followed through a video, and the motion of a camera between two of its frames. What needs OpenCV.

Points are corners (Shi and Tomasi 1994), followed from frame to frame by Lucas-Kanade and back again: those that do not
return to where they came from are dropped. A camera that moved is found from pairs of points by the five-point method
(Nister 2004) with MAGSAC (Barath et al. 2020).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from minwm.cameras.epipolar import distances, load_opencv, sampson
from minwm.cameras.track import Intrinsics, rigid, se3_inverse, so3_exp

Array = np.ndarray
SHORTER_SIDE = 256
"""Smaller frames are enlarged to it: the windows of the tracker are made for so many pixels."""
MOST_POINTS = 500
SPACING = 6
"""Pixels between new points, in frames of that size."""
WINDOW = 15
"""Side of the windows that are compared, in pixels of the enlarged frame; of frames enlarged by more than about 3,"""
WINDOW_BEFORE = 5.25
"""in pixels of the video."""
RETURN, RETURN_BEFORE = 0.2, 0.1
"""Pixels of either kind by which a point may miss its origin when it is followed back; the greater counts."""
CONFIDENCE = 0.9999
ROUGH, FINE = 6, 30
"""Gauss-Newton iterations from every start, and from the best of what they find."""
DIRECTIONS = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 0, 1], [1, 0, -1]], np.float64)


@dataclass(frozen=True)
class View:
    """The points of one frame."""

    ids: Int[Array, " p"]
    """Of points, the same in all frames; sorted."""
    rays: Float[Array, "p 2"]
    """x/z and y/z in camera coordinates."""


def follow_points(frames: UInt8[Array, "n h w 3"], K: Intrinsics, every: int) -> list[View]:
    """Points in every `every`-th frame. New ones are added there, wherever there is room."""
    cv2: Any = load_opencv()
    height, width = frames.shape[1:3]
    scale = max(1.0, SHORTER_SIDE / min(height, width))
    size = round(width * scale), round(height * scale)
    fx, fy, cx, cy = K * [*size, *size]
    points, ids, known = np.zeros((0, 2), np.float32), np.zeros(0, int), 0
    before = np.zeros((0, 0), np.uint8)
    views = list[View]()
    for i, frame in enumerate(frames):
        image = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_CUBIC)
        if len(points):
            kept, points = _follow(cv2, before, image, points, scale)
            ids = ids[kept]
        if i % every == 0:
            new = _new_points(cv2, image, points)
            points, ids = np.concatenate([points, new]), np.concatenate([ids, known + np.arange(len(new))])
            known += len(new)
            views.append(View(ids, (points + 0.5 - [cx, cy]) / [fx, fy]))
        before = image
    return views


def _follow(cv2: Any, before: Array, image: Array, points: Array, scale: float) -> tuple[Array, Array]:
    """Indices of the points that are found in the next image and back, and where they are. `scale`: pixels of these
    images per pixel of the video."""
    side = round(max(WINDOW, WINDOW_BEFORE * scale))
    settings: dict[str, Any] = {"winSize": (side, side), "maxLevel": 3}
    moved, found, _ = cv2.calcOpticalFlowPyrLK(before, image, points, None, **settings)
    back, returned, _ = cv2.calcOpticalFlowPyrLK(image, before, moved, None, **settings)
    inside = ((moved >= 0) & (moved < image.shape[::-1])).all(1)
    near = np.linalg.norm(back - points, axis=1) < max(RETURN, RETURN_BEFORE * scale)
    kept = np.flatnonzero(inside & near & (found[:, 0] > 0) & (returned[:, 0] > 0))
    return kept, moved[kept]


def _new_points(cv2: Any, image: Array, points: Array) -> Float[Array, "p 2"]:
    """Corners that are not near known points."""
    room = np.full(image.shape, 255, np.uint8)
    for x, y in points.astype(int).tolist():
        cv2.circle(room, (x, y), SPACING, 0, -1)
    missing = MOST_POINTS - len(points)
    new = cv2.goodFeaturesToTrack(image, missing, 0.003, SPACING, mask=room) if missing > 0 else None
    return np.zeros((0, 2), np.float32) if new is None else new[:, 0]


def moved_camera(
    a: Float[Array, "p 2"], b: Float[Array, "p 2"], turn: Float[Array, "3 3"], tolerance: float
) -> tuple[Float[Array, "4 4"], Float[Array, " p"]] | None:
    """Pose of the second camera in the coordinates of the first, its distance 1, and the error of each pair of rays
    (`epipolar_errors`); None if no motion explains the pairs.

    The best is taken of what the five-point method finds, and of a way along each of `DIRECTIONS` after the rotation
    `turn` (x_b = turn x_a) alone, all `refined`. `tolerance`: error of a ray, in units of x/z.
    """
    cv2: Any = load_opencv()
    cv2.setRNGSeed(0)
    essential, _ = cv2.findEssentialMat(a, b, np.eye(3), cv2.USAC_MAGSAC, CONFIDENCE, tolerance)
    starts = [(turn, direction / np.linalg.norm(direction)) for direction in DIRECTIONS]
    if essential is not None and essential.shape == (3, 3):
        _, R, t, _ = cv2.recoverPose(essential, a, b, np.eye(3))
        starts.append((R, t[:, 0]))
    found = [refined(R, t, a, b, tolerance, ROUGH) for R, t in starts]
    costs = [np.log1p((4 * epipolar_errors(R, t, a, b) / tolerance) ** 2).sum() for R, t in found]
    R, t = refined(*found[int(np.argmin(costs))], a, b, tolerance, FINE)
    errors = epipolar_errors(R, t, a, b)
    good = np.abs(errors) < tolerance
    ahead, behind = ((distances(a[good], b[good], R, sign * t) > 0).all(1).sum() for sign in (1, -1))
    if not max(ahead, behind):
        return None
    return se3_inverse(rigid(R, t if ahead >= behind else -t)), errors


def epipolar_errors(
    R: Float[Array, "*n 3 3"], t: Float[Array, "*n 3"], a: Float[Array, "p 2"], b: Float[Array, "p 2"]
) -> Float[Array, "*n p"]:
    """Signed first-order distance (Sampson) of pairs of rays from the epipolar constraint of x_b = R x_a + t, in units
    of x/z."""
    essential = np.cross(t[..., None, :], R.swapaxes(-2, -1)).swapaxes(-2, -1)
    return sampson(essential, a, b)


def refined(
    R: Float[Array, "3 3"],
    t: Float[Array, "3"],
    a: Float[Array, "p 2"],
    b: Float[Array, "p 2"],
    tolerance: float,
    iterations: int,
) -> tuple[Float[Array, "3 3"], Float[Array, "3"]]:
    """The nearest minimum of the epipolar errors, robust (Cauchy) from a quarter of the tolerance on, by Gauss-Newton
    over rotation and direction."""
    step = 1e-6
    nudges = step * np.eye(6, 5, -1)  # none, then one along each of the five
    for _ in range(iterations):
        errors, *nudged = epipolar_errors(*_moved(R, t, nudges), a, b)
        slopes = (np.stack(nudged, 1) - errors[:, None]) / step
        weight = 1 / (1 + (4 * errors / tolerance) ** 2)
        normal = (slopes * weight[:, None]).T @ slopes
        change = -np.linalg.solve(normal + 1e-9 * np.trace(normal) * np.eye(5), (slopes * weight[:, None]).T @ errors)
        R, t = _moved(R, t, change)
        if np.abs(change).max() < 1e-9:
            break
    return R, t


def _moved(
    R: Float[Array, "3 3"], t: Float[Array, "3"], change: Float[Array, "*n 5"]
) -> tuple[Float[Array, "*n 3 3"], Float[Array, "*n 3"]]:
    """A rotation and a direction, changed by a rotation vector and by two steps across the direction."""
    direction = t + change[..., 3:] @ np.linalg.svd(t[None])[2][1:]
    return so3_exp(change[..., :3]) @ R, direction / np.linalg.norm(direction, axis=-1, keepdims=True)
