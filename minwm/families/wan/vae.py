"""Wan's video autoencoder: 2.1 (8x8 pixels to 16 channels) and 2.2 (16x16 pixels to 48), both 4 frames to a latent.

Parameter names are those of the original release (`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`); `diffusers_names` maps them.
Source of the architecture: `wan/modules/vae.py` of Wan2.1 and `wan/modules/vae2_2.py` of Wan2.2.

Given one latent at a time, `decode_next` compiles to two graphs (`engine.decoder`): for the first one, and all others.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minwm.core.config import ConfigError
from minwm.families.base import Layout
from minwm.families.wan.vae_layers import (
    CausalConv,
    Down,
    Downsample,
    Up,
    Upsample,
    head,
    middle,
    residuals,
)
from minwm.nets.causal_vae import CausalVae, Memory, Stream, Video
from minwm.nets.codec import Latents, Pixels, State


@dataclass(frozen=True, kw_only=True)
class WanVaeConfig:
    """Architecture of a Wan VAE and the statistics of its latents; the defaults are Wan2.1."""

    kind: ClassVar[str] = "wan_vae"
    channels: int = 16
    """Channels of a latent."""
    base: int = 96
    """Channels of the encoder at full resolution."""
    decoder_base: int = 96
    """Channels of the decoder at full resolution."""
    mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channels at each resolution, from the finest, as multiples of the base; rows and columns halve in between."""
    depth: int = 2
    """Residual blocks of the encoder per resolution; the decoder has one more."""
    temporal: tuple[bool, ...] = (False, True, True)
    """Whether frames halve too, at each of the encoder's steps to a coarser resolution."""
    residual: bool = False
    """Shortcuts without parameters past each resolution (Wan2.2)."""
    patch: int = 1
    """Rows and columns of pixels folded into channels at both ends (Wan2.2: 2)."""
    mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    """Mean of each latent channel, as published with the release."""
    std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )
    """Standard deviation of each latent channel."""

    def __post_init__(self) -> None:
        for name in ("channels", "base", "decoder_base", "depth", "patch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"wan_vae.{name}={getattr(self, name)}: must be at least 1")
        if not self.mult or min(self.mult) < 1:
            raise ConfigError(f"wan_vae.mult={self.mult}: needs at least one multiple, each at least 1")
        if len(self.temporal) != len(self.mult) - 1:
            raise ConfigError(
                f"wan_vae.temporal={self.temporal}: {len(self.mult)} resolutions have {len(self.mult) - 1} steps"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                count = len(getattr(self, name))
                raise ConfigError(f"wan_vae.{name} has {count} values: give one for each of {self.channels} channels")
        if min(self.std) <= 0:
            raise ConfigError(f"wan_vae.std={self.std}: must be positive")
        if not self.residual and any(self.decoder_base * m % 2 for m in self.mult[1:]):
            raise ConfigError(f"wan_vae.decoder_base={self.decoder_base}: upsampling halves it, so it must be even")

    @property
    def scale(self) -> int:
        """Rows and columns of pixels per row and column of latents."""
        return self.patch * 2 ** len(self.temporal)

    @property
    def stride(self) -> int:
        """Frames per latent, after the first."""
        return 2 ** sum(self.temporal)

    @property
    def tiny(self) -> str | None:
        """The published tiny codec (`nets.taehv.TAEHV`) of the same latents, if there is one."""
        return {16: "taew2_1", 48: "taew2_2"}.get(self.channels)

    def build(self) -> "WanVae":
        return WanVae(self)


WAN22 = WanVaeConfig(
    channels=48,
    base=160,
    decoder_base=256,
    residual=True,
    patch=2,
    mean=(
        *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
        *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
        *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
        *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
        *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
        *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    ),
    std=(
        *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
        *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
        *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
        *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
        *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
        *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ),
)
"""The VAE of Wan2.2-TI2V-5B."""


class Encoder(nn.Module):
    """One frame at first, `stride` later, to one latent's mean and log variance; a pure function of them and the pasts.

    Frames come with patches folded into channels: (b, 3 patch^2, t, H / patch, W / patch).
    """

    def __init__(self, cfg: WanVaeConfig) -> None:
        super().__init__()
        self.conv1 = CausalConv(3 * cfg.patch**2, cfg.base)
        self.downsamples = Stream(*self.resolutions(cfg))
        self.middle = middle(cfg.base * cfg.mult[-1])
        self.head = head(cfg.base * cfg.mult[-1], 2 * cfg.channels)

    @staticmethod
    def resolutions(cfg: WanVaeConfig) -> Iterator[nn.Module]:
        inputs = cfg.base
        for m, temporal in zip(cfg.mult, (*cfg.temporal, None), strict=True):  # None: there is no coarser one
            layers, inputs = residuals(inputs, cfg.base * m, cfg.depth), cfg.base * m
            if temporal is not None:
                layers.append(Downsample(inputs, temporal))
            yield from [Down(layers, inputs, temporal)] if cfg.residual else layers

    def forward(self, x: Video, pasts: State = ()) -> tuple[Video, State]:
        memory = Memory(pasts)
        for part in (self.conv1, self.downsamples, self.middle, self.head):
            x = part(x, memory)
        return x, tuple(memory.kept)


class Decoder(nn.Module):
    """One latent to one frame at first, `stride` later, patches in channels; a pure function of it and the pasts."""

    def __init__(self, cfg: WanVaeConfig) -> None:
        super().__init__()
        self.conv1 = CausalConv(cfg.channels, cfg.decoder_base * cfg.mult[-1])
        self.middle = middle(cfg.decoder_base * cfg.mult[-1])
        self.upsamples = Stream(*self.resolutions(cfg))
        self.head = head(cfg.decoder_base * cfg.mult[0], 3 * cfg.patch**2)

    @staticmethod
    def resolutions(cfg: WanVaeConfig) -> Iterator[nn.Module]:
        inputs = cfg.decoder_base * cfg.mult[-1]
        for m, temporal in zip(reversed(cfg.mult), (*reversed(cfg.temporal), None), strict=True):
            outputs = cfg.decoder_base * m
            layers, inputs = residuals(inputs, outputs, cfg.depth + 1), outputs if cfg.residual else outputs // 2
            if temporal is not None:
                layers.append(Upsample(outputs, inputs, temporal))
            yield from [Up(layers, outputs, temporal)] if cfg.residual else layers

    def forward(self, x: Video, pasts: State = ()) -> tuple[Video, State]:
        memory = Memory(pasts)
        for part in (self.conv1, self.middle, self.upsamples, self.head):
            x = part(x, memory)
        return x, tuple(memory.kept)


class WanVae(CausalVae):
    """Wan's VAE; see `CausalVae`. A state is of one shape from the first latent on."""

    decoding: tuple[str, ...] = ("conv2", "decoder")
    mean: Tensor
    std: Tensor

    def __init__(self, cfg: WanVaeConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.channels, self.scale, self.stride = cfg.channels, cfg.scale, cfg.stride
        self.encoder = Encoder(cfg)
        self.conv1 = nn.Conv3d(2 * cfg.channels, 2 * cfg.channels, 1)
        self.conv2 = nn.Conv3d(cfg.channels, cfg.channels, 1)
        self.decoder = Decoder(cfg)
        for name, values in (("mean", cfg.mean), ("std", cfg.std)):  # not in the published file
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def encode_group(self, frames: Pixels, pasts: State) -> tuple[Latents, State]:
        p = self.cfg.patch
        x = rearrange(frames, "b t c (h j) (w i) -> b (c i j) t h w", i=p, j=p)
        x, pasts = self.encoder(x.to(self.conv1.weight.dtype), pasts)
        mean, _ = self.conv1(x).transpose(1, 2).float().chunk(2, dim=2)  # the other half is the log variance
        return ((mean - self.mean) / self.std).to(frames.dtype), pasts

    def decode_latent(self, latent: Float[Tensor, "b c h w"], pasts: State) -> tuple[Pixels, State]:
        x = (latent.float() * self.std + self.mean)[:, :, None].to(self.conv2.weight.dtype)
        x, pasts = self.decoder(self.conv2(x), pasts)
        p = self.cfg.patch
        pixels = rearrange(x, "b (c i j) t h w -> b t c (h j) (w i)", i=p, j=p)
        return pixels.to(latent.dtype).clamp(-1, 1), pasts


RENAMES = {
    r"^conv1\.": "quant_conv.",
    r"^conv2\.": "post_quant_conv.",
    r"coder\.conv1\.": "coder.conv_in.",
    r"\.head\.0\.": ".norm_out.",
    r"\.head\.2\.": ".conv_out.",
    r"\.middle\.0\.": ".mid_block.resnets.0.",
    r"\.middle\.1\.": ".mid_block.attentions.0.",
    r"\.middle\.2\.": ".mid_block.resnets.1.",
    r"\.residual\.0\.": ".norm1.",
    r"\.residual\.2\.": ".conv1.",
    r"\.residual\.3\.": ".norm2.",
    r"\.residual\.6\.": ".conv2.",
    r"\.shortcut\.": ".conv_shortcut.",
    r"\.(down|up)samples\.(\d+)\.\1samples\.\d+\.(resample|time_conv)\.": r".\1_blocks.\2.\1sampler.\3.",
    r"\.(down|up)samples\.(\d+)\.\1samples\.(\d+)\.": r".\1_blocks.\2.resnets.\3.",
    r"\.downsamples\.": ".down_blocks.",
}
"""Patterns of the release's names and diffusers' names, in order; what none matches has one name."""
MARKS = {
    r"encoder\.downsamples\.0\.residual\.": "a Wan2.1 VAE (original names)",
    r"encoder\.downsamples\.0\.downsamples\.": "a Wan2.2 VAE (original names)",
    r"encoder\.down_blocks\.0\.norm1\.gamma": "a Wan2.1 VAE (diffusers names)",
    r"encoder\.down_blocks\.0\.downsampler\.resample\.": "a Wan2.2 VAE (diffusers names)",
}
"""What a VAE is, by how one of its parameters' names begins."""


def diffusers_names(cfg: WanVaeConfig) -> dict[str, str]:
    """Every name in the release (and in `WanVae.state_dict()`) with the one that diffusers' AutoencoderKLWan gives it.

    Tensors are the same; source: diffusers' `scripts/convert_wan_to_diffusers.py`.
    """

    def stage(found: re.Match[str]) -> str:  # Wan2.1 has the layers of all resolutions in one row
        i, j = divmod(int(found[1]), cfg.depth + 2)
        return f".up_blocks.{i}.upsamplers.0." if j == cfg.depth + 1 else f".up_blocks.{i}.resnets.{j}."

    with torch.device("meta"):
        names = dict.fromkeys(WanVae(cfg).state_dict(), "")
    for name in names:
        new = name
        for pattern, replacement in RENAMES.items():
            new = re.sub(pattern, replacement, new)
        names[name] = re.sub(r"\.upsamples\.(\d+)\.", stage, new)
    return names


def describe(names: Collection[str]) -> str | None:
    """What of Wan's VAEs has such parameter names, in words; None if nothing."""
    return next((what for start, what in MARKS.items() if any(re.match(start, name) for name in names)), None)


def detect_layout(names: Collection[str]) -> Layout | None:
    """The layout of a Wan VAE with such parameter names; None if it is none."""
    if "quant_conv.weight" in names:
        return "diffusers"
    return "original" if describe(names) else None
