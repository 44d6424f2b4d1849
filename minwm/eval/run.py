"""Models of one kind and the baselines, measured on the same held-out cases. Finished rows are kept on disk."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from minwm.bench.stream import BenchResult, bench_model
from minwm.core.config import ConfigError, UserError, dumps
from minwm.core.files import atomic, read_config, write_text
from minwm.eval.camera.confusion import Confusion, counterfactual
from minwm.eval.camera.follow import FollowReference, FollowResult, measure_following
from minwm.eval.cases import BASELINES, HELD_OUT, Case, Clips, Videos, held_out
from minwm.eval.diversity import Diversity, measure_diversity
from minwm.eval.drift import DriftCurves, Frames, LongRollouts
from minwm.eval.image import Quality, chunk_spans, measure_quality
from minwm.eval.revisit import Revisit, measure_revisits, routes
from minwm.nets.codec import VideoCodec
from minwm.render.base import Scenes
from minwm.store.model import Model, ModelConfig

Log = Callable[[str], None]
MAX_PASSES = 8
"""Network passes per chunk above which a model is too slow for the long rollouts."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured, and how much is generated for it. Scenes and trajectories are fixed; see docs/evaluation.md."""

    clips: int = 32
    """Held-out clips for camera following and quality."""
    counterfactual: tuple[str, ...] | None = None
    """Models that are given every action from one first frame; None: all."""
    revisits: int = 8
    """Clips that go out and come back, of each kind; 0: none."""
    walks: int = 4
    """Scenes of the long rollouts, each with three routes; 0: none."""
    seconds: int = 60
    """Length of the long rollouts."""
    seeds: int = 3
    """Seeds over which diversity is measured, on the revisits; 0: it is not."""
    bench_repeats: int = 3
    """Clips over which latency is measured; 0: it is not."""
    seed: int = 1
    """Of the models' noise."""

    def __post_init__(self) -> None:
        optional = {"revisits": 2, "walks": 1, "seeds": 2, "bench_repeats": 1}
        for name, least in {"clips": 3, "seconds": 2, **optional}.items():
            value = vars(self)[name]
            if value < least and not (value == 0 and name in optional):
                raise ConfigError(f"eval.{name}={value}: give at least {least}{', or 0' * (name in optional)}")
        if self.seeds and not self.revisits:
            raise ConfigError(f"eval.seeds={self.seeds}: diversity is measured on eval.revisits, which is 0; set both")


QUICK = EvalConfig(clips=4, revisits=2, walks=1, seconds=4, seeds=2, bench_repeats=1)
"""Every line of the evaluation, in seconds; its numbers mean little."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Measurements of a model or a baseline: a row of every table. None: not measured."""

    follow: FollowResult | None = None
    """As quality and confusion, of models that start from images."""
    quality: Quality | None = None
    confusion: Confusion | None = None
    revisit: Revisit | None = None
    """Within a training clip."""
    revisit_away: Revisit | None = None
    """Until the first view is out of sight; of models that stream."""
    drift: dict[str, DriftCurves] | None = None
    """By route; of models that stream in at most `MAX_PASSES` passes."""
    diversity: Diversity | None = None
    bench: BenchResult | None = None
    eval_seconds: float = 0.0
    """Generating and measuring; rendering the truth counts in the row that needs it first."""


@dataclass(frozen=True)
class HeldOut:
    """What the models are given and compared with, rendered when first needed and once."""

    config: ModelConfig
    codec: VideoCodec
    cfg: EvalConfig
    scenes: Scenes

    @cached_property
    def clips(self) -> Clips:
        return held_out(self.config, self.cfg.clips, self.scenes)

    @cached_property
    def reference(self) -> FollowReference:
        size = self.config.height, self.config.width
        return FollowReference.render(self.clips.cases, *size, stride=self.config.motion.stride)

    @cached_property
    def revisits(self) -> Clips:
        return self._revisits(away=False)

    @cached_property
    def revisits_away(self) -> Clips:
        return self._revisits(away=True)

    def _revisits(self, *, away: bool) -> Clips:
        return Clips.make(self.config, routes(self.config, self.cfg.revisits, away=away), self.scenes, HELD_OUT + 1)

    @cached_property
    def long(self) -> LongRollouts:
        return LongRollouts.make(self.config, self.codec, self.scenes, self.cfg.walks, self.cfg.seconds)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` left in a folder."""

    folder: Path
    models: Sequence[str]
    config: ModelConfig
    cfg: EvalConfig
    scenes: Scenes | None = None
    """None: those of the models."""

    @cached_property
    def cases(self) -> list[Case]:
        """Of the held-out clips."""
        return held_out(self.config, self.cfg.clips, self.scenes or self.config.scene).cases

    @cached_property
    def rows(self) -> dict[str, EvalResult]:
        """By name, models first."""
        paths = {name: _path(self.folder, name, "json") for name in (*self.models, *BASELINES)}
        return {name: read_config(EvalResult, path) for name, path in paths.items() if path.exists()}

    def videos(self, name: str) -> Videos:
        """Of the held-out clips."""
        return load_file(_path(self.folder, name, "safetensors"))["frames"]


def evaluate(
    models: Mapping[str, Callable[[], Model]],
    cfg: EvalConfig,
    folder: Path,
    log: Log,
    scenes: Scenes | None = None,
    part: tuple[int, int] = (0, 1),
) -> Evaluation:
    """Measure models, each loaded when it is its turn, and the baselines; rows that `folder` holds are kept.

    `scenes`: where; None: the models' own. Process i of n, as `part` says, measures every n-th row, and waits for none.

    Raises UserError if the models differ in what they see, or if the rows are those of another config.
    """
    check_config(folder, cfg)
    *_, (last, load) = models.items()
    reference = load()
    held = HeldOut(reference.config, reference.codec, cfg, scenes or reference.config.scene)
    image_start = held.config.image_start
    if not image_start and part[0] == 0:
        log(
            "text starts: camera following, quality and counterfactual control need a first image, and are skipped; "
            "minwm eval --suite recovers the cameras from pixels"
        )

    def model_row(name: str) -> tuple[Videos, EvalResult]:
        model = reference if name == last else models[name]()
        check_alike({last: held.config, name: model.config})
        return measure_model(name, model, held)

    def baseline_row(name: str) -> tuple[Videos, EvalResult]:
        return _measure(
            held, held.config, lambda clips: clips.baseline(name, held.codec), lambda long: long.baseline(name)
        )

    baselines = BASELINES if image_start or cfg.revisits or cfg.walks else ()
    rows = [*((name, model_row) for name in models), *((name, baseline_row) for name in baselines)]
    for name, make in rows[part[0] :: part[1]]:
        _keep(folder, name, make, log)
    return Evaluation(folder, [*models], held.config, cfg, scenes)


def measure_model(name: str, model: Model, held: HeldOut) -> tuple[Videos, EvalResult]:
    """A model's videos of the held-out clips, and its row."""
    cfg, config = held.cfg, model.config
    long = config.sampler.causal and config.sampler.passes <= MAX_PASSES
    videos, row = _measure(
        held,
        config,
        lambda clips: clips.generate(model, cfg.seed),
        (lambda rollouts: rollouts.generate(model, cfg.seed)) if long else None,
        away=config.sampler.causal,
    )
    actions = config.image_start and (cfg.counterfactual is None or name in cfg.counterfactual)
    return videos, replace(
        row,
        confusion=counterfactual(model, held.scenes, cfg.seed) if actions else None,
        diversity=measure_diversity(model, held.revisits, cfg.seeds, cfg.seed) if cfg.seeds else None,
        bench=bench_model(model, repeats=cfg.bench_repeats) if cfg.bench_repeats else None,
    )


def _measure(
    held: HeldOut,
    config: ModelConfig,
    make: Callable[[Clips], Videos],
    rollout: Callable[[LongRollouts], Mapping[str, Frames]] | None,
    *,
    away: bool = True,
) -> tuple[Videos, EvalResult]:
    """The videos that `make` gives for the held-out clips, and what is measured of models and baselines alike. None for
    `rollout`, and not `away`: nothing is longer than a training clip."""
    stream, motion, cfg = config.stream, config.motion, held.cfg
    videos = make(held.clips)
    follow = quality = near = far = drift = None
    if config.image_start:
        spans = chunk_spans(videos.shape[1], stream.first_chunk_frames, stream.chunk, motion.stride)
        follow = measure_following(held.reference, videos)
        quality = measure_quality(videos, held.clips.truth, spans, fps=motion.fps, stride=motion.stride)
    if cfg.revisits:
        near = measure_revisits(config, held.revisits, make(held.revisits))
    if cfg.revisits and away:
        far = measure_revisits(config, held.revisits_away, make(held.revisits_away))
    if cfg.walks and rollout:
        drift = held.long.measure(rollout(held.long))
    return videos, EvalResult(follow=follow, quality=quality, revisit=near, revisit_away=far, drift=drift)


def _keep(folder: Path, name: str, make: Callable[[str], tuple[Videos, EvalResult]], log: Log) -> None:
    """Make a row and its videos, unless `folder` holds them."""
    path = _path(folder, name, "json")
    if path.exists():
        return
    began = time.monotonic()
    videos, row = make(name)
    with atomic(_path(folder, name, "safetensors")) as temporary:
        save_file({"frames": np.ascontiguousarray(videos)}, temporary)
    seconds = time.monotonic() - began
    write_text(path, dumps(replace(row, eval_seconds=seconds)))
    log(f"evaluated {name}: {headline(row)} ({seconds:.0f} s)")


def _path(folder: Path, name: str, suffix: str) -> Path:
    return folder / f"{name.strip('/')}.{suffix}"


def headline(row: EvalResult) -> str:
    """The row in a few words."""
    if row.follow and row.quality:
        return f"camera score {row.follow.score.value:.2f}, PSNR {row.quality.psnr:.1f} dB"
    return f"revisits {row.revisit.consistency.value:.1f} dB alike" if row.revisit else "no camera score"


def check_config(folder: Path, cfg: EvalConfig) -> None:
    """Raise UserError if `folder` holds rows of another config; else note this one there."""
    path = folder / "config.json"
    if path.exists() and (other := read_config(EvalConfig, path)) != cfg:
        raise UserError(f"{folder} holds rows measured with {other}, not with {cfg}; give another folder or delete it")
    write_text(path, dumps(cfg))


def check_alike(configs: Mapping[str, ModelConfig]) -> None:
    """Raise UserError unless all see the same pictures along the same trajectories."""
    names = ("height", "width", "latents", "focal", "motion", "scenes", "stream")
    (one, first), *others = configs.items()
    for other, config in others:
        for name in names:
            a, b = vars(first)[name], vars(config)[name]
            if a != b:
                raise UserError(f"{one} has {name}={a}, {other} has {name}={b}: evaluate them one by one")
