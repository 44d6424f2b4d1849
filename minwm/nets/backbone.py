"""Backbone: embed -> blocks -> unembed under an attention scope, and the teacher-forced pass built on it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from minwm.control.plucker import Rays
from minwm.control.prope import Projection
from minwm.core.config import ConfigError
from minwm.core.flow import Latents, Times
from minwm.core.types import Condition
from minwm.nets.attention import Full, Geometry, Heads, KVArena, Masked, Scope, teacher_forcing
from minwm.nets.fp8 import Linear

TextKV = list[tuple[Float[Tensor, "b a l e"], Float[Tensor, "b a l e"]]]


@dataclass(frozen=True)
class Bound:
    """A condition made ready for the network: text keys and values per layer, cameras as projections or rays."""

    text: TextKV
    camera: Projection | Rays | None
    rope: Tensor | None = None
    """Table of the positions of the frames, as `places` makes it; None: the network asks the scope."""


Paced = tuple[Float[Tensor, "#b #f 1 d"], ...]


@dataclass(frozen=True)
class Pace:
    """What time does to every layer, made ready: samplers ask at the same few times again and again."""

    layers: list[Paced]
    end: Paced
    t: Float[Tensor, "#b #f"]


Checkpointing = Literal[False, True, "attention"]
"""What of a block is kept for the backward pass: everything; its inputs alone, so that all of it is computed again; or
its inputs and what attention among the video's tokens found, so that this, most of the work, is not done again."""
ATTENTION = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
"""The operators that may be behind `scaled_dot_product_attention`. Not its plain form, which keeps all scores."""


def policy(_context: Any, operator: Any, *args: Any, **_options: Any) -> CheckpointPolicy:
    """Keep what attention found, but for that to a prompt: its few keys (args[1]) are soon asked again."""
    costly = operator in ATTENTION and args[1].shape[-2] >= args[0].shape[-2]
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


class Backbone(nn.Module, ABC):
    """A video diffusion transformer that predicts velocity.

    `layers`, `heads` (attention heads of one pass, both camera branches stacked) and `head_width` size its arena.
    """

    layers: int
    heads: int
    head_width: int
    anchored: bool = False
    """Wants cameras in the frame of the first one: a stream may not move its cache to another."""
    checkpointing: Checkpointing = False
    cache: type[KVArena] = KVArena
    """What its streams keep keys and values in."""

    @abstractmethod
    def read(self, text: Float[Tensor, "b l d"]) -> TextKV:
        """Text keys and values of every layer; they depend on the prompt alone."""

    @abstractmethod
    def watch(self, cond: Condition) -> Projection | Rays | None:
        """Camera matrices of the condition's frames; None for a network without camera control."""

    def pace(self, t: Float[Tensor, "#b #f"]) -> Times | Pace:
        """What to give to `velocity` for times that are asked for often: per frame, or one for all (1 x 1)."""
        return t

    def use_kernels(self) -> None:
        """Let hand-written kernels do what they can in streams, in place; no fallback."""
        raise ConfigError(f"{type(self).__name__} has no kernels of its own; leave engine.kernels off")

    def use_fp8(self, on: bool = True) -> None:
        """Let every `fp8.Linear` take its products in FP8, in place, once the network is where it runs."""
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        if not linears:
            raise ConfigError(f"{type(self).__name__} has no linears for FP8; leave engine.fp8 off")
        weight = linears[0].weight
        if weight.is_cuda and (torch.cuda.get_device_capability() < (8, 9) or weight.dtype != torch.bfloat16):
            name, dtype = torch.cuda.get_device_name(), weight.dtype
            raise ConfigError(f"FP8 needs a GPU since Ada or Hopper and bfloat16, not {name} and {dtype}; leave it off")
        for linear in linears:
            linear.use_fp8(on)

    def places(self, x: Latents, scope: Scope) -> Tensor | None:
        """The network's table of the positions of x's frames, if it has any: for `Bound`."""
        return None

    def compile_blocks(self, backend: str | Callable = "inductor") -> None:
        """Compile the blocks, in place. One graph must serve all layers and chunks; no fallback."""
        raise ConfigError(f"{type(self).__name__} has no compiled form; leave engine.compile off")

    def flops(self, frames: int, tokens: int, seen: int) -> int:
        """Of one pass over `frames` of `tokens` each that sees `seen` tokens, itself included, for one branch.

        A multiply-add is two; matrix products alone count. The prompt is read and time looked at beforehand.
        """
        raise ConfigError(f"{type(self).__name__} has no closed form of its FLOPs")

    @abstractmethod
    def velocity(self, x: Latents, t: Float[Tensor, "#b #f"] | Pace, bound: Bound, scope: Scope) -> Latents:
        """v at x_t. The one forward pass, whatever the scope."""

    @abstractmethod
    def tokens(self, height: int, width: int) -> int:
        """Tokens per latent frame of height x width latents."""

    @abstractmethod
    def later(self, keys: Heads, frames: int) -> Heads:
        """Cached keys, had their frames come `frames` later in time."""

    @abstractmethod
    def rebased(self, kv: Heads, frame: Float[Tensor, "b 4 4"]) -> Heads:
        """Cached keys or values after the world's frame has moved to the pose `frame`."""

    def through(self, block: nn.Module, *args: Any) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return block(*args)
        kept = partial(create_selective_checkpoint_contexts, policy)
        context = kept if self.checkpointing == "attention" else noop_context_fn
        return cast(Tensor, checkpoint(block, *args, use_reentrant=False, context_fn=context))

    def bind(self, cond: Condition) -> Bound:
        return Bound(self.read(cond.text), self.watch(cond))

    def forward(
        self, x: Latents, t: Float[Tensor, "#b #f"] | Pace, cond: Condition | Bound, scope: Scope | None = None
    ) -> Latents:
        bound = self.bind(cond) if isinstance(cond, Condition) else cond
        return self.velocity(x, t, bound, scope or Full())

    def arena(self, geometry: Geometry, batch: int) -> KVArena:
        weight = next(self.parameters())
        kind, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return self.cache(
            geometry,
            self.layers,
            batch,
            self.heads,
            self.head_width,
            dtype=dtype,
            device=weight.device,
        )


@dataclass(frozen=True)
class Past:
    """What later chunks are given of earlier ones: the clip at times t, 0 or little more."""

    latents: Latents
    t: Times


def teacher_forced(net: Backbone, past: Past, noisy: Latents, t: Times, cond: Condition, geometry: Geometry) -> Latents:
    """Velocity of every noisy chunk given the true chunks before it, all chunks in one pass (paper, stage 1).

    The sequence is [past | noisy at t]; both halves have the same positions and cameras.
    """
    frames = noisy.shape[1]
    scope = Masked(teacher_forcing(geometry, frames), 2 * frames, period=frames)
    bound = net.bind(cond)
    bound = Bound(bound.text, bound.camera and bound.camera.twice())
    both = net.velocity(torch.cat([past.latents, noisy], 1), torch.cat([past.t, t], 1), bound, scope)
    return both[:, frames:]
