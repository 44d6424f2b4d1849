"""Our Wan VAE is Wan's: the same numbers as diffusers' class from the same weights; names, sizes, graphs."""

import copy
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import tiny_codecs
import torch
from tiny_codecs import clip, close, draw, randomise

from minwm.core.config import ConfigError, dumps, loads
from minwm.families.wan.vae import WAN22, WanVae, WanVaeConfig, diffusers_names

WAN21 = WanVaeConfig()
TINY = {"wan2.1": tiny_codecs.WAN21, "wan2.2": tiny_codecs.WAN22}


@pytest.fixture(scope="module", params=TINY)
def vae(request: pytest.FixtureRequest) -> WanVae:
    return randomise(TINY[request.param].build())


def reference(cfg: WanVaeConfig) -> Any:
    """diffusers' class of the same size."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderKLWan(
        base_dim=cfg.base,
        decoder_base_dim=cfg.decoder_base,
        z_dim=cfg.channels,
        dim_mult=list(cfg.mult),
        num_res_blocks=cfg.depth,
        temperal_downsample=list(cfg.temporal),
        latents_mean=list(cfg.mean),
        latents_std=list(cfg.std),
        is_residual=cfg.residual,
        in_channels=3 * cfg.patch**2,
        out_channels=3 * cfg.patch**2,
        patch_size=cfg.patch if cfg.patch > 1 else None,
        scale_factor_spatial=cfg.scale,
    )


def test_same_as_diffusers(vae: WanVae) -> None:
    theirs, names = reference(vae.cfg), diffusers_names(vae.cfg)
    theirs.load_state_dict({names[name]: value for name, value in vae.state_dict().items()})
    pixels, latents = clip(vae), draw(vae)
    means = theirs.encode(pixels.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    assert means.std() > 0.1
    close(vae.encode(pixels), (means - vae.mean) / vae.std)
    drawn = theirs.decode((latents * vae.std + vae.mean).transpose(1, 2)).sample.transpose(1, 2)
    assert drawn.std() > 0.1 and (drawn.abs() == 1).float().mean() < 0.02, "clamping would hide errors"
    close(vae.decode(latents), drawn)


def test_parity_would_notice_any_parameter(vae: WanVae) -> None:
    """Every parameter moves what comes out, so agreement says something about each."""
    learns = copy.deepcopy(vae).requires_grad_()
    for out in (learns.encode(clip(vae, 1, 9)), learns.decode(draw(vae, 3))):
        (out * torch.randn_like(out)).sum().backward()
    assert not [name for name, p in learns.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-2]


@pytest.mark.parametrize(("cfg", "count", "size"), [(WAN21, 194, 126_892_531), (WAN22, 196, 704_688_668)])
def test_full_size_has_the_names_and_shapes_of_the_release(cfg: WanVaeConfig, count: int, size: int) -> None:
    with torch.device("meta"):
        ours, theirs = cfg.build(), reference(cfg)
    names = diffusers_names(cfg)
    assert len(names) == len(set(names.values())) == count
    shapes = {names[name]: value.shape for name, value in ours.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == size


@pytest.mark.parametrize(
    ("cfg", "name", "theirs"),
    [
        (WAN21, "decoder.upsamples.4.shortcut.weight", "decoder.up_blocks.1.resnets.0.conv_shortcut.weight"),
        (WAN21, "decoder.upsamples.7.time_conv.bias", "decoder.up_blocks.1.upsamplers.0.time_conv.bias"),
        (WAN21, "encoder.downsamples.5.resample.1.bias", "encoder.down_blocks.5.resample.1.bias"),
        (
            WAN22,
            "encoder.downsamples.1.downsamples.2.time_conv.bias",
            "encoder.down_blocks.1.downsampler.time_conv.bias",
        ),
        (WAN22, "decoder.upsamples.0.upsamples.3.resample.1.bias", "decoder.up_blocks.0.upsampler.resample.1.bias"),
        (WAN22, "decoder.upsamples.3.upsamples.2.residual.0.gamma", "decoder.up_blocks.3.resnets.2.norm1.gamma"),
    ],
)
def test_names_of_the_release(cfg: WanVaeConfig, name: str, theirs: str) -> None:
    assert diffusers_names(cfg)[name] == theirs


def test_statistics_are_no_weights(vae: WanVae) -> None:
    assert vae.state_dict().keys().isdisjoint({"mean", "std"})


@pytest.mark.slow  # a new process compiles: many seconds on a busy machine
def test_one_graph_for_a_start_and_one_for_all_the_rest() -> None:
    """In a process of its own: the checks of shapes that tests install cannot be compiled."""
    script = """
import torch
from minwm.families.wan.vae import WanVaeConfig

graphs = []
def count(graph, inputs):
    graphs.append(graph)
    return graph.forward

small = dict(base=2, decoder_base=2, channels=1, depth=1, mult=(1, 1), temporal=(True,), mean=(0.0,), std=(1.0,))
vae = WanVaeConfig(**small, residual=True, patch=2).build().requires_grad_(False)
for advance, groups in (
    (vae.decode_next, [torch.randn(1, 1, 1, 4, 4) for _ in range(4)]),
    (vae.encode_next, [torch.randn(1, 2 if i else 1, 3, 16, 16) for i in range(4)]),
):
    graphs.clear()
    compiled, state, expected = torch.compile(advance, backend=count, fullgraph=True, dynamic=False), None, None
    for group in groups:
        want, expected = advance(group, expected)
        got, state = compiled(group, state)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert len(graphs) == 2, len(graphs)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": 0}, r"wan_vae\.base=0.*at least 1"),
        ({"mult": ()}, r"wan_vae\.mult=\(\)"),
        ({"temporal": (True, True)}, r"wan_vae\.temporal.*4 resolutions have 3 steps"),
        ({"channels": 8}, r"wan_vae\.mean has 16 values.*8 channels"),
        ({"std": (0.0,) * 16}, r"wan_vae\.std.*positive"),
        ({"decoder_base": 5, "mult": (1, 1, 1, 1)}, r"wan_vae\.decoder_base=5.*even"),
    ],
)
def test_config_is_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(WAN21, **fields)  # pyright: ignore[reportArgumentType]


def test_config_round_trip() -> None:
    for cfg in (WAN21, WAN22):
        assert loads(WanVaeConfig, dumps(cfg)) == cfg
    assert (WAN21.stride, WAN21.scale, WAN22.stride, WAN22.scale) == (4, 8, 4, 16)
