"""A small model with every recipe: what is planned for it, and the real thing beside the plan."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from minwm.bench.memory import Plan
from minwm.cameras.trajectory import Motion
from minwm.families.wan.transformer import WanConfig
from minwm.nets.chunks import StreamConfig
from minwm.nets.small_codec import SmallCodecConfig
from minwm.nets.text import WordText
from minwm.recipes.codec import CodecTraining
from minwm.recipes.consistency import ConsistencyConfig
from minwm.recipes.diffusion import AutoregressiveConfig, BidirectionalConfig
from minwm.recipes.dmd import DmdConfig
from minwm.recipes.ode import OdeConfig
from minwm.store.model import ModelConfig
from minwm.stream.solvers import FewStepSampler
from minwm.train.config import Init, Run
from minwm.train.roles import build_recipe

MODEL = ModelConfig(
    network=WanConfig(
        dim=32, heads=2, layers=1, ffn=64, channels=4, text_dim=8, text_length=24, freq_dim=8, camera="dual"
    ),
    sampler=FewStepSampler(steps=2),
    codec=SmallCodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1),
    motion=Motion(move=0.5, turn=24.0, fps=16.0),
    text=WordText(dim=8),
    latents=5,
    height=32,
    width=32,
    stream=StreamConfig(chunk=2, first_chunk=1, window=3),
)
"""Three chunks; its ring is larger."""
REMEMBERING = replace(MODEL.stream, window=2, retrieved=1, recompute="causal")
"""Of five chunks it sees four."""
RECIPE = {
    "bidirectional": BidirectionalConfig(),
    "autoregressive": AutoregressiveConfig(),
    "ode": OdeConfig(ode_steps=4),
    "consistency": ConsistencyConfig(grid=4),
    "dmd": DmdConfig(),
    "codec": CodecTraining(),
}


def stage(name: str, **changes: Any) -> Run:
    run = Run(name=name, model=MODEL, recipe=RECIPE[name], data="nowhere", init=Init(codec="nowhere"), batch=3)
    return replace(run, **changes)


def item(plan: Plan, name: str) -> int:
    (found,) = [one.bytes for one in (*plan.held, *plan.turns) if one.name == name]
    return found


def real_recipe(run: Run) -> Any:
    return build_recipe(run, lambda _: run.recipe.network(run.model))


def allocated(work: Callable[[], Any]) -> int:
    """Peak of what torch's own allocator hands out: an instrument that shares nothing with the plan's."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    live = peak = 0
    assert record.profiler is not None and record.profiler.kineto_results is not None
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, live)
    return peak


def micro_batch(run: Run, recipe: Any, step: int) -> Tensor:
    """What the loop does between two updates, up to the backward pass."""
    generator = torch.Generator().manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=run.precision == "bfloat16"):
        return recipe.loss(run.recipe.example_batch(run.model, run.batch), step, generator).total
