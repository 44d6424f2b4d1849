"""The one training loop, for every stage: what happens in a step is what you read in `loop`."""

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from minwm.core.config import UserError, to_dict
from minwm.core.metrics import metrics_log, read_metrics
from minwm.core.runtime import Progress, peak_memory_gb, progress
from minwm.core.runtime import generator as make_generator
from minwm.data.dataset import Loader
from minwm.nets.backbone import Backbone
from minwm.nets.lora import copy_network, update_average
from minwm.recipes.base import Recipe
from minwm.train.config import Run
from minwm.train.doctor import Verdict, camera_change, from_camera_change, from_log, from_unmoved
from minwm.train.flops import count_flops
from minwm.train.parallel import Parallel, Weights, no_weights, termination, whole
from minwm.train.state import States

SAMPLED = 1024
"""Numbers of a parameter that are compared with what they were."""


class DivergedError(UserError):
    """Loss or gradient stopped being finite."""


class StoppedError(UserError):
    """The run was told to end before its time, and can go on."""

    exit_code = 128 + signal.SIGTERM


class Ema:
    """Exponential moving average of the student's weights; the decay grows from 0.1 to `decay`."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net, self.decay = copy_network(net).requires_grad_(False).eval(), decay

    def update(self, net: nn.Module, step: int) -> None:
        update_average(self.net, net, min(self.decay, (1 + step) / (10 + step)))


@dataclass(frozen=True)
class Gradients:
    """What one step's micro-batches gave, read from the device at once."""

    trains: str
    """The role that has gradients now."""
    losses: dict[str, float]
    """`Loss.logs`, averaged over micro-batches."""
    norm: float
    """Of the averaged gradient, before clipping."""
    data_wait: float
    """Seconds spent waiting for batches."""


class Trainer:
    """What a step changes: networks, optimisers, EMA. A step is `gradients`, then `update`.

    Random draws depend on the step and on the number of the micro-batch in it, not on the process that has it.
    """

    def __init__(self, run: Run, recipe: Recipe[Any], parallel: Parallel, weights: Weights = no_weights) -> None:
        """`weights`: values of networks that were built without any."""
        self.run, self.recipe, self.parallel = run, recipe, parallel
        self.micro_batches = parallel.micro_batches(run.batch, run.accumulate)
        self.networks = recipe.stateful
        self.ema = Ema(self.networks["student"], run.ema)
        parallel.place(recipe, {"ema": self.ema.net}, weights)
        self.settings = {"student": run.optim, "critic": run.critic}
        self.optimizers = {role: self.settings[role].build(self.networks[role]) for role in run.recipe.trained}
        """By role, then by name."""
        self.clip: Any = None
        """The newest one of this process."""
        self.first_weights = weights_sample(self.networks["student"])

    def gradients(self, step: int, clips: Iterator[Any]) -> Gradients:
        """Accumulate and clip the gradients of a step; losses are means over all micro-batches of all processes."""
        device, losses, data_wait = self.parallel.device, [], 0.0
        for number in self.micro_batches:
            start = time.perf_counter()
            self.clip = clip = next(clips)
            data_wait += time.perf_counter() - start
            generator = make_generator(self.run.seed, "train", step, number, device=device)
            with autocast(self.run, device):
                loss = self.recipe.loss(clip.to(device), step, generator)
            (loss.total / len(self.micro_batches)).backward()
            losses.append(loss)
        role, names = losses[-1].trains, [*losses[-1].logs]
        norm = whole(clip_grad_norm_(self.networks[role].parameters(), self.settings[role].clip))
        logs = [torch.stack([loss.logs[name].double() for loss in losses]).mean() for name in names]
        *means, norm = self.parallel.mean(torch.stack([*logs, norm.to(device).double()])).tolist()
        return Gradients(role, dict(zip(names, means, strict=True)), norm, data_wait)

    def update(self, step: int, gradients: Gradients) -> float:
        """Optimiser step of a role, and of the EMA after the student's. Returns the learning rate; 0 if the gradient is
        so large that the step is left out."""
        role, settings = gradients.trains, self.settings[gradients.trains]
        if settings.skip_above is not None and gradients.norm >= settings.skip_above:
            self.networks[role].zero_grad(set_to_none=True)
            return 0.0
        rate = settings.rate(step, self.run.steps)
        for optimizer in self.optimizers[role].values():
            _set_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if role == "student":
            self.ema.update(self.networks[role], step)
        return rate

    @property
    def averaged(self) -> nn.Module:
        """The student that is saved as the model."""
        return self.ema.net if self.run.ema else self.networks["student"]

    @property
    def all_optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer for optimizers in self.optimizers.values() for optimizer in optimizers.values()]


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step; a compiled update has it in a tensor."""
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def loop(
    run: Run,
    out: Path,
    recipe: Recipe[Any],
    clips: Loader[Any],
    parallel: Parallel,
    held_out: Sequence[Any] = (),
    weights: Weights = no_weights,
    sample: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
) -> nn.Module:
    """Train until `run.steps`, from the newest state in `out` if there is one. Returns the averaged student.

    The loss on the batches `held_out`, if there are any, is logged whenever a state is saved at its time. After SIGTERM
    a state is saved at the end of the step, and StoppedError raised. `sample` is called every `run.sample_every` steps,
    with the averaged student and the number of steps; what it gives is logged.
    """
    trainer, states = Trainer(run, recipe, parallel, weights), States(out, run.keep, run.states)
    saved: dict[str, nn.Module] = {**trainer.networks, "ema": trainer.ema.net}
    first_step, extra = states.latest() or 0, dict[str, Any]()
    if first_step:
        extra = states.load(first_step, saved, trainer.all_optimizers)
        clips.load(extra["data"])
    clock, told_of = Clock(run, first_step, parallel.world, extra), set[tuple[str, str]]()
    with (
        metrics_log(out, first_step, run.tensorboard, run.tracker) as log,
        progress(run.steps - first_step, run.name) as bar,
        count_flops(recipe.networks.values()) as flops,
        termination() as told,
    ):
        for step in range(first_step, run.steps):
            step_start = time.perf_counter()
            flops.clear()
            gradients = trainer.gradients(step, clips)
            if not math.isfinite(gradients.norm):
                lr = trainer.settings[gradients.trains].lr
                raise DivergedError(
                    f"{run.name}: step {step}: gradient norm {gradients.norm}, losses {gradients.losses}; "
                    f"the state after {states.latest() or 0} steps is untouched: lower optim.lr (now {lr})"
                )
            rate = trainer.update(step, gradients)
            speed = throughput(run, time.perf_counter() - step_start, flops)
            save = (step + 1) % run.save_every == 0 or step + 1 == run.steps
            val = {"val": validate(run, recipe, held_out, step, parallel.device)} if save and held_out else {}
            losses, optimisation = gradients.losses | val, {"grad_norm": gradients.norm, "lr": rate}
            peak = peak_memory_gb(parallel.device)
            cost = speed | {"data_wait_s": gradients.data_wait} | ({"peak_memory_gb": peak} if peak else {})
            made = sample(trainer.averaged, step + 1) if sample and (step + 1) % run.sample_every == 0 else {}
            scores = {f"sample/{name}": value for name, value in made.items()}
            log(step, gradients.trains, losses | optimisation | cost | scores)
            bar.advance(1, f"{progress_text(losses, cost)} {clock.text(step + 1)}")
            stop = parallel.any(told.is_set()) and step + 1 < run.steps
            if save or stop:
                beside = {"run": to_dict(run), "data": clips.state(), **clock.spent()}
                states.save(step + 1, saved, trainer.all_optimizers, beside)
                found = [*from_log(run, read_metrics(out)), *live_verdicts(trainer, step + 1)]
                note_verdicts(run.name, found, bar, told_of)
            if stop:
                raise StoppedError(f"{run.name}: told to end (SIGTERM); the same command goes on after step {step + 1}")
    return trainer.averaged


class Clock:
    """The time of a training over all of its parts: in seconds, and in hours of its GPUs, one for each process."""

    def __init__(self, run: Run, first_step: int, processes: int, before: Mapping[str, Any]) -> None:
        """`before`: what `spent` was at the first step."""
        self.run, self.first_step, self.processes, self.begin = run, first_step, processes, time.monotonic()
        self.seconds = before.get("seconds", 0.0)
        self.hours = before.get("gpu_hours", self.seconds * processes / 3600)

    def spent(self) -> dict[str, float]:
        seconds = time.monotonic() - self.begin
        return {"seconds": self.seconds + seconds, "gpu_hours": self.hours + seconds * self.processes / 3600}

    def text(self, step: int) -> str:
        """GPU-hours so far and to come after so many steps, and what the latter cost."""
        hours = self.spent()["gpu_hours"]
        to_come = (hours - self.hours) / (step - self.first_step) * (self.run.steps - step)
        price = "" if self.run.price is None else f" for {to_come * self.run.price:.2f}"
        return f"{hours:.2g} GPU-h, {to_come:.2g} to come{price}"


def live_verdicts(trainer: Trainer, steps: int) -> Iterator[Verdict]:
    """What the doctor says of the weights after so many steps, by a sample of them and the newest clip of each process;
    all processes call it."""
    run, student, parallel = trainer.run, trainer.recipe.networks["student"], trainer.parallel
    if run.init.student:
        now, first = weights_sample(trainer.networks["student"]), trainer.first_weights
        same = (now == first)[first != 0].double().mean()  # zeros, of a branch that is new, move by any update
        yield from from_unmoved(run, steps, float(parallel.mean(same)))
    if isinstance(student, Backbone):
        with autocast(run, parallel.device):
            change = camera_change(run, student, trainer.clip.to(parallel.device))
        yield from from_camera_change(steps, student, change)


def weights_sample(net: nn.Module) -> Tensor:
    """The first numbers of every trained parameter, of those that this process has."""
    parts = list[Tensor]()
    for p in net.parameters():
        if p.requires_grad:
            part = p.to_local() if isinstance(p, DTensor) else p
            parts.append(part.detach().flatten()[:SAMPLED])
    return torch.cat(parts)


def note_verdicts(name: str, verdicts: Iterable[Verdict], bar: Progress, told_of: set[tuple[str, str]]) -> None:
    """Show the doctor's verdicts, each once."""
    for verdict in verdicts:
        if (key := (verdict.name, verdict.level)) not in told_of:
            told_of.add(key)
            bar.note(f"{name}: {verdict.level}: {verdict.name}: {verdict.evidence}; {verdict.cure}")


def progress_text(losses: Mapping[str, float], cost: Mapping[str, float]) -> str:
    """Losses, rates and memory."""
    units = {
        "clips_per_s": "clips/s",
        "tokens_per_s": "tokens/s",
        "tflops": "TFLOP/s",
        "mfu": "% MFU",
        "peak_memory_gb": "GB",
    }
    parts = [f"{name} {value:.4f}" for name, value in losses.items()]
    parts += [f"{cost[name]:.3g} {unit}" for name, unit in units.items() if name in cost]
    return " ".join(parts)


def throughput(run: Run, seconds: float, flops: Sequence[int]) -> dict[str, float]:
    """Rates in a step of that time: clips of all processes, their tokens, and useful FLOPs of this process in 1e12;
    with `run.peak_tflops` also their part of that, in percent (MFU). Validation and saving are not in the time."""
    rates = {"clips_per_s": run.batch * run.accumulate / seconds}
    if run.recipe.trains_backbone:
        rates["tokens_per_s"] = rates["clips_per_s"] * run.recipe.clip_latents(run.model) * run.model.geometry.tokens
    if flops:
        rates["tflops"] = sum(flops) / seconds / 1e12
        if run.peak_tflops:
            rates["mfu"] = 100 * rates["tflops"] / run.peak_tflops
    return rates


def autocast(run: Run, device: torch.device) -> torch.autocast:
    """The precision in which a run passes through its networks.

    With checkpointing no cast weight is cached for a later pass: recomputation must meet the same operators.
    """
    half = run.precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=not run.checkpointing)


@torch.no_grad()
def validate(run: Run, recipe: Recipe[Any], batches: Sequence[Any], step: int, device: torch.device) -> float:
    """Mean loss on clips that are never trained on, with the same noise every time."""
    losses = []
    for i, batch in enumerate(batches):
        generator = make_generator(run.seed, "validate", i, device=device)
        with autocast(run, device):
            losses.append(recipe.loss(batch.to(device), step, generator).total)
    return float(torch.stack(losses).double().mean())
