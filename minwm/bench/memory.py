"""What playing a model and training a stage need in GPU memory: by arithmetic, before anything is loaded.

Fake tensors have shapes and no data. What is held all the time is counted on them; for what comes and goes, the
very code of playing and training runs on them while the bytes alive are watched:

playing    held      weights    parameters x bytes of the dtype
                     cache      layers x 2 (keys, values) x branches x heads x rows x head width x bytes
                     prompt     layers x 2 x branches x text rows x width x bytes
           in turn   the network making a chunk (a whole clip, if bidirectional) · decoding it
training   held      weights    4 bytes a parameter of every role, and of the average (EMA)
                     optimiser  8 bytes a trained parameter: the two moments of AdamW
           in turn   forward and backward of every trained role · its update, with all gradients

A plan needs what is held plus the largest of what comes in turn. Branches are 2 with guidance, else 1. The text
encoder is not there: prompts are encoded before, and their states kept in files. What kernels use inside is not seen
and is left to `reserve`.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from minwm.core.memory import MemoryMeter, ShapeOnlyMode
from minwm.nets import layers
from minwm.nets.taehv import TAEHV
from minwm.recipes.base import Recipe, random_clip
from minwm.store.model import ModelConfig
from minwm.stream.rollout import Stream, sample_bidirectional
from minwm.train.config import Run
from minwm.train.loop import autocast
from minwm.train.roles import build_recipe

GIB = 2**30
"""A card sold with "24 GB" has 24 of these."""
CONTEXT = GIB
"""What CUDA and its libraries take before the first tensor: code, handles, workspaces."""
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
    held, turns = [], []
    with no_data():
        # fused kernels keep less: this is an upper bound
        run = replace(run, compile=False, model=_newest_chunks(run.model))
        if run.recipe.self_rollout:  # the pass with gradient; the others are like the one that updates the cache
            run = replace(run, model=replace(run.model, sampler=run.model.sampler.with_steps(1)))
        recipe = build_recipe(run, lambda _: run.recipe.network(run.model))
        nets = recipe.networks
        held += [_weights(role, net) for role, net in nets.items()]
        held.append(_weights("averaged student", nets["student"]))
        for role in run.recipe.trained:
            optim = {"student": run.optim, "critic": run.critic}[role]
            split = optim.split(nets[role])
            trained = [p for weights in split.values() for p in weights]
            adamw, muon = (sum(p.numel() for p in split.get(name, ())) for name in ("adamw", "muon"))
            twice = f"2 x {adamw:,} trained parameters x 4 bytes"
            once = f" + {muon:,} x 4 bytes" if muon else ""
            both = "AdamW, and one of Muon for matrices" if muon else "AdamW"
            held.append(Item(f"{role} optimiser", 8 * adamw + 4 * muon, f"moments of {both}: {twice}{once}"))
            turns.append(_activations(run, recipe, role, trained))
            turns.append(Item(f"update: {role}", 8 * adamw + 4 * muon, f"gradients and roots: {twice}{once}"))
    return Plan(tuple(held), tuple(turns))


def _activations(run: Run, recipe: Recipe[Any], role: str, trained: list[nn.Parameter]) -> Item:
    """A micro-batch forward and backward; unless it is the only one, gradients of others are there before."""
    if run.accumulate > 1:
        for p in trained:
            p.grad = torch.zeros_like(p)
    before = sum(p.grad.nbytes for p in trained if p.grad is not None)
    with MemoryMeter() as memory:
        with autocast(run, torch.device("cpu")):
            step = run.recipe.turn.index(role)
            loss = recipe.loss(run.recipe.example_batch(run.model, run.batch), step, torch.Generator())
        graph = memory.live
        loss.total.backward()
    for p in trained:
        p.grad = None
    clips = f"{run.batch} clip{'s' * (run.batch > 1)} x {run.recipe.describe_clip(run.model)}"
    why = f"{clips}; {size(graph)} kept for the backward pass"
    return Item(f"activations: {role}", before + memory.peak, why + (", gradients come on top" if before else ""))


# ------------------------------------------------------------------------------------------------ what would help


@dataclass(frozen=True)
class Change:
    """Something to do, and the bytes that it saves if nothing else is done: the difference of two plans."""

    what: str
    saves: int


@dataclass(frozen=True)
class Advice:
    """What would help, most first; and, with all of it done, the subject of the plan and the plan."""

    changes: tuple[Change, ...]
    subject: tuple[Any, ...]
    plan: Plan


Option = Callable[..., tuple[str, tuple[Any, ...]] | None]
"""option(*subject): what to do, and the subject with it done; None where there is nothing to do."""


def advise(
    plan: Callable[..., Plan],
    subject: tuple[Any, ...],
    options: Sequence[Option],
    tried: Callable[[], None] = lambda: None,
) -> Advice:
    """Try options on `plan(*subject)`, each by itself, and keep those that save something; `tried` hears of each."""
    now, together, changes = plan(*subject).total, subject, []
    for option in options:
        if (alone := option(*subject)) and (saves := now - plan(*alone[1]).total) > 0:
            changes.append(Change(alone[0], saves))
            after = option(*together)
            together = after[1] if after else together
        tried()
    return Advice(tuple(sorted(changes, key=lambda change: -change.saves)), together, plan(*together))


def _unguided(cfg: ModelConfig) -> tuple[str, tuple[ModelConfig]] | None:
    if cfg.sampler.guidance == 1:
        return None
    return "no guidance (sampler.guidance 1)", (replace(cfg, sampler=replace(cfg.sampler, guidance=1.0)),)


def _smaller_window(cfg: ModelConfig) -> tuple[str, tuple[ModelConfig]] | None:
    if cfg.stream.window == 1 or not cfg.sampler.causal:
        return None
    window = cfg.stream.window // 2
    what = (
        f"a window of {window} instead of {cfg.stream.window} chunks (stream.window in model.json): it forgets sooner"
    )
    return what, (replace(cfg, stream=replace(cfg.stream, window=window)),)


def _shorter_clip(cfg: ModelConfig) -> tuple[str, tuple[ModelConfig]] | None:
    latents = _half(cfg)
    if latents == cfg.latents or cfg.sampler.causal:
        return None
    return f"clips of {latents} latents instead of {cfg.latents}", (replace(cfg, latents=latents),)


def _tiny_codec(cfg: ModelConfig) -> tuple[str, tuple[ModelConfig]] | None:
    name = cfg.codec.tiny
    if name is None:
        return None
    return f"the tiny codec {name}: pictures less sharp", (replace(cfg, codec=TAEHV[name]),)


def _half(cfg: ModelConfig) -> int:
    """Latents of half as many chunks, but at least one after the first."""
    lead, chunk = cfg.geometry.first_chunk_frames, cfg.stream.chunk
    return min(cfg.latents, lead + max(1, (cfg.latents - lead) // chunk // 2) * chunk)


def _checkpointing(run: Run) -> tuple[str, tuple[Run]] | None:
    overwritten = run.recipe.self_rollout and run.model.geometry.overwrites(_chunks(run))
    if run.checkpointing is True or overwritten or not run.recipe.trains_backbone:
        return None
    what = "--checkpointing true: everything is computed twice, attention too"
    return what, (replace(run, checkpointing=True),)


def _bfloat16(run: Run) -> tuple[str, tuple[Run]] | None:
    changed = replace(run, precision="bfloat16")
    return None if run.precision == "bfloat16" else ("--precision bfloat16", (changed,))


def _one_clip(run: Run) -> tuple[str, tuple[Run]] | None:
    accumulate = run.batch * run.accumulate
    what = f"--batch 1 --accumulate {accumulate}: one clip at a time, the same step"
    return None if run.batch == 1 else (what, (replace(run, batch=1, accumulate=accumulate),))


def _shorter_clips(run: Run) -> tuple[str, tuple[Run]] | None:
    latents = _half(run.model)
    what = f"clips of {latents} latents instead of {run.model.latents} (in the data, and --model.latents {latents})"
    changed = replace(run, model=replace(run.model, latents=latents))
    return None if latents == run.model.latents else (what, (changed,))


def _smaller_ring(run: Run) -> tuple[str, tuple[Run]] | None:
    """Only a self-rollout has a cache, which needs no more slots than the clip has chunks."""
    if not run.recipe.self_rollout:
        return None
    window = max(1, _chunks(run) - run.model.stream.sink)
    if window >= run.model.stream.window:
        return None
    model = replace(run.model, stream=replace(run.model.stream, window=window))
    changed = replace(run, model=model)
    return f"--model.stream.window {window}: all that a clip fills (play with more)", (changed,)


def _chunks(run: Run) -> int:
    return len(run.model.geometry.chunks(run.model.latents))


PLAYING: tuple[Option, ...] = (_unguided, _smaller_window, _shorter_clip, _tiny_codec)
TRAINING: tuple[Option, ...] = (_checkpointing, _bfloat16, _one_clip, _shorter_clips, _smaller_ring)

# ------------------------------------------------------------------------------------------------ without data


def _weights(name: str, net: nn.Module) -> Item:
    weights, buffers = list(net.parameters()), list(net.buffers())
    count = f"{sum(x.numel() for x in weights):,} parameters x {weights[0].itemsize} bytes"
    total = sum(x.nbytes for x in (*weights, *buffers))
    return Item(f"{name} weights", total, count + (", and buffers" if buffers else ""))


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
