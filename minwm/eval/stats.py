"""Bootstrap intervals over clips: how sure a number is, given that a few other clips might have been drawn."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Array = np.ndarray
DRAWS = 1000


@dataclass(frozen=True)
class Interval:
    """A value over clips with its bootstrap 95% interval."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Percentile intervals over resampled clips; every metric sees the same resamples."""

    def __init__(self, clips: int, seed: int = 0) -> None:
        self.all = np.arange(clips)
        self.draws = np.random.default_rng(seed).integers(0, clips, (DRAWS, clips))

    def __call__(self, statistic: Callable[[Array], float]) -> Interval:
        return _interval(float(statistic(self.all)), np.array([statistic(draw) for draw in self.draws]))

    def mean(self, samples: Float[Array, "clips k"]) -> Interval | None:
        """Mean over all samples that are no NaN, clips resampled; None if there are none."""
        there = ~np.isnan(samples)
        if not there.any():
            return None
        total, count = np.where(there, samples, 0).sum(1), there.sum(1)
        sums, counts = total[self.draws].sum(1), count[self.draws].sum(1)
        return _interval(float(total.sum() / count.sum()), sums[counts > 0] / counts[counts > 0])

    def median(self, samples: Float[Array, "clips k"]) -> Interval | None:
        """Median over all samples that are no NaN, clips resampled; None if there are none."""
        if np.isnan(samples).all():
            return None
        drawn = samples[self.draws].reshape(DRAWS, -1)
        drawn = drawn[~np.isnan(drawn).all(1)]
        return _interval(float(np.nanmedian(samples)), np.nanmedian(drawn, axis=1))


def _interval(value: float, draws: Float[Array, " n"]) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(value, float(low), float(high))
