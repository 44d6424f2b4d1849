"""Small codecs of every kind, with every parameter random; clips and latents for them."""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from minwm.families.hunyuan.vae import HunyuanVaeConfig
from minwm.families.wan.vae import WanVaeConfig
from minwm.nets.codec import VideoCodec
from minwm.nets.small_codec import SmallCodecConfig
from minwm.nets.taehv import TaehvConfig
from minwm.store.layouts import AnyCodecConfig

Codec = TypeVar("Codec", bound=nn.Module)
FRAMES, LATENTS = 17, 5
WAN21 = WanVaeConfig(base=8, decoder_base=8, channels=4, depth=1, mean=(0.3, -0.8, 0.1, 0.0), std=(0.7, 1.2, 2.0, 1.1))
WAN22 = replace(WAN21, channels=6, residual=True, patch=2, mean=(*WAN21.mean, 0.2, -0.1), std=(*WAN21.std, 0.5, 1.0))
HUNYUAN = HunyuanVaeConfig(channels=4, base=8, mult=(1, 2, 4), depth=1, temporal=(True, True))
VAES: dict[str, WanVaeConfig | HunyuanVaeConfig] = {
    "wan2.1": WAN21,
    "wan2.2": WAN22,
    "hunyuan1.5": HUNYUAN,
    "hunyuan1.5-window": replace(HUNYUAN, window=2),
    "hunyuan1.5-chunk": replace(HUNYUAN, attention="chunk"),
}
CODECS: dict[str, AnyCodecConfig] = {
    **VAES,
    "taehv": TaehvConfig(channels=4, width=8),
    "small": SmallCodecConfig(channels=4, width=8, fine=8),
}
FACTORS = {"decoder.head.2.": 0.3, "decoder.conv_out.": 0.2, "attn_1.q.weight": 3.0, "attn_1.proj_out.weight": 3.0}
"""Weak heads, so that hardly a pixel is clamped; attention that chooses, and matters beside what it is added to."""


def randomise(codec: Codec) -> Codec:
    """Random parameters, every one of which matters."""
    torch.manual_seed(0)
    for name, parameter in codec.named_parameters():
        if name.endswith("gamma"):
            nn.init.normal_(parameter, mean=1, std=0.2)
        else:
            fan = parameter[0].numel() if parameter.ndim > 1 else 25
            nn.init.normal_(parameter, std=fan**-0.5)
        for part, factor in FACTORS.items():
            parameter.data *= factor if part in name else 1
    return codec.eval().requires_grad_(False)


def clip(codec: VideoCodec, batch: int = 2, frames: int = FRAMES, rows: int = 2, seed: int = 1) -> Tensor:
    """Frames for latents of `rows` x 3."""
    size = batch, frames, 3, rows * codec.scale, 3 * codec.scale
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def draw(codec: VideoCodec, latents: int = LATENTS, batch: int = 2, rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, latents, codec.channels, rows, 3, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
