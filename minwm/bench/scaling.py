"""A training stage on many GPUs, by arithmetic: memory of each, what it sends, and the time of a step that follows.

The recipe runs once on tensors without data (bench/memory.py), while uses of every unit of FSDP are counted. With n
ranks that share the weights, c copies of them, and r ranks that share a clip, a rank sends

shard      (n - 1) / n x bytes of a unit for each use of it, and again before each backward pass (all-gather);
           (n - 1) / n x 4 bytes a trained parameter for each micro-batch (reduce-scatter)
copy       2 (c - 1) / c x 4 bytes / n a trained parameter for each micro-batch (all-reduce of HSDP)
sequence   (r - 1) / r x what attention takes and gives, of its tokens, in each direction (Ulysses)

and a step takes at least the longest of its computing and its transfers, if all of them overlap; at most their sum.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from minwm.bench.memory import no_data, plan_training, without_retrieval
from minwm.core.config import ConfigError
from minwm.nets.backbone import Backbone
from minwm.nets.ulysses import CountedGroup, Ulysses
from minwm.stream.solvers import FewStepSampler
from minwm.train.config import Run
from minwm.train.flops import count_flops
from minwm.train.loop import autocast
from minwm.train.parallel import ParallelConfig, sharded_units
from minwm.train.roles import build_recipe


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs and the links between them; the defaults are H100 SXM with NVLink 4, and 400 Gb/s of network for each."""

    node: int = 8
    """GPUs of a node."""
    tflops: float = 989.0
    """Of a GPU in bfloat16, by its data sheet."""
    mfu: float = 0.4
    """Part of that which a pass reaches: an assumption, to be replaced by what `minwm bench-train` measures."""
    node_gbytes: float = 450.0
    """GB/s that a GPU sends to others of its node."""
    network_gbytes: float = 50.0
    """GB/s that a GPU sends to other nodes."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ConfigError(f"cluster.{name}={value}: must be more than 0")

    def seconds(self, count: float, ranks: int) -> float:
        """Of sending so many bytes within a group of ranks, neighbours in number."""
        return count / 1e9 / (self.node_gbytes if ranks <= self.node else self.network_gbytes)


@dataclass(frozen=True)
class Unit:
    """Uses of one unit of FSDP in a micro-batch."""

    shapes: tuple[tuple[int, int, int], ...]
    """Of each parameter: its rows, the numbers of a row, the bytes of a number."""
    trained: tuple[tuple[int, int], ...]
    """Of each trained parameter: its rows, and the numbers of a row."""
    forward: int
    backward: int

    def gathered(self, ranks: int) -> int:
        """Bytes of the whole of it, padded to equal parts."""
        return sum(math.ceil(rows / ranks) * ranks * row * width for rows, row, width in self.shapes)

    def reduced(self, ranks: int) -> int:
        """Bytes of its gradients, in float32."""
        return sum(math.ceil(rows / ranks) * ranks * row * 4 for rows, row in self.trained)


@dataclass(frozen=True)
class MicroBatch:
    """What a micro-batch of a role asks for."""

    units: tuple[Unit, ...]
    flops: float
    """Of this rank's part of its passes, with those of the backward one."""
    exchanged: int
    """Bytes that this rank exchanges around attention, those that stay included."""


@dataclass(frozen=True)
class Step:
    """A step of a role on a cluster; bytes are those that one GPU sends, by kind of group."""

    flops: float
    shard: float
    copy: float
    sequence: float
    compute_s: float
    transfer_s: float

    @property
    def seconds(self) -> tuple[float, float]:
        """At least, and at most."""
        return max(self.compute_s, self.transfer_s), self.compute_s + self.transfer_s


@dataclass(frozen=True)
class Scaling:
    """A stage on so many GPUs."""

    gpus: int
    sequence: int
    shard: int
    bytes: int
    """Memory of each GPU."""
    steps: Mapping[str, Step]
    """By role."""
    gpu_hours: tuple[float, float]
    """Of the whole stage, at least and at most."""


def scale(run: Run, gpus: int, cluster: Cluster) -> Scaling:
    """The stage with its clips of a step dealt out to so many GPUs, one at a time; several share one if there are more
    GPUs than clips, or if `parallel.sequence` says so. ConfigError if they cannot be dealt out evenly."""
    clips, shard = run.batch * run.accumulate, min(run.parallel.shard or gpus, gpus)
    sequence = max(math.ceil(gpus / clips), min(run.parallel.sequence, gpus))
    if gpus % sequence or clips % (gpus // sequence) or gpus % shard:
        raise ConfigError(f"{run.name}: {clips} clips of a step cannot be dealt out to {gpus} GPUs evenly")
    parallel = ParallelConfig(gather=run.parallel.gather, cpu_offload=run.parallel.cpu_offload)
    one = replace(run, batch=1, accumulate=clips, parallel=parallel)
    parts = {"shard": shard, "copies": gpus // shard, "sequence": sequence}
    steps = {role: plan_step(one, role, cluster, **parts) for role in run.recipe.trained}
    plan = plan_training(one)
    held = sum(item.bytes for item in plan.held)
    if shard > 1 and not plan.host:  # with CPU offload, gathered units are what is held
        micro_batches = (count_uses(one, role, sequence) for role in run.recipe.trained)
        units = sorted(unit.gathered(1) for micro in micro_batches for unit in micro.units if unit.forward)
        held = held / shard + sum(units[-2:])
    turns = (item.bytes / (sequence if item.name.startswith("activations") else shard) for item in plan.turns)
    memory = int(held + max(turns))
    return Scaling(gpus, sequence, shard, memory, steps, gpu_hours(run, gpus, steps))


def gpu_hours(run: Run, gpus: int, steps: Mapping[str, Step]) -> tuple[float, float]:
    """Of a whole stage, at least and at most: its steps train one role after the other."""
    turn = run.recipe.turn
    low, high = zip(*(steps[turn[i % len(turn)]].seconds for i in range(run.steps)), strict=True)
    return gpus * sum(low) / 3600, gpus * sum(high) / 3600


def plan_step(run: Run, role: str, cluster: Cluster, *, shard: int, copies: int, sequence: int) -> Step:
    """A step of a role, its micro-batches dealt out to `copies` x `shard` GPUs, of which `sequence` share each."""
    micro, count = count_uses(run, role, sequence), run.accumulate * sequence // (shard * copies)
    gathers = sum(unit.gathered(shard) * (unit.forward + unit.backward) for unit in micro.units)
    reduced = sum(unit.reduced(shard) for unit in micro.units if unit.backward)
    sent = {
        "shard": count * (shard - 1) / shard * (gathers + reduced),
        "copy": count * 2 * (copies - 1) / copies * reduced / shard,
        "sequence": count * (sequence - 1) / sequence * micro.exchanged,
    }
    spans = {"shard": shard, "copy": shard * copies, "sequence": sequence}
    transfer = sum(cluster.seconds(sent[kind], spans[kind]) for kind in sent)
    flops = count * micro.flops
    compute = flops / 1e12 / cluster.tflops / cluster.mfu
    return Step(flops=flops, compute_s=compute, transfer_s=transfer, **sent)


@cache
def count_uses(run: Run, role: str, sequence: int) -> MicroBatch:
    """What a micro-batch of a role asks of one of the ranks that share its clip.

    All blocks are alike, so it runs with one of them, and with two for what grows with their number.
    """
    (uses, flops, exchanged), (_, flops_2, exchanged_2) = (_count(run, role, sequence, layers) for layers in (1, 2))
    more = run.model.network.layers - 1
    with no_data():
        networks = build_recipe(replace(run, compile=False), lambda _: run.recipe.network(run.model)).networks
        half, units = run.parallel.gather == "bfloat16", list[Unit]()
        for name, net in networks.items():
            *blocks, whole = sharded_units(net)
            units += [_unit([*block.parameters()], half, *uses[name, "block"]) for block in blocks]
            inner = {p for block in blocks for p in block.parameters()}
            units.append(_unit([p for p in whole.parameters() if p not in inner], half, *uses[name, "whole"]))
    flops += more * (flops_2 - flops)
    return MicroBatch(tuple(units), flops, exchanged + more * (exchanged_2 - exchanged))


def _count(run: Run, role: str, sequence: int, layers: int) -> tuple[dict[tuple[str, str], list[int]], float, int]:
    """Run the loss of a micro-batch without data. Uses, and those under gradient, of the first block and of the whole
    of each network; FLOPs with those of the backward pass; bytes exchanged around attention."""
    model = replace(run.model, network=replace(run.model.network, layers=layers))
    if isinstance(model.sampler, FewStepSampler):  # without data all times of a schedule would be one
        model = replace(model, sampler=replace(model.sampler, timesteps=tuple(model.sampler.times)))
    run = replace(without_retrieval(replace(run, model=model)), compile=False)
    with no_data():
        recipe = build_recipe(run, lambda _: run.recipe.network(run.model))
        networks, group = {**recipe.networks}, CountedGroup(sequence)
        if sequence > 1:
            recipe.networks |= {name: Ulysses(net, group) for name, net in networks.items()}
        clips, step = run.recipe.example_batch(run.model, run.batch), run.recipe.turn.index(role)
        counts = _uses(networks), count_flops(recipe.networks.values()), autocast(run, torch.device("cpu"))
        with counts[0] as uses, counts[1] as flops, counts[2]:
            recipe.loss(clips, step, torch.Generator())
    again = bool(run.checkpointing)
    return uses, sum(flops) * (4 if again else 3) / 3, group.forward + (1 + again) * group.backward


def _unit(own: list[nn.Parameter], half: bool, forward: int, backward: int) -> Unit:
    shapes = tuple((len(p), p[0].numel(), min(p.itemsize, 2) if half else p.itemsize) for p in own)
    trained = tuple((len(p), p[0].numel()) for p in own if p.requires_grad)
    return Unit(shapes, trained, forward, backward)


@contextmanager
def _uses(networks: Mapping[str, nn.Module]) -> Iterator[dict[tuple[str, str], list[int]]]:
    """Uses, and those under gradient, of the first block and of the whole of each network."""
    found = {(name, part): [0, 0] for name in networks for part in ("block", "whole")}
    undo = list[Callable[[], None]]()

    def counter(unit: nn.Module, uses: list[int]) -> Callable[..., None]:
        def count(*_: Any) -> None:
            uses[0] += 1
            uses[1] += torch.is_grad_enabled() and any(p.requires_grad for p in unit.parameters())

        return count

    def counted(method: Callable[..., Any], count: Callable[..., None]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count()
            return method(*args, **kwargs)

        return call

    for name, net in networks.items():
        block, *_, whole = sharded_units(net)
        for part, unit in (("block", block), ("whole", whole)):
            count = counter(unit, found[name, part])
            undo.append(unit.register_forward_pre_hook(count).remove)
            for module, method in net.forward_methods() if isinstance(net, Backbone) else ():
                if module is unit:
                    setattr(module, method, counted(getattr(module, method), count))
                    undo.append(partial(delattr, module, method))
    try:
        yield found
    finally:
        for each in undo:
            each()
