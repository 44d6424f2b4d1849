"""Wan2.1 diffusion transformer, with cameras through PRoPE. Parameter names are those of the original release.

Sources: Wan2.1 `wan/modules/model.py` for the architecture (facts in the docstrings), minWM for `prope_o`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minwm.control.plucker import NUMBERS, Rays
from minwm.control.prope import Mode, Projection, rebased
from minwm.core.config import ConfigError
from minwm.core.flow import Latents, per_frame
from minwm.core.types import Condition
from minwm.nets.attention import Branches, Cached, Heads, Scope, attend, softmax_attention
from minwm.nets.backbone import Backbone, Bound, Pace, Paced, TextKV
from minwm.nets.fp8 import Linear
from minwm.nets.layers import (
    LayerNorm,
    RMSNorm,
    Rope3D,
    eager,
    gated,
    laid_out,
    modulated,
    patchify,
    rotate,
    sinusoid,
    unpatchify,
    video_pairs,
)

LEAST_TIME = 0.05
"""Below it, the velocity that follows from clean latents is taken as if it were this time: it would grow as 1/t."""


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Architecture of a Wan transformer; the defaults are Wan2.1-T2V-1.3B."""

    kind: ClassVar[str] = "wan"
    dim: int = 1536
    """Token width."""
    heads: int = 12
    layers: int = 30
    ffn: int = 8960
    """Hidden width of the feed-forward part."""
    channels: int = 16
    """Latent channels, in and out."""
    text_dim: int = 4096
    """Width of the text states."""
    text_length: int = 512
    """Rows of text; shorter prompts are zero-padded and the padding is attended to, as in the release."""
    freq_dim: int = 256
    """Width of the time sinusoid."""
    patch: int = 2
    """Latent rows and columns per token."""
    rounded: bool = False
    """Compatibility: cameras and modulation rounded to bfloat16, as minWM's own inference has them. Its released
    weights ran so; a rounded camera is another camera, and moving the world's frame is then no longer nothing."""
    camera: Mode = "none"
    """How cameras enter self-attention (control/prope.py)."""
    predicts: Literal["velocity", "clean"] = "velocity"
    """What the head gives: the velocity, or the clean latents, of which the velocity follows (JiT, Li & He 2025): noise
    does not pass through a network that is narrower than its patches, pictures do."""

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "layers", "ffn", "channels", "text_dim", "text_length", "freq_dim", "patch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"wan.{name}={getattr(self, name)}: must be at least 1")
        unit = self.heads * (8 if self.camera == "single" else 4)
        if self.dim % unit:
            near = max(1, round(self.dim / unit)) * unit
            raise ConfigError(
                f"wan.dim={self.dim}: {self.heads} heads and camera={self.camera} need a multiple of {unit}; try {near}"
            )

    def build(self) -> "Wan":
        return Wan(self)


class SelfAttention(nn.Module):
    """What comes before and after attention among video tokens, which itself is a matter of the scope.

    Cameras: a second branch stacked on heads, or the paper's one.
    """

    def __init__(self, cfg: WanConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.mode, self.layer = cfg.heads, cfg.camera, layer
        self.q, self.k, self.v, self.o = (Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.dim), RMSNorm(cfg.dim)
        self.kernel: Callable[..., Tensor] | None = None
        """`kernels.place`, if it is to be used."""
        self.joined = -1 if cfg.camera == "single" else 2
        """The axis on which branches are stacked."""
        if cfg.camera == "dual":
            self.prope_o = nn.Linear(cfg.dim, cfg.dim)
            nn.init.zeros_(self.prope_o.weight)
            nn.init.zeros_(self.prope_o.bias)

    def before(self, x: Float[Tensor, "b f p d"], rope: Tensor, camera: Projection | None) -> Branches:
        """Branches of queries, keys and values."""
        qk, v = self.project(x)
        match self.mode, camera:
            case "dual", Projection():
                (q, k), (q_seen, k_seen) = rotate(qk, rope), camera.queries_and_keys(qk)
                return (q, q_seen), (k, k_seen), (v, camera.keys(v))
            case "single", Projection():
                # The paper's D = diag(P on half of the channels, RoPE x, RoPE y) on queries, keys, values and outputs;
                # D^T and D^-1 of a rotation both turn it back.
                (seen, flat), (v_seen, v_flat) = qk.chunk(2, dim=-1), v.chunk(2, dim=-1)
                (q_seen, k_seen), (q, k) = camera.queries_and_keys(laid_out(seen)), rotate(flat, rope, back=True)
                return (q_seen, q), (k_seen, k), (camera.keys(laid_out(v_seen)), rotate(v_flat, rope, back=True))
        q, k = rotate(qk, rope)
        return (q,), (k,), (v,)

    def project(self, x: Float[Tensor, "b f p d"]) -> tuple[Float[Tensor, "2 b s a e"], Float[Tensor, "b s a e"]]:
        """Normalised queries and keys, and values."""
        out = self.linear(x)
        qk = F.rms_norm(out[:2].float(), out.shape[-1:], eps=self.norm_q.eps)
        qk[0].mul_(self.norm_q.weight)
        qk[1].mul_(self.norm_k.weight)
        qk = qk.to(out.dtype)
        shape = len(x), -1, self.heads, x.shape[-1] // self.heads
        return qk.view(2, *shape), out[2].view(shape)

    def linear(self, x: Float[Tensor, "b f p d"]) -> Float[Tensor, "3 n d"]:
        rows, layers = x.flatten(0, 2), (self.q, self.k, self.v)
        if not eager(x):
            return torch.stack([layer(rows) for layer in layers])
        out = rows.new_empty(3, *rows.shape)
        for part, layer in zip(out, layers, strict=True):
            layer.product(rows, layer.bias, out=part)
        return out

    def placed(
        self, x: Float[Tensor, "b f p d"], rope: Tensor, camera: Projection, scope: Cached
    ) -> Float[Tensor, "b s a e"]:
        """`before` and attention in a stream, with one kernel for all that is between products."""
        assert self.kernel is not None
        norms, room = (self.norm_q.weight, self.norm_k.weight), scope.room(self.layer)
        queries = self.kernel(self.linear(x), norms, rope, camera, room, self.norm_q.eps)
        return scope.read(self.layer, queries.transpose(1, 2)).transpose(1, 2)

    def after(self, out: Float[Tensor, "b s a e"], rope: Tensor, camera: Projection | None) -> Float[Tensor, "r d"]:
        """Projection of what attention found. Dual: o(RoPE branch) + prope_o(PRoPE branch)."""
        if self.mode == "single" and camera:
            seen, flat = out.chunk(2, dim=-1)
            parts = camera.outputs(laid_out(seen)), rotate(flat, rope)
            out = torch.cat(parts, dim=-1)
        if self.mode != "dual" or not camera:
            return self.o(out.flatten(2).flatten(0, 1))
        main, projective = out.split(self.heads, dim=2)
        seen = camera.outputs(laid_out(projective))
        rows = self.o.product(main.flatten(2).flatten(0, 1), self.o.bias + self.prope_o.bias)
        return torch.addmm(rows, seen.flatten(2).flatten(0, 1), self.prope_o.weight.t())


class CrossAttention(nn.Module):
    """Reading the prompt. Keys and values depend on the text alone and are computed once per prompt."""

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.q, self.k, self.v, self.o = (kind(cfg.dim, cfg.dim) for kind in (Linear, nn.Linear, nn.Linear, Linear))
        self.norm_q, self.norm_k = RMSNorm(cfg.dim), RMSNorm(cfg.dim)

    def read(self, text: Float[Tensor, "b l d"]) -> tuple[Float[Tensor, "b a l e"], Float[Tensor, "b a l e"]]:
        k, v = (rearrange(y, "b l (a e) -> b a l e", a=self.heads) for y in (self.norm_k(self.k(text)), self.v(text)))
        return k, v

    def forward(self, x: Float[Tensor, "b f p d"], k: Tensor, v: Tensor) -> Float[Tensor, "b f p d"]:
        q = self.norm_q(self.q(x)).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = softmax_attention(q, k, v).transpose(1, 2)
        return self.o(out.flatten(2)).view_as(x)


class Block(nn.Module):
    """Look around under the scope, read the prompt, think; modulated by time."""

    def __init__(self, cfg: WanConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(cfg, layer)
        self.norm3 = LayerNorm(cfg.dim, eps=1e-6)
        self.cross_attn = CrossAttention(cfg)
        self.ffn = nn.Sequential(Linear(cfg.dim, cfg.ffn), nn.GELU("tanh"), Linear(cfg.ffn, cfg.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim) / cfg.dim**0.5)
        self.rounded = cfg.rounded

    def paced(self, time: Float[Tensor, "b f 6 d"]) -> Paced:
        """Shift, scale and gate of attention, then of the feed-forward part."""
        return _affine(self.modulation, time, self.rounded)

    def before(self, x: Float[Tensor, "b f p d"], paced: Paced, rope: Tensor, camera: Projection | None) -> Branches:
        """Branches of queries, keys and values; stacked already if a compiler can do so on the way."""
        shift, scale, *_ = paced
        parts = self.self_attn.before(modulated(x, shift, scale), rope, camera)
        if torch.compiler.is_compiling():
            q, k, v = ((torch.cat(part, self.self_attn.joined),) for part in parts)
            return q, k, v
        return parts

    def after(
        self,
        x: Float[Tensor, "b f p d"],
        out: Float[Tensor, "b s a e"],
        paced: Paced,
        rope: Tensor,
        text: tuple[Tensor, Tensor],
        camera: Projection | None,
    ) -> Float[Tensor, "b f p d"]:
        _, _, gate_a, shift, scale, gate = paced
        x = gated(x, self.self_attn.after(out, rope, camera).view_as(x), gate_a)
        x = x + self.cross_attn(self.norm3(x), *text)
        return gated(x, self.ffn(modulated(x, shift, scale)), gate)

    def forward(
        self,
        x: Float[Tensor, "b f p d"],
        time: Float[Tensor, "b f 6 d"] | Paced,
        rope: Tensor,
        text: tuple[Tensor, Tensor],
        camera: Projection | None,
        scope: Scope,
    ) -> Float[Tensor, "b f p d"]:
        paced, attention = self.paced(time) if isinstance(time, Tensor) else time, self.self_attn
        if attention.kernel and camera and isinstance(scope, Cached) and eager(x):
            out = attention.placed(modulated(x, paced[0], paced[1]), rope, camera, scope)
        else:
            out = attend(scope, attention.layer, *self.before(x, paced, rope, camera), dim=attention.joined)
        return self.after(x, out, paced, rope, text, camera)


class Head(nn.Module):
    """Modulated norm and projection to patch features; it sees the time embedding before its projection."""

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.head = nn.Linear(cfg.dim, cfg.channels * cfg.patch**2)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim**0.5)
        self.rounded = cfg.rounded

    def paced(self, time: Float[Tensor, "b f d"]) -> Paced:
        return _affine(self.modulation, time[:, :, None], self.rounded)

    def forward(self, x: Float[Tensor, "b f p d"], shift: Tensor, scale: Tensor) -> Float[Tensor, "b f p k"]:
        return self.head(modulated(x, shift, scale))


def _affine(learned: Float[Tensor, "1 k d"], time: Float[Tensor, "b f _ d"], rounded: bool) -> Paced:
    """Learned and timely modulation; 1 is added to scales, which come second of every (shift, scale, gate)."""
    both = (learned.bfloat16() + time.bfloat16()).float() if rounded else learned.float() + time
    parts = both.split(1, dim=2)
    return tuple(1 + part if i % 3 == 1 else part for i, part in enumerate(parts))


class Wan(Backbone):
    """Wan2.1: patches of latents, text through cross-attention, one time per latent frame."""

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.config = cfg
        self.layers, self.head_width = cfg.layers, cfg.dim // cfg.heads
        self.heads = cfg.heads * (2 if cfg.camera == "dual" else 1)
        self.patch_embedding = nn.Conv3d(cfg.channels, cfg.dim, (1, cfg.patch, cfg.patch), (1, cfg.patch, cfg.patch))
        self.text_embedding = nn.Sequential(
            nn.Linear(cfg.text_dim, cfg.dim), nn.GELU("tanh"), nn.Linear(cfg.dim, cfg.dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, cfg.dim), nn.SiLU(), nn.Linear(cfg.dim, cfg.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))
        self.anchored = cfg.camera == "plucker"
        if self.anchored:
            self.plucker = nn.Linear(NUMBERS * cfg.patch**2, cfg.dim)
            nn.init.zeros_(self.plucker.weight)
            nn.init.zeros_(self.plucker.bias)
        inner = replace(cfg, camera="none") if self.anchored else cfg
        self.blocks = nn.ModuleList(Block(inner, layer) for layer in range(cfg.layers))
        self.head = Head(cfg)
        e = self.head_width
        self.rope = Rope3D((0, e // 8, e // 8) if cfg.camera == "single" else video_pairs(e))
        self.init_weights()

    def init_weights(self) -> None:
        """The release's initialisation: Xavier linears, small embeddings, a silent head and camera branch."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith(("prope_o", "plucker")):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.head.head.weight)

    def tokens(self, height: int, width: int) -> int:
        return (height // self.config.patch) * (width // self.config.patch)

    def read(self, text: Float[Tensor, "b l d"]) -> TextKV:
        if text.shape[1:] != (self.config.text_length, self.config.text_dim):
            want = f"(b, {self.config.text_length}, {self.config.text_dim})"
            raise ConfigError(
                f"text states have shape {tuple(text.shape)}, this network reads {want}; pad with zero rows"
            )
        text = self.text_embedding(text.to(self.patch_embedding.weight.dtype))
        return [block.cross_attn.read(text) for block in cast(list[Block], self.blocks)]

    def watch(self, cond: Condition) -> Projection | Rays | None:
        if self.config.camera == "none":
            return None
        if cond.w2c is None or cond.K is None:
            raise ConfigError(
                f"a network with camera={self.config.camera} needs a camera for every latent frame; this clip has none"
            )
        w2c, K = (x.bfloat16() if self.config.rounded else x for x in (cond.w2c, cond.K))
        camera = (Rays if self.anchored else Projection).bind(w2c, K)
        if self.config.rounded and isinstance(camera, Projection):
            return Projection(camera.matrices.bfloat16().float())
        return camera

    def later(self, keys: Heads, frames: int) -> Heads:
        if self.config.camera == "single":  # its rotary part has no time
            return keys
        table = self.rope([frames], 1, 1, keys.device)
        return torch.cat([rotate(keys[:, : self.config.heads], table), keys[:, self.config.heads :]], dim=1)

    def rebased(self, kv: Heads, frame: Float[Tensor, "b 4 4"]) -> Heads:
        if self.config.camera == "single":
            projective, rotary = kv.chunk(2, dim=-1)
            return torch.cat([rebased(projective, frame), rotary], dim=-1)
        return torch.cat([kv[:, : self.config.heads], rebased(kv[:, self.config.heads :], frame)], dim=1)

    def embed_time(self, t: Float[Tensor, "#b #f"]) -> tuple[Float[Tensor, "#b #f d"], Float[Tensor, "#b #f 6 d"]]:
        sines = sinusoid(1000 * t, self.config.freq_dim).to(self.patch_embedding.weight.dtype)
        time = self.time_embedding(sines)
        return time.float(), self.time_projection(time).float().unflatten(-1, (6, -1))

    def pace(self, t: Float[Tensor, "#b #f"]) -> Pace:
        time, modulation = self.embed_time(t)
        return Pace([block.paced(modulation) for block in cast(list[Block], self.blocks)], self.head.paced(time), t)

    def places(self, x: Latents, scope: Scope) -> Float[Tensor, "s half 2"]:
        patch = self.config.patch
        return self.rope(scope.positions(x.shape[1]), x.shape[-2] // patch, x.shape[-1] // patch, x.device)

    def flops(self, frames: int, tokens: int, seen: int) -> int:
        cfg, d, rows = self.config, self.config.dim, frames * tokens
        branches = self.heads // cfg.heads
        projections = 2 * rows * d * (6 * d + 2 * cfg.ffn + (d if cfg.camera == "dual" else 0))
        attention = 4 * rows * d * (branches * seen + cfg.text_length)
        cameras = {"none": 0, "dual": 4, "single": 2, "plucker": 0}[cfg.camera] * 2 * rows * d * 4  # 4 times 4 x 4
        rays = NUMBERS if cfg.camera == "plucker" else 0
        ends = 2 * rows * d * (2 * cfg.channels + rays) * cfg.patch**2
        return self.layers * (projections + attention + cameras) + ends

    def compile_blocks(self, backend: str | Callable = "inductor") -> None:
        """Compile what is before and after attention, once for all blocks; they hold no index of chunk or layer,
        so a stream needs one graph of each, whatever its regime."""
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        before, after = compiled(Block.before), compiled(Block.after)
        for block in cast(list[Block], self.blocks):
            block.before, block.after = partial(before, block), partial(after, block)

    def use_kernels(self) -> None:
        if self.config.camera != "dual":
            raise ConfigError(f"the kernel is for camera=dual, this network has {self.config.camera}; leave it off")
        from minwm.nets import kernels

        for block in cast(list[Block], self.blocks):
            block.self_attn.kernel = kernels.place

    def velocity(self, x: Latents, t: Float[Tensor, "#b #f"] | Pace, bound: Bound, scope: Scope) -> Latents:
        patch, embedding = self.config.patch, self.patch_embedding
        h, w = (n // patch for n in x.shape[-2:])
        tokens = F.linear(patchify(x, patch).to(embedding.weight.dtype), embedding.weight.flatten(1), embedding.bias)
        camera = bound.camera
        if isinstance(camera, Rays):
            tokens = tokens + self.plucker(camera.patches(h, w, patch).to(tokens.dtype))
            camera = None
        rope = self.places(x, scope) if bound.rope is None else bound.rope
        if isinstance(t, Pace):
            times, end = t.layers, t.end
        else:  # each block looks at time by itself: its parameters may be elsewhere until then
            time, modulation = self.embed_time(t)
            times, end = [modulation] * self.layers, self.head.paced(time)
        for block, time, text in zip(self.blocks, times, bound.text, strict=True):
            tokens = self.through(block, tokens, time, rope, text, camera, scope)
        out = unpatchify(self.head(tokens, *end), h, w, patch).to(x.dtype)
        if self.config.predicts == "velocity":
            return out
        level = per_frame((t.t if isinstance(t, Pace) else t).to(x)).clamp_min(LEAST_TIME)
        return (x - out) / level
