"""HunyuanVideo-1.5's diffusion transformer, with cameras through PRoPE: video and text in one attention (MMDiT).

Sources: HunyuanVideo-1.5 `hyvideo/models/transformers/hunyuanvideo_1_5_transformer.py` for the architecture, minWM for
`img_attn_prope_proj` and for text that attends to itself alone.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minwm.control.action import given_labels
from minwm.control.plucker import Rays
from minwm.control.prope import Mode, Projection, change_world_frame
from minwm.core.config import ConfigError
from minwm.core.flow import Latents
from minwm.core.types import Condition
from minwm.families.hunyuan.transformer_block import Block, Words
from minwm.families.hunyuan.transformer_layers import (
    FinalLayer,
    GlyphMapper,
    States,
    TimestepEmbedder,
    TokenRefiner,
    Valid,
    image_projection,
    zero,
)
from minwm.nets.attention import FULL, AttentionScope, Heads, TextKV, scatter_rope
from minwm.nets.backbone import Backbone, Modulation, PreparedCondition, Timesteps
from minwm.nets.layers import Rope3D, rotate


@dataclass(frozen=True, kw_only=True)
class HunyuanConfig:
    """Architecture of a HunyuanVideo-1.5 transformer; the defaults are the release's 8B."""

    kind: ClassVar[str] = "hunyuan"
    unpublished: ClassVar[tuple[str, ...]] = (
        "text_length", "glyph_length", "image_length", "text_time", "principal_point", "prope_text", "prope_cache",
    )  # fmt: skip
    dim: int = 2048
    """Token width."""
    heads: int = 16
    layers: int = 54
    ffn: int = 8192
    """Hidden width of the feed-forward parts, of video and of text."""
    refiner_layers: int = 2
    """Blocks in which the text states attend to each other before all others."""
    channels: int = 32
    """Latent channels, in and out; there are as many for the image, and one says where it is."""
    text_dim: int = 3584
    """Width of the text states (Qwen2.5-VL)."""
    text_length: int = 1000
    """Rows of text; the padding of shorter prompts is not attended to."""
    glyph_dim: int = 1472
    """Width of the states of text in quotes (ByT5)."""
    glyph_length: int = 256
    glyph_hidden: int = 2048
    """Hidden width of what makes tokens of them."""
    image_dim: int = 1152
    """Width of the states of the first picture (SigLIP)."""
    image_length: int = 729
    freq_dim: int = 256
    """Width of the time sinusoid."""
    rope: tuple[int, int, int] = (16, 56, 56)
    """Channels of a head that are rotated by time, row and column: all of it."""
    meanflow: bool = False
    """The network is also told when its step ends, and predicts the mean velocity until then (step-distilled)."""
    text_time: Literal["video", "zero"] = "video"
    """Timestep of text where it attends to video: the video's, or 0 (minWM). Where it does not, it is 0."""
    camera: Mode = "none"
    """How cameras enter attention (control/prope.py): none or dual."""
    actions: bool = False
    """Actions are embedded beside the video's timesteps (control/action.py), as in HY-WorldPlay."""
    principal_point: bool = True
    """PRoPE sees the principal point."""
    prope_text: bool = True
    """The PRoPE branch sees text keys and values as they are, as released weights do. As text has no camera, moving the
    world frame then changes the output; without, they are zero there, and it changes nothing."""

    prope_cache: Literal["prope", "rope_compat"] = "prope"
    """Compatibility: rope_compat gives the PRoPE branch the cached keys and values of the RoPE branch, not its own,
    as minWM's streams do by mistake, in which its few-step weights were trained. Streams alone differ, and those from
    the second chunk on."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ConfigError(f"hunyuan.{name}={value}: must be at least 1")
        if self.dim % (4 * self.heads):
            near = max(1, round(self.dim / (4 * self.heads))) * 4 * self.heads
            raise ConfigError(
                f"hunyuan.dim={self.dim}: {self.heads} heads need a multiple of {4 * self.heads}; {near}?"
            )
        if sum(self.rope) != self.dim // self.heads or any(size % 2 for size in self.rope):
            raise ConfigError(
                f"hunyuan.rope={self.rope}: must be three even numbers with the sum {self.dim // self.heads}, the "
                "channels of a head"
            )
        if self.camera not in ("none", "dual"):
            raise ConfigError(f"hunyuan.camera={self.camera}: this network has none and dual")
        if self.meanflow and self.actions:
            raise ConfigError("hunyuan.meanflow=true with actions=true: no published network has both; leave one off")
        if self.prope_cache == "rope_compat" and not (self.camera == "dual" and self.prope_text):
            raise ConfigError(
                "hunyuan.prope_cache=rope_compat needs camera=dual and prope_text=true; leave it at prope"
            )

    @property
    def patch(self) -> int:
        return 1

    @property
    def text_shapes(self) -> dict[str, tuple[int, int]]:
        return {
            "text": (self.text_length, self.text_dim),
            "glyphs": (self.glyph_length, self.glyph_dim),
            "image_states": (self.image_length, self.image_dim),
        }

    @property
    def text_rows(self) -> int:
        """Text tokens of all kinds."""
        return sum(rows for rows, _ in self.text_shapes.values())

    def build(self) -> "Hunyuan":
        return Hunyuan(self)


class Hunyuan(Backbone):
    """HunyuanVideo-1.5: latents, an image as the first of them, text of three kinds, one time per latent frame."""

    def __init__(self, cfg: HunyuanConfig) -> None:
        super().__init__()
        self.config = cfg
        self.layers, self.head_width, self.text_rows = cfg.layers, cfg.dim // cfg.heads, cfg.text_rows
        self.cache_heads = cfg.heads * (2 if cfg.camera == "dual" else 1)
        if cfg.prope_cache == "rope_compat":
            self.finished_kv = self.repeat_rope_branch
        self.needs_first_frame_coordinates = cfg.camera == "dual" and cfg.prope_text
        self.img_in = nn.Sequential(OrderedDict(proj=nn.Conv3d(2 * cfg.channels + 1, cfg.dim, 1)))
        self.time_in = TimestepEmbedder(cfg.dim, cfg.freq_dim)
        if cfg.meanflow:
            self.time_r_in = TimestepEmbedder(cfg.dim, cfg.freq_dim)
        self.takes_actions, self.takes_step_end = cfg.actions, cfg.meanflow
        if cfg.actions:
            self.action_in = TimestepEmbedder(cfg.dim, cfg.freq_dim)
        self.txt_in = TokenRefiner(cfg.text_dim, cfg.dim, cfg.heads, cfg.refiner_layers, cfg.freq_dim)
        self.byt5_in = GlyphMapper(cfg.glyph_dim, cfg.glyph_hidden, cfg.dim)
        self.vision_in = image_projection(cfg.image_dim, cfg.dim)
        self.cond_type_embedding = nn.Embedding(3, cfg.dim)
        """Of text, glyphs and image."""
        self.double_blocks = nn.ModuleList(
            Block(layer, cfg.dim, cfg.heads, cfg.ffn, dual=cfg.camera == "dual", prope_text=cfg.prope_text)
            for layer in range(cfg.layers)
        )
        self.final_layer = FinalLayer(cfg.dim, cfg.channels)
        time, row, column = (size // 2 for size in cfg.rope)
        self.rope = Rope3D((time, row, column), theta=256.0)
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier linears; modulation, kinds of text, head, camera branch and actions start at zero (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        zero(self.cond_type_embedding, self.final_layer)
        if self.takes_actions:
            zero(self.action_in.mlp[2])
        for block in cast(list[Block], self.double_blocks):
            zero(block.img.mod, block.txt.mod)
            if block.dual:
                zero(block.img_attn_prope_proj)

    def forward(
        self, x: Latents, t: Timesteps | Modulation, cond: Condition | PreparedCondition, scope: AttentionScope = FULL
    ) -> Latents:
        h, w = x.shape[-2:]
        tokens = self.embed_latents(x, cond.first_latent, scope)
        if isinstance(t, Modulation):
            times, head, t, t_end = t.layers, t.head, t.t, t.t_end
        else:
            head, t_end = self.embed_time(t), None
            if self.takes_actions:
                head = head + self.action_in(given_labels(cond.actions))
            times = [head] * self.layers
        if isinstance(cond, Condition):
            text, kv = self.embed_text(cond, *self.text_times(t, t_end, scope)), [None] * self.layers
            camera, rope = self.camera_matrices(cond), None
        else:
            text, kv, camera, rope = None, cond.text, cond.camera, cond.rope
        rope = self.rope_table(x, scope) if rope is None else rope
        tokens, rope = scope.scatter(tokens), scatter_rope(scope, rope, x.shape[1])
        for block, block_time, block_kv in zip(self.double_blocks, times, kv, strict=True):
            given = text if block_kv is None else block_kv
            tokens, text = self.maybe_checkpoint(block, tokens, block_time, rope, given, camera, scope)
        tokens = scope.gather(self.final_layer(tokens, head))
        return rearrange(tokens, "b f (h w) c -> b f c h w", h=h, w=w).to(x.dtype)

    def embed_latents(
        self, x: Latents, first: Float[Tensor, "clips 1 c h w"] | None, scope: AttentionScope
    ) -> Float[Tensor, "b f p d"]:
        """Tokens of [noisy | image | mask]: the clean first latent and ones at position 0 in time, zeros elsewhere.

        Under guidance there are two branches of every clip.
        """
        c, conv = self.config.channels, cast(nn.Conv3d, self.img_in[0])
        image = x.new_zeros(*x.shape[:2], c + 1, *x.shape[3:])
        if first is not None:
            for frame, position in enumerate(scope.positions(x.shape[1])):
                if position == 0:
                    image[:, frame, :c] = first[:, 0].repeat(len(x) // len(first), 1, 1, 1)
                    image[:, frame, c] = 1
        both = torch.cat([x, image], dim=2).to(conv.weight.dtype)
        return rearrange(conv(both.transpose(1, 2)), "b d f h w -> b f (h w) d")

    def embed_time(self, t: Timesteps, t_end: Timesteps | None = None) -> Float[Tensor, "#b #f d"]:
        """The time embedding; in a network of mean velocities, of a step that ends at `t_end`, or at once."""
        time = self.time_in(1000 * t)
        if self.config.meanflow:
            time = time + self.time_r_in(1000 * (t if t_end is None else t_end))
        return time

    def text_times(
        self, t: Timesteps, t_end: Timesteps | None, scope: AttentionScope
    ) -> tuple[Float[Tensor, "#b 1"], Float[Tensor, "#b 1"] | None]:
        """Timestep of text, and where its step ends: those of the noisiest frame, or 0."""
        if scope.bidirectional and self.config.text_time == "video":
            return t.amax(1, keepdim=True), None if t_end is None else t_end.amax(1, keepdim=True)
        return torch.zeros_like(t[:, :1]), None

    def embed_text(self, cond: Condition, t: Float[Tensor, "#b 1"], t_end: Float[Tensor, "#b 1"] | None) -> Words:
        """Tokens of image, glyphs and text, in this order; what is not given is padding."""
        cfg, b, weight = self.config, len(cond.text), self.cond_type_embedding.weight
        t = t.expand(b, -1)

        def given(name: str, x: States | None, length: int, dim: int) -> tuple[States, Valid]:
            x = weight.new_zeros(b, length, dim) if x is None else x
            if x.shape[1:] != (length, dim):
                raise ConfigError(
                    f"{name} states have shape {tuple(x.shape)}, this network reads (b, {length}, {dim}); pad with "
                    "zero rows"
                )
            return x.to(weight.dtype), x.any(dim=-1)

        text, valid = given("text", cond.text, cfg.text_length, cfg.text_dim)
        glyphs, glyphs_valid = given("glyph", cond.glyphs, cfg.glyph_length, cfg.glyph_dim)
        image, image_valid = given("image", cond.image_states, cfg.image_length, cfg.image_dim)
        kinds = (
            self.vision_in(image) + weight[2],
            self.byt5_in(glyphs) + weight[1],
            self.txt_in(text, t, valid) + weight[0],
        )
        time = self.embed_time(t, t_end)
        return Words(torch.cat(kinds, 1)[:, None], time, torch.cat([image_valid, glyphs_valid, valid], 1))

    def prepare(self, cond: Condition) -> Condition:
        return cond

    def project_text_kv(self, cond: Condition) -> list[TextKV]:
        words = self.embed_text(cond, torch.zeros(1, 1, device=cond.text.device), None)
        text = list[TextKV]()
        for block in cast(list[Block], self.double_blocks):
            kv, words = block.project_text_kv(words)
            text.append(kv)
        return text

    def adaln_modulation(self, t: Timesteps, t_end: Timesteps | None = None) -> Timesteps | Modulation:
        if self.takes_actions:
            return t
        time = self.embed_time(t, t_end)
        layers = [block.adaln_modulation(time) for block in cast(list[Block], self.double_blocks)]
        return Modulation(layers, self.final_layer.adaln_modulation(time), t, t_end)

    def compile_blocks(self, backend: str | Callable = "inductor") -> None:
        """Compile what the video has before and after attention, once for all blocks; text comes once per prompt."""
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        before, after = compiled(Block.project_qkv), compiled(Block.after_attention)
        for block in cast(list[Block], self.double_blocks):
            block.project_qkv, block.after_attention = partial(before, block), partial(after, block)

    def forward_methods(self) -> Iterator[tuple[nn.Module, str]]:
        yield from super().forward_methods()
        for block in self.double_blocks:
            yield from ((block, "project_text_kv"), (block, "adaln_modulation"))
        yield self.final_layer, "adaln_modulation"

    def camera_matrices(self, cond: Condition) -> Projection | Rays | None:
        if self.config.camera == "none":
            return None
        return Projection.from_cameras(*cond.cameras, self.config.principal_point)

    def tokens_per_frame(self, height: int, width: int) -> int:
        return height * width

    def rope_table(self, x: Latents, scope: AttentionScope) -> Float[Tensor, "s half 2"]:
        return self.rope(scope.positions(x.shape[1]), x.shape[-2], x.shape[-1], x.device)

    def rotate_keys_in_time(self, keys: Heads, frames: int) -> Heads:
        table, heads = self.rope([frames], 1, 1, keys.device), self.config.heads
        if self.finished_kv is not None:  # both branches hold rotary keys
            return rotate(keys, table)
        return torch.cat([rotate(keys[:, :heads], table), keys[:, heads:]], dim=1)

    def repeat_rope_branch(self, kv: Heads) -> Heads:
        """Keys or values with those of the RoPE branch in place of the PRoPE branch's (`prope_cache`)."""
        return kv[:, : self.config.heads].repeat(1, 2, 1, 1)

    def change_world_frame(self, kv: Heads, frame: Float[Tensor, "b 4 4"]) -> Heads:
        heads = self.config.heads
        return torch.cat([kv[:, :heads], change_world_frame(kv[:, heads:], frame)], dim=1)

    def flops(self, frames: int, tokens: int, visible: int) -> int:
        cfg, d, rows = self.config, self.config.dim, frames * tokens
        branches = self.cache_heads // cfg.heads
        projections = 2 * rows * d * (4 * d + 2 * cfg.ffn + (d if branches == 2 else 0))
        attention = 4 * rows * d * branches * (visible + cfg.text_rows)
        cameras = 4 * 2 * rows * d * 4 * (branches - 1)  # 4 times 4 x 4
        return self.layers * (projections + attention + cameras) + 2 * rows * d * (3 * cfg.channels + 1)

    def text_flops(self, video: int) -> int:
        cfg, d, length, rows = self.config, self.config.dim, self.config.text_length, self.config.text_rows
        time = (cfg.freq_dim + d) * d * (2 if cfg.meanflow else 1)
        context = (cfg.freq_dim + d) * d + (cfg.text_dim + d) * d
        refiner = cfg.refiner_layers * (length * d * (12 * d + 2 * length) + 2 * d * d)
        image = cfg.image_length * cfg.image_dim * (cfg.image_dim + d)
        glyphs = cfg.glyph_length * cfg.glyph_hidden * (cfg.glyph_dim + cfg.glyph_hidden + d)
        block = rows * d * (4 * d + 2 * cfg.ffn + 2 * (rows + video)) + 6 * d * d
        return 2 * (time + context + length * cfg.text_dim * d + refiner + image + glyphs + self.layers * block)
