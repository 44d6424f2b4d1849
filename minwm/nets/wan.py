"""Wan2.1 diffusion transformer, with cameras through PRoPE. Parameter names are those of the original release.

Sources: Wan2.1 `wan/modules/model.py` for the architecture (facts in the docstrings), minWM for `prope_o`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minwm.control.plucker import NUMBERS, Rays
from minwm.control.prope import Mode, Projection, rebased
from minwm.core.config import ConfigError
from minwm.core.flow import Latents, Times
from minwm.core.types import Condition
from minwm.nets.attention import Heads, Scope
from minwm.nets.backbone import Backbone, Bound, TextKV
from minwm.nets.layers import LayerNorm, RMSNorm, Rope3D, modulate, rotate, sinusoid, unpatchify, video_pairs


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
    camera: Mode = "none"
    """How cameras enter self-attention (control/prope.py)."""

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
    """Attention among video tokens under a scope. Cameras: a second branch stacked on heads, or the paper's one."""

    def __init__(self, cfg: WanConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.mode, self.layer = cfg.heads, cfg.camera, layer
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.dim), RMSNorm(cfg.dim)
        if cfg.camera == "dual":
            self.prope_o = nn.Linear(cfg.dim, cfg.dim)
            nn.init.zeros_(self.prope_o.weight)
            nn.init.zeros_(self.prope_o.bias)

    def forward(
        self,
        x: Float[Tensor, "b f p d"],
        rope: Float[Tensor, "2 s half"],
        camera: Projection | None,
        scope: Scope,
    ) -> Float[Tensor, "b f p d"]:
        flat = x.flatten(1, 2)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1))
            for y in (self.norm_q(self.q(flat)), self.norm_k(self.k(flat)), self.v(flat))
        )
        attend = {"none": self.plain, "dual": self.dual, "single": self.single}[self.mode]
        return attend(q, k, v, rope, camera, scope).view_as(x)

    def attention(self, scope: Scope, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "b s a e"]:
        return scope(self.layer, *(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2)

    def plain(self, q: Tensor, k: Tensor, v: Tensor, rope: Tensor, camera: None, scope: Scope) -> Tensor:
        return self.o(self.attention(scope, rotate(q, rope), rotate(k, rope), v).flatten(2))

    def dual(self, q: Tensor, k: Tensor, v: Tensor, rope: Tensor, camera: Projection, scope: Scope) -> Tensor:
        """o(RoPE attention) + prope_o(PRoPE attention): one attention over 2a heads."""
        out = self.attention(
            scope,
            torch.cat([rotate(q, rope), camera.queries(q)], dim=2),
            torch.cat([rotate(k, rope), camera.keys(k)], dim=2),
            torch.cat([v, camera.keys(v)], dim=2),
        )
        main, projective = out.split(self.heads, dim=2)
        return self.o(main.flatten(2)) + self.prope_o(camera.outputs(projective).flatten(2))

    def single(self, q: Tensor, k: Tensor, v: Tensor, rope: Tensor, camera: Projection, scope: Scope) -> Tensor:
        """The paper's D = diag(P on half of the channels, RoPE x, RoPE y) on queries, keys, values and outputs."""
        back = torch.stack([rope[0], -rope[1]])  # D^T and D^-1 of a rotation both turn it back

        def halves(y: Tensor, project: Callable[[Tensor], Tensor], table: Tensor) -> Tensor:
            a, b = y.chunk(2, dim=-1)
            return torch.cat([project(a.contiguous()), rotate(b, table)], dim=-1)

        out = self.attention(
            scope, halves(q, camera.queries, back), halves(k, camera.keys, back), halves(v, camera.keys, back)
        )
        return self.o(halves(out, camera.outputs, rope).flatten(2))


class CrossAttention(nn.Module):
    """Reading the prompt. Keys and values depend on the text alone and are computed once per prompt."""

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.dim), RMSNorm(cfg.dim)

    def read(self, text: Float[Tensor, "b l d"]) -> tuple[Float[Tensor, "b a l e"], Float[Tensor, "b a l e"]]:
        k, v = (rearrange(y, "b l (a e) -> b a l e", a=self.heads) for y in (self.norm_k(self.k(text)), self.v(text)))
        return k, v

    def forward(self, x: Float[Tensor, "b f p d"], k: Tensor, v: Tensor) -> Float[Tensor, "b f p d"]:
        q = rearrange(self.norm_q(self.q(x)), "b f p (a e) -> b a (f p) e", a=self.heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o(rearrange(out, "b a (f p) e -> b f p (a e)", f=x.shape[1]))


class Block(nn.Module):
    """Look around under the scope, read the prompt, think; modulated by time."""

    def __init__(self, cfg: WanConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.self_attn = SelfAttention(cfg, layer)
        self.norm3 = LayerNorm(cfg.dim, eps=1e-6)
        self.cross_attn = CrossAttention(cfg)
        self.norm2 = LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(cfg.dim, cfg.ffn), nn.GELU("tanh"), nn.Linear(cfg.ffn, cfg.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim) / cfg.dim**0.5)

    def forward(
        self,
        x: Float[Tensor, "b f p d"],
        time: Float[Tensor, "b f 6 d"],
        rope: Tensor,
        text: tuple[Tensor, Tensor],
        camera: Projection | None,
        scope: Scope,
    ) -> Float[Tensor, "b f p d"]:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation.float() + time).unbind(2)
        y = self.self_attn(modulate(self.norm1(x), shift_a, scale_a), rope, camera, scope)
        x = (x.float() + y * gate_a[:, :, None]).to(x.dtype)
        x = x + self.cross_attn(self.norm3(x), *text)
        y = self.ffn(modulate(self.norm2(x), shift_f, scale_f))
        return (x.float() + y * gate_f[:, :, None]).to(x.dtype)


class Head(nn.Module):
    """Modulated norm and projection to patch features; it sees the time embedding before its projection."""

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(cfg.dim, cfg.channels * cfg.patch**2)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim**0.5)

    def forward(self, x: Float[Tensor, "b f p d"], time: Float[Tensor, "b f d"]) -> Float[Tensor, "b f p k"]:
        shift, scale = (self.modulation.float() + time[:, :, None]).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


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
        return (Rays if self.anchored else Projection).bind(cond.w2c, cond.K)

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

    def velocity(self, x: Latents, t: Times, bound: Bound, scope: Scope) -> Latents:
        h, w = (n // self.config.patch for n in x.shape[-2:])
        tokens = self.patch_embedding(rearrange(x, "b f c h w -> b c f h w").to(self.patch_embedding.weight.dtype))
        tokens = rearrange(tokens, "b d f h w -> b f (h w) d")
        camera = bound.camera
        if isinstance(camera, Rays):
            tokens = tokens + self.plucker(camera.patches(h, w, self.config.patch).to(tokens.dtype))
            camera = None
        sines = sinusoid(1000 * t, self.config.freq_dim).to(tokens.dtype)
        time = self.time_embedding(sines)
        modulation = self.time_projection(time).float().unflatten(-1, (6, -1))
        rope = self.rope(scope.positions(x.shape[1]), h, w, x.device)
        for block, text in zip(self.blocks, bound.text, strict=True):
            tokens = self.through(block, tokens, modulation, rope, text, camera, scope)
        return unpatchify(self.head(tokens, time.float()), h, w, self.config.patch).to(x.dtype)
