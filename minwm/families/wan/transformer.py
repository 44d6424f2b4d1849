"""Wan2.1 diffusion transformer, with cameras through PRoPE. Parameter names are those of the original release.

Sources: Wan2.1 `wan/modules/model.py` for the architecture (facts in the docstrings), minWM for `prope_o`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minwm.control.action import Labels, given_labels
from minwm.control.plucker import NUMBERS, Rays
from minwm.control.prope import Mode, Projection, change_world_frame
from minwm.core.config import ConfigError
from minwm.core.flow import Latents, per_frame
from minwm.core.types import Condition
from minwm.families.wan.transformer_layers import CrossAttention, Head, adaln, rotate_halves
from minwm.nets.attention import FULL, AttentionScope, Cached, Heads, QKVBranches, attend_branches, scatter_rope
from minwm.nets.backbone import Backbone, Modulation, PreparedCondition, ShiftScaleGate, TextKV, Timesteps
from minwm.nets.fp8 import Linear
from minwm.nets.layers import (
    LayerNorm,
    ProductLinear,
    RMSNorm,
    Rope3D,
    can_write_in_place,
    contiguous_copy,
    gated_residual,
    modulate,
    patchify,
    rotate,
    sinusoid,
    unpatchify,
    video_pairs,
)

MIN_TIME = 0.05
"""Least t in v = (x_t - x_0) / t where a network predicts x_0."""


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Architecture of a Wan transformer; the defaults are Wan2.1-T2V-1.3B."""

    kind: ClassVar[str] = "wan"
    unpublished: ClassVar[tuple[str, ...]] = ("rounded", "principal_point")
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
    actions: bool = False
    """Actions are embedded beside the timesteps (control/action.py), as in HY-WorldPlay."""
    principal_point: bool = True
    """PRoPE sees the principal point; minWM's released weights were trained without."""
    predicts: Literal["velocity", "clean"] = "velocity"
    """What the head predicts: the velocity, or the clean latents, from which the velocity follows (JiT, Li & He 2025):
    noise does not pass through a network that is narrower than its patches, pictures do."""

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

    @property
    def text_shapes(self) -> dict[str, tuple[int, int]]:
        return {"text": (self.text_length, self.text_dim)}

    def build(self) -> "Wan":
        return Wan(self)


class SelfAttention(nn.Module):
    """Attention among video tokens, but for attention itself, which is the scope's.

    Cameras (`WanConfig.camera`): dual adds a PRoPE branch, stacked on heads; single is the paper's one branch, with
    PRoPE and RoPE halves stacked on channels.
    """

    def __init__(self, cfg: WanConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.mode, self.layer = cfg.heads, cfg.camera, layer
        self.q, self.k, self.v, self.o = (Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.dim), RMSNorm(cfg.dim)
        self.kernel: Callable[..., Tensor] | None = None
        """`kernels.fused_qkv`, if it is to be used."""
        self.stack_dim = -1 if cfg.camera == "single" else 2
        """The axis on which branches are stacked."""
        if cfg.camera == "dual":
            self.prope_o = ProductLinear(cfg.dim, cfg.dim)

    def project_qkv(self, x: Float[Tensor, "b f p d"], rope: Tensor, camera: Projection | None) -> QKVBranches:
        """Branches of queries, keys and values."""
        qk, v = self.normalised_qkv(x)
        match self.mode, camera:
            case "dual", Projection():
                (q, k), (q_prope, k_prope) = rotate(qk, rope), camera.queries_and_keys(qk)
                return (q, q_prope), (k, k_prope), (v, camera.keys(v))
            case "single", Projection():
                # Li et al. 2025: D = diag(P on half of the channels, RoPE x, RoPE y) on queries, keys, values, outputs;
                # D^T and D^-1 of a rotation both turn it back.
                (qk_prope, qk_rope), (v_prope, v_rope) = qk.chunk(2, dim=-1), v.chunk(2, dim=-1)
                q_prope, k_prope = camera.queries_and_keys(contiguous_copy(qk_prope))
                q, k = rotate_halves(qk_rope, rope, back=True)
                v_prope, v = camera.keys(contiguous_copy(v_prope)), rotate_halves(v_rope, rope, back=True)
                return (q_prope, q), (k_prope, k), (v_prope, v)
        q, k = rotate(qk, rope)
        return (q,), (k,), (v,)

    def normalised_qkv(
        self, x: Float[Tensor, "b f p d"]
    ) -> tuple[Float[Tensor, "2 b s a e"], Float[Tensor, "b s a e"]]:
        """Normalised queries and keys, and values."""
        out = self.qkv_linear(x)
        qk = F.rms_norm(out[:2].float(), out.shape[-1:], eps=self.norm_q.eps)
        qk[0].mul_(self.norm_q.weight)
        qk[1].mul_(self.norm_k.weight)
        qk = qk.to(out.dtype)
        shape = len(x), -1, self.heads, x.shape[-1] // self.heads
        return qk.view(2, *shape), out[2].view(shape)

    def qkv_linear(self, x: Float[Tensor, "b f p d"]) -> Float[Tensor, "3 n d"]:
        rows, linears = x.flatten(0, 2), (self.q, self.k, self.v)
        if not can_write_in_place(x):
            return torch.stack([linear(rows) for linear in linears])
        out = rows.new_empty(3, *rows.shape)
        for part, linear in zip(out, linears, strict=True):
            linear.product(rows, linear.bias, out=part)
        return out

    def fused_attention(
        self, x: Float[Tensor, "b f p d"], rope: Tensor, camera: Projection, scope: Cached
    ) -> Float[Tensor, "b s a e"]:
        """`project_qkv` and attention in a stream, with one kernel for all that is between matrix products."""
        assert self.kernel is not None
        norms, slot = (self.norm_q.weight, self.norm_k.weight), scope.current_slot(self.layer)
        queries = self.kernel(self.qkv_linear(x), norms, rope, camera, slot, self.norm_q.eps)
        return scope.attend(self.layer, queries.transpose(1, 2)).transpose(1, 2)

    def project_output(
        self, out: Float[Tensor, "b s a e"], rope: Tensor, camera: Projection | None
    ) -> Float[Tensor, "r d"]:
        """Output projection. Dual: o(RoPE branch) + prope_o(PRoPE branch)."""
        if self.mode == "single" and camera:
            prope, flat = out.chunk(2, dim=-1)
            out = torch.cat([camera.outputs(contiguous_copy(prope)), rotate_halves(flat, rope)], dim=-1)
        if self.mode != "dual" or not camera:
            return self.o(out.flatten(2).flatten(0, 1))
        main, prope = out.split(self.heads, dim=2)
        prope = camera.outputs(contiguous_copy(prope))
        rows = self.o.product(main.flatten(2).flatten(0, 1), self.o.bias + self.prope_o.bias)
        return self.prope_o.product(prope.flatten(2).flatten(0, 1), rows)


class Block(nn.Module):
    """Self-attention under the scope, cross-attention to the prompt, feed-forward; modulated by the timestep (adaLN).

    `time` and `text` are embeddings, or what the block makes of them: `adaln_modulation`, `project_text_kv`.
    """

    def __init__(self, cfg: WanConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(cfg, layer)
        self.norm3 = LayerNorm(cfg.dim, eps=1e-6)
        self.cross_attn = CrossAttention(cfg.dim, cfg.heads)
        self.ffn = nn.Sequential(Linear(cfg.dim, cfg.ffn), nn.GELU("tanh"), Linear(cfg.ffn, cfg.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim) / cfg.dim**0.5)
        self.rounded = cfg.rounded

    def adaln_modulation(self, time: Float[Tensor, "b f 6 d"]) -> ShiftScaleGate:
        """Shift, scale and gate of self-attention, then of the feed-forward part."""
        return adaln(self.modulation, time, self.rounded)

    def project_text_kv(self, text: Float[Tensor, "b l d"]) -> TextKV:
        return self.cross_attn.project_kv(text)

    def before_attention(
        self, x: Float[Tensor, "b f p d"], modulation: ShiftScaleGate, rope: Tensor, camera: Projection | None
    ) -> QKVBranches:
        """Branches of queries, keys and values; stacked already if a compiler can do so on the way."""
        shift, scale, *_ = modulation
        qkv = self.self_attn.project_qkv(modulate(x, shift, scale), rope, camera)
        if torch.compiler.is_compiling():
            q, k, v = ((torch.cat(branches, self.self_attn.stack_dim),) for branches in qkv)
            return q, k, v
        return qkv

    def after_attention(
        self,
        x: Float[Tensor, "b f p d"],
        out: Float[Tensor, "b s a e"],
        modulation: ShiftScaleGate,
        rope: Tensor,
        text: Float[Tensor, "b l d"] | TextKV,
        camera: Projection | None,
    ) -> Float[Tensor, "b f p d"]:
        _, _, attention_gate, shift, scale, gate = modulation
        x = gated_residual(x, self.self_attn.project_output(out, rope, camera).view_as(x), attention_gate)
        x = x + self.cross_attn(self.norm3(x), text)
        return gated_residual(x, self.ffn(modulate(x, shift, scale)), gate)

    def forward(
        self,
        x: Float[Tensor, "b f p d"],
        time: Float[Tensor, "b f 6 d"] | ShiftScaleGate,
        rope: Tensor,
        text: Float[Tensor, "b l d"] | TextKV,
        camera: Projection | None,
        scope: AttentionScope,
    ) -> Float[Tensor, "b f p d"]:
        attention = self.self_attn
        modulation = adaln(self.modulation, time, self.rounded) if isinstance(time, Tensor) else time
        shift, scale, *_ = modulation
        if attention.kernel and camera and isinstance(scope, Cached) and can_write_in_place(x):
            out = attention.fused_attention(modulate(x, shift, scale), rope, camera, scope)
        else:
            qkv = self.before_attention(x, modulation, rope, camera)
            out = attend_branches(scope, attention.layer, *qkv, dim=attention.stack_dim)
        return self.after_attention(x, out, modulation, rope, text, camera)


class Wan(Backbone):
    """Wan2.1: patches of latents, text through cross-attention, one time per latent frame."""

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.config = cfg
        self.layers, self.head_width = cfg.layers, cfg.dim // cfg.heads
        self.cache_heads = cfg.heads * (2 if cfg.camera == "dual" else 1)
        self.patch_embedding = nn.Conv3d(cfg.channels, cfg.dim, (1, cfg.patch, cfg.patch), (1, cfg.patch, cfg.patch))
        self.text_embedding = nn.Sequential(
            nn.Linear(cfg.text_dim, cfg.dim), nn.GELU("tanh"), nn.Linear(cfg.dim, cfg.dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, cfg.dim), nn.SiLU(), nn.Linear(cfg.dim, cfg.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))
        self.takes_actions = cfg.actions
        if cfg.actions:
            self.action_embedding = nn.Sequential(
                nn.Linear(cfg.freq_dim, cfg.dim), nn.SiLU(), nn.Linear(cfg.dim, cfg.dim)
            )
        self.needs_first_frame_coordinates = cfg.camera == "plucker"
        if self.needs_first_frame_coordinates:
            self.plucker = nn.Linear(NUMBERS * cfg.patch**2, cfg.dim)
        inner = replace(cfg, camera="none") if self.needs_first_frame_coordinates else cfg
        self.blocks = nn.ModuleList(Block(inner, layer) for layer in range(cfg.layers))
        self.head = Head(cfg.dim, cfg.channels * cfg.patch**2, cfg.rounded)
        e = self.head_width
        self.rope = Rope3D((0, e // 8, e // 8), theta=100.0) if cfg.camera == "single" else Rope3D(video_pairs(e))
        self.init_weights()

    def init_weights(self) -> None:
        """The release's initialisation: Xavier linears, small embeddings; head, cameras and actions start at zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                camera = name.endswith(("prope_o", "plucker"))
                nn.init.zeros_(module.weight) if camera else nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.head.head.weight)
        if self.takes_actions:
            nn.init.zeros_(self.action_embedding.get_parameter("2.weight"))

    def forward(
        self, x: Latents, t: Timesteps | Modulation, cond: Condition | PreparedCondition, scope: AttentionScope = FULL
    ) -> Latents:
        patch, embedding = self.config.patch, self.patch_embedding
        h, w = (n // patch for n in x.shape[-2:])
        tokens = F.linear(patchify(x, patch).to(embedding.weight.dtype), embedding.weight.flatten(1), embedding.bias)
        if isinstance(cond, Condition):
            text, camera, rope = [self.embed_text(cond.text)] * self.layers, self.camera_matrices(cond), None
        else:
            text, camera, rope = cond.text, cond.camera, cond.rope
        if isinstance(camera, Rays):
            tokens, camera = tokens + self.plucker(camera.patches(h, w, patch).to(tokens.dtype)), None
        rope = self.rope_table(x, scope) if rope is None else rope
        tokens, rope = scope.scatter(tokens), scatter_rope(scope, rope, x.shape[1])
        if isinstance(t, Modulation):
            times, time = t.layers, t.head
        else:
            time, projected = self.embed_time(t, cond.actions)
            times = [projected] * self.layers
        for block, block_time, block_text in zip(self.blocks, times, text, strict=True):
            tokens = self.maybe_checkpoint(block, tokens, block_time, rope, block_text, camera, scope)
        out = unpatchify(scope.gather(self.head(tokens, time)), h, w, patch).to(x.dtype)
        if self.config.predicts == "velocity":
            return out
        level = per_frame((t.t if isinstance(t, Modulation) else t).to(x)).clamp_min(MIN_TIME)
        return (x - out) / level

    def embed_text(self, text: Float[Tensor, "b l text_dim"]) -> Float[Tensor, "b l d"]:
        if text.shape[1:] != (self.config.text_length, self.config.text_dim):
            want = f"(b, {self.config.text_length}, {self.config.text_dim})"
            raise ConfigError(
                f"text states have shape {tuple(text.shape)}, this network reads {want}; pad with zero rows"
            )
        return self.text_embedding(text.to(self.patch_embedding.weight.dtype))

    def embed_time(
        self, t: Timesteps, actions: Labels | None = None
    ) -> tuple[Float[Tensor, "#b #f d"], Float[Tensor, "#b #f 6 d"]]:
        """The time embedding with that of actions, for the head, and its projection, for the blocks."""
        width, dtype = self.config.freq_dim, self.patch_embedding.weight.dtype
        time = self.time_embedding(sinusoid(1000 * t, width).to(dtype))
        if self.takes_actions:
            time = time + self.action_embedding(sinusoid(given_labels(actions), width).to(dtype))
        return time.float(), self.time_projection(time).float().unflatten(-1, (6, -1))

    def project_text_kv(self, cond: Condition) -> list[TextKV]:
        states = self.embed_text(cond.text)
        return [block.project_text_kv(states) for block in cast(list[Block], self.blocks)]

    def adaln_modulation(self, t: Timesteps, t_end: Timesteps | None = None) -> Timesteps | Modulation:
        if self.takes_actions:
            return t
        time, projected = self.embed_time(t)
        layers = [block.adaln_modulation(projected) for block in cast(list[Block], self.blocks)]
        return Modulation(layers, self.head.adaln_modulation(time), t)

    def forward_methods(self) -> Iterator[tuple[nn.Module, str]]:
        yield from super().forward_methods()
        for block in self.blocks:
            yield from ((block, "project_text_kv"), (block, "adaln_modulation"))
        yield self.head, "adaln_modulation"

    def camera_matrices(self, cond: Condition) -> Projection | Rays | None:
        if self.config.camera == "none":
            return None
        w2c, K = (x.bfloat16() if self.config.rounded else x for x in cond.cameras)
        if self.needs_first_frame_coordinates:
            return Rays.from_cameras(w2c, K)
        camera = Projection.from_cameras(w2c, K, self.config.principal_point)
        return Projection(camera.matrices.bfloat16().float()) if self.config.rounded else camera

    def tokens_per_frame(self, height: int, width: int) -> int:
        return (height // self.config.patch) * (width // self.config.patch)

    def rope_table(self, x: Latents, scope: AttentionScope) -> Float[Tensor, "s half 2"]:
        patch = self.config.patch
        table = self.rope(scope.positions(x.shape[1]), x.shape[-2] // patch, x.shape[-1] // patch, x.device)
        return table.roll(table.shape[1] // 2, 1) if self.config.camera == "single" else table  # columns before rows

    def rotate_keys_in_time(self, keys: Heads, frames: int) -> Heads:
        if self.config.camera == "single":  # its rotary part has no time
            return keys
        table = self.rope([frames], 1, 1, keys.device)
        return torch.cat([rotate(keys[:, : self.config.heads], table), keys[:, self.config.heads :]], dim=1)

    def change_world_frame(self, kv: Heads, frame: Float[Tensor, "b 4 4"]) -> Heads:
        if self.config.camera == "single":
            projective, rotary = kv.chunk(2, dim=-1)
            return torch.cat([change_world_frame(projective, frame), rotary], dim=-1)
        return torch.cat([kv[:, : self.config.heads], change_world_frame(kv[:, self.config.heads :], frame)], dim=1)

    def flops(self, frames: int, tokens: int, visible: int) -> int:
        cfg, d, rows = self.config, self.config.dim, frames * tokens
        branches = self.cache_heads // cfg.heads
        projections = 2 * rows * d * (6 * d + 2 * cfg.ffn + (d if cfg.camera == "dual" else 0))
        attention = 4 * rows * d * (branches * visible + cfg.text_length)
        cameras = {"none": 0, "dual": 4, "single": 2, "plucker": 0}[cfg.camera] * 2 * rows * d * 4  # 4 times 4 x 4
        rays = NUMBERS if cfg.camera == "plucker" else 0
        ends = 2 * rows * d * (2 * cfg.channels + rays) * cfg.patch**2
        return self.layers * (projections + attention + cameras) + ends

    def compile_blocks(self, backend: str | Callable = "inductor") -> None:
        """Compile what is before and after attention, once for all blocks; they hold no index of chunk or layer,
        so a stream needs one graph of each, whatever its slot and the number of valid rows."""
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        before, after = compiled(Block.before_attention), compiled(Block.after_attention)
        for block in cast(list[Block], self.blocks):
            block.before_attention, block.after_attention = partial(before, block), partial(after, block)

    def use_kernels(self) -> None:
        if self.config.camera != "dual":
            raise ConfigError(f"the kernel is for camera=dual, this network has {self.config.camera}; leave it off")
        from minwm.nets import kernels

        for block in cast(list[Block], self.blocks):
            block.self_attn.kernel = kernels.fused_qkv
