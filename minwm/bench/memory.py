"""What playing a model and training a stage need in GPU memory: by arithmetic, before anything is loaded.

Fake tensors have shapes and no data. What is held all the time is counted on them; for what comes and goes, the
very code of playing and training runs on them while the bytes alive are watched:

playing    held      weights    parameters x bytes of the dtype
                     cache      layers x 2 (keys, values) x branches x heads x rows x head width x bytes
                     prompt     layers x 2 x branches x text rows x width x bytes
           in turn   the network making a chunk (a whole clip, if bidirectional) · decoding it
training   held      weights    of every role, and of the average (EMA): 4 bytes a parameter; 2 where it is frozen and
                                precision is bfloat16; with LoRA the frozen ones once for all roles
                     optimiser  8 bytes a trained parameter: the two moments of AdamW; about 2 in 8 bits
           in turn   forward and backward of every trained role · its update, with all gradients

With `parallel.cpu_offload` what training holds, gradients and updates are in the memory of the CPU, and on the GPU, of
each network that passes, the weights outside of its blocks and those of two blocks.

A plan needs what is held plus the largest of what comes in turn. Branches are 2 with guidance, else 1. The text
encoder is not there: prompts are encoded before, and their states kept in files. What kernels use inside is not seen
and is left to `reserve`.
"""

import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from minwm.core.memory import MemoryMeter, ShapeOnlyMode
from minwm.nets import layers
from minwm.recipes.base import ClipConfig, Recipe, random_clip
from minwm.store.model import ModelConfig
from minwm.stream.rollout import Stream, sample_bidirectional
from minwm.train.adamw8bit import nbytes_8bit
from minwm.train.config import Run
from minwm.train.loop import autocast
from minwm.train.parallel import sharded_units
from minwm.train.roles import build_recipe

GIB = 2**30
"""A card sold with "24 GB" has 24 of these."""
CONTEXT = GIB
"""What CUDA and its libraries take before the first tensor: code, handles, workspaces."""
TRANSIENT_8BIT = 53
"""Bytes for each number of a matrix that the update of its 8-bit moments takes on a CPU
(tests/test_plan.py); compiled, on a GPU, it is not measured."""
FRAGMENTATION = 0.08
"""Share of a GPU that is lost in gaps between tensors, and inside kernels."""


@dataclass(frozen=True)
class Item:
    """One line of a plan."""

    name: str
    bytes: int
    why: str
    """The arithmetic, or what was watched."""


@dataclass(frozen=True)
class Plan:
    """Memory of one GPU: what is held all the time, and what comes one at a time, of which the largest counts."""

    held: tuple[Item, ...]
    turns: tuple[Item, ...]
    host: tuple[Item, ...] = ()
    """What waits in the memory of the CPU."""

    @property
    def turn(self) -> Item:
        """The largest of what comes in turn."""
        return max(self.turns, key=lambda item: item.bytes)

    @property
    def total(self) -> int:
        return sum(item.bytes for item in self.held) + self.turn.bytes

    def spare(self, budget: int) -> int:
        """Bytes left on a GPU of `budget` bytes besides `reserve`; negative if the plan does not fit."""
        return budget - reserve(budget) - self.total

    def fits(self, budget: int) -> bool:
        return self.spare(budget) >= 0

    def shards(self, budget: int) -> int | None:
        """GPUs that would do if they shared evenly what is held; None if that is not what is too much."""
        room = budget - reserve(budget) - self.turn.bytes
        return math.ceil((self.total - self.turn.bytes) / room) if room > 0 else None


def reserve(budget: int) -> int:
    """Bytes of a GPU that no plan may count on."""
    return CONTEXT + math.ceil(FRAGMENTATION * budget)


def size(count: int) -> str:
    """Bytes for people, three digits: 7.61 GiB, 12.3 MiB."""
    scale, unit = (GIB, "GiB") if count >= GIB else (2**20, "MiB") if count >= 2**20 else (2**10, "KiB")
    value = count / scale
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


# ------------------------------------------------------------------------------------------------ playing


@cache
def plan_inference(cfg: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """Playing a model: one stream whose cache is full; or, for a bidirectional model, making one clip.

    `dtype` is that of network, cache and codec: `Model.ready` makes it bfloat16 on a GPU.
    """
    times = cfg.sampler.distinct_times + 1  # outside: without data all times are one
    cfg = _newest_chunks(cfg)
    with no_data(), torch.no_grad():
        net, codec = cfg.network.build(), cfg.codec.build()
        for x in (*net.parameters(), *codec.parameters(), *codec.buffers()):
            x.data = x.data.to(dtype)  # nn.Module.to would swap tensors, which those without data cannot
        held = [_weights("network", net), _weights("codec", codec)]
        if not cfg.sampler.causal:
            clip, state = random_clip(cfg, 1, cfg.latents), None
            once = replace(cfg.sampler, steps=1, solver="euler")  # steps are alike, and UniPC computes with times
            with MemoryMeter() as passing:
                sample_bidirectional(net, once, clip.latents, clip.cond)
        else:
            clip = random_clip(cfg, 1, cfg.stream.chunk)
            stream = Stream(net, clip.cond, cfg.geometry, cfg.sampler.guidance)
            stream.chunk = cfg.geometry.slots  # the ring is full: nothing grows from here on
            state = None
            for _ in range(decoded := cfg.latents if codec.grows else 1):
                _, state = codec.decode_next(clip.latents[:, :1], state)
            held += _held_by(stream, times)
            kept = f"; it grows, and this is after {decoded} latents" if codec.grows else ""
            held.append(Item("decoder state", sum(x.nbytes for x in state or ()), f"what decoding keeps{kept}"))
            starts = [cfg.stream.start(i) for i in range(cfg.stream.slots + 2)]
            chunks = [random_clip(cfg, 1, b - a) for a, b in pairwise(starts)]
            with MemoryMeter() as passing:  # a pass like all others, if need be after all those that it recomputes
                for chunk in chunks[0 if cfg.stream.recompute != "never" else -1 :]:
                    stream.update_cache(stream.prepare_chunk(chunk.cond), chunk.latents)
        with MemoryMeter() as decoding:
            codec.decode_next(clip.latents, state)
    frames, twice = clip.latents.shape[1], ", with and without the prompt" if cfg.sampler.guidance != 1 else ""
    tokens = f"one pass of {frames} latents x {cfg.geometry.tokens:,} tokens{twice}"
    turns = (
        Item("activations: network", passing.peak, tokens),
        Item("activations: decoder", decoding.peak, f"{frames} latents to frames of {cfg.width}x{cfg.height}"),
    )
    return Plan(tuple(held), turns)


def _newest_chunks(cfg: ModelConfig) -> ModelConfig:
    """The model with the newest chunks in place of retrieved ones, as many: which to retrieve depends on data."""
    stream = cfg.stream
    return replace(cfg, stream=replace(stream, retrieved=0, window=stream.window + stream.retrieved))


def without_retrieval(run: Run) -> Run:
    """The run with latents of its clips in place of retrieved ones, and of known views, as many."""
    recipe = run.recipe
    if isinstance(recipe, ClipConfig) and recipe.views:
        recipe = replace(recipe, views=None, latents=recipe.clip_latents(run.model))
    return replace(run, model=_newest_chunks(run.model), recipe=recipe)


def _held_by(stream: Stream, times: int) -> Iterator[Item]:
    """What a session holds besides weights and the decoder's state; `times` are those at which its network is asked."""
    kv, text = stream.arena.kv, [x for layer in stream.text for x in layer if x is not None]
    depth, _, branches, heads, rows, width = kv.shape
    each = f"{depth} layers x 2 x {branches} branch{'es' * (branches > 1)}"
    yield Item("cache", kv.nbytes, f"{each} x {heads} heads x {rows:,} rows x {width} x {kv.itemsize} bytes")
    _, heads, rows, width = text[0].shape
    prompt = f"{each} x {heads} heads x {rows} rows x {width} x {text[0].itemsize} bytes"
    yield Item("prompt", sum(x.nbytes for x in text), prompt)
    with MemoryMeter() as table:
        stream.modulation(0.0)
    yield Item("times", times * table.live, f"modulation at {times} times: {depth} layers, each in float32")
    lost = sum(x.nbytes for x in stream.arena.save_slot(stream.chunk))
    yield Item("undo", lost, "cache rows that one step overwrites; a session keeps as much for every step")


# ------------------------------------------------------------------------------------------------ training


@cache
def plan_training(run: Run) -> Plan:
    """A stage as the loop of train/loop.py runs it on one GPU. No folder that the run names has to exist."""
    held, turns, updates = [], [], []
    with no_data():
        # fused kernels keep less: this is an upper bound
        run = replace(without_retrieval(run), compile=False)
        if run.recipe.self_rollout:  # the pass with gradient; the others are like the one that updates the cache
            run = replace(run, model=replace(run.model, sampler=run.model.sampler.with_steps(1)))
        recipe = build_recipe(run, lambda _: run.recipe.network(run.model))
        nets = recipe.networks
        shared = _shared(nets)
        if shared:
            held.append(Item("base weights", sum(p.nbytes for p in shared), f"{_count(shared)}, which all roles share"))
        held += [_weights(role, net, shared) for role, net in nets.items()]
        held.append(_weights("averaged student", nets["student"], shared))
        for role in run.recipe.trained:
            split = {"student": run.optim, "critic": run.critic}[role].split(nets[role])
            optimiser, update = plan_optimisers(role, split)
            held.append(optimiser)
            trained = [p for weights in split.values() for p in weights]
            turns.append(_activations(run, recipe, role, trained))
            updates.append(update)
        if run.parallel.cpu_offload:
            update = max(updates, key=lambda item: item.bytes)
            return Plan((_gathered(run, nets.values()),), tuple(turns), (*held, update))
    return Plan(tuple(held), (*turns, *updates))


def plan_optimisers(role: str, split: Mapping[str, list[nn.Parameter]]) -> tuple[Item, Item]:
    """What the optimisers of a role hold; and its update, with all gradients."""
    sizes = {name: sum(p.numel() for p in weights) for name, weights in split.items()}
    held = {"adamw": 8, "muon": 4}
    moments = {name: held[name] * count for name, count in sizes.items() if name in held}
    why = [f"{name}: {held[name]} bytes x {sizes[name]:,} trained parameters" for name in moments]
    extra = 4 * sizes.get("adamw", 0)
    if eight := split.get("adamw8bit"):
        moments["adamw8bit"] = sum(nbytes_8bit(p) for p in eight)
        why.append(f"adamw8bit: codes, scales and tables of {sizes['adamw8bit']:,}")
        extra = max(extra, TRANSIENT_8BIT * max(p.numel() for p in eight))
    update = Item(
        f"update: {role}", 4 * sum(sizes.values()) + extra, "gradients, and roots or 8-bit moments in float32"
    )
    return Item(f"{role} optimiser", sum(moments.values()), "; ".join(why)), update


def _gathered(run: Run, networks: Iterable[nn.Module]) -> Item:
    """What FSDP has on a GPU of the network that passes: what is outside of its blocks, a block, and the next one."""
    most = 0
    for net in networks:
        *blocks, whole = ([*unit.parameters()] for unit in sharded_units(net))
        inner = {p for block in blocks for p in block}
        sizes = sorted(_gathered_bytes(run, block) for block in blocks)
        most = max(most, _gathered_bytes(run, (p for p in whole if p not in inner)) + sum(sizes[-2:]))
    return Item("gathered weights", most, "of the network that passes: all outside of its blocks, and two blocks")


def _gathered_bytes(run: Run, weights: Iterable[nn.Parameter]) -> int:
    widest = 2 if run.parallel.gather == "bfloat16" else 4
    return sum(p.numel() * min(p.itemsize, widest) for p in weights)


def _activations(run: Run, recipe: Recipe[Any], role: str, trained: list[nn.Parameter]) -> Item:
    """A micro-batch forward and backward; unless it is the only one, gradients of others are there before."""
    offload = run.parallel.cpu_offload
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in trained if offload]
    if run.accumulate > 1 and not offload:
        for p in trained:
            p.grad = torch.zeros_like(p)
    before = sum(p.grad.nbytes for p in trained if p.grad is not None)
    with MemoryMeter() as memory:
        with autocast(run, torch.device("cpu")):
            step = run.recipe.turn.index(role)
            loss = recipe.loss(run.recipe.example_batch(run.model, run.batch), step, torch.Generator())
        graph = memory.live
        loss.total.backward()
    for hook in hooks:
        hook.remove()
    for p in trained:
        p.grad = None
    clips = f"{run.batch} clip{'s' * (run.batch > 1)} x {run.recipe.describe_clip(run.model)}"
    why = f"{clips}; {size(graph)} kept for the backward pass"
    return Item(f"activations: {role}", before + memory.peak, why + (", gradients come on top" if before else ""))


def _drop_gradient(p: Tensor) -> None:
    """It is sent to the memory of the CPU as soon as it is there."""
    p.grad = None


# ------------------------------------------------------------------------------------------------ without data


def _shared(networks: Mapping[str, nn.Module]) -> set[nn.Parameter]:
    """Parameters of several networks."""
    holders = Counter(p for net in networks.values() for p in net.parameters())
    return {p for p, count in holders.items() if count > 1}


def _weights(name: str, net: nn.Module, besides: Collection[nn.Parameter] = ()) -> Item:
    weights, buffers = [p for p in net.parameters() if p not in besides], list(net.buffers())
    total = sum(x.nbytes for x in (*weights, *buffers))
    return Item(f"{name} weights", total, _count(weights) + (", and buffers" if buffers else ""))


def _count(weights: Iterable[nn.Parameter]) -> str:
    """So many parameters of so many bytes each."""
    counts = Counter[int]()
    for p in weights:
        counts[p.itemsize] += p.numel()
    return " + ".join(f"{n:,} x {width} bytes" for width, n in counts.items()) or "none of its own"


@contextmanager
def no_data() -> Iterator[None]:
    """Networks and batches that are made inside take no memory."""
    layers._rope_table.cache_clear()  # no table may cross this border, either way
    try:
        with ShapeOnlyMode(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # deepcopy does it
            yield
    finally:
        layers._rope_table.cache_clear()
