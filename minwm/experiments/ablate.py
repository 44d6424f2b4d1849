"""Training and measuring the arms of an ablation. Finished arms are kept, so an interrupted ablation goes on."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from minwm.control.action import with_action_labels
from minwm.core.config import dumps
from minwm.core.files import read_config, write_text
from minwm.core.runtime import generator, pick_device
from minwm.core.weights import read_weights, write_safetensors
from minwm.data.dataset import Split
from minwm.data.encode import encode_clips
from minwm.data.remote import data_folder
from minwm.data.rerender import render_worlds
from minwm.eval.report.charts import Dot, Panel, figure
from minwm.eval.run import EvalConfig, EvalResult, HeldOut, Log, headline, measure_model
from minwm.eval.stats import Interval
from minwm.experiments.ablations import Ablation, Arm, shipped
from minwm.experiments.pipeline import PipelinePart, collect_for, part_seconds
from minwm.experiments.presets.demo import demo, tiny_model
from minwm.store.folder import load_codec, load_model, load_weights, save_model
from minwm.store.layouts import FAMILIES
from minwm.store.model import Model
from minwm.train.build import train
from minwm.train.config import Run
from minwm.train.roles import build_recipe, load_role

CLIPS = 1600
"""Training clips of 33 frames at 64x64."""
WORLDS = 5
"""Seed of their worlds."""
EVALUATION = EvalConfig(clips=12, counterfactual=(), revisits=0, walks=2, seconds=20, seeds=0)
"""What is measured of an arm; long rollouts where the ablation asks for them, speed of few-step models."""
TRAJECTORIES = 64


@dataclass(frozen=True, kw_only=True)
class ArmResult(EvalResult):
    """What an arm came to: its measurements, and its training."""

    name: str
    x: float
    seed: int
    steps: int
    """Of the last stage."""
    batch: int
    seconds: float
    """Of all its stages, on the machine that the results name; trajectories included."""
    loss: float | None
    """On held-out clips with true cameras; None where reliance is not measured."""
    reliance: float | None
    """1 - that loss over the loss with the cameras of other clips: 0 ignores cameras."""
    stored_mb: float = 0.0
    """Trajectories that had to be stored first."""


def run_ablation(plan: Ablation, out: Path, log: Log) -> Iterator[list[ArmResult]]:
    """Train and measure the arms that `out` lacks; yields the results so far after every arm."""
    _prepare(out, log)
    cfg = EVALUATION if plan.drift else replace(EVALUATION, walks=0, bench_repeats=0)
    held, results = None, []
    for arm in plan.arms:
        folder = out / plan.name
        done = folder / "results" / f"{arm.name.replace(':', '').replace(', ', '-').replace(' ', '-')}.json"
        if not done.exists():
            began = time.monotonic()
            seconds = sum(_train(run, folder / run.name, out, log) for run in arm.runs)
            made = folder / arm.runs[-1].name
            model = _quick(load_model(made).ready(), arm)
            held = held or HeldOut(model.config, model.codec, cfg, model.config.scene)
            result = _measure(plan, arm, model, held, made, out, seconds)
            write_text(done, dumps(result))
            log(f"{plan.name}: {arm.name}: {_headline(result)} ({time.monotonic() - began:.0f} s)")
        results.append(read_config(ArmResult, done))
        yield results


def _headline(result: ArmResult) -> str:
    reliance = "" if result.reliance is None else f", reliance on cameras {result.reliance:.2f}"
    return f"{headline(result)}{reliance}"


def _train(run: Run, folder: Path, out: Path, log: Log) -> float:
    """Seconds that the run takes, or took."""
    extra = 0.0
    if run.recipe.needs_trajectories:
        PipelinePart(out, log)("collect", lambda: collect_for(run, out, TRAJECTORIES))
        extra = part_seconds(out, "collect")
    return extra + train(run, folder).seconds


def _prepare(out: Path, log: Log) -> None:
    """Training clips, and what arms start from, as far as `out` lacks them."""
    camera_start(out / "start")
    _teacher(out / "ar")
    render = demo(out).render
    assert render is not None
    raw, latents, codec = out / "raw", out / "latents", load_codec(shipped("codec"))
    part = PipelinePart(out, log)
    part("render", lambda: render_worlds(raw, replace(render, seed=WORLDS), clips=CLIPS, workers=2))
    part("encode", lambda: encode_clips(raw, latents, codec, tiny_model().text))


def camera_start(folder: Path) -> None:
    """The shipped camera model without its camera branch. With the branch at zero again, what follows relearns control.

    Learning it from the foundation takes thousands of steps, which is more than a CPU has for every arm.
    """
    if not folder.exists():
        tensors = read_weights(shipped("camera") / "model.safetensors").tensors
        camera = FAMILIES[tiny_model().network.kind].CAMERA_PARAMETERS
        kept = {name: value for name, value in tensors.items() if not name.endswith(camera)}
        write_safetensors(folder / "model.safetensors", kept)


def _teacher(folder: Path) -> None:
    """The shipped autoregressive model as a whole model folder."""
    if not (folder / "model.json").exists():
        config, codec = demo(folder).stage("ar").model, load_codec(shipped("codec"))
        net = config.network.build()
        load_weights(net, shipped("ar") / "model.safetensors")
        save_model(folder, replace(config, codec=codec.cfg), net, codec)


def _measure(
    plan: Ablation, arm: Arm, model: Model, held: HeldOut, folder: Path, out: Path, seconds: float
) -> ArmResult:
    """An arm whose last stage left `model` in `folder`."""
    run = arm.runs[-1]
    losses = camera_losses(replace(run, init=replace(run.init, student=str(folder)))) if plan.reliance else None
    stores = run.recipe.needs_trajectories
    _, row = measure_model(arm.name, model, held)
    return ArmResult(
        name=arm.name, x=arm.x, seed=arm.seed, steps=run.steps, batch=run.batch, seconds=seconds,
        loss=losses and losses[0], reliance=losses and 1 - losses[0] / losses[1],
        stored_mb=sum(p.stat().st_size for p in (out / "trajectories").glob("*")) / 1e6 if stores else 0.0,
        **vars(row),
    )  # fmt: skip


def _quick(model: Model, arm: Arm) -> Model:
    """With the arm's sampler; for a bidirectional model 12 solver steps and no guidance where there would be 50 and
    some: eight times as fast, hardly worse."""
    sampler = model.config.sampler
    if not sampler.causal:
        sampler = replace(sampler, steps=12, guidance=1.0)
    return replace(model, config=replace(model.config, sampler=arm.sampler or sampler))


@torch.no_grad()
def camera_losses(run: Run, split: Split = "val", batch: int = 16, batches: int = 6) -> tuple[float, float]:
    """The recipe's loss on clips with their own cameras, and with those of the clip before in the batch; by the weights
    that the run starts from."""
    device = pick_device()
    recipe = build_recipe(run, partial(load_role, run, device))
    data, totals = run.recipe.shards(data_folder(run.data), split, run.model), [0.0, 0.0]
    for i in range(batches):
        clip = data.batch([j % len(data) for j in range(i * batch, (i + 1) * batch)])
        assert clip.cond.w2c is not None
        wrong = replace(clip, cond=with_action_labels(replace(clip.cond, w2c=clip.cond.w2c.roll(1, 0))))
        for j, given in enumerate((clip, wrong)):
            totals[j] += float(recipe.loss(given.to(device), 0, generator(0, "reliance", i)).total) / batches
    return totals[0], totals[1]


# ---------------------------------------------------------------------------------------------- drawing


def draw(plan: Ablation, results: list[ArmResult]) -> str:
    """The results as a figure (SVG), a dot per arm."""

    def panel(title: str, values: list[tuple[float, float, float] | None]) -> Panel:
        dots = [Dot(r.x, *v, r.name) for r, v in zip(results, values, strict=True) if v]
        return Panel(title, dots)

    def spread(x: Interval | None) -> tuple[float, float, float] | None:
        return x and (x.value, x.low, x.high)

    panels = [panel("camera score", [spread(r.follow and r.follow.score) for r in results])]
    if all(r.reliance is not None for r in results):
        reliance = [r.reliance for r in results if r.reliance is not None]
        panels.append(panel("reliance on cameras", [(x, x, x) for x in reliance]))
    direction = [spread(r.follow and r.follow.motion.overall.direction_deg) for r in results]
    panels.append(panel("direction missed, degrees", direction))
    if plan.drift:
        worst = [max(c.feature_distance[-1] for c in r.drift.values()) if r.drift else 0.0 for r in results]
        panels.append(panel(f"feature distance after {EVALUATION.seconds} s", [(x, x, x) for x in worst]))
    names = {} if plan.numeric else {arm.x: arm.name for arm in plan.arms}
    return figure(panels, plan.varies, names)
