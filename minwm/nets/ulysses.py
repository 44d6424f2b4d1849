"""One stream on several GPUs: every rank has some rows of the picture, and in attention some heads of all of it.

Both camera branches are stacked on heads, so twice as many ranks can share them. Between the two splits lies one
exchange of equal parts before attention and one after it (DeepSpeed-Ulysses, Jacobs et al. 2023). The arena is
sharded by heads. All ranks are given the same noise, and all return the whole chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from minwm.control.plucker import Rays
from minwm.control.prope import Projection
from minwm.core.config import ConfigError
from minwm.core.flow import Latents
from minwm.core.types import Condition
from minwm.nets.attention import FULL, AttentionScope, Cached, Full, Heads, TextKV
from minwm.nets.backbone import Backbone, Modulation, PreparedCondition, Timesteps


@dataclass(frozen=True)
class Exchanged:
    """A scope whose attention runs on whole frames and this rank's heads; outside, on all heads and its rows."""

    bidirectional: ClassVar[bool] = False
    scope: AttentionScope
    ranks: int

    def positions(self, frames: int) -> list[int]:
        return self.scope.positions(frames)

    def __call__(self, layer: int, q: Heads, k: Heads, v: Heads, text: TextKV | None = None) -> Heads:
        parts = torch.cat([q, k, v]).unflatten(1, (self.ranks, -1)).transpose(0, 1)  # ranks 3b a/ranks s e
        q, k, v = _exchange(parts).permute(1, 2, 0, 3, 4).flatten(2, 3).chunk(3)
        out = self.scope(layer, q, k, v, text).unflatten(2, (self.ranks, -1)).permute(2, 0, 1, 3, 4)
        return _exchange(out).transpose(0, 1).flatten(1, 2)


def _exchange(parts: Float[Tensor, "r ..."]) -> Float[Tensor, "r ..."]:
    """Part i goes to rank i; part i of the result came from rank i."""
    sent = parts.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return received


class Ulysses(Backbone):
    """A backbone shared by all ranks of the default process group; for streams, without gradients."""

    def __init__(self, net: Backbone) -> None:
        super().__init__()
        self.net, self.rank, self.ranks = net, dist.get_rank(), dist.get_world_size()
        if net.cache_heads % self.ranks:
            raise ConfigError(f"{net.cache_heads} heads of attention cannot be shared by {self.ranks} ranks evenly")
        self.layers, self.cache_heads, self.head_width = net.layers, net.cache_heads // self.ranks, net.head_width
        self.text_rows, self.needs_first_frame_coordinates = net.text_rows, net.needs_first_frame_coordinates

    def project_text_kv(self, cond: Condition) -> list[TextKV]:
        """Of this rank's heads where text takes part in the exchanged attention; elsewhere of all."""
        text, first = self.net.project_text_kv(cond), self.rank * self.cache_heads
        heads = slice(first, first + self.cache_heads)
        return [TextKV(k[:, heads], v[:, heads], valid) for k, v, valid in text] if self.text_rows else text

    def camera_matrices(self, cond: Condition) -> Projection | Rays | None:
        return self.net.camera_matrices(cond)

    def tokens_per_frame(self, height: int, width: int) -> int:
        return self.net.tokens_per_frame(height, width)

    def adaln_modulation(self, t: Timesteps) -> Timesteps | Modulation:
        return self.net.adaln_modulation(t)

    def rope_table(self, x: Latents, scope: AttentionScope) -> Tensor | None:
        """Of this rank's rows."""
        whole = self.net.rope_table(x, scope)
        if whole is None:
            return None
        rows = whole.unflatten(0, (x.shape[1], self.ranks, -1))[:, self.rank]
        return rows.flatten(0, 1)

    def rotate_keys_in_time(self, keys: Heads, frames: int) -> Heads:
        return self._mine(keys, lambda whole: self.net.rotate_keys_in_time(whole, frames))

    def change_world_frame(self, kv: Heads, frame: Float[Tensor, "b 4 4"]) -> Heads:
        return self._mine(kv, lambda whole: self.net.change_world_frame(whole, frame))

    def _mine(self, kv: Heads, change: Callable[[Heads], Heads]) -> Heads:
        """A change that depends on which head it is, of this rank's heads."""
        first = self.rank * self.cache_heads
        whole = kv.new_zeros(len(kv), self.net.cache_heads, *kv.shape[2:])
        whole[:, first : first + self.cache_heads] = kv
        return change(whole)[:, first : first + self.cache_heads]

    def forward(
        self, x: Latents, t: Timesteps | Modulation, cond: Condition | PreparedCondition, scope: AttentionScope = FULL
    ) -> Latents:
        if not isinstance(scope, Cached | Full):  # others know where in the sequence a frame is
            raise ConfigError(f"ranks share streams and bidirectional passes, not {type(scope).__name__}")
        if x.shape[-2] % self.ranks or self.net.tokens_per_frame(*x.shape[-2:]) % self.ranks:
            raise ConfigError(f"{x.shape[-2]} rows of latents cannot be shared by {self.ranks} ranks evenly")
        if self.text_rows and scope.bidirectional:
            raise ConfigError("ranks share bidirectional passes only of networks with cross-attention to text")
        if isinstance(cond, Condition):
            cond = PreparedCondition(self.project_text_kv(cond), self.camera_matrices(cond))
        rope = self.rope_table(x, scope) if cond.rope is None else cond.rope
        rows = x.chunk(self.ranks, dim=-2)[self.rank]
        image = cond.first_latent if cond.first_latent is None else cond.first_latent.chunk(self.ranks, -2)[self.rank]
        cond = replace(cond, rope=rope, first_latent=image)
        mine = self.net(rows, t, cond, Exchanged(scope, self.ranks)).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(parts, mine)
        return torch.cat(parts, dim=-2)
