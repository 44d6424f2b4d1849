"""Errors in camera poses, put on training clips when they are loaded: what is stored stays true.

The error of a clip depends on its id and the seed alone: an estimator that is wrong about a clip is wrong about it in
every epoch.
"""

import zlib
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from minwm.cameras.track import CameraTrack, se3_exp
from minwm.core.config import ConfigError

WAVES = 3
"""Sines whose sum is a slow error."""


@dataclass(frozen=True, kw_only=True)
class PoseNoise:
    """Sizes of the errors, each a standard deviation per axis. Errors are rigid motions in the camera's own axes."""

    jitter_deg: float = 0.0
    """Independent in every pixel frame."""
    jitter_units: float = 0.0
    drift_deg: float = 0.0
    """Random walk: after one second."""
    drift_units: float = 0.0
    slow_deg: float = 0.0
    """Smooth: sines of one to four seconds."""
    slow_units: float = 0.0
    log_scale: float = 0.0
    """Of the logarithm of one factor per clip on all translations."""
    outliers: float = 0.0
    """Chance per pixel frame that the pose is off by `outlier_deg` and `outlier_units`."""
    outlier_deg: float = 15.0
    outlier_units: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ConfigError(f"poses.{name}={value}: sizes of errors are not negative")
        if self.outliers > 1:
            raise ConfigError(f"poses.outliers={self.outliers}: a chance is at most 1")

    def __call__(self, track: CameraTrack, clip: str) -> CameraTrack:
        """The track as it would have been estimated, anchored at its first frame."""
        rng = np.random.default_rng([self.seed, zlib.crc32(clip.encode())])
        anchored, count = track.relative_to_first(), len(track)
        c2w = anchored.c2w.copy()
        c2w[:, :3, 3] *= np.exp(self.log_scale * rng.normal())
        jitter = self._twist(rng.normal(size=(count, 6)), self.jitter_units, self.jitter_deg)
        walk = rng.normal(size=(count, 6)).cumsum(0) / np.sqrt(track.fps)
        drift = self._twist(walk, self.drift_units, self.drift_deg)
        slow = self._twist(_waves(rng, count, track.fps), self.slow_units, self.slow_deg)
        off = rng.normal(size=(count, 6)) * (rng.random((count, 1)) < self.outliers)
        error = jitter + drift + slow + self._twist(off, self.outlier_units, self.outlier_deg)
        return replace(anchored, c2w=c2w @ se3_exp(error)).relative_to_first()

    @staticmethod
    def _twist(x: Float[np.ndarray, "n 6"], units: float, degrees: float) -> Float[np.ndarray, "n 6"]:
        return x * np.repeat([units, np.radians(degrees)], 3)


def _waves(rng: np.random.Generator, count: int, fps: float) -> Float[np.ndarray, "n 6"]:
    """A smooth error of unit variance: sines of random phase with periods of one to four seconds."""
    rate = 2 * np.pi / rng.uniform(1.0, 4.0, (WAVES, 1, 6))
    phase = rng.uniform(0, 2 * np.pi, (WAVES, 1, 6))
    time = (np.arange(count) / fps)[None, :, None]
    return np.sin(rate * time + phase).sum(0) * np.sqrt(2 / WAVES)
