"""What would help a plan that does not fit (bench/memory.py): changes of a config, and what each of them saves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from minwm.bench.memory import Plan
from minwm.nets.lora import LoraConfig
from minwm.nets.taehv import TAEHV
from minwm.store.model import ModelConfig
from minwm.train.adamw8bit import fits_8bit
from minwm.train.config import Run


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


def _in_8_bits(run: Run) -> bool:
    return "adamw8bit" in (run.optim.optimizer, run.critic.optimizer)


def _adamw8bit(run: Run) -> tuple[str, tuple[Run]] | None:
    if run.optim.optimizer != "adamw" or run.parallel.cpu_offload or run.lora:
        return None
    with torch.device("meta"):
        if not any(fits_8bit(p) for p in run.recipe.network(run.model).parameters()):
            return None
    critic = "critic" in run.recipe.trained and run.critic.optimizer == "adamw"
    parts = {"optim": run.optim} | ({"critic": run.critic} if critic else {})
    changed = {name: replace(optim, optimizer="adamw8bit") for name, optim in parts.items()}
    return " ".join(f"--{name}.optimizer adamw8bit" for name in parts) + ": instead of offload and LoRA", (
        replace(run, **changed),
    )


def _cpu_offload(run: Run) -> tuple[str, tuple[Run]] | None:
    if run.parallel.cpu_offload or _in_8_bits(run):
        return None
    what = "--parallel.cpu_offload true: weights, gradients and moments wait in the CPU's memory; slower"
    return what, (replace(run, parallel=replace(run.parallel, cpu_offload=True)),)


def _bfloat16(run: Run) -> tuple[str, tuple[Run]] | None:
    changed = replace(run, precision="bfloat16")
    return None if run.precision == "bfloat16" else ("--precision bfloat16", (changed,))


def _one_clip(run: Run) -> tuple[str, tuple[Run]] | None:
    accumulate = run.batch * run.accumulate
    what = f"--batch 1 --accumulate {accumulate}: one clip at a time, the same step"
    return None if run.batch == 1 else (what, (replace(run, batch=1, accumulate=accumulate),))


def _lora(run: Run) -> tuple[str, tuple[Run]] | None:
    # additions are too narrow for moments in 8 bits
    if run.lora or _in_8_bits(run) or not (run.recipe.trains_backbone and run.init.student):
        return None
    lora = LoraConfig()
    return f"--lora.rank {lora.rank}: additions are trained, to weights that all roles share", (
        replace(run, lora=lora),
    )


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
TRAINING: tuple[Option, ...] = (
    _lora,
    _checkpointing,
    _bfloat16,
    _one_clip,
    _shorter_clips,
    _smaller_ring,
    _cpu_offload,
    _adamw8bit,
)
