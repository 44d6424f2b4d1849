"""All measurements of one or several models of one kind, and of the baselines, on the same held-out worlds."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from minwm.bench.stream import BenchResult, bench_model
from minwm.core.config import ConfigError, UserError
from minwm.core.media import Frame, contact_sheet
from minwm.eval.camera.follow import Confusion, FollowResult
from minwm.eval.cases import Clips, HeldOut, Videos, counterfactual, measure
from minwm.eval.diversity import Diversity, diversity
from minwm.eval.drift import Curve, LongRun
from minwm.eval.image import Quality
from minwm.eval.revisit import Revisit, revisit, revisits
from minwm.store.model import Model, ModelConfig

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How much is generated and measured. Worlds and trajectories are fixed; see docs/evaluation.md."""

    clips: int = 32
    """Held-out clips for camera following and quality."""
    revisits: int = 8
    """Clips that go out and come back, of each kind."""
    walks: int = 4
    """Worlds of the long streams, each with three routes."""
    seconds: int = 60
    """Length of the long streams."""
    seeds: int = 3
    """Seeds over which diversity is measured."""
    counterfactual: bool = True
    """Every action from one first frame."""
    bench_repeats: int = 3
    seed: int = 1
    """Of the models' noise."""

    def __post_init__(self) -> None:
        least = {"clips": 3, "revisits": 2, "walks": 1, "seconds": 2, "seeds": 2, "bench_repeats": 1}
        for name, bound in least.items():
            if (value := vars(self)[name]) < bound:
                raise ConfigError(f"eval.{name}={value}: give at least {bound}")


QUICK = EvalConfig(clips=4, revisits=2, walks=1, seconds=4, seeds=2, bench_repeats=1)
"""Every line of the evaluation, in seconds; its numbers mean little."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One row of every table: a model, or a baseline."""

    follow: FollowResult
    quality: Quality
    confusion: Confusion | None = None
    revisit: Revisit | None = None
    """Within a clip of training."""
    revisit_away: Revisit | None = None
    """Until the first view is out of sight; for models that stream."""
    drift: dict[str, Curve] | None = None
    """By route; for models that stream."""
    diversity: Diversity | None = None
    bench: BenchResult | None = None
    """None for baselines, which are no models."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What was aimed at, and what came out."""

    what: str
    value: float
    bound: float
    met: bool


@dataclass(frozen=True)
class Truths:
    """All that the models are compared with, rendered once."""

    held: HeldOut
    near: Clips
    away: Clips
    long: LongRun

    @classmethod
    def make(cls, model: Model, cfg: EvalConfig) -> "Truths":
        config = model.config
        return cls(
            HeldOut.of(config, cfg.clips),
            revisits(config, cfg.revisits, away=False),
            revisits(config, cfg.revisits, away=True),
            LongRun.make(config, model.codec, cfg.walks, cfg.seconds),
        )


@dataclass
class Evaluation:
    """Rows by name, models first, and the videos of the held-out clips behind them."""

    config: ModelConfig
    truths: Truths
    rows: dict[str, Evaluated] = field(default_factory=dict)
    videos: dict[str, Videos] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """What each row took, and `truth`: rendering what they are compared with."""


def evaluate(models: Mapping[str, Model], cfg: EvalConfig, say: Say) -> Evaluation:
    """Measure the models, then the baselines. Raises UserError if the models do not see the same things."""
    check_alike({name: model.config for name, model in models.items()})
    last = list(models.values())[-1]
    began = time.monotonic()
    result = Evaluation(last.config, Truths.make(last, cfg))
    result.seconds["truth"] = time.monotonic() - began
    for name, model in models.items():
        began = time.monotonic()
        result.videos[name] = result.truths.held.generate(model, cfg.seed)
        result.rows[name] = measure_model(model, result.truths, result.videos[name], cfg)
        result.seconds[name] = time.monotonic() - began
        say(f"{name}: {headline(result.rows[name])} ({result.seconds[name]:.0f} s)")
    began = time.monotonic()
    baselines(result, last)
    result.seconds["baselines"] = time.monotonic() - began
    return result


def best_and_worst(result: Evaluation, name: str, each: int = 2) -> Frame:
    """A contact sheet of a model's clips that follow their cameras best and worst, each below the truth."""
    follow, held, videos = result.rows[name].follow, result.truths.held, result.videos[name]
    parts = (follow.rot_err_per_clip, follow.static_rot_deg), (follow.trans_err_per_clip, follow.static_trans_u)
    missed = sum(np.array(errors) / max(still, 1e-6) for errors, still in parts)
    order, rows, labels = np.argsort(missed), [], []
    for kind, clips in (("best", order[:each]), ("worst", order[-each:])):
        for i in clips:
            rows += [held.truth[i], videos[i]]
            labels += [held.trajectories[i], f"{name}: {kind}"]
    return contact_sheet(rows, every=2 * result.config.motion.stride, labels=labels)


def headline(row: Evaluated) -> str:
    return f"camera score {row.follow.score.value:.2f}, PSNR {row.quality.psnr:.1f} dB"


def measure_model(model: Model, truths: Truths, videos: Videos, cfg: EvalConfig) -> Evaluated:
    """A row from a model; `videos` are those of the held-out clips."""
    config, streams = model.config, model.config.sampler.causal
    measured = measure(config, truths.held, videos)
    long = truths.long
    return Evaluated(
        follow=measured.follow,
        quality=measured.quality,
        confusion=counterfactual(model, cfg.seed)[2] if cfg.counterfactual else None,
        revisit=revisit(config, truths.near, truths.near.generate(model, cfg.seed)),
        revisit_away=revisit(config, truths.away, truths.away.generate(model, cfg.seed)) if streams else None,
        drift=long.measure(long.generate(model, cfg.seed)) if streams and model.config.sampler.passes <= MANY else None,
        diversity=diversity(model, truths.near, cfg.seeds, cfg.seed),
        bench=bench_model(model, repeats=cfg.bench_repeats),
    )


MANY = 8
"""Network passes per chunk above which a model is too slow for the long streams."""


def baselines(result: Evaluation, model: Model) -> None:
    """Add the rows of the baselines, measured like the models."""
    truths, config = result.truths, result.config
    long = truths.long.anchors()
    near, away = (clips.anchors(model.codec) for clips in (truths.near, truths.away))
    for name, videos in truths.held.anchors(model.codec).items():
        measured = measure(config, truths.held, videos)
        result.videos[name] = videos
        result.rows[name] = Evaluated(
            follow=measured.follow,
            quality=measured.quality,
            revisit=revisit(config, truths.near, near[name]),
            revisit_away=revisit(config, truths.away, away[name]),
            drift=truths.long.measure(long[name]),
        )


def targets(row: Evaluated, teacher: Evaluated | None = None) -> list[Target]:
    """The demo world's aims, judged on medians; `teacher` is the multi-step model that the few-step one came from."""
    motion, found = row.follow.motion.overall, []
    if motion.turn_error:
        found.append(_target("yaw and pitch missed, share of the command", motion.turn_error.value, TURN_SHARE))
    if motion.direction_deg:
        found.append(_target("direction of movement missed, degrees", motion.direction_deg.value, DIRECTION_DEG))
    if teacher and teacher.quality.psnr_at and row.quality.psnr_at:
        behind = teacher.quality.psnr_at[0].value - row.quality.psnr_at[0].value
        found.append(_target("PSNR behind the multi-step teacher after 1 s, dB", behind, BEHIND_DB))
    if row.drift:
        ends = [second for curve in row.drift.values() for second in curve.collapsed]
        found.append(_target("long streams that collapsed", sum(end is not None for end in ends), 0))
    return found


TURN_SHARE, DIRECTION_DEG, BEHIND_DB = 0.15, 15.0, 2.0


def _target(what: str, value: float, bound: float) -> Target:
    return Target(what=what, value=value, bound=bound, met=value <= bound)


def check_alike(configs: Mapping[str, ModelConfig]) -> None:
    """Raise UserError unless all see the same pictures along the same trajectories."""
    names = ("height", "width", "latents", "focal", "motion", "stream")
    (one, first), *others = configs.items()
    for other, config in others:
        for name in names:
            a, b = vars(first)[name], vars(config)[name]
            if a != b:
                raise UserError(f"{one} has {name}={a}, {other} has {name}={b}: evaluate them one by one")
