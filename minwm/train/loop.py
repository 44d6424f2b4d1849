"""The one training loop, for every stage: what happens in a step is what you read in `loop`."""

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from minwm.core.config import UserError
from minwm.core.metrics import metrics_log
from minwm.core.runtime import generator as make_generator
from minwm.core.runtime import progress, rank
from minwm.data.dataset import Loader
from minwm.recipes.base import Loss
from minwm.train.config import Run
from minwm.train.state import States


class DivergedError(UserError):
    """Loss or gradient stopped being finite."""


@runtime_checkable
class Trainable(Protocol):
    """A recipe, as the loop sees it."""

    trained: ClassVar[tuple[str, ...]]

    @property
    def stateful(self) -> Mapping[str, nn.Module]: ...

    def loss(self, clip: Any, /, step: int, generator: torch.Generator) -> Loss: ...


class Ema:
    """Moving average of the student in float32; its decay grows from 0.1 so that early steps do not linger."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net, self.decay = copy.deepcopy(net).requires_grad_(False).eval(), decay

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, value in zip(self.net.parameters(), net.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)


class Trainer:
    """What steps change: networks, optimisers, the average, the random draws. A step is gradients, then an update."""

    def __init__(self, run: Run, recipe: Trainable, device: torch.device) -> None:
        self.run, self.recipe, self.device = run, recipe, device
        self.networks = {role: net.to(device) for role, net in recipe.stateful.items()}
        self.settings = {"student": run.optim, "critic": run.critic}
        self.optimizers = {role: self.settings[role].build(self.networks[role]) for role in recipe.trained}
        self.ema = Ema(self.networks["student"], run.ema)
        self.generator = make_generator(run.seed, "train", rank(), device=device)

    def gradients(self, step: int, clips: Iterator[Any]) -> tuple[list[Loss], float]:
        """Losses of the step's micro-batches; and the norm of their averaged gradient, before it was clipped."""
        parts = []
        for _ in range(self.run.accumulate):
            with autocast(self.run, self.device):
                loss = self.recipe.loss(next(clips).to(self.device), step, self.generator)
            (loss.total / self.run.accumulate).backward()
            parts.append(loss)
        role = parts[-1].trains
        return parts, float(clip_grad_norm_(self.networks[role].parameters(), self.settings[role].clip))

    def update(self, step: int, role: str) -> float:
        """Move a role along its gradients, and the average after the student. Returns the learning rate."""
        optimizer, rate = self.optimizers[role], self.settings[role].rate(step, self.run.steps)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if role == "student":
            self.ema.update(self.networks[role], step)
        return rate


def loop(
    run: Run, out: Path, recipe: Trainable, clips: Loader[Any], device: torch.device, held_out: Sequence[Any] = ()
) -> nn.Module:
    """Train until `run.steps`, from the newest state in `out` if there is one. Returns the averaged student.

    The loss on the batches `held_out`, if there are any, is logged whenever a state is saved.
    """
    trainer, states = Trainer(run, recipe, device), States(out)
    saved: dict[str, nn.Module] = {**trainer.networks, "ema": trainer.ema.net}
    start, spent = states.latest() or 0, 0.0
    if start:
        extra = states.load(start, saved, trainer.optimizers, trainer.generator)
        clips.load(extra["data"])
        spent = extra["seconds"]
    began = time.monotonic() - spent
    with metrics_log(out, start, run.tensorboard) as log, progress(run.steps - start, run.name) as bar:
        for step in range(start, run.steps):
            parts, norm = trainer.gradients(step, clips)
            last = parts[-1]
            if not math.isfinite(norm):
                lr = trainer.settings[last.trains].lr
                raise DivergedError(
                    f"{run.name}: step {step}: gradient norm {norm}, losses {[p.logs for p in parts]}; "
                    f"the state after {states.latest() or 0} steps is untouched: lower optim.lr (now {lr})"
                )
            rate = trainer.update(step, last.trains)
            save = (step + 1) % run.save_every == 0 or step + 1 == run.steps
            val = {"val": validate(run, recipe, held_out, step, device)} if save and held_out else {}
            mean = {name: sum(part.logs[name] for part in parts) / len(parts) for name in last.logs}
            log(step, last.trains, mean | val | {"grad_norm": norm, "lr": rate})
            bar.advance(1, " ".join(f"{name} {value:.4f}" for name, value in (last.logs | val).items()))
            if save:
                place = {"data": clips.state(), "seconds": time.monotonic() - began}
                states.save(step + 1, saved, trainer.optimizers, trainer.generator, place)
    return trainer.ema.net if run.ema else trainer.networks["student"]


def autocast(run: Run, device: torch.device) -> torch.autocast:
    """The precision in which a run passes through its networks.

    With checkpointing no weight that was cast is kept for a later pass: computing again must meet the same operators.
    """
    half = run.precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=not run.checkpointing)


@torch.no_grad()
def validate(run: Run, recipe: Trainable, batches: Sequence[Any], step: int, device: torch.device) -> float:
    """Mean loss on clips that are never trained on, always with the same noise: what falls here was learned."""
    losses = []
    for i, batch in enumerate(batches):
        draws = make_generator(run.seed, "validate", i, device=device)
        with autocast(run, device):
            losses.append(float(recipe.loss(batch.to(device), step, draws).total))
    return sum(losses) / len(losses)
