"""The contract of a backbone: embed -> blocks -> unembed under an attention scope; the teacher-forced pass on it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from minwm.control.action import Labels
from minwm.control.plucker import Rays
from minwm.control.prope import Mode, Projection
from minwm.core.config import ConfigError
from minwm.core.flow import FirstLatent, FirstLatents, Latents, Times, with_first
from minwm.core.types import Condition
from minwm.nets.attention import FULL, AttentionScope, Heads, KVArena, Masked, TextKV, teacher_forcing
from minwm.nets.chunks import Geometry, StreamConfig
from minwm.nets.fp8 import Linear

Timesteps = Float[Tensor, "#b #f"]
"""Per latent frame, or one for all."""


@dataclass(frozen=True)
class PreparedCondition:
    """A condition with what depends on it alone worked out, for many passes over the same frames."""

    text: Sequence[TextKV]
    """Per layer."""
    camera: Projection | Rays | None
    rope: Tensor | None = None
    """`Backbone.rope_table` of the frames; None: the network asks the scope for their positions."""
    first_latent: FirstLatent | None = None
    """The clean first latent of the frames, if it is given: streams hold it."""
    given: Latents | None = None
    """The frames themselves, if they are all given: a chunk of a stream that there is nothing to generate of."""
    actions: Labels | None = None
    """Of the frames, for networks that take them."""


ShiftScaleGate = tuple[Float[Tensor, "#b #f 1 d"], ...]
"""adaLN modulation of one layer."""


@dataclass(frozen=True)
class Modulation:
    """The adaLN modulation of every layer at some timesteps: samplers come back to the same few."""

    layers: Sequence[ShiftScaleGate]
    head: ShiftScaleGate
    t: Timesteps
    t_end: Timesteps | None = None
    """Where the sampler's step ends, for networks that predict the mean velocity until then (MeanFlow)."""


Checkpointing = Literal[False, True, "attention"]
"""What of a block is kept for the backward pass: everything; its inputs alone, so that all of it is computed again; or
its inputs and the output of attention among video tokens, so that this, most of the work, is not done again."""
ATTENTION_OPS = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
"""The operators that may be behind `scaled_dot_product_attention`. Not its plain form, which keeps all scores."""


def keep_attention(_context: Any, operator: Any, *args: Any, **_options: Any) -> CheckpointPolicy:
    """Keep the output of self-attention; cross-attention has few keys (args[1]): cheap to repeat."""
    costly = operator in ATTENTION_OPS and args[1].shape[-2] >= args[0].shape[-2]
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


class Backbone(nn.Module, ABC):
    """A video diffusion transformer that predicts the velocity v = eps - x_0.

    `forward` is the one pass, whatever the attention scope. What many passes share can be worked out before: text keys
    and values once per prompt, camera matrices once per chunk, modulation once per timestep. `layers`, `cache_heads`
    (attention heads of one pass, both camera branches stacked) and `head_width` size the KV arena.
    """

    layers: int
    cache_heads: int
    head_width: int
    text_rows: int = 0
    """Rows at the front of the KV cache for text that the video attends to in the same softmax as to itself; 0 for text
    in an attention of its own. Such text is not rotated: see `Geometry.time_origin`."""
    needs_first_frame_coordinates: bool = False
    """Cameras must be given relative to the first frame: a stream may not move the world frame of its cache. So it is
    for ray maps, and where text, which has no camera, takes part in an attention that sees cameras."""
    takes_actions: bool = False
    """Whether actions are embedded beside the timesteps: modulation then depends on both."""
    finished_kv: Callable[[Heads], Heads] | None = None
    """Compatibility: makes of a finished chunk's cached keys, or values, what later chunks read; None: they stay."""
    takes_step_end: bool = False
    """Whether the velocity is the mean one until `Modulation.t_end` (MeanFlow): `adaln_modulation` takes that."""
    checkpointing: Checkpointing = False
    arena_type: type[KVArena] = KVArena
    """The KV cache of its streams."""

    @abstractmethod
    def forward(
        self, x: Latents, t: Timesteps | Modulation, cond: Condition | PreparedCondition, scope: AttentionScope = FULL
    ) -> Latents:
        """v at x_t. `t`: per frame or one for all, or the modulation of these."""

    def init_weights(self) -> None:
        """Give parameters their first values, in place; those on the meta device, which have none, stay as they are.

        A loaded network needs it for what its file lacks: parameters of cameras and actions.
        """

    @abstractmethod
    def project_text_kv(self, cond: Condition) -> list[TextKV]:
        """Text keys and values of every layer, for scopes that are not bidirectional: they depend on the prompt alone.

        A stream works them out once per prompt, writes them into its cache if they have `text_rows` there, and hands
        them to every pass.
        """

    @abstractmethod
    def camera_matrices(self, cond: Condition) -> Projection | Rays | None:
        """Cameras of the condition's frames as attention takes them; None for a network without camera control."""

    def adaln_modulation(self, t: Timesteps, t_end: Timesteps | None = None) -> Timesteps | Modulation:
        """What `forward` may be given in place of timesteps; by default these themselves. `t_end`: where the sampler's
        step ends, for networks that take it."""
        return t

    def prepare(self, cond: Condition) -> Condition | PreparedCondition:
        """The condition for many bidirectional passes over the same frames; as it is, if text depends on the video."""
        return PreparedCondition(self.project_text_kv(cond), self.camera_matrices(cond), actions=cond.actions)

    def forward_methods(self) -> Iterator[tuple[nn.Module, str]]:
        """Methods besides `forward` that read parameters, with the module that owns these.

        Whoever shards these modules has the hooks run here too (`torch.distributed.fsdp.register_fsdp_forward_method`).
        No `forward` calls one of them: parameters would be gone from the middle of it on.
        """
        yield from ((self, "project_text_kv"), (self, "adaln_modulation"))

    @abstractmethod
    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens per latent frame of height x width latents."""

    @abstractmethod
    def rotate_keys_in_time(self, keys: Heads, frames: int) -> Heads:
        """Cached keys as if their frames came `frames` later."""

    @abstractmethod
    def change_world_frame(self, kv: Heads, frame: Float[Tensor, "b 4 4"]) -> Heads:
        """Cached keys or values after the world frame has moved to the pose `frame` (camera-to-world)."""

    def rope_table(self, x: Latents, scope: AttentionScope) -> Tensor | None:
        """Rotary angles of the tokens of x, for `PreparedCondition.rope`; None for a network without any."""
        return None

    def flops(self, frames: int, tokens: int, visible: int) -> int:
        """FLOPs of one forward pass over `frames` x `tokens` tokens that attend to `visible` tokens, themselves
        included; no guidance. A multiply-add is two; matrix products alone count. Text keys and values and the
        modulation are taken as worked out before."""
        raise ConfigError(f"{type(self).__name__} has no closed form of its FLOPs")

    def text_flops(self, video: int) -> int:
        """FLOPs that a pass has besides if text is not worked out before: of text and its modulation, where its tokens
        attend to each other and to `video` tokens. 0 for text in an attention of its own, which is little."""
        return 0

    def use_kernels(self) -> None:
        """Use hand-written kernels in streams, in place; no fallback."""
        raise ConfigError(f"{type(self).__name__} has no kernels of its own; leave engine.kernels off")

    def use_fp8(self, on: bool = True) -> None:
        """Compute every `fp8.Linear` in FP8, in place, once the network is on its device."""
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        if not linears:
            raise ConfigError(f"{type(self).__name__} has no linears for FP8; leave engine.fp8 off")
        weight = linears[0].weight
        if weight.is_cuda and (torch.cuda.get_device_capability() < (8, 9) or weight.dtype != torch.bfloat16):
            name, dtype = torch.cuda.get_device_name(), weight.dtype
            raise ConfigError(f"FP8 needs a GPU since Ada or Hopper and bfloat16, not {name} and {dtype}; leave it off")
        for linear in linears:
            linear.use_fp8(on)

    def compile_blocks(self, backend: str | Callable = "inductor") -> None:
        """Compile the blocks, in place. One graph must serve all layers and chunks; no fallback."""
        raise ConfigError(f"{type(self).__name__} has no compiled form; leave engine.compile off")

    def maybe_checkpoint(self, block: nn.Module, *args: Any) -> Any:
        """block(*args), under activation checkpointing where gradients flow and `checkpointing` asks for it."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return block(*args)
        selective = partial(create_selective_checkpoint_contexts, keep_attention)
        context = selective if self.checkpointing == "attention" else noop_context_fn
        return checkpoint(block, *args, use_reentrant=False, context_fn=context)

    def arena(self, geometry: Geometry, batch: int) -> KVArena:
        """An empty KV cache in the dtype of the keys, on the device of the weights."""
        weight = next(self.parameters())
        kind, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        size = self.layers, batch, self.cache_heads, self.head_width
        return self.arena_type(replace(geometry, text_rows=self.text_rows), size, dtype, weight.device)


@runtime_checkable
class BackboneConfig(Protocol):
    """What the config of every backbone has: a frozen dataclass that checks itself and builds its network.

    Those outside of its family read these fields and no others.
    """

    kind: ClassVar[str]
    """The family, by its name in config files."""
    layers: int
    """Blocks, which are all alike."""
    unpublished: ClassVar[tuple[str, ...]]
    """Fields that say how weights are run, which no published file tells."""

    @property
    def channels(self) -> int:
        """Latent channels, in and out."""
        ...

    @property
    def patch(self) -> int:
        """Latent rows and columns per token."""
        ...

    @property
    def text_shapes(self) -> Mapping[str, tuple[int, int]]:
        """Rows and width of the parts of a prompt that it reads, by name (`nets.text.TextEncoder.shapes`)."""
        ...

    @property
    def camera(self) -> Mode:
        """How cameras enter."""
        ...

    def build(self) -> Backbone: ...


@dataclass(frozen=True)
class Context:
    """The past that chunks are given in training: the clip at timesteps t, 0 (clean) or little more."""

    latents: Latents
    t: Times


def teacher_forced(
    net: Backbone, context: Context, noisy: Latents, t: Times, cond: Condition, stream: StreamConfig
) -> Latents:
    """Velocity of every noisy chunk given the true chunks before it, all chunks in one pass (paper, stage 1).

    The sequence is [context | noisy at t]; both halves have the same positions and cameras. Given first latents are
    clean in both; the velocity there means nothing.
    """
    frames = noisy.shape[1]
    stream.check_one_pass(frames)
    scope = Masked(teacher_forcing(stream, frames), 2 * frames, period=frames)
    clean, t_clean = keep_first_clean(context.latents, context.t, cond.first_latents, stream)
    noisy, t = keep_first_clean(noisy, t, cond.first_latents, stream)
    both = net(torch.cat([clean, noisy], 1), torch.cat([t_clean, t], 1), cond.repeat_frames(2), scope)
    return both[:, frames:]


def keep_first_clean(
    x: Latents, t: Times, first: FirstLatents | None, stream: StreamConfig | None = None
) -> tuple[Latents, Times]:
    """Put given first latents in front of a noisy clip: clean, and shown at timestep 0 or where a stream shows them."""
    if first is None:
        return x, t
    image_time, later_time = (stream.image_time, stream.context_time or 0.0) if stream else (0.0, 0.0)
    t = t.clone()
    t[:, : first.shape[1]] = later_time
    if not stream or stream.takes_image:
        t[:, :1] = image_time
    return with_first(x, first), t
