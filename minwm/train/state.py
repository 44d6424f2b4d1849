"""Training states on disk (torch.distributed.checkpoint): networks, optimisers, averaged weights, place in the data.

Every process writes its part of the tensors, and any other number of processes reads them.
"""

import functools
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from minwm.core.config import UserError
from minwm.core.files import check_shape, json_object
from minwm.core.runtime import rank
from minwm.train.adamw8bit import stored
from minwm.train.state_places import RECORD, Place, StateFolder, StateStore, sum_files

T = TypeVar("T")
EXTRA = {"step": int, "seconds": float, "data": dict, "files": dict}
"""What `state.json` holds: steps done, seconds of training, the position in the data, and checksums of the files."""


class States:
    """The training states of a run, in `state/{step}` or at an address in a store; the newest counts."""

    def __init__(self, run: Path, keep: int = 1, address: str | None = None) -> None:
        """`keep`: how many of them stay. `address`: where they are kept instead, such as s3://bucket/run."""
        self.place: Place = StateStore(address) if address else StateFolder(run / "state")
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps done in each state."""
        return self.place.steps()

    def latest(self) -> int | None:
        """Steps done in the newest state."""
        return max(self.steps(), default=None)

    def save(
        self,
        step: int,
        networks: Mapping[str, nn.Module],
        optimizers: Iterable[torch.optim.Optimizer],
        extra: Mapping[str, Any],
    ) -> None:
        """Write the state after `step` steps beside the others, let it appear, then remove the oldest ones.

        All processes call it. UserError if one of them cannot write; then none has a new state.
        """
        place, target = self.place, self.place.name(step)
        if rank() == 0:
            place.clear(step)
        writer = place.writer(step)
        sums = sum_files(writer)
        try:
            with _named_errors(f"{target} is not written; the state after {self.latest() or 0} steps is untouched"):
                save(
                    state_tensors(networks, optimizers),
                    storage_writer=writer,
                    no_dist=not dist.is_initialized(),
                )
            files = _from_all(sums)
            problems = dict[str, str]()
            if rank() == 0:
                try:
                    place.finish(step, {"step": step, "files": files, **extra})
                except (OSError, UserError) as error:
                    problems[target] = str(error)
            for path, problem in _from_all(problems).items():
                raise UserError(f"{path} is not written: {problem}")
        except BaseException:
            if rank() == 0:
                place.clear(step)
            raise
        if rank() == 0:
            for old in self.steps()[: -self.keep]:
                place.remove(old)

    def load(
        self,
        step: int,
        networks: Mapping[str, nn.Module],
        optimizers: Iterable[torch.optim.Optimizer],
        alone: bool = False,
    ) -> dict[str, Any]:
        """Load everything in place; returns `extra`. All processes call it, unless one does it `alone`, whose networks
        are whole. UserError for a damaged state."""
        alone = alone or not dist.is_initialized()
        extra = self.extra(step)
        problem = f"{self.place.name(step)} is damaged; delete it, and the run goes on from what was before it"
        self._check_files(step, extra["files"], problem, alone)
        reader = self.place.reader(step)
        with _named_errors(problem):
            _prepare_optimizers(networks, optimizers, reader.read_metadata().state_dict_metadata)
            tensors = state_tensors(networks, optimizers)
            load(tensors, storage_reader=reader, no_dist=alone)
        return extra

    def _check_files(self, step: int, sums: Mapping[str, int], problem: str, alone: bool) -> None:
        """UserError on every process if a file is not what was written; each looks at some."""
        mine = sorted(sums) if alone else sorted(sums)[rank() :: dist.get_world_size()]
        names = set(self.place.files(step)).intersection(mine)
        there = {name: _checksum(self.place.open(step, name)) for name in names}
        found = {name: "another" if name in there else "gone" for name in mine if there.get(name) != sums[name]}
        wrong = found if alone else _from_all(found)
        if wrong:
            raise UserError(f"{problem} ({', '.join(f'{name}: {what}' for name, what in sorted(wrong.items()))})")

    def extra(self, step: int) -> dict[str, Any]:
        """What was saved beside: position in the data, seconds of training."""
        where = f"{self.place.name(step)}/{RECORD}"
        extra = json_object(self.place.record(step), where, EXTRA)
        check_shape(extra["files"], dict.fromkeys(extra["files"], int), f"{where}: files")
        return extra


def state_tensors(networks: Mapping[str, nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All tensors of a state by name, as they are: `student.{name}`, `optimizer.student.{name}.exp_avg`."""
    tensors = {f"{role}.{name}": x for role, net in networks.items() for name, x in net.state_dict().items()}
    names = _names(networks)
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            for name, value in values.items():
                tensors |= {f"optimizer.{names[parameter]}.{name}{end}": x for end, x in stored(value).items()}
    return tensors


def _names(networks: Mapping[str, nn.Module]) -> dict[Tensor, str]:
    return {p: f"{role}.{name}" for role, net in networks.items() for name, p in net.named_parameters()}


def _prepare_optimizers(
    networks: Mapping[str, nn.Module], optimizers: Iterable[torch.optim.Optimizer], saved: Mapping[str, Any]
) -> None:
    """Give each optimiser tensors for what is saved of its parameters, to be read into; 8-bit moments are there."""
    found: dict[str, dict[str, torch.Size]] = {}
    for key, about in saved.items():
        parameter, _, name = key.removeprefix("optimizer.").rpartition(".")
        if key.startswith("optimizer.") and isinstance(about, TensorStorageMetadata):
            found.setdefault(parameter, {})[name] = about.size
    names = _names(networks)
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if any(len(stored(value)) > 1 for value in optimizer.state[parameter].values()):
                continue
            optimizer.state[parameter] = {
                name: torch.zeros_like(parameter) if size == parameter.shape else torch.zeros(size)
                for name, size in found.get(names[parameter], {}).items()
            }


def _checksum(opened: AbstractContextManager[Any]) -> int:
    with opened as file:
        return functools.reduce(lambda crc, part: zlib.crc32(part, crc), iter(lambda: file.read(2**24), b""), 0)


def _from_all(mine: dict[str, T]) -> dict[str, T]:
    """What all processes have."""
    if not dist.is_initialized():
        return mine
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}


@contextmanager
def _named_errors(problem: str) -> Iterator[None]:
    """UserError, on every process, with what went wrong on the first of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there may be one process only
        try:
            yield
        except CheckpointException as error:
            process, (reason, _) = next(iter(error.failures.items()))
            raise UserError(f"{problem} (process {process}: {str(reason).partition(chr(10))[0]})") from error
