"""Training on several processes, which torchrun or Slurm starts: who shares weights, a clip, a batch.

The weights of all networks are sharded (FSDP2), block by block, over all ranks or over groups of them that hold copies
(HSDP). `sequence` ranks in a row share every clip (nets/ulysses.py), and such groups share the micro-batches of a step.
What a step computes does not depend on any of this, up to rounding.
"""

import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from minwm.core.config import ConfigError, UserError
from minwm.core.runtime import pick_device
from minwm.nets.backbone import Backbone
from minwm.nets.ulysses import Ulysses
from minwm.recipes.base import Recipe

Weights = Callable[[str], Mapping[str, Tensor]]
"""weights(role): whole tensors by name, mapped from a file."""


def no_weights(_role: str) -> Mapping[str, Tensor]:
    """For networks that have their values."""
    return {}


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes of torchrun share the work; the result does not depend on it."""

    sequence: int = 1
    """Ranks that share every clip; they divide heads of attention and tokens of a frame."""
    shard: int | None = None
    """Ranks among which the weights are divided, such as those of a node: every such group has a copy. None: all."""
    gather: Literal["float32", "bfloat16"] = "float32"
    """Type in which weights are gathered for a pass. bfloat16 halves what is sent, and rounds norms and modulation."""
    cpu_offload: bool = False
    """Weights, gradients and optimisers are in the memory of the CPU between passes."""
    timeout: float = 600.0
    """Seconds after which ranks stop waiting for one that hangs."""

    def __post_init__(self) -> None:
        for name in ("sequence", "shard", "timeout"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"parallel.{name}={value}: must be more than 0")


@contextmanager
def process_group(timeout: float, alone: bool = False) -> Iterator[None]:
    """The group of the processes that torchrun started; without torchrun nothing, or of this process `alone`; inside of
    another one nothing.

    UserError if another process is lost. After an error it is left as it is: others may hang, and this process ends.
    """
    if dist.is_initialized() or not (alone or "RANK" in os.environ):
        yield
        return
    device = pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    here = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **({} if "RANK" in os.environ else here))
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"process {dist.get_rank()}: another process has ended, or hung for {timeout:g} s ({reason}); what that "
            "one has written says why, and the same command goes on from the last state"
        ) from error
    dist.destroy_process_group()


LONG_WAIT = 4 * 7 * 24 * 3600.0
"""Seconds that processes wait for each other where their parts are not steps of a training: four weeks."""


def wait_for_all(part: tuple[int, int]) -> None:
    """Process i of n, as `part` says, waits for the others, which all call it; alone it does nothing."""
    if part[1] > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU: by gloo, whatever the backend of GPUs


@contextmanager
def first_process_first(part: tuple[int, int]) -> Iterator[None]:
    """Process 0 does it before the others do, which then find the files that it has written."""
    if part[0] > 0:
        wait_for_all(part)
    yield
    if part[0] == 0:
        wait_for_all(part)


class Parallel:
    """The place of this process in a training: alone, or one rank of torchrun's."""

    def __init__(self, cfg: ParallelConfig, device: torch.device) -> None:
        self.cfg, self.device, self.sharded = cfg, device, dist.is_initialized()
        self.world = dist.get_world_size() if self.sharded else 1
        shard = cfg.shard or self.world
        for name, size in {"sequence": cfg.sequence, "shard": shard}.items():
            if self.world % size:
                fits = ", ".join(str(n) for n in range(1, self.world + 1) if self.world % n == 0)
                raise ConfigError(f"parallel.{name}={size}: {self.world} processes are no multiple; give one of {fits}")
        self.data_ranks = self.world // cfg.sequence
        self.data_rank = dist.get_rank() // cfg.sequence if self.sharded else 0
        """Groups of ranks that share a clip, and this one's number."""
        if self.sharded:
            copies = self.world // shard
            sizes, names = ((copies, shard), ("copy", "shard")) if copies > 1 else ((shard,), ("shard",))
            self.weights = init_device_mesh(device.type, sizes, mesh_dim_names=names)
            grid = (self.data_ranks, cfg.sequence)
            self.sequence = init_device_mesh(device.type, grid, mesh_dim_names=("data", "sequence"))["sequence"]

    @property
    def build_device(self) -> torch.device:
        """Where networks are built: without values, if each process keeps a part of them."""
        return torch.device("meta") if self.sharded else self.device

    def micro_batches(self, batch: int, accumulate: int) -> range:
        """Numbers of this process's micro-batches among those of a step; ConfigError if they cannot be shared."""
        if accumulate % self.data_ranks:
            raise ConfigError(
                f"{accumulate} micro-batches of {batch} clips cannot be shared by {self.data_ranks} groups of "
                f"processes; {_ways_out(batch * accumulate, self.data_ranks, batch)}"
            )
        return range(self.data_rank, accumulate, self.data_ranks)

    def place(self, recipe: Recipe[Any], others: Mapping[str, nn.Module], weights: Weights = no_weights) -> None:
        """Put the networks of a recipe, and others, on the device, sharded if there is a group.

        A parameter without a value, on the meta device, gets this process's part of its value in `weights(role)`. One
        that is frozen and that networks share is placed once.
        """
        placed = dict[Tensor, nn.Parameter]()
        for role, net in {**recipe.networks, **others}.items():
            if not self.sharded:
                net.to(self.device)
                continue
            before = dict(net.named_parameters())
            values = {name: placed[p] for name, p in before.items() if p in placed}
            for name in values:
                set_parameter(net, name, torch.empty_like(before[name], device="meta"))
            self._shard(net)
            if empty := [name for name, p in before.items() if p.is_meta and name not in values]:
                saved = weights(role)
                values |= {name: self._own_part(net.get_parameter(name), saved[name]) for name in empty}
            net.load_state_dict(values, strict=False, assign=True)
            placed |= {p: net.get_parameter(name) for name, p in before.items() if not p.requires_grad}
        if self.cfg.sequence > 1:
            group = self.sequence.get_group()
            for role, net in recipe.networks.items():
                if not isinstance(net, Backbone):
                    raise ConfigError(f"parallel.sequence={self.cfg.sequence}: a codec has no tokens to share; give 1")
                recipe.networks[role] = Ulysses(net, group)

    def _shard(self, net: nn.Module) -> None:
        """Blocks are gathered one after the other, what is left with the whole; after every pass it is parts again."""
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # outputs are views: nothing writes into them
        for parameter in net.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP takes no channels-last ones
        dtype = torch.bfloat16 if self.cfg.gather == "bfloat16" else None
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        pinned = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        offload = pinned if self.cfg.cpu_offload else OffloadPolicy()
        methods = [*net.forward_methods()] if isinstance(net, Backbone) else []
        for module in sharded_units(net):
            fully_shard(
                module, mesh=self.weights, reshard_after_forward=True, mp_policy=precision, offload_policy=offload
            )
        for module, name in methods:
            register_fsdp_forward_method(module, name)

    def _own_part(self, sharded: Tensor, value: Tensor) -> nn.Parameter:
        """A sharded parameter, so far without a value, with this process's rows of `value`."""
        group = self.weights["shard"]
        rows = math.ceil(len(value) / group.size())
        first = group.get_local_rank() * rows
        found = torch.empty_like(sharded, device="cpu" if self.cfg.cpu_offload else self.device)
        assert isinstance(found, DTensor)
        found.to_local().copy_(value[first : first + rows])
        return nn.Parameter(found, sharded.requires_grad)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over all processes."""
        if self.sharded:
            dist.all_reduce(values)
        return values / self.world

    def any(self, here: bool) -> bool:
        """Whether it is so in any process; on the CPU, so that no step waits for a GPU."""
        return bool(self.mean(torch.tensor(float(here))) > 0)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.sharded:
            dist.barrier()


def _ways_out(clips: int, groups: int, batch: int) -> str:
    """What a user may give instead, for a step of so many clips."""
    if clips % groups:
        fits = ", ".join(str(n) for n in range(1, clips + 1) if clips % n == 0)
        return f"of {clips} clips in a step, {fits} groups can have equal parts"
    fits = max(n for n in range(1, batch + 1) if clips // groups % n == 0)
    return f"give --batch {fits} --accumulate {clips // fits}, of as many clips in a step"


def sharded_units(net: nn.Module) -> list[nn.Module]:
    """What is gathered at once, of a backbone: each block; then the network, whose are the other parameters."""
    parts = net.children() if isinstance(net, Backbone) else ()
    return [*(block for part in parts if isinstance(part, nn.ModuleList) for block in part), net]


def set_parameter(net: nn.Module, name: str, value: Tensor) -> None:
    """Put another parameter in the place of one; it is trained if that was."""
    module, _, own = name.rpartition(".")
    setattr(net.get_submodule(module), own, nn.Parameter(value, net.get_parameter(name).requires_grad))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which every process may have a part; all must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, which schedulers send some time before they kill; only in the main thread."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def tell(_number: int, _frame: FrameType | None) -> None:
        told.set()

    before = signal.signal(signal.SIGTERM, tell)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
