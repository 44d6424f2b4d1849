"""The straightforward form of a streamed chunk, from the same weights: what the engine is measured against.

Every pass works everything out again: two attentions per layer, each with its own cache that grows by concatenation
and is cut when it is full; cameras as one matrix per token, inverted in every layer; rotary angles from scratch in
float64, for queries and for keys; time looked at by every layer. The prompt's keys and values are kept, as everywhere.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minwm.core.flow import interpolate
from minwm.core.types import Condition
from minwm.families.wan.transformer import Wan
from minwm.nets.chunks import Geometry
from minwm.stream.solvers import FewStepSampler


def angles(frames: list[int], height: int, width: int, head_width: int) -> Tensor:
    """exp(i angle) of every token, `s 1 e/2`, complex128."""
    third = head_width // 2 // 3
    grid = torch.cartesian_prod(
        *(torch.tensor(list(x), dtype=torch.float64) for x in (frames, range(height), range(width)))
    )
    parts = []
    for axis, pairs in enumerate((head_width // 2 - 2 * third, third, third)):
        frequency = 1e4 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        parts.append(grid[:, axis, None] * frequency)
    angle = torch.cat(parts, dim=1)
    return torch.polar(torch.ones_like(angle), angle)[:, None]


def rotated(x: Tensor, frames: list[int], height: int, width: int) -> Tensor:
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles(frames, height, width, x.shape[-1])).flatten(-2).to(x.dtype)


def seen(x: Tensor, matrix: Tensor) -> Tensor:
    """Groups of four channels of every token times the token's own matrix (`b s 4 4`)."""
    groups = x.unflatten(-1, (-1, 4))
    return torch.einsum("bsij,bsagj->bsagi", matrix, groups).flatten(-2)


@dataclass
class PlainStream:
    """The same walk as `sampling.Stream` without guidance, for a Wan with camera="dual"."""

    net: Wan
    cond: Condition
    geometry: Geometry
    chunk: int = 0
    cache: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    """Committed keys and values, one tensor per (layer, name)."""

    def __post_init__(self) -> None:
        self.text = self.net.project_text_kv(self.cond)

    def step(self, cond: Condition, noise: Tensor, sampler: FewStepSampler) -> Tensor:
        """Make a chunk and commit it."""
        x, times = noise[0], sampler.times
        for i, t in enumerate(times):
            x0 = x - t * self.velocity(x, t, cond)
            if i + 1 < len(times):
                x = interpolate(x0, noise[i + 1], x.new_full(x.shape[:2], times[i + 1]))
        self.velocity(x0, 0.0, cond, commit=True)
        self.chunk += 1
        return x0

    def velocity(self, x: Tensor, t: float, cond: Condition, commit: bool = False) -> Tensor:
        net, cfg = self.net, self.net.config
        b, f, _, height, width = x.shape
        h, w = height // cfg.patch, width // cfg.patch
        tokens = rearrange(net.patch_embedding(rearrange(x, "b f c h w -> b c f h w")), "b d f h w -> b (f h w) d")
        half = cfg.freq_dim // 2
        angle = 1000 * t * 1e4 ** (-torch.arange(half, dtype=torch.float64) / half)
        sines = torch.cat([angle.cos(), angle.sin()]).to(tokens.dtype).expand(b, f, -1)
        time = net.time_embedding(sines)
        modulation = net.time_projection(time).unflatten(-1, (6, -1))
        start = self.geometry.start(self.chunk)
        for layer, (block, text) in enumerate(zip(net.blocks, self.text, strict=True)):
            place = dict(frames=list(range(start, start + f)), height=h, width=w)
            tokens = self.block(cast(Any, block), layer, tokens, modulation, text, place, cond, commit)
        shift, scale = (net.head.modulation + time[:, :, None]).unbind(2)
        out = net.head.head(self.modulated(tokens, shift, scale))
        return rearrange(out, "b (f h w) (i j c) -> b f c (h i) (w j)", f=f, h=h, w=w, i=cfg.patch, j=cfg.patch)

    def modulated(self, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        y = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6).unflatten(1, (shift.shape[1], -1))
        return (y * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)

    def block(
        self, block: Any, layer: int, x: Tensor, time: Tensor, text: Any, place: Any, cond: Condition, commit: bool
    ) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (block.modulation + time).unbind(2)
        per_frame = x.shape[1] // time.shape[1]
        y = self.attention(block.self_attn, layer, self.modulated(x, shift_a, scale_a), place, cond, commit)
        x = x + y * gate_a.repeat_interleave(per_frame, 1)
        cross = block.cross_attn
        q = rearrange(cross.norm_q(cross.q(block.norm3(x))), "b s (a e) -> b a s e", a=cross.heads)
        x = x + cross.o(rearrange(F.scaled_dot_product_attention(q, *text), "b a s e -> b s (a e)"))
        return x + block.ffn(self.modulated(x, shift_f, scale_f)) * gate_f.repeat_interleave(per_frame, 1)

    def attention(self, net: Any, layer: int, x: Tensor, place: Any, cond: Condition, commit: bool) -> Tensor:
        q, k, v = (
            rearrange(y, "b s (a e) -> b s a e", a=net.heads)
            for y in (net.norm_q(net.q(x)), net.norm_k(net.k(x)), net.v(x))
        )
        main = self.attend((layer, "rope"), rotated(q, **place), rotated(k, **place), v, commit)
        assert cond.w2c is not None and cond.K is not None
        per_frame = x.shape[1] // cond.w2c.shape[1]
        w2c, K = (y.repeat_interleave(per_frame, 1).to(x.dtype) for y in (cond.w2c, cond.K))
        lens = torch.diag_embed(torch.cat([K[..., :2], torch.ones_like(K[..., :2])], -1))
        project = lens @ w2c
        back = torch.linalg.inv(project)
        camera = self.attend((layer, "prope"), seen(q, project.mT), seen(k, back), seen(v, back), commit)
        return net.o(main.flatten(2)) + net.prope_o(seen(camera, project).flatten(2))

    def attend(self, name: tuple[int, str], q: Tensor, k: Tensor, v: Tensor, commit: bool) -> Tensor:
        past = self.cache.get(name, [k[:, :0], v[:, :0]])
        past = [self.cut(y, k.shape[1]) for y in past]
        keys, values = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        if commit:
            self.cache[name] = [keys, values]
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
        return out.transpose(1, 2)

    def cut(self, y: Tensor, new: int) -> Tensor:
        """Sinks and what fits beside the new rows."""
        sink = self.geometry.start(self.geometry.sink) * self.geometry.tokens
        over = y.shape[1] + new - self.geometry.rows
        return torch.cat([y[:, :sink], y[:, sink + over :]], 1) if over > 0 else y
