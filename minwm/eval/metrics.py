"""The registry of metrics, and what they say of a source of videos.

A metric gives samples by quantity for one video, such as one per second, and declares which fields of a `Video` it
needs. Videos that lack one are left out and counted; a metric that is left without any is skipped, and says why.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minwm.core.config import lookup
from minwm.core.runtime import require
from minwm.eval.camera.published import score_published
from minwm.eval.camera.score import Samples, score_camera
from minwm.eval.image import flicker, psnr, seam, sharpness, ssim
from minwm.eval.perceptual import (
    Network,
    dreamsim,
    four_a_second,
    frechet_distance,
    i3d_features,
    load_network,
    lpips,
)
from minwm.eval.revisit import measure_gated, measure_returns
from minwm.eval.source import Video, VideoSource, digest
from minwm.eval.stats import Bootstrap, Interval

Array = np.ndarray
Log = Callable[[str], None]
Better = Literal["more", "less", "one"]
"""What is best: the most, the least, or the nearest to 1."""
RECOVERED = ("camera", "published")
"""Metrics of the cameras that an estimator recovers from pixels."""


@dataclass(frozen=True)
class Score:
    """One quantity of a source."""

    mean: Interval
    """Over all samples, with the interval over videos."""
    videos: dict[str, float]
    """Mean of each video that has it."""


@dataclass(frozen=True)
class Metric:
    needs: tuple[str, ...]
    """Fields of a `Video` that must be known."""
    measure: Callable[..., Any]
    """Of a `Video` it gives `Samples`, or what `summarise` takes; of a network and a video, if there is one."""
    better: Mapping[str, Better]
    """What is best of each quantity that says how good a video is, over all keys and seconds."""
    network: str = ""
    """The TorchScript file that it needs."""
    summarise: Callable[[Mapping[str, Any]], dict[str, Score]] = field(default_factory=lambda: means)
    """From what was measured, by video."""

    @property
    def compares(self) -> bool:
        """Whether videos are compared with true ones."""
        return bool({"reference", "truth"}.intersection(self.needs))

    def ready(self, network: Network | None) -> "Metric":
        """The same, without need of a network."""
        return replace(self, measure=partial(self.measure, network), network="") if self.network else self

    def lacks(self, video: Video) -> list[str]:
        return [name for name in self.needs if vars(video)[name] is None]


@dataclass(frozen=True)
class Scores:
    """What all metrics say of a source, and why some say nothing."""

    scores: dict[str, dict[str, Score]]
    """By metric and quantity."""
    skipped: dict[str, str]
    """Reason by metric; also of those that could not judge every video."""
    tasks: dict[str, dict[str, str]]
    """`Video.described` by name."""
    weights: dict[str, str]
    """Digest of the file of each metric that has one."""
    estimator: str = "klt"
    """What recovered the cameras from pixels; a name of `ESTIMATORS`."""


def measure(
    source: VideoSource,
    names: Collection[str] | None = None,
    log: Log = lambda _line: None,
    weights: Mapping[str, Path] = {},
    estimator: str = "klt",
) -> Scores:
    """Score a source by the metrics of these names; None: by all. `weights` are TorchScript files by metric;
    `estimator` recovers the cameras. `log` is given what was skipped, and videos without a camera."""
    chosen = {name: lookup(METRICS, name, "metric") for name in (METRICS if names is None else names)}
    skipped = {
        name: f"skipped: it needs weights, --weights {name}=FILE: {metric.network}"
        for name, metric in chosen.items()
        if metric.network and name not in weights
    }
    networks = {name: load_network(file) for name, file in weights.items() if name in chosen}
    ready = {name: metric.ready(networks.get(name)) for name, metric in chosen.items() if name not in skipped}
    found: dict[str, dict[str, Any]] = {name: {} for name in ready}
    missing: dict[str, dict[str, int]] = {name: {} for name in ready}
    tasks = dict[str, dict[str, str]]()
    for video in (replace(video, estimator=estimator) for video in source):
        tasks[video.name] = video.described()
        for name, metric in ready.items():
            if lacking := metric.lacks(video):
                missing[name][lacking[0]] = missing[name].get(lacking[0], 0) + 1
            else:
                found[name][video.name] = metric.measure(video)
        if {*RECOVERED} & ready.keys() and video.camera and (reason := video.recovered.failure):
            log(f"{video.name}: no camera was found: {reason}")
    scores = {name: ready[name].summarise(by_video) for name, by_video in found.items() if by_video}
    skipped |= {name: "skipped: these videos have nothing to judge" for name, score in scores.items() if not score}
    skipped |= {name: _reason(counts, len(source)) for name, counts in missing.items() if counts}
    for name, reason in skipped.items():
        log(f"{name}: {reason}")
    scores = {name: score for name, score in scores.items() if score}
    digests = {name: digest(np.fromfile(weights[name], np.uint8)) for name in networks}
    return Scores(scores, skipped, tasks, digests, estimator)


def _reason(counts: Mapping[str, int], videos: int) -> str:
    parts = ", ".join(f"{count} of {videos} videos have no {field}" for field, count in counts.items())
    return ("skipped: " if sum(counts.values()) == videos else "not of all: ") + parts


def means(samples: Mapping[str, Samples]) -> dict[str, Score]:
    """Of samples by video."""
    quantities = dict.fromkeys(quantity for found in samples.values() for quantity, values in found.items() if values)
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
    return score_published(video.recovered, video.camera, video.turns) if video.recovered.kinds else {}


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
    pairs = ((video.reference[i], video.frames[i]) for i in four_a_second(video))
    return {"flip": [float(flip.evaluate(*(x.astype(np.float32) / 255 for x in pair), "LDR")[1]) for pair in pairs]}


def _texture(video: Video) -> Samples:
    found = {"sharpness": list(map(float, sharpness(video.frames)))}
    return found if len(video.frames) < 3 else {**found, "flicker": [flicker(video.frames[None])]}


def _seams(video: Video) -> Samples:
    assert video.chunks is not None
    found = seam(video.frames, video.reference, *video.chunks)
    return {} if found is None else {"seam": [found]}


def _revisits(video: Video) -> Samples:
    assert video.camera is not None
    return measure_returns(video.frames, video.camera) | measure_gated(video.frames, video.camera)


def _video_distance(features: Mapping[str, tuple[Array, Array]]) -> dict[str, Score]:
    """FVD over all videos, with the interval over videos; None of a video alone."""
    shown, true = zip(*features.values(), strict=True)
    if sum(map(len, shown)) < 2:
        return {}

    def of(videos: Array) -> float:
        return frechet_distance(*(np.concatenate([sets[i] for i in videos]) for sets in (shown, true)))

    return {"fvd": Score(Bootstrap(len(shown))(of), {})}


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
    "seams": Metric(("chunks",), _seams, {"seam": "one"}),
    "revisits": Metric(("camera",), _revisits, {"gain": "more", "gated_psnr": "more", "gated_ssim": "more"}),
    "lpips": Metric(("reference",), lpips, {"lpips": "less"}, "lpips.LPIPS"),
    "dreamsim": Metric(("reference",), dreamsim, {"dreamsim": "less"}, "dreamsim.PerceptualModel"),
    "fvd": Metric(("truth",), i3d_features, {}, "I3D of StyleGAN-V", _video_distance),
}
