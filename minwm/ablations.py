"""The paper's ablations (figures 3 to 5), small enough for a CPU and with numbers: arms that differ in one thing.

An arm is one or more training runs, one after the other; the last model is measured on held-out worlds. Finished arms
are kept, so an interrupted ablation goes on.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from minwm import presets
from minwm.checkpoint import Model, ModelConfig, load_codec, load_model
from minwm.core.config import ConfigError, choose, dumps, loads
from minwm.core.media import atomic
from minwm.core.runtime import generator, pick_device
from minwm.core.weights import read_weights, write_safetensors
from minwm.data.dataset import ShardDataset
from minwm.data.encode import encode_clips
from minwm.data.noise import PoseNoise
from minwm.data.rerender import render_worlds
from minwm.eval.follow import FollowResult
from minwm.eval.quality import Quality
from minwm.eval.suite import HeldOut, measure
from minwm.formats import CAMERA
from minwm.recipes.diffusion import BidirectionalConfig
from minwm.sampling import Bidirectional
from minwm.train import OptimConfig, Run, build_recipe, train

Say = Callable[[str], None]
CLIPS = 1600
"""Rendered clips of 33 frames at 64x64."""
WORLDS = 5
"""Seed of their worlds."""
MEASURED = 12
"""Held-out clips on which an arm is measured."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One value of what an ablation varies."""

    name: str
    runs: tuple[Run, ...]
    """Stages, one after the other; the last one is measured."""
    x: float = 0.0
    """Place on the axis of the drawing."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Arms that answer a question."""

    name: str
    question: str
    varies: str
    """What differs between arms: the label of the axis."""
    small: str
    """How small it is, in words."""
    arms: tuple[Arm, ...]


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What an arm came to."""

    name: str
    x: float
    seed: int
    steps: int
    batch: int
    seconds: float
    """Of training, on the machine that the results name."""
    loss: float | None
    """On held-out clips with true cameras; None where the recipe's loss is no distance."""
    reliance: float | None
    """1 - that loss over the loss with the cameras of other clips: 0 does not listen to cameras."""
    follow: FollowResult
    quality: Quality


# ---------------------------------------------------------------------------------------------- the arms


def start(out: Path) -> Path:
    """The shipped camera model without its camera branch. With the branch at zero again, what follows relearns control.

    Learning it from the foundation takes thousands of steps, which is more than a CPU has for every arm.
    """
    folder = out / "start"
    if not (folder / "model.safetensors").exists():
        tensors = read_weights(_shipped("camera") / "model.safetensors").tensors
        kept = {name: value for name, value in tensors.items() if not name.endswith(CAMERA)}
        write_safetensors(folder / "model.safetensors", kept)
    return folder


def _shipped(name: str) -> Path:
    folder = presets.starting_checkpoint(name)
    if folder is None:
        raise ConfigError(f"the package ships no {name!r} checkpoint, from which ablations start")
    return Path(folder)


def camera_run(out: Path, name: str, *, steps: int = 200, batch: int = 8, seed: int = 0) -> Run:
    """Phase 1 in small: cameras are learnt again."""
    run = presets.demo(out).stage("camera")
    init = replace(run.init, student=str(out / "start"), codec=str(_shipped("codec")))
    optim = OptimConfig(lr=1e-3, beta2=0.99, warmup=min(20, steps // 2), final=0.1)
    return replace(
        run, name=name, data=str(out / "latents"), init=init, steps=steps, batch=batch, seed=seed, optim=optim,
        ema=0.95, save_every=200, tensorboard=False,
    )  # fmt: skip


NOISES = {
    "exact": None,
    "jittered": PoseNoise(jitter_deg=3.0, jitter_units=0.06),
    "drifting": PoseNoise(drift_deg=6.0, drift_units=0.12),
    "estimated": PoseNoise(log_scale=0.4, slow_deg=2.0, slow_units=0.05, outliers=0.03),
    "twice as badly estimated": PoseNoise(log_scale=0.8, slow_deg=4.0, slow_units=0.1, outliers=0.06),
}
"""A latent of the demo's motion is 4 degrees or 0.125 units: jitter is most of one; drift is that after a second."""


def poses(out: Path) -> Ablation:
    arms = [
        Arm(name=name, x=i, runs=(replace(camera_run(out, name), pose_noise=noise),))
        for i, (name, noise) in enumerate(NOISES.items())
    ]
    return Ablation(
        name="poses",
        question="How exact must the cameras of the training clips be?",
        varies="cameras of the training clips",
        small="200 steps of 8 clips, cameras relearnt from the shipped camera model without its camera branch",
        arms=tuple(arms),
    )


def steps(out: Path) -> Ablation:
    arms = [Arm(name=f"{n} steps", x=n, runs=(camera_run(out, f"{n}", steps=n),)) for n in (10, 25, 50, 100, 200, 400)]
    return Ablation(
        name="steps",
        question="After how many steps does control set in?",
        varies="training steps",
        small="batch 8, every arm a run of its own, cameras relearnt as in `poses`",
        arms=tuple(arms),
    )


def batch(out: Path) -> Ablation:
    arms = [
        Arm(name=f"batch {n}, seed {s}", x=n, seed=s, runs=(camera_run(out, f"{n}-{s}", steps=60, batch=n, seed=s),))
        for s in range(2)
        for n in (1, 2, 4, 8, 16, 32)
    ]
    return Ablation(
        name="batch",
        question="How large must a batch be?",
        varies="clips per step",
        small="60 steps, 2 seeds, cameras relearnt as in `poses`",
        arms=tuple(arms),
    )


ABLATIONS: dict[str, Callable[[Path], Ablation]] = {"poses": poses, "steps": steps, "batch": batch}


def ablation(name: str, out: Path) -> Ablation:
    return ABLATIONS[choose(name, ABLATIONS, "ablation")](out)


# ---------------------------------------------------------------------------------------------- running them


def run_ablation(plan: Ablation, out: Path, say: Say) -> list[ArmResult]:
    """Train and measure the arms that `out` lacks."""
    prepare_data(out, say)
    start(out)
    results = []
    for arm in plan.arms:
        folder = out / plan.name / arm.runs[-1].name
        done = folder / "result.json"
        if not done.exists():
            began = time.monotonic()
            summaries = [train(run, out / plan.name / run.name) for run in arm.runs]
            result = measure_arm(arm, folder, sum(summary.seconds for summary in summaries))
            with atomic(done) as temporary:
                temporary.write_text(dumps(result))
            say(f"{plan.name}: {arm.name}: {_headline(result)} ({time.monotonic() - began:.0f} s)")
        results.append(loads(ArmResult, done.read_text()))
    return results


def _headline(result: ArmResult) -> str:
    listens = "" if result.reliance is None else f", reliance on cameras {result.reliance:.2f}"
    return f"camera score {result.follow.score.value:.2f}{listens}"


def prepare_data(out: Path, say: Say) -> None:
    """Render and encode the training clips, as far as `out` lacks them."""
    render = presets.demo(out).render
    assert render is not None
    if (out / "latents" / "manifest.json").exists():
        return
    say(f"{CLIPS} training clips -> {out}")
    render_worlds(out / "raw", replace(render, seed=WORLDS), clips=CLIPS, workers=2)
    text = presets.tiny_model().text
    encode_clips(out / "raw", out / "latents", load_codec(_shipped("codec")), text)


def measure_arm(arm: Arm, folder: Path, seconds: float) -> ArmResult:
    model, run = _quick(load_model(folder)), arm.runs[-1]
    held = _held_out(model.config)
    measured = measure(model.config, held, held.generate(model, seed=1))
    losses = _losses(run, folder) if isinstance(run.recipe, BidirectionalConfig) else None
    return ArmResult(
        name=arm.name, x=arm.x, seed=arm.seed, steps=run.steps, batch=run.batch, seconds=seconds,
        loss=losses and losses[0], reliance=losses and 1 - losses[0] / losses[1],
        follow=measured.follow, quality=measured.quality,
    )  # fmt: skip


@cache
def _held_out(config: ModelConfig) -> HeldOut:
    return HeldOut.of(config, MEASURED)


def _quick(model: Model) -> Model:
    """With a solver of 12 steps and no guidance where there would be 50 and some: eight times as fast, hardly worse."""
    sampler = model.config.sampler
    if not isinstance(sampler, Bidirectional):
        return model
    return replace(model, config=replace(model.config, sampler=replace(sampler, steps=12, guidance=1.0)))


@torch.no_grad()
def _losses(run: Run, folder: Path, batch: int = 16, batches: int = 6) -> tuple[float, float]:
    """The recipe's loss on held-out clips with their own cameras, and with those of the clip before in the batch."""
    recipe = build_recipe(replace(run, init=replace(run.init, student=str(folder))), pick_device())
    data, totals = ShardDataset(Path(run.data), "val", null=run.model.null()), [0.0, 0.0]
    for i in range(batches):
        clip = data.batch(range(i * batch, (i + 1) * batch))
        assert clip.cond.w2c is not None
        wrong = replace(clip, cond=replace(clip.cond, w2c=clip.cond.w2c.roll(1, 0)))
        for j, given in enumerate((clip, wrong)):
            totals[j] += float(recipe.loss(given, 0, generator(0, "reliance", i)).total) / batches
    return totals[0], totals[1]
