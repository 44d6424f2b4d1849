"""The one training loop, for every stage: what happens in a step is what you read in `loop`."""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from minwm.core.config import UserError
from minwm.core.metrics import metrics_log
from minwm.core.runtime import generator as make_generator
from minwm.core.runtime import peak_memory_gb, progress, rank
from minwm.data.dataset import Loader
from minwm.recipes.base import Recipe
from minwm.train.config import Run
from minwm.train.flops import count_flops
from minwm.train.state import States


class DivergedError(UserError):
    """Loss or gradient stopped being finite."""


class Ema:
    """Exponential moving average of the student's weights; the decay grows from 0.1 to `decay`."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net, self.decay = copy.deepcopy(net).requires_grad_(False).eval(), decay

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, value in zip(self.net.parameters(), net.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)


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
    """What a step changes: networks, optimisers, EMA, random state. A step is `gradients`, then `update`."""

    def __init__(self, run: Run, recipe: Recipe[Any], device: torch.device) -> None:
        self.run, self.recipe, self.device = run, recipe, device
        self.networks = {role: net.to(device) for role, net in recipe.stateful.items()}
        self.settings = {"student": run.optim, "critic": run.critic}
        self.optimizers = {role: self.settings[role].build(self.networks[role]) for role in run.recipe.trained}
        """By role, then by name."""
        self.ema = Ema(self.networks["student"], run.ema)
        self.generator = make_generator(run.seed, "train", rank(), device=device)

    def gradients(self, step: int, clips: Iterator[Any]) -> Gradients:
        """Accumulate and clip the gradients of a step."""
        losses, data_wait = [], 0.0
        for _ in range(self.run.accumulate):
            start = time.perf_counter()
            clip = next(clips)
            data_wait += time.perf_counter() - start
            with autocast(self.run, self.device):
                loss = self.recipe.loss(clip.to(self.device), step, self.generator)
            (loss.total / self.run.accumulate).backward()
            losses.append(loss)
        role, names = losses[-1].trains, [*losses[-1].logs]
        norm = clip_grad_norm_(self.networks[role].parameters(), self.settings[role].clip)
        *values, norm = read_scalars([*(loss.logs[name] for name in names for loss in losses), norm])
        n = len(losses)
        means = {name: sum(values[i * n : (i + 1) * n]) / n for i, name in enumerate(names)}
        return Gradients(role, means, norm, data_wait)

    def update(self, step: int, gradients: Gradients) -> float:
        """Optimiser step of a role, and of the EMA after the student's. Returns the learning rate; 0 if the gradient is
        so large that the step is left out."""
        role, settings = gradients.trains, self.settings[gradients.trains]
        if settings.skip_above is not None and gradients.norm >= settings.skip_above:
            self.networks[role].zero_grad(set_to_none=True)
            return 0.0
        rate = settings.rate(step, self.run.steps)
        for optimizer in self.optimizers[role].values():
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if role == "student":
            self.ema.update(self.networks[role], step)
        return rate

    @property
    def saved_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """All optimisers by the names that states have for them; `student` is AdamW's."""
        return {
            role if name == "adamw" else f"{role}-{name}": optimizer
            for role, optimizers in self.optimizers.items()
            for name, optimizer in optimizers.items()
        }


def loop(
    run: Run, out: Path, recipe: Recipe[Any], clips: Loader[Any], device: torch.device, held_out: Sequence[Any] = ()
) -> nn.Module:
    """Train until `run.steps`, from the newest state in `out` if there is one. Returns the averaged student.

    The loss on the batches `held_out`, if there are any, is logged whenever a state is saved.
    """
    trainer, states = Trainer(run, recipe, device), States(out)
    saved: dict[str, nn.Module] = {**trainer.networks, "ema": trainer.ema.net}
    first_step, seconds_before = states.latest() or 0, 0.0
    if first_step:
        extra = states.load(first_step, saved, trainer.saved_optimizers, trainer.generator)
        clips.load(extra["data"])
        seconds_before = extra["seconds"]
    start = time.monotonic() - seconds_before
    with (
        metrics_log(out, first_step, run.tensorboard) as log,
        progress(run.steps - first_step, run.name) as bar,
        count_flops(recipe.networks.values()) as flops,
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
            val = {"val": validate(run, recipe, held_out, step, device)} if save and held_out else {}
            losses, optimisation = gradients.losses | val, {"grad_norm": gradients.norm, "lr": rate}
            peak = peak_memory_gb(device)
            cost = speed | {"data_wait_s": gradients.data_wait} | ({"peak_memory_gb": peak} if peak else {})
            log(step, gradients.trains, losses | optimisation | cost)
            bar.advance(1, " ".join(f"{name} {value:.4f}" for name, value in losses.items()))
            if save:
                extra = {"data": clips.state(), "seconds": time.monotonic() - start}
                states.save(step + 1, saved, trainer.saved_optimizers, trainer.generator, extra)
    return trainer.ema.net if run.ema else trainer.networks["student"]


def read_scalars(values: Sequence[Tensor]) -> list[float]:
    """Scalars from the device, in one transfer; float64 holds all of them exactly."""
    return torch.stack([value.double() for value in values]).tolist()


def throughput(run: Run, seconds: float, flops: Sequence[int]) -> dict[str, float]:
    """Rates of this process in a step of that time: clips, their tokens, and useful FLOPs in 1e12 (MFU is these over
    the machine's rate, which `minwm bench-train` measures). Validation and saving are not in the time."""
    rates = {"clips_per_s": run.batch * run.accumulate / seconds}
    if run.recipe.trains_backbone:
        rates["tokens_per_s"] = rates["clips_per_s"] * run.recipe.clip_latents(run.model) * run.model.geometry.tokens
    if flops:
        rates["tflops"] = sum(flops) / seconds / 1e12
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
    return sum(read_scalars(losses)) / len(losses)
