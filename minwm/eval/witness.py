"""A second estimator of cameras beside the first: how far scores can be trusted where no true camera is known."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minwm.eval.metrics import METRICS, RECOVERED, Score, Scores, measure
from minwm.eval.source import VideoSource
from minwm.eval.stats import Bootstrap, Interval

LIMITS = {
    **dict.fromkeys(("rot_err_deg", "rpe_deg"), 3.0),
    "direction_err_deg": 15.0,
    **dict.fromkeys(("lost", "strays", "turn_ratio", "speed_ratio", "relative_speed", "worldscore"), 0.15),
    **dict.fromkeys(("nav_accuracy", "nav_consistency", "nav_score"), 0.15),
}
"""Differences of a video's score above which estimators disagree. Rotation: as far as the two halves of a second may
differ (`recover.AGREEMENT`); the rest: as far as a model in rendered worlds may miss (`targets.AIMS`)."""


@dataclass(frozen=True)
class Difference:
    """Of one quantity between two estimators, over videos."""

    median: Interval | None
    """Of its size, over the videos that both give it for; None if there are none."""
    videos: int
    """So many are these."""
    limit: float | None
    """From `LIMITS`; None of what is summed over a path, which has none."""
    beyond: list[str]
    """Videos that differ by more."""
    only_one: list[str]
    """Videos of which only one estimator gives the quantity."""


@dataclass(frozen=True)
class Witness:
    """What a second estimator says of the same videos."""

    scores: Scores
    differences: dict[str, dict[str, Difference]]
    """By metric and quantity."""


def call_witness(
    source: VideoSource, first: Scores, estimator: str, log: Callable[[str], None] = lambda _line: None
) -> Witness:
    """Measure again, by another estimator, what `first` says of cameras."""
    second = measure(source, [name for name in RECOVERED if name in first.scores], log, estimator=estimator)
    differences = dict[str, dict[str, Difference]]()
    for name in second.scores:
        one, two = first.scores[name], second.scores[name]
        quantities = [quantity for quantity in METRICS[name].better if quantity in one or quantity in two]
        differences[name] = {q: _difference(q, one.get(q), two.get(q)) for q in quantities}
    return Witness(second, differences)


def _difference(quantity: str, one: Score | None, two: Score | None) -> Difference:
    first, second = (score.videos if score else {} for score in (one, two))
    sizes = {name: abs(first[name] - second[name]) for name in first if name in second}
    median = Bootstrap(len(sizes)).median(np.array([*sizes.values()])[:, None]) if sizes else None
    limit = LIMITS.get(quantity)
    beyond = [name for name, size in sizes.items() if limit is not None and size > limit]
    return Difference(median, len(sizes), limit, beyond, sorted(first.keys() ^ second.keys()))
