"""Synthetic errors in camera poses, applied to training clips when they are loaded (for ablations).

The error of a clip depends only on its id and the seed, so it is the same in every epoch, like that of an estimator.
"""

import zlib
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from minwm.cameras.track import CameraTrack, se3_exp
from minwm.core.config import ConfigError

WAVES = 3
"""Number of sines in a slow error."""


@dataclass(frozen=True, kw_only=True)
class PoseNoise:
    """Standard deviations per axis of pose errors, which are rigid motions in the camera's own axes."""

    jitter_deg: float = 0.0
    """Rotation, independent in every pixel frame."""
    jitter_units: float = 0.0
    """Translation, independent in every pixel frame."""
    drift_deg: float = 0.0
    """Rotation of a random walk after one second."""
    drift_units: float = 0.0
    """Translation of a random walk after one second."""
    slow_deg: float = 0.0
    """Rotation, a sum of sines with periods of one to four seconds."""
    slow_units: float = 0.0
    """Translation, a sum of sines with periods of one to four seconds."""
    log_scale: float = 0.0
    """Standard deviation of the logarithm of the scale factor on all translations of a clip."""
    outliers: float = 0.0
    """Probability per pixel frame of an additional error of `outlier_deg` and `outlier_units`."""
    outlier_deg: float = 15.0
    """Rotation of an outlier."""
    outlier_units: float = 0.3
    """Translation of an outlier."""
    seed: int = 0
    """Seed of all errors."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ConfigError(f"poses.{name}={value}: sizes of errors are not negative")
        if self.outliers > 1:
            raise ConfigError(f"poses.outliers={self.outliers}: a chance is at most 1")

    def __call__(self, track: CameraTrack, clip: str) -> CameraTrack:
        """The perturbed track of the clip with this id, relative to its first frame."""
        rng = np.random.default_rng([self.seed, zlib.crc32(clip.encode())])
        relative, count = track.relative_to_first(), len(track)
        c2w = relative.c2w.copy()
        c2w[:, :3, 3] *= np.exp(self.log_scale * rng.normal())
        jitter = self._twist(rng.normal(size=(count, 6)), self.jitter_units, self.jitter_deg)
        walk = rng.normal(size=(count, 6)).cumsum(0) / np.sqrt(track.fps)
        drift = self._twist(walk, self.drift_units, self.drift_deg)
        slow = self._twist(_waves(rng, count, track.fps), self.slow_units, self.slow_deg)
        off = rng.normal(size=(count, 6)) * (rng.random((count, 1)) < self.outliers)
        error = jitter + drift + slow + self._twist(off, self.outlier_units, self.outlier_deg)
        return replace(relative, c2w=c2w @ se3_exp(error)).relative_to_first()

    @staticmethod
    def _twist(x: Float[np.ndarray, "n 6"], units: float, degrees: float) -> Float[np.ndarray, "n 6"]:
        return x * np.repeat([units, np.radians(degrees)], 3)


def _waves(rng: np.random.Generator, count: int, fps: float) -> Float[np.ndarray, "n 6"]:
    """A smooth error of unit variance: sines of random phase with periods of one to four seconds."""
    rate = 2 * np.pi / rng.uniform(1.0, 4.0, (WAVES, 1, 6))
    phase = rng.uniform(0, 2 * np.pi, (WAVES, 1, 6))
    time = (np.arange(count) / fps)[None, :, None]
    return np.sin(rate * time + phase).sum(0) * np.sqrt(2 / WAVES)
