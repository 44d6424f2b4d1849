"""Training states on disk: networks, optimisers, averaged weights, random generator, position in the data."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minwm.core.config import UserError
from minwm.core.files import read_json, write_json
from minwm.core.weights import load_safetensors, write_safetensors
from minwm.store.folder import load_weights

EXTRA = {"step": int, "seconds": float, "data": dict}
"""What `state.json` holds: steps done, seconds of training, and the position in the data."""


class States:
    """The training states of a run: complete folders `state/{step}`, of which the newest counts."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "state"

    def latest(self) -> int | None:
        """Steps done in the newest state."""
        steps = [int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdigit()]
        return max(steps, default=None)

    def save(
        self,
        step: int,
        networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        generator: torch.Generator,
        extra: Mapping[str, Any],
    ) -> None:
        """Write the state after `step` steps beside the others, rename it into place, then remove the older ones."""
        target, partial = self.folder / f"{step:06d}", self.folder / f".{step:06d}.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            for role, net in networks.items():
                write_safetensors(partial / f"{role}.safetensors", net.state_dict())
            for role, optimizer in optimizers.items():
                write_safetensors(partial / f"optimizer-{role}.safetensors", dict(_flat_optimizer(optimizer)))
            write_safetensors(partial / "random.safetensors", {"generator": generator.get_state()})
            write_json(partial / "state.json", {"step": step, **extra})
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in self.folder.glob("[0-9]*"):
            if old != target:
                shutil.rmtree(old)

    def load(
        self,
        step: int,
        networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        generator: torch.Generator,
    ) -> dict[str, Any]:
        """Load everything in place; returns `extra`. Raises UserError for a damaged state."""
        folder = self.folder / f"{step:06d}"
        try:
            for role, net in networks.items():
                load_weights(net, folder / f"{role}.safetensors")
            for role, optimizer in optimizers.items():
                _restore_optimizer(optimizer, load_safetensors(folder / f"optimizer-{role}.safetensors"))
            generator.set_state(load_safetensors(folder / "random.safetensors")["generator"])
        except (LookupError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{folder} is damaged ({error}); delete it to start this run again") from error
        return self.extra(step)

    def extra(self, step: int) -> dict[str, Any]:
        """What was saved beside: position in the data, seconds of training."""
        return read_json(self.folder / f"{step:06d}" / "state.json", EXTRA)


def _flat_optimizer(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            yield f"{index}.{name}", value


def _restore_optimizer(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
