"""A small model with every recipe: what is planned for it, and the real thing beside the plan."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from minwm.bench.memory import Plan
from minwm.cameras.trajectory import Motion
from minwm.core.types import Clip, Condition
from minwm.families.wan.transformer import WanConfig
from minwm.nets.attention import StreamConfig
from minwm.nets.codec import Codec, CodecConfig
from minwm.nets.text import WordText
from minwm.recipes.codec import CodecRecipe, CodecTraining
from minwm.recipes.consistency import ConsistencyConfig
from minwm.recipes.diffusion import AutoregressiveConfig, BidirectionalConfig
from minwm.recipes.dmd import DmdConfig
from minwm.recipes.ode import OdeConfig
from minwm.store.model import ModelConfig
from minwm.stream.solvers import FewStepSampler
from minwm.train.build import RECIPES
from minwm.train.config import Init, Run

MODEL = ModelConfig(
    network=WanConfig(
        dim=32, heads=2, layers=1, ffn=64, channels=4, text_dim=8, text_length=24, freq_dim=8, camera="dual"
    ),
    sampler=FewStepSampler(steps=2),
    codec=CodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1),
    motion=Motion(move=0.5, turn=24.0, fps=16.0),
    text=WordText(dim=8),
    latents=5,
    height=32,
    width=32,
    stream=StreamConfig(chunk=2, first_chunk=1, window=3),
)
"""Three chunks; its ring is larger."""
RECIPE = {
    "bidirectional": BidirectionalConfig(),
    "autoregressive": AutoregressiveConfig(),
    "ode": OdeConfig(ode_steps=4),
    "consistency": ConsistencyConfig(grid=4),
    "dmd": DmdConfig(steps=2),
    "codec": CodecTraining(),
}


def stage(name: str, **changes: Any) -> Run:
    run = Run(name=name, model=MODEL, recipe=RECIPE[name], data="nowhere", init=Init(codec="nowhere"), batch=3)
    return replace(run, **changes)


def item(plan: Plan, name: str) -> int:
    (found,) = [one.bytes for one in (*plan.held, *plan.turns) if one.name == name]
    return found


def batch(run: Run, generator: torch.Generator) -> Any:
    config = run.model
    if isinstance(run.recipe, CodecTraining):
        return torch.rand(run.batch, 4 * config.latents - 3, 3, config.height, config.width, generator=generator)
    x = torch.randn(config.latent_shape(run.batch), generator=generator)
    w2c = torch.eye(4).repeat(run.batch, config.latents, 1, 1)
    K = torch.tensor([0.7, 0.7, 0.5, 0.5]).repeat(run.batch, config.latents, 1)
    cond = Condition(text=config.text.encode(["a room"] * run.batch), w2c=w2c, K=K, first_latent=x[:, :1].clone())
    return Clip(x, cond, x.repeat(5, 1, 1, 1, 1, 1) if isinstance(run.recipe, OdeConfig) else None)


def real_recipe(run: Run) -> Any:
    if isinstance(run.recipe, CodecTraining):
        codec = run.model.codec.build()
        assert isinstance(codec, Codec)
        return CodecRecipe(codec)
    kind = RECIPES[type(run.recipe)]
    nets = {role: run.model.network.build() for role in (*kind.trained, *kind.frozen)}
    for role in kind.trained:
        nets[role].checkpointing = run.checkpointing
    return kind(run.recipe, nets, run.model.geometry)


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
        return recipe.loss(batch(run, generator), step, generator).total
