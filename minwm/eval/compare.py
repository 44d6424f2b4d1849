"""Two results of `minwm eval` in any scene, video by video: what has become significantly better or worse.

Of every quantity that can be better or worse, each video has one difference. Its mean has a bootstrap interval over
videos. Whether it is significant says a sign-flip test (Fisher's randomisation test of paired differences), corrected
for the number of quantities (Holm 1979): if nothing has changed, something is called better or worse in one comparison
of twenty.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from minwm.core.config import ConfigError, UserError, from_dict
from minwm.core.files import read_json
from minwm.eval.metrics import METRICS, Better, Score, Scores
from minwm.eval.stats import Bootstrap, Interval

Array = np.ndarray
SIGNIFICANCE = 0.05
"""Probability that anything is called better or worse if nothing has changed."""
FLIPS = 20_000


@dataclass(frozen=True)
class Difference:
    """How much better the second result is in one quantity, over the videos in which both have it."""

    name: str
    """Metric and quantity."""
    before: float
    after: float
    """Means over videos."""
    gain: Interval
    """Mean of `after - before` where more is better, the reverse where less is; how much nearer to 1 where that is
    best."""
    p: float
    """Probability of so large a gain or loss if the two did not differ, without correction."""
    videos: int
    verdict: Literal["better", "worse", "undecided"] = "undecided"


def read_results(path: Path) -> dict[str, Scores]:
    """The rows of a result, by model; UserError if it is none of any scene."""
    rows = read_json(path).get("videos")
    if not isinstance(rows, dict) or not rows:
        raise UserError(f"{path} is no result of minwm eval --suite, --data or --videos: it has no scores by video")
    try:
        return {name: from_dict(Scores, row) for name, row in rows.items()}
    except ConfigError as error:
        raise UserError(f"{path}: {error}; measure again with this version") from error


def compare(before: Path, after: Path) -> dict[str, list[Difference]]:
    """Differences of each model in both files, or of the only ones in them.

    Raises UserError, naming what differs, unless both were measured on the same videos.
    """
    one, two = read_results(before), read_results(after)
    pairs = {name: (one[name], two[name]) for name in one if name in two}
    if len(one) == len(two) == 1:
        (old, of_old), (new, of_new) = *one.items(), *two.items()
        pairs = {" -> ".join(dict.fromkeys([old, new])): (of_old, of_new)}
    if not pairs:
        raise UserError(f"{before} has {', '.join(one)}, {after} has {', '.join(two)}: no model is in both")
    for pair in pairs.values():
        _check_same_tasks(before, after, pair)
        _check_same_means(pair)
    return {name: judged([*_differences(*pair)]) for name, pair in pairs.items()}


def _check_same_tasks(before: Path, after: Path, pair: tuple[Scores, Scores]) -> None:
    one, two = (scores.tasks for scores in pair)
    for name in (*one, *two):
        if name not in one or name not in two:
            has, lacks = (before, after) if name in one else (after, before)
            raise UserError(f"{has} has a video {name}, {lacks} has none: they are of other clips, or another suite")
        for part in one[name].keys() & two[name].keys():
            if one[name][part] != two[name][part]:
                raise UserError(
                    f"video {name}: its {part} is {one[name][part]!r} in {before}, {two[name][part]!r} in {after}; "
                    "measure both on the same clips"
                )


def _check_same_means(pair: tuple[Scores, Scores]) -> None:
    """Of the weights of metrics, and of the estimator of cameras."""
    by = [scores.estimator for scores in pair]
    if by[0] != by[1]:
        raise UserError(f"cameras were recovered by {by[0]} and by {by[1]}; measure both with one --estimator")
    one, two = (scores.weights for scores in pair)
    for metric in one.keys() & two.keys():
        if one[metric] != two[metric]:
            raise UserError(
                f"{metric} was measured with weights {one[metric]} and {two[metric]}; take one file for both"
            )


def _differences(one: Scores, two: Scores) -> Iterator[Difference]:
    for metric, quantities in one.scores.items():
        for quantity, score in quantities.items():
            better = METRICS[metric].better.get(quantity) if metric in METRICS else None
            other = two.scores.get(metric, {}).get(quantity)
            shared = [name for name in score.videos if other and name in other.videos]
            if better and other and shared:
                yield _difference(f"{metric}: {quantity}", score, other, shared, better)


def _difference(name: str, one: Score, two: Score, shared: Sequence[str], better: Better) -> Difference:
    before, after = (np.array([score.videos[video] for video in shared]) for score in (one, two))
    gains = {"more": after - before, "less": before - after, "one": abs(before - 1) - abs(after - 1)}[better]
    mean = Bootstrap(len(gains)).mean(gains[:, None])
    assert mean is not None, "no value is NaN"
    return Difference(name, float(before.mean()), float(after.mean()), mean, sign_flip(gains), len(gains))


def sign_flip(gains: Float[Array, " n"]) -> float:
    """Two-sided p-value: the share of random signs under which the mean is as far from 0; at least 1 / (FLIPS + 1)."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (FLIPS, len(gains)))
    far = np.abs(signs @ gains) >= abs(gains.sum()) - 1e-12
    return float((1 + far.sum()) / (1 + FLIPS))


def judged(found: Sequence[Difference]) -> list[Difference]:
    """The same with verdicts, which hold together."""
    order, verdicts = sorted(found, key=lambda difference: difference.p), dict[str, Difference]()
    for left, difference in zip(range(len(order), 0, -1), order, strict=True):
        if difference.p * left > SIGNIFICANCE:
            break  # nor those with greater ones
        verdicts[difference.name] = replace(difference, verdict="better" if difference.gain.value > 0 else "worse")
    return [verdicts.get(difference.name, difference) for difference in found]
