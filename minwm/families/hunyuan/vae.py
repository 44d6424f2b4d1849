"""HunyuanVideo-1.5's video autoencoder: 4 frames of 16x16 pixels to a latent of 32 channels.

Parameter names are those of the original release; `diffusers_names` maps them. Source of the architecture: the
release's `hunyuan_15_vae.py` and diffusers' `AutoencoderKLHunyuanVideo15`, which gives the same numbers. It has
1,260,634,115 parameters; at 480x832 decoding a latent costs 40 TFLOP, and its convolutions keep 2.6 GiB in bfloat16.

Attention in the middle of encoder and decoder sees the pixels of a latent and of others before it:

attention=causal            of all before it, as in the release. Streams keep keys and values of all latents and grow by
                            2 x rows x columns x 1024 numbers per latent, 6.4 MB at 480x832 in bfloat16.
attention=causal, window=n  of the last n before it. Memory and cost are bounded, and one graph holds a step. The first
                            n + 1 latents are the release's: 30 covers the 121 frames of its own clips.
attention=chunk             of none. So HY-WorldPlay and minWM run the VAE, group by group without keys, in training and
                            in use; take it with their weights. Only the first latent is the release's.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minwm.core.config import ConfigError
from minwm.families.base import Layout
from minwm.families.hunyuan.vae_layers import CausalConv, Downsample, Upsample, group_means, middle, resolution
from minwm.nets.causal_vae import CausalVae, Memory, RMSNorm, Stream, Video
from minwm.nets.codec import Latents, Pixels, State


@dataclass(frozen=True, kw_only=True)
class HunyuanVaeConfig:
    """Architecture of the VAE, the scale of its latents, and what its attention sees; the defaults are the release."""

    kind: ClassVar[str] = "hunyuan_vae"
    channels: int = 32
    """Channels of a latent."""
    base: int = 128
    """Channels at full resolution."""
    mult: tuple[int, ...] = (1, 2, 4, 8, 8)
    """Channels at each resolution, from the finest, as multiples of the base; rows and columns halve in between."""
    depth: int = 2
    """Residual blocks of the encoder per resolution; the decoder has one more."""
    temporal: tuple[bool, ...] = (False, False, True, True)
    """Whether frames halve too, at each of the encoder's steps to a coarser resolution.

    The decoder doubles them in as many of its first steps.
    """
    scaling: float = 1.03682
    """What posterior means are multiplied by; there is no shift."""
    attention: Literal["causal", "chunk"] = "causal"
    """What a latent sees in the middle of encoder and decoder: itself and those before it, as in the release; or
    itself alone, as latents are made by HY-WorldPlay and minWM."""
    window: int | None = None
    """How many latents before its own causal attention sees; None: all of them, and a stream's state grows."""

    def __post_init__(self) -> None:
        for name in ("channels", "base", "depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"hunyuan_vae.{name}={getattr(self, name)}: must be at least 1")
        if not self.mult or min(self.mult) < 1:
            raise ConfigError(f"hunyuan_vae.mult={self.mult}: needs at least one multiple, each at least 1")
        if len(self.temporal) != len(self.mult) - 1:
            steps = len(self.mult) - 1
            raise ConfigError(f"hunyuan_vae.temporal={self.temporal}: {len(self.mult)} resolutions have {steps} steps")
        if self.scaling <= 0:
            raise ConfigError(f"hunyuan_vae.scaling={self.scaling}: must be positive")
        if self.widths[-1] % (2 * self.channels):
            raise ConfigError(
                f"hunyuan_vae.channels={self.channels}: the {self.widths[-1]} channels of the coarsest resolution "
                "must be a multiple of twice as many"
            )
        for fine, coarse in zip(self.widths, self.widths[1:], strict=False):
            if coarse % 8 or 4 * fine % coarse:
                raise ConfigError(
                    f"hunyuan_vae.base={self.base}, mult={self.mult}: a step from {fine} to {coarse} channels; "
                    "the second must be a multiple of 8 that divides 4 times the first"
                )
        if self.window is not None and (self.window < 1 or self.attention == "chunk"):
            raise ConfigError(
                f"hunyuan_vae.window={self.window}, attention={self.attention}: a window is for causal attention, of "
                "at least 1 latent; attention=chunk sees no other latent"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each resolution, from the finest."""
        return tuple(self.base * m for m in self.mult)

    @property
    def past(self) -> int | None:
        """How many latents before its own a latent sees; None: all of them."""
        return 0 if self.attention == "chunk" else self.window

    @property
    def scale(self) -> int:
        """Rows and columns of pixels per row and column of latents."""
        return 2 ** len(self.temporal)

    @property
    def stride(self) -> int:
        """Frames per latent, after the first."""
        return 2 ** sum(self.temporal)

    @property
    def tiny(self) -> str | None:
        """The published tiny codec (`nets.taehv.TAEHV`) of the same latents, if there is one."""
        return "taehv1_5" if (self.channels, self.scale, self.stride) == (32, 16, 4) else None

    def build(self) -> "HunyuanVae":
        return HunyuanVae(self)


class Encoder(nn.Module):
    """One frame at first, `stride` later, to one latent's mean and log variance; a pure function of them and the pasts.

    y = mid(down(conv_in(x)));  conv_out(silu(norm_out(y))) + means of groups of y's channels
    """

    def __init__(self, cfg: HunyuanVaeConfig) -> None:
        super().__init__()
        self.conv_in = CausalConv(3, cfg.base)
        self.down = Stream(*self.resolutions(cfg))
        self.mid = middle(cfg.widths[-1], cfg.past)
        self.norm_out = RMSNorm(cfg.widths[-1])
        self.conv_out = CausalConv(cfg.widths[-1], 2 * cfg.channels)
        self.outputs = 2 * cfg.channels

    @staticmethod
    def resolutions(cfg: HunyuanVaeConfig) -> Iterator[Stream]:
        for width, coarser, temporal in zip(cfg.widths, cfg.widths[1:], cfg.temporal, strict=False):
            yield resolution(width, cfg.depth, downsample=Downsample(width, coarser, temporal))
        yield resolution(cfg.widths[-1], cfg.depth)

    def forward(self, x: Video, pasts: State = ()) -> tuple[Video, State]:
        memory = Memory(pasts)
        for part in (self.conv_in, self.down, self.mid):
            x = part(x, memory)
        x = self.conv_out(F.silu(self.norm_out(x)), memory) + group_means(x, self.outputs)
        return x, tuple(memory.kept)


class Decoder(nn.Module):
    """One latent to one frame at first, `stride` later; a pure function of it and the pasts.

    y = up(mid(conv_in(x) + copies of x's channels));  conv_out(silu(norm_out(y)))
    """

    def __init__(self, cfg: HunyuanVaeConfig) -> None:
        super().__init__()
        self.copies = cfg.widths[-1] // cfg.channels
        self.conv_in = CausalConv(cfg.channels, cfg.widths[-1])
        self.mid = middle(cfg.widths[-1], cfg.past)
        self.up = Stream(*self.resolutions(cfg))
        self.norm_out = RMSNorm(cfg.base * cfg.mult[0])
        self.conv_out = CausalConv(cfg.base * cfg.mult[0], 3)

    @staticmethod
    def resolutions(cfg: HunyuanVaeConfig) -> Iterator[Stream]:
        widths = cfg.widths[::-1]
        for width, finer, temporal in zip(widths, widths[1:], cfg.temporal[::-1], strict=False):
            yield resolution(width, cfg.depth + 1, upsample=Upsample(width, finer, temporal))
        yield resolution(widths[-1], cfg.depth + 1)

    def forward(self, x: Video, pasts: State = ()) -> tuple[Video, State]:
        memory = Memory(pasts)
        x = self.conv_in(x, memory) + x.repeat_interleave(self.copies, dim=1)
        for part in (self.mid, self.up):
            x = part(x, memory)
        x = self.conv_out(F.silu(self.norm_out(x)), memory)
        return x, tuple(memory.kept)


class HunyuanVae(CausalVae):
    """HunyuanVideo-1.5's VAE; see `CausalVae`. A state grows with its stream if `grows` says so."""

    decoding: tuple[str, ...] = ("decoder",)

    def __init__(self, cfg: HunyuanVaeConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.channels, self.scale, self.stride = cfg.channels, cfg.scale, cfg.stride
        self.grows = cfg.past is None
        self.encoding = f"scaling {cfg.scaling}, past {cfg.past}"
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.conv.weight.dtype

    def encode_group(self, frames: Pixels, pasts: State) -> tuple[Latents, State]:
        x, pasts = self.encoder(frames.transpose(1, 2).to(self.dtype), pasts)
        mean, _ = x.transpose(1, 2).float().chunk(2, dim=2)  # the other half is the log variance
        return (mean * self.cfg.scaling).to(frames.dtype), pasts

    def decode_latent(self, latent: Float[Tensor, "b c h w"], pasts: State) -> tuple[Pixels, State]:
        x = (latent.float() / self.cfg.scaling)[:, :, None].to(self.dtype)
        x, pasts = self.decoder(x, pasts)
        return x.transpose(1, 2).to(latent.dtype).clamp(-1, 1), pasts


RENAMES = {
    r"\.(down|up)\.(\d+)\.block\.": r".\1_blocks.\2.resnets.",
    r"\.(down|up)\.(\d+)\.(down|up)sample\.": r".\1_blocks.\2.\3samplers.0.",
    r"\.mid\.block_1\.": ".mid_block.resnets.0.",
    r"\.mid\.block_2\.": ".mid_block.resnets.1.",
    r"\.mid\.attn_1\.([qkv])\.": r".mid_block.attentions.0.to_\1.",
    r"\.mid\.attn_1\.": ".mid_block.attentions.0.",
}
"""Patterns of the release's names and diffusers' names; what none matches has one name."""
MARKS: dict[Layout, tuple[str, ...]] = {
    "original": ("encoder.mid.attn_1.norm.gamma", "encoder.down.0.block.0.conv1.conv.weight"),
    "diffusers": ("encoder.mid_block.attentions.0.norm.gamma", "encoder.down_blocks.0.resnets.0.conv1.conv.weight"),
}
"""Names that together only this VAE has, by layout."""


def diffusers_names(cfg: HunyuanVaeConfig) -> dict[str, str]:
    """Every name in the release (and in `HunyuanVae.state_dict()`) with diffusers' name of the same tensor.

    Source: diffusers' `scripts/convert_hunyuan_video1_5_to_diffusers.py`.
    """
    with torch.device("meta"):
        names = dict.fromkeys(HunyuanVae(cfg).state_dict(), "")
    for name in names:
        new = name
        for pattern, replacement in RENAMES.items():
            new = re.sub(pattern, replacement, new)
        names[name] = new
    return names


def detect_layout(names: Collection[str]) -> Layout | None:
    """The layout of such a VAE with such parameter names; None if it is none."""
    return next((layout for layout, marks in MARKS.items() if all(mark in names for mark in marks)), None)


def describe(names: Collection[str]) -> str | None:
    """What of this VAE has such parameter names, in words; None if nothing."""
    layout = detect_layout(names)
    return layout and f"a HunyuanVideo-1.5 VAE ({layout} names)"
