"""Results of WBench in its own layouts: its report, of what `minwm eval` measures, and its result file for the Hub.

The Hub's leaderboard ranks by the mean of five dimensions, most of which need networks that others have trained. So the
result file is made from a report of WBench's own evaluation, and refused for one that lacks a metric.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minwm.core.config import UserError
from minwm.core.files import check_shape, read_json
from minwm.eval.metrics import Score

DATASET = "meituan-longcat/WBench"
DIMENSIONS = {
    "quality": (
        "aesthetic_quality",
        "imaging_quality",
        "temporal_flickering",
        "dynamic_degree",
        "motion_smoothness",
        "hpsv3_quality",
    ),
    "setting": ("scene_adherence", "subject_adherence"),
    "interaction": (
        "navigation_trajectory",
        "event_edit_adherence",
        "subject_action_adherence",
        "perspective_switch_adherence",
    ),
    "consistency": (
        "background_consistency",
        "segment_continuity",
        "perspective_consistency",
        "subject_consistency",
        "geometric_consistency",
        "photometric_consistency",
        "spatial_consistency",
        "gated_spatial_consistency",
    ),
    "physical": ("visual_plausibility", "causal_fidelity"),
}
"""Metrics of each dimension; a dimension is their mean, and the score the mean of the dimensions."""
TASKS = {"navi": ("wbench_navi", 158), "full": ("wbench_full", 289)}
"""Of each part of a report: its task on the Hub, and the cases that it needs. Models that are steered by cameras are
judged by `navi` alone, whose interaction is navigation."""


def navigation_report(model: str, scores: Mapping[str, Score]) -> dict[str, Any]:
    """WBench's report.json, of navigation alone, from the scores of `published`; UserError if they have none."""
    found = dict[str, dict[str, float]]()
    for name in ("accuracy", "consistency"):
        videos = scores[f"nav_{name}"].videos.values() if f"nav_{name}" in scores else ()
        if videos:
            found[f"navigation_{name}"] = {"mean": round(float(np.mean([*videos])), 4), "n": len(videos)}
    if len(found) < 2:
        raise UserError(
            f"--wbench: the videos of {model} have no score of navigation; give cases with two turns of equal or "
            "opposite keys"
        )
    accuracy, consistency = found["navigation_accuracy"], found["navigation_consistency"]
    found["navigation_trajectory"] = {
        "mean": round((accuracy["mean"] + consistency["mean"]) / 2, 4),
        "n": accuracy["n"],
        "n_consistency": consistency["n"],
    }
    cases = {"n_cases": accuracy["n"], "n_navi": accuracy["n"]}
    about = "minwm eval: navigation alone, cameras by optical flow in place of MegaSaM"
    return {"model": model, "made_by": about, **cases, "full": found, "navi": found}


def hub_scores(path: Path) -> dict[str, float]:
    """Score (0 to 100) of each task on the Hub that a report of WBench answers, as its leaderboard has it.

    Raises UserError for a report that lacks cases or metrics of `navi`; `full` is left out where cases are missing, as
    for all models that are steered by cameras.
    """
    report = read_json(path, {"n_cases": int, "n_navi": int, "navi": dict, "full": dict})
    found = dict[str, float]()
    for part, (task, cases) in TASKS.items():
        if (count := report["n_navi" if part == "navi" else "n_cases"]) >= cases:
            found[task] = _score(report[part], part, path)
        elif part == "navi":
            raise UserError(f"{path} is of {count} navigation cases; the Hub's score is that of all {cases}")
    return found


def _score(metrics: Mapping[str, Any], part: str, path: Path) -> float:
    """In percent, with one decimal."""
    dimensions = dict(DIMENSIONS)
    if part == "navi":
        dimensions["interaction"] = ("navigation_trajectory",)
    names = [name for metrics_of in dimensions.values() for name in metrics_of]
    if missing := [name for name in names if name not in metrics]:
        raise UserError(
            f"{path}: its part {part} lacks {', '.join(missing)}; the Hub's score is the mean of all, which WBench's "
            "own evaluation measures (python main.py --model NAME, in its repository)"
        )
    check_shape(metrics, {name: {"mean": float} for name in names}, f"{path}: {part}")
    means = [np.mean([metrics[name]["mean"] for name in metrics_of]) for metrics_of in dimensions.values()]
    return round(100 * float(np.mean(means)), 1)
