"""Small versions of the real classes, with every parameter random (also the zero-initialised ones)."""

from dataclasses import replace

import torch
from torch import nn

from minwm.cameras.track import se3_exp
from minwm.control.action import with_action_labels
from minwm.core.types import Condition
from minwm.families.hunyuan.transformer import HunyuanConfig
from minwm.families.wan.transformer import WanConfig
from minwm.nets.attention import KVArena, TextKV
from minwm.nets.backbone import Backbone, PreparedCondition
from minwm.nets.chunks import Geometry
from minwm.store.layouts import NetworkConfig

WAN = {
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
WAN["wan-clean"] = replace(WAN["wan-dual"], predicts="clean")
WAN["wan-actions"] = replace(WAN["wan-dual"], actions=True)
HUNYUAN = HunyuanConfig(
    dim=32, heads=2, layers=2, ffn=48, channels=4, text_dim=6, text_length=5, glyph_dim=4, glyph_length=2,
    glyph_hidden=8, image_dim=4, image_length=2, freq_dim=16, rope=(4, 6, 6),
)  # fmt: skip
SMALL: dict[str, NetworkConfig] = {
    **WAN,
    "hunyuan-none": HUNYUAN,
    "hunyuan-dual": replace(HUNYUAN, camera="dual"),
    "hunyuan-actions": replace(HUNYUAN, camera="dual", actions=True),
    "hunyuan-null": replace(HUNYUAN, camera="dual", prope_text=False),
}
"""FAMILY-none, FAMILY-dual and other variants of every family."""
CAMERA = [name for name, cfg in SMALL.items() if cfg.camera != "none"]
FAMILY_NAMES = {name.partition("-")[0] for name in SMALL}
DUAL = sorted(f"{family}-dual" for family in FAMILY_NAMES)
"""One variant of each family, with cameras."""
UNREAD = {
    "hunyuan": ("vision_in", *(f"double_blocks.1.txt.{part}" for part in ("attn_q", "attn_proj", "mlp"))),
}
"""Parameters, by how their names begin, that no loss over the clips of `recipes.clip` has a gradient for: of image
states, which these have none of, and of what the last block makes of text."""
HEIGHT, WIDTH, CHANNELS = 4, 6, 4


def sized(net: Backbone, geometry: Geometry) -> Geometry:
    """For latents of HEIGHT x WIDTH."""
    return replace(geometry, tokens=net.tokens_per_frame(HEIGHT, WIDTH))


def small(name: str, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    net = SMALL[name].build().double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.25)
    return net


def open_cache(net: Backbone, geometry: Geometry, cond: Condition) -> tuple[KVArena, list[TextKV]]:
    """An empty cache that knows the prompt, and what passes are given of it."""
    arena, text = net.arena(sized(net, geometry), len(cond.text)), net.project_text_kv(cond)
    arena.write_text_kv(text)
    return arena, text


def prepared(net: Backbone, text: list[TextKV], cond: Condition) -> PreparedCondition:
    return PreparedCondition(text, net.camera_matrices(cond), actions=cond.actions)


def latents(frames: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, CHANNELS, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)


def condition(frames: int, batch: int = 2, seed: int = 2, image: bool = False) -> Condition:
    """Random prompt, ragged in its glyphs, and a random walk of cameras."""
    generator = torch.Generator().manual_seed(seed)
    steps = 0.2 * torch.randn(batch, frames, 6, generator=generator, dtype=torch.float64)
    w2c = torch.stack([torch.stack([torch.from_numpy(se3_exp(s.numpy())) for s in walk]) for walk in steps.cumsum(1)])
    K = torch.tensor([0.5, 0.9, 0.5, 0.5], dtype=torch.float64).expand(batch, frames, 4)
    text = torch.randn(batch, 5, 6, generator=generator, dtype=torch.float64)
    glyphs, states = torch.randn(2, batch, 2, 4, generator=generator, dtype=torch.float64)
    glyphs[-1, 1:] = 0
    cond = Condition(
        text=text,
        w2c=w2c.float(),
        K=K.float(),
        first_latents=latents(1, batch, seed=9) if image else None,
        glyphs=glyphs,
        image_states=states if image else None,
    )
    return with_action_labels(cond)
