"""Poses by Depth Anything 3 (Lin et al. 2025), through its own package, where that is installed."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from minwm.cameras.estimate.base import Estimate, EstimateError, Pictures, Seconds, chosen, filled
from minwm.cameras.formats.base import inverted, normalised, square
from minwm.cameras.track import CameraTrack
from minwm.core.runtime import MissingExtraError, pick_device, require


@dataclass(frozen=True, kw_only=True)
class DepthAnything3:
    """Poses, lens and depth of a clip in one pass of a network. Install it by `pip install depth-anything-3`."""

    kind: ClassVar[str] = "depth-anything-3"
    model: str = "depth-anything/DA3-BASE"
    """Weights on the Hub, or a folder. BASE and SMALL are Apache-2.0; LARGE, GIANT and NESTED forbid commercial use."""
    rows: int = 504
    """Pictures are reduced to so many pixels on their shorter side."""
    pictures: int = 40
    """Most pictures of a clip that are looked at, evenly spread; poses between them are interpolated."""

    def __call__(self, pictures: Pictures, seconds: Seconds, fps: float) -> Estimate:
        """See `PoseEstimator`."""
        used = chosen(len(pictures), self.pictures)
        found = _network(self.model)([pictures[i] for i in used])
        if found.extrinsics is None or found.intrinsics is None:
            raise EstimateError(f"{self.model} gives no poses; choose weights that do, such as DA3-BASE")
        depth = np.asarray(found.depth, np.float64)
        c2w = inverted(square(np.asarray(found.extrinsics, np.float64)))
        K = normalised(np.asarray(found.intrinsics, np.float64), (depth.shape[1], depth.shape[2]))
        track = filled(CameraTrack(c2w, K, fps, "sfm"), used, seconds)
        seen = depth[np.isfinite(depth) & (depth > 0)]
        return Estimate(track, float(np.median(seen)) if seen.size else float("nan"), {"focal": float(K[0, 0])})


@functools.cache
def _network(name: str) -> Callable[[list[np.ndarray]], Any]:
    """What turns pictures into a prediction; loaded once per process."""
    try:
        api = require("depth_anything_3.api", "sfm")
    except MissingExtraError as error:
        raise MissingExtraError("depth-anything-3 is not installed; run: pip install depth-anything-3") from error
    return api.DepthAnything3.from_pretrained(name).to(pick_device()).inference
