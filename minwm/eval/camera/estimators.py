"""What recovers the camera of a video from its pixels, by name. docs/evaluation.md compares the two."""

from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8

from minwm.cameras.estimate.base import EstimateError
from minwm.cameras.estimate.colmap import Colmap
from minwm.cameras.track import CameraError, Intrinsics, rotation_degrees, se3_inverse
from minwm.eval.camera.recover import (
    LEAST_SHARED,
    PER_SECOND,
    STILL,
    TURN_ERROR,
    Kind,
    RecoveredCamera,
    depth_at,
    recover,
)

Array = np.ndarray


class Estimator(Protocol):
    """As `recover`."""

    def __call__(
        self, frames: UInt8[Array, "n h w 3"], K: Intrinsics, fps: float, first_depth: Float[Array, "h w"] | None
    ) -> RecoveredCamera: ...


def recover_by_colmap(
    frames: UInt8[Array, "n h w 3"], K: Intrinsics, fps: float, first_depth: Float[Array, "h w"] | None = None
) -> RecoveredCamera:
    """As `recover`, with the poses of COLMAP where that finds a camera that moves, or none at all: without parallax
    COLMAP has no poses. A video in which COLMAP fails is lost in all its seconds, and `failure` says why.

    Raises CameraError for a lens that `Colmap` cannot be given.
    """
    tracked = recover(frames, K, fps, first_depth)
    if "move" not in tracked.kinds and set(tracked.kinds) != {"lost"}:
        return tracked
    height, width = frames.shape[1:3]
    if not np.allclose([K[1] * height, *K[2:]], [K[0] * width, 0.5, 0.5], rtol=1e-3):
        raise CameraError(
            f"COLMAP needs square pixels and the axis in the middle; the lens is {K.tolist()} of {width} x {height} "
            "pixels; give --estimator klt"
        )
    every, count = tracked.ends[1] // PER_SECOND, len(tracked.kinds)
    pictures = frames[: tracked.ends[-1] + 1 : every]
    colmap = Colmap(focal=float(K[0]), pictures=len(pictures))
    try:
        found = colmap(pictures, np.arange(len(pictures)) * every / fps, fps / every)
        pixels = found.scale(float(K[0]) * width)
    except EstimateError as error:
        nowhere = np.tile(np.eye(4), (count, 1, 1))
        known = first_depth is not None
        return RecoveredCamera(tracked.ends, ["lost"] * count, nowhere, np.zeros(count, bool), known, str(error))
    c2w = found.track.c2w[::PER_SECOND]
    poses = se3_inverse(c2w[:-1]) @ c2w[1:]
    moved = np.linalg.norm(poses[:, :3, 3], axis=1) * pixels > TURN_ERROR
    turned = np.radians(rotation_degrees(poses[:, :3, :3])) * K[0] * width > STILL
    kinds: list[Kind] = [
        "move" if way else "turn" if turn else "still" for way, turn in zip(moved, turned, strict=True)
    ]
    unit = _unit(found.points, K, first_depth)
    poses[:, :3, 3] *= np.where(moved, unit or 1.0, 0.0)[:, None]
    return RecoveredCamera(tracked.ends, kinds, poses, np.ones(count, bool), unit is not None)


def _unit(points: Float[Array, "m 3"], K: Intrinsics, depth: Float[Array, "h w"] | None) -> float | None:
    """What the points of the first picture, seen from its camera, are multiplied by to be at their known depths; None
    if too few are known."""
    if depth is None:
        return None
    ratios = depth_at(points[:, :2] / points[:, 2:], K, depth) / points[:, 2]
    ratios = ratios[np.isfinite(ratios)]
    return float(np.median(ratios)) if len(ratios) >= LEAST_SHARED else None


ESTIMATORS: dict[str, Estimator] = {"klt": recover, "colmap": recover_by_colmap}
