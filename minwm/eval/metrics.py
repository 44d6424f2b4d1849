"""The registry of metrics, and what they say of a source of videos.

A metric gives samples by quantity for one video, such as one per second, and declares which fields of a `Video` it
needs. Videos that lack one are left out and counted; a metric that is left without any is skipped, and says why.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from minwm.core.config import lookup
from minwm.core.runtime import require
from minwm.eval.camera.published import score_published
from minwm.eval.camera.score import Samples, score_camera
from minwm.eval.image import flicker, psnr, sharpness, ssim
from minwm.eval.source import Video, VideoSource
from minwm.eval.stats import Bootstrap, Interval

Log = Callable[[str], None]
Better = Literal["more", "less", "one"]
"""What is best: the most, the least, or the nearest to 1."""


@dataclass(frozen=True)
class Metric:
    needs: tuple[str, ...]
    """Fields of a `Video` that must be known."""
    measure: Callable[[Video], Samples]
    better: Mapping[str, Better]
    """What is best of each quantity that says how good a video is, over all keys and seconds."""

    @property
    def compares(self) -> bool:
        """Whether videos are compared with a reference."""
        return "reference" in self.needs

    def lacks(self, video: Video) -> list[str]:
        return [name for name in self.needs if vars(video)[name] is None]


@dataclass(frozen=True)
class Score:
    """One quantity of a source."""

    mean: Interval
    """Over all samples, with the interval over videos."""
    videos: dict[str, float]
    """Mean of each video that has it."""


@dataclass(frozen=True)
class Scores:
    """What all metrics say of a source, and why some say nothing."""

    scores: dict[str, dict[str, Score]]
    """By metric and quantity."""
    skipped: dict[str, str]
    """Reason by metric; also of those that could not judge every video."""
    tasks: dict[str, dict[str, str]]
    """`Video.described` by name."""


def measure(source: VideoSource, names: Collection[str] | None = None, log: Log = lambda _line: None) -> Scores:
    """Score a source by the metrics of these names; None: by all."""
    chosen = {name: lookup(METRICS, name, "metric") for name in (METRICS if names is None else names)}
    samples: dict[str, dict[str, Samples]] = {name: {} for name in chosen}
    missing: dict[str, dict[str, int]] = {name: {} for name in chosen}
    tasks = dict[str, dict[str, str]]()
    for video in source:
        tasks[video.name] = video.described()
        for name, metric in chosen.items():
            if lacking := metric.lacks(video):
                missing[name][lacking[0]] = missing[name].get(lacking[0], 0) + 1
            else:
                samples[name][video.name] = metric.measure(video)
    skipped = {name: _reason(counts, len(source)) for name, counts in missing.items() if counts}
    for name, reason in skipped.items():
        log(f"{name}: {reason}")
    return Scores({name: _summary(found) for name, found in samples.items() if found}, skipped, tasks)


def _reason(counts: Mapping[str, int], videos: int) -> str:
    parts = ", ".join(f"{count} of {videos} videos have no {field}" for field, count in counts.items())
    return ("skipped: " if sum(counts.values()) == videos else "not of all: ") + parts


def _summary(samples: Mapping[str, Samples]) -> dict[str, Score]:
    quantities = dict.fromkeys(quantity for found in samples.values() for quantity in found)
    return {
        quantity: _score({name: found.get(quantity, []) for name, found in samples.items()}) for quantity in quantities
    }


def _score(samples: Mapping[str, list[float]]) -> Score:
    there = {name: values for name, values in samples.items() if values}
    table = np.full((len(there), max(map(len, there.values()))), np.nan)
    for row, values in zip(table, there.values(), strict=True):
        row[: len(values)] = values
    mean = Bootstrap(len(table)).mean(table)
    assert mean is not None, "no sample is NaN"
    return Score(mean, {name: float(np.mean(values)) for name, values in there.items()})


def _camera(video: Video) -> Samples:
    assert video.camera is not None
    return score_camera(video.recovered, video.camera)


def _published(video: Video) -> Samples:
    assert video.camera is not None
    return score_published(video.recovered, video.camera) if video.recovered.kinds else {}


def _likeness(video: Video) -> Samples:
    assert video.reference is not None
    values = {"psnr": psnr(video.frames, video.reference)[1:], "ssim": ssim(video.frames, video.reference)[1:]}
    found: Samples = {name: list(map(float, of_frames)) for name, of_frames in values.items()}
    for name, of_frames in values.items():
        for second in range(1, 1 + int(len(of_frames) / video.fps)):
            end = round(second * video.fps)
            found[f"{name}@{second}"] = [float(of_frames[end - max(1, round(video.fps / 4)) : end].mean())]
    return found


def _flip(video: Video) -> Samples:
    """Perceptual difference of frames that follow one another on a screen (Andersson et al. 2020), 0 is none: four a
    second."""
    flip: Any = require("flip_evaluator", "eval")
    assert video.reference is not None
    indices = range(1, len(video.frames), max(1, round(video.fps / 4)))
    pairs = ((video.reference[i], video.frames[i]) for i in indices)
    return {"flip": [float(flip.evaluate(*(x.astype(np.float32) / 255 for x in pair), "LDR")[1]) for pair in pairs]}


def _texture(video: Video) -> Samples:
    found = {"sharpness": list(map(float, sharpness(video.frames)))}
    return found if len(video.frames) < 3 else {**found, "flicker": [flicker(video.frames[None])]}


METRICS: dict[str, Metric] = {
    "camera": Metric(
        ("camera",),
        _camera,
        {
            **dict.fromkeys(("lost", "rot_err_deg", "direction_err_deg", "strays"), "less"),
            **dict.fromkeys(("turn_ratio", "speed_ratio", "relative_speed"), "one"),
        },
    ),
    "published": Metric(
        ("camera",),
        _published,
        {
            **dict.fromkeys(("rot_err", "trans_err", "cam_mc", "rpe_t", "rpe_deg", "nav_nate_t", "nav_nate_r"), "less"),
            **dict.fromkeys(("worldscore", "nav_accuracy", "nav_consistency", "nav_score"), "more"),
        },
    ),
    "likeness": Metric(("reference",), _likeness, {"psnr": "more", "ssim": "more"}),
    "flip": Metric(("reference",), _flip, {"flip": "less"}),
    "texture": Metric((), _texture, {}),
}
