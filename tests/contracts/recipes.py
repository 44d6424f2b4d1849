"""Recipes with small random networks in all roles, and what a test looks at them with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from backbones import CHANNELS, HEIGHT, WAN, WIDTH, condition, latents
from torch import Tensor, nn

from minwm.cameras.trajectory import Motion
from minwm.core.flow import Latents, Times
from minwm.core.types import Clip, Condition
from minwm.nets.attention import FULL, AttentionScope, TextKV
from minwm.nets.backbone import Backbone
from minwm.nets.chunks import StreamConfig
from minwm.nets.small_codec import SmallCodecConfig
from minwm.nets.text import WordText
from minwm.recipes.base import Recipe, RecipeConfig
from minwm.recipes.consistency import ConsistencyConfig
from minwm.recipes.diffusion import AutoregressiveConfig, BidirectionalConfig, TimeLaw
from minwm.recipes.dmd import DmdConfig
from minwm.recipes.ode import OdeConfig
from minwm.store.model import ModelConfig
from minwm.stream.solvers import FewStepSampler

FRAMES = 5
MODEL = ModelConfig(
    network=WAN["wan-dual"],
    sampler=FewStepSampler(steps=2),
    codec=SmallCodecConfig(channels=CHANNELS),
    motion=Motion(move=0.5, turn=16.0, fps=16.0),
    text=WordText(dim=6, length=5),
    latents=FRAMES,
    height=8 * HEIGHT,
    width=8 * WIDTH,
    stream=StreamConfig(chunk=2, first_chunk=1, window=8, sink=1),
)
GEOMETRY = MODEL.geometry
LONG_FIRST = replace(MODEL, stream=replace(MODEL.stream, first_chunk=3, image_start=True))
"""The image is the first of three latents, of which the others are generated."""
PLAIN = TimeLaw(weight="none")
CASES: dict[str, RecipeConfig] = {
    "bidirectional": BidirectionalConfig(time=PLAIN),
    "autoregressive": AutoregressiveConfig(time=PLAIN),
    "ode": OdeConfig(),
    "consistency": ConsistencyConfig(grid=8),
    "dmd": DmdConfig(),
}
every_recipe = pytest.mark.parametrize("name", CASES)
TURNS = [(name, step) for name in CASES for step in ((0, 1) if name == "dmd" else (0,))]
"""Every recipe, at a step of each network that it trains: DMD starts with the student."""
every_turn = pytest.mark.parametrize(("name", "step"), TURNS)


def network(seed: int) -> Backbone:
    """Initialised as for training, but with a head and a camera branch that are no longer zero."""
    torch.manual_seed(seed)
    net = WAN["wan-dual"].build().double()
    for key, parameter in net.named_parameters():
        if key.startswith("head.head") or "prope_o" in key:
            nn.init.normal_(parameter, std=0.2)
    return net


def make(name: str, model: ModelConfig = MODEL, /, **changes: Any) -> Recipe[Backbone]:
    """A recipe with random networks in all roles."""
    cfg = replace(CASES[name], **changes)
    return cfg.build(model, {role: network(seed) for seed, role in enumerate((*cfg.trained, *cfg.frozen))})


def clip(image: bool = True, batch: int = 2) -> Clip:
    x, cond = latents(FRAMES, batch), condition(FRAMES, batch)
    states = torch.stack([latents(FRAMES, batch, seed=20 + k) for k in range(3)])
    return Clip(x, replace(cond, first_latents=x[:, :1] if image else None), states)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


@contextmanager
def watched(net: Backbone) -> Iterator[list[tuple[Times, Latents]]]:
    """Times and outputs of every pass of a network that is under gradient."""
    seen = []

    def record(_: nn.Module, args: tuple[Any, ...], v: Latents) -> None:
        if v.requires_grad:
            v.retain_grad()
            seen.append((args[1], v))

    hook = net.register_forward_hook(record)
    yield seen
    hook.remove()


class Exact(Backbone):
    """The exact velocity field of a data set with one clip in it: everything flows straight to that clip."""

    layers, cache_heads, head_width = 1, 1, 4

    def __init__(self, datum: Latents) -> None:
        super().__init__()
        self.datum = nn.Parameter(datum.clone())

    def project_text_kv(self, cond: Condition) -> list[TextKV]:
        return []

    def camera_matrices(self, cond: Condition) -> None:
        return None

    def tokens_per_frame(self, height: int, width: int) -> int:
        return GEOMETRY.tokens

    def rotate_keys_in_time(self, keys: Tensor, frames: int) -> Tensor:
        return keys

    def change_world_frame(self, kv: Tensor, frame: Tensor) -> Tensor:
        return kv

    def forward(self, x: Latents, t: Tensor, cond: Any, scope: AttentionScope = FULL) -> Latents:
        ends = self.datum[:, scope.positions(x.shape[1])].repeat(len(x) // len(self.datum), 1, 1, 1, 1)
        t = t[:, :, None, None, None]
        return torch.where(t > 0, (x - ends) / t.clamp_min(1e-3), 0)
