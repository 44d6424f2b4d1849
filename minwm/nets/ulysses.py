"""One sequence on several processes: every rank has some tokens of each frame, and in attention some heads of all.

Both camera branches are stacked on heads, so twice as many ranks can share them. Between the two splits lies one
exchange of equal parts before attention and one after it (DeepSpeed-Ulysses, Jacobs et al. 2023). All ranks are given
the same clip, noise and times, and all return the whole clip. The arena of a stream is sharded by heads.

In training all ranks have the same loss. Gradients of an exchange are exchanged back, and those of a gathered tensor
summed over ranks; so the mean over ranks of a parameter's gradients, which FSDP takes, is that of one process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from minwm.control.plucker import Rays
from minwm.control.prope import Projection
from minwm.core.config import ConfigError
from minwm.core.flow import Latents
from minwm.core.types import Condition
from minwm.nets.attention import FULL, AttentionScope, FrameTokens, Heads, Keys, TextKV, cast_heads
from minwm.nets.backbone import Backbone, Modulation, PreparedCondition, Timesteps


class _Exchange(torch.autograd.Function):
    """Part i goes to rank i; part i of the result came from rank i. Gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, parts: Float[Tensor, "r ..."], group: dist.ProcessGroup) -> Float[Tensor, "r ..."]:
        ctx.group = group
        sent = parts.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "r ..."]) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.group), None


class CountedGroup:
    """Stands for a group of so many ranks in plans: nothing is sent, and what would be is counted."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.forward, self.backward = ranks, 0, 0
        """Bytes of all parts, those that stay included."""

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return 0


Group = dist.ProcessGroup | CountedGroup


def _exchange(parts: Float[Tensor, "r ..."], group: Group) -> Float[Tensor, "r ..."]:
    if isinstance(group, CountedGroup):
        group.forward += parts.nbytes
        group.backward += parts.nbytes if parts.requires_grad else 0
        return parts.contiguous()
    exchanged = _Exchange.apply(parts, group)
    assert isinstance(exchanged, Tensor)
    return exchanged


@dataclass(frozen=True)
class Exchanged:
    """A scope whose attention runs on whole frames and this rank's heads; outside, on all heads and its tokens.

    Text is on every rank. Where it is handed over with all heads, those of this rank are taken.
    """

    scope: AttentionScope
    frames: int
    group: Group

    @property
    def bidirectional(self) -> bool:
        return self.scope.bidirectional

    @property
    def ranks(self) -> int:
        return self.group.size()

    def positions(self, frames: int) -> list[int]:
        return self.scope.positions(frames)

    def scatter(self, tokens: FrameTokens) -> Float[Tensor, "b f t d"]:
        return tokens.chunk(self.ranks, dim=2)[self.group.rank()]

    def gather(self, tokens: FrameTokens) -> Float[Tensor, "b f s d"]:
        parts = _exchange(tokens.expand(self.ranks, *tokens.shape), self.group)
        return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def __call__(self, layer: int, q: Heads, k: Keys, v: Keys, text: TextKV | None = None) -> Heads:
        q, k, v = self._to_heads(torch.cat(cast_heads(q, k, v))).chunk(3)
        return self._to_tokens(self.scope(layer, q, k, v, text and self._own_text(text, q)))

    def attend_from_text(self, layer: int, q: Heads, k: Keys, v: Keys, text: TextKV) -> Heads:
        if q.shape[1] % self.ranks:
            raise ConfigError(f"{q.shape[1]} heads of text cannot be shared by {self.ranks} ranks evenly")
        k, v = self._to_heads(torch.cat(cast_heads(k, v))).chunk(2)
        out = self.scope.attend_from_text(layer, self._own(q), k, v, self._own_text(text, k))
        return _exchange(out.expand(self.ranks, *out.shape), self.group).transpose(0, 1).flatten(1, 2)

    def _own(self, heads: Heads) -> Float[Tensor, "b own s e"]:
        return heads.chunk(self.ranks, dim=1)[self.group.rank()]

    def _own_text(self, text: TextKV, video: Heads) -> TextKV:
        """A stream's text has been cut to this rank's heads (`Ulysses.project_text_kv`)."""
        if text.k.shape[1] == video.shape[1]:
            return text
        return TextKV(self._own(text.k), self._own(text.v), text.valid)

    def _to_heads(self, x: Float[Tensor, "n a t e"]) -> Float[Tensor, "n b s e"]:
        """From this rank's tokens to its heads."""
        parts = x.unflatten(1, (self.ranks, -1)).unflatten(3, (self.frames, -1))  # n r a f p e
        return _exchange(parts.transpose(0, 1), self.group).permute(1, 2, 3, 0, 4, 5).flatten(2, 4)

    def _to_tokens(self, x: Float[Tensor, "n a s e"]) -> Float[Tensor, "n b t e"]:
        """And back."""
        parts = x.unflatten(2, (self.frames, self.ranks, -1)).permute(3, 0, 1, 2, 4, 5)  # r n a f p e
        return _exchange(parts, self.group).transpose(0, 1).flatten(1, 2).flatten(2, 3)


class Ulysses(Backbone):
    """A backbone whose passes are shared by the ranks of a process group."""

    def __init__(self, net: Backbone, group: Group) -> None:
        super().__init__()
        self.net, self.group, self.ranks = net, group, group.size()
        if net.cache_heads % self.ranks:
            raise ConfigError(f"{net.cache_heads} heads of attention cannot be shared by {self.ranks} ranks evenly")
        if net.finished_kv is not None:
            raise ConfigError("a network that mixes heads of its cache (prope_cache) cannot be shared by ranks")
        self.layers, self.cache_heads, self.head_width = net.layers, net.cache_heads // self.ranks, net.head_width
        self.text_rows, self.needs_first_frame_coordinates = net.text_rows, net.needs_first_frame_coordinates
        self.takes_step_end = net.takes_step_end
        self.takes_actions, self.checkpointing, self.arena_type = net.takes_actions, net.checkpointing, net.arena_type

    def project_text_kv(self, cond: Condition) -> list[TextKV]:
        """Of this rank's heads where text takes part in the exchanged attention; elsewhere of all."""
        text, heads = self.net.project_text_kv(cond), self._heads
        return [TextKV(k[:, heads], v[:, heads], valid) for k, v, valid in text] if self.text_rows else text

    def camera_matrices(self, cond: Condition) -> Projection | Rays | None:
        return self.net.camera_matrices(cond)

    def tokens_per_frame(self, height: int, width: int) -> int:
        return self.net.tokens_per_frame(height, width)

    def adaln_modulation(self, t: Timesteps, t_end: Timesteps | None = None) -> Timesteps | Modulation:
        return self.net.adaln_modulation(t, t_end)

    def prepare(self, cond: Condition) -> Condition | PreparedCondition:
        return self.net.prepare(cond)

    def rope_table(self, x: Latents, scope: AttentionScope) -> Tensor | None:
        return self.net.rope_table(x, scope)

    def flops(self, frames: int, tokens: int, visible: int) -> int:
        """This rank's part."""
        return self.net.flops(frames, tokens, visible) // self.ranks

    def text_flops(self, video: int) -> int:
        return self.net.text_flops(video)

    def rotate_keys_in_time(self, keys: Heads, frames: int) -> Heads:
        return self._own_heads(keys, lambda whole: self.net.rotate_keys_in_time(whole, frames))

    def change_world_frame(self, kv: Heads, frame: Float[Tensor, "b 4 4"]) -> Heads:
        return self._own_heads(kv, lambda whole: self.net.change_world_frame(whole, frame))

    @property
    def _heads(self) -> slice:
        first = self.group.rank() * self.cache_heads
        return slice(first, first + self.cache_heads)

    def _own_heads(self, kv: Heads, change: Callable[[Heads], Heads]) -> Heads:
        """A change that depends on which head it is, of this rank's heads."""
        whole = kv.new_zeros(len(kv), self.net.cache_heads, *kv.shape[2:])
        whole[:, self._heads] = kv
        return change(whole)[:, self._heads]

    def forward(
        self, x: Latents, t: Timesteps | Modulation, cond: Condition | PreparedCondition, scope: AttentionScope = FULL
    ) -> Latents:
        if (tokens := self.net.tokens_per_frame(*x.shape[-2:])) % self.ranks:
            raise ConfigError(f"{tokens} tokens of a frame cannot be shared by {self.ranks} ranks evenly")
        return self.net(x, t, cond, Exchanged(scope, x.shape[1], self.group))
