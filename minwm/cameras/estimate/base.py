"""Poses of clips that came without: what an estimator gives, and the one rule for its scale."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8

from minwm.cameras.track import CameraError, CameraTrack

Pictures = UInt8[np.ndarray, "n h w 3"]
Seconds = Float[np.ndarray, " n"]


class EstimateError(CameraError):
    """An estimator finds no poses for a clip; the message says why."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """The cameras of a clip as an estimator finds them."""

    track: CameraTrack
    """One pose per picture, in the estimator's scale."""
    depth: float
    """Median depth of what the pictures show, in units of the track."""
    quality: dict[str, float] = field(default_factory=dict)
    """What the estimator says of its work, by name."""
    points: Float[np.ndarray, "m 3"] = field(default_factory=lambda: np.zeros((0, 3)))
    """Points that the first picture shows, in the coordinates of its camera; of estimators that find points."""

    def scale(self, depth: float) -> float:
        """What the median depth becomes `depth` by: equal steps then move the pictures of all clips alike."""
        if not (np.isfinite(self.depth) and self.depth > 0):
            raise EstimateError(f"the median depth is {self.depth:g}: the scale is not known")
        return depth / self.depth


class PoseEstimator(Protocol):
    """Finds the cameras of a clip from its pictures alone."""

    @property
    def rows(self) -> int:
        """Pixels on the shorter side of the pictures that it wants, at most."""
        ...

    def __call__(self, pictures: Pictures, seconds: Seconds, fps: float) -> Estimate:
        """One camera per picture; EstimateError if they are not found. `seconds`: when each picture was taken; `fps`:
        their mean rate."""
        ...


def chosen(count: int, most: int) -> list[int]:
    """Indices of at most `most` of `count` pictures, evenly spread, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def filled(track: CameraTrack, at: Sequence[int], seconds: Seconds) -> CameraTrack:
    """A camera for each picture from those of the pictures `at`; interpolated between them.

    EstimateError if the first or the last picture has none: no path is made longer than what was seen.
    """
    if at[0] != 0 or at[-1] != len(seconds) - 1:
        raise EstimateError(f"pictures {at[0]} to {at[-1]} of 0 to {len(seconds) - 1} have poses; the clip is longer")
    return track.at(np.interp(seconds, seconds[list(at)], np.arange(len(at))), track.fps)


def median_depth(points: Float[np.ndarray, "m 3"], track: CameraTrack) -> float:
    """Median over cameras of the median z-depth of the points in front of each; NaN if there are none."""
    w2c = track.w2c()
    depth = np.einsum("nj,mj->nm", w2c[:, 2, :3], points) + w2c[:, 2:3, 3]
    seen = np.where(depth > 0, depth, np.nan)
    per_camera = [float(np.nanmedian(row)) for row in seen if np.isfinite(row).any()]
    return float(np.median(per_camera)) if per_camera else float("nan")
