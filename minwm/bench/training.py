"""How long a training step takes, and how much of what the machine could do is useful work in it (MFU).

A stage is built as its config says, with random weights and one random batch, and makes steps with the loop's own
`Trainer`: passes, backward, clipping, AdamW, average. Loading clips, logs, validation and saving are not in the time.

`train/flops.py` says which FLOPs are useful.
"""

import gc
import math
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import torch
from torch import nn

from minwm.bench.machine import Machine, compiled_graphs, faster, measure_machine, peak_memory, reset_peak_memory
from minwm.core.config import ConfigError
from minwm.core.runtime import StageTimer, pick_device
from minwm.nets.backbone import Backbone
from minwm.train.config import Init, Run
from minwm.train.flops import count_flops
from minwm.train.loop import DivergedError, Trainer
from minwm.train.parallel import Parallel
from minwm.train.roles import build_recipe


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Timed steps that train one network."""

    count: int
    median_ms: float
    p90_ms: float
    update_ms: float
    """Median of AdamW and average alone."""
    gflop: float
    """Useful, of the mean step: some recipes make passes by chance."""
    tflops: float
    """Useful FLOPs of all steps per second of all steps, in 1e12."""
    mfu: float
    """The same in percent of the rate of one large product, measured before and after the steps."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A stage on this machine; `roles` by the network that the steps train (DMD: student and critic in turn)."""

    run: Run
    parameters: int
    """Of the student."""
    threads: int
    """CPU threads that torch uses."""
    machine: Machine
    roles: dict[str, Steps]
    clips_per_s: float
    tokens_per_s: float
    """Of the clips, each counted once: a clean copy beside a noisy clip is work, and no result."""
    tflops: float
    mfu: float
    mfu_of_peak: float | None
    """Percent of a peak that was given, such as that of a data sheet; None if none was."""
    allocated_gb: float | None
    """Peak of the timed steps; None without a GPU."""
    reserved_gb: float | None
    graphs: int
    """Compiled during the timed steps: more than 0 means that they hold compile time."""


@dataclass(frozen=True)
class _Step:
    role: str
    seconds: float
    update: float
    flops: int


def measure_steps(run: Run, steps: int = 10, warmup: int = 3, peak: float | None = None) -> StepTime:
    """Time at least `steps` steps after at least `warmup` others, in whole turns of the recipe's roles.

    `peak`: TFLOP/s of a data sheet, for `mfu_of_peak`. Raises ConfigError for a codec, whose FLOPs have no closed form.
    """
    if not run.recipe.trains_backbone:
        raise ConfigError(f"{run.name} trains a codec, whose FLOPs have no closed form; name a stage of the network")
    if min(steps, warmup) < 1:
        raise ConfigError(f"steps={steps}, warmup={warmup}: at least one of each is needed")
    turn = len(run.recipe.turn)
    warmup, steps = (turn * math.ceil(count / turn) for count in (warmup, steps))
    device = pick_device()
    run = replace(run, init=Init(), data="")  # nothing is read from the folders that it names
    like = torch.empty((), dtype=torch.bfloat16 if run.precision == "bfloat16" else torch.float32, device=device)
    before = measure_machine(like)
    gc.collect()  # compiled blocks refer to themselves, so what another stage left may still be there
    torch.cuda.empty_cache()
    torch.manual_seed(run.seed)
    recipe = build_recipe(run, lambda _: random_network(run).to(device))
    trainer = Trainer(run, recipe, Parallel(run.parallel, device))
    with count_flops(recipe.networks.values()) as passes:
        _steps(trainer, range(warmup), passes)
        reset_peak_memory(device)
        graphs_before = compiled_graphs()
        timed = _steps(trainer, range(warmup, warmup + steps), passes)
        graphs = compiled_graphs() - graphs_before
        allocated, reserved = peak_memory(device)
    machine = faster(before, measure_machine(like))
    roles = {role: [step for step in timed if step.role == role] for role in run.recipe.trained}
    clips = run.batch * run.accumulate * steps / sum(step.seconds for step in timed)
    tflops = _tflops(timed)
    return StepTime(
        run=run,
        parameters=sum(p.numel() for p in trainer.networks["student"].parameters()),
        threads=torch.get_num_threads(),
        machine=machine,
        roles={role: _row(some, machine) for role, some in roles.items()},
        clips_per_s=clips,
        tokens_per_s=clips * run.recipe.clip_latents(run.model) * run.model.geometry.tokens,
        tflops=tflops,
        mfu=100 * tflops / machine.tflops,
        mfu_of_peak=peak and 100 * tflops / peak,
        allocated_gb=allocated,
        reserved_gb=reserved,
        graphs=graphs,
    )


def random_network(run: Run) -> Backbone:
    """A fresh network whose silent parts are no longer zero: products of zeros can be faster than others."""
    net = run.model.network.build()
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return net


def _steps(trainer: Trainer, numbers: range, passes: list[int]) -> list[_Step]:
    """Train on one random batch; `passes` is what `count_flops` yields."""
    run, timer, made = trainer.run, StageTimer(trainer.parallel.device), list[_Step]()
    clips = repeat(run.recipe.example_batch(run.model, run.batch).to(trainer.parallel.device))
    for step in numbers:
        passes.clear()
        timer.restart()
        gradients = trainer.gradients(step, clips)
        timer.record("gradients")
        if not math.isfinite(gradients.norm):
            raise DivergedError(
                f"{run.name}: step {step} on random clips: gradient norm {gradients.norm}; lower optim.lr"
            )
        trainer.update(step, gradients)
        update = timer.record("update")
        made.append(_Step(gradients.trains, sum(timer.seconds.values()), update, sum(passes)))
    return made


def _row(steps: list[_Step], machine: Machine) -> Steps:
    median, p90 = (1000 * float(x) for x in np.percentile([step.seconds for step in steps], (50, 90)))
    tflops = _tflops(steps)
    return Steps(
        count=len(steps),
        median_ms=median,
        p90_ms=p90,
        update_ms=1000 * float(np.median([step.update for step in steps])),
        gflop=float(np.mean([step.flops for step in steps])) / 1e9,
        tflops=tflops,
        mfu=100 * tflops / machine.tflops,
    )


def _tflops(steps: list[_Step]) -> float:
    return sum(step.flops for step in steps) / sum(step.seconds for step in steps) / 1e12


def headline(name: str, time: StepTime) -> list[str]:
    """Lines that say it in short."""
    lines = [
        f"{name}: {role} step {row.median_ms:.4g} ms (p90 {row.p90_ms:.4g}, {row.count} steps), "
        f"{row.gflop:.4g} GFLOP, MFU {row.mfu:.3g}%"
        for role, row in time.roles.items()
    ]
    memory = "" if time.allocated_gb is None else f", peak {time.allocated_gb:.3g} GB"
    peak = "" if time.mfu_of_peak is None else f", {time.mfu_of_peak:.3g}% of the given peak"
    rates = f"{time.clips_per_s:.3g} clips/s, {time.tokens_per_s:.4g} tokens/s"
    machine = f"{time.tflops:.3g} of {time.machine.tflops:.3g} TFLOP/s measured: MFU {time.mfu:.3g}%"
    return [*lines, f"{name}: {rates}, {machine}{peak}{memory}"]
