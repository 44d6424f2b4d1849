"""Small versions of the real classes, with every parameter random (also the zero-initialised ones)."""

from dataclasses import replace

import torch
from torch import nn

from minwm.cameras.track import se3_exp
from minwm.core.types import Condition
from minwm.families.wan.transformer import WanConfig
from minwm.nets.backbone import Backbone

SMALL = {
    f"wan-{camera}": WanConfig(
        dim=48,
        heads=2,
        layers=2,
        ffn=64,
        channels=4,
        text_dim=6,
        text_length=5,
        freq_dim=16,
        camera=camera,
    )
    for camera in ("none", "dual", "single", "plucker")
}
SMALL["wan-clean"] = replace(SMALL["wan-dual"], predicts="clean")
CAMERA = [name for name, cfg in SMALL.items() if cfg.camera != "none"]
PROPE = [name for name in CAMERA if SMALL[name].camera != "plucker"]
"""What does not know where the world's origin is."""
HEIGHT, WIDTH, CHANNELS = 4, 6, 4


def small(name: str, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    net = SMALL[name].build().double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.25)
    return net


def latents(frames: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, CHANNELS, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)


def condition(frames: int, batch: int = 2, seed: int = 2, image: bool = False) -> Condition:
    """Random prompt, and a random walk of cameras."""
    generator = torch.Generator().manual_seed(seed)
    steps = 0.2 * torch.randn(batch, frames, 6, generator=generator, dtype=torch.float64)
    w2c = torch.stack([torch.stack([torch.from_numpy(se3_exp(s.numpy())) for s in walk]) for walk in steps.cumsum(1)])
    K = torch.tensor([0.5, 0.9, 0.5, 0.5], dtype=torch.float64).expand(batch, frames, 4)
    return Condition(
        text=torch.randn(batch, 5, 6, generator=generator, dtype=torch.float64),
        w2c=w2c.float(),
        K=K.float(),
        first_latent=latents(1, batch, seed=9) if image else None,
    )
