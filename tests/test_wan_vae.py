"""Our Wan VAE is Wan's: the same numbers as diffusers' class, from the same weights, and the same in a stream."""

import copy
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minwm.core.config import ConfigError, UserError, dumps, loads
from minwm.families.wan.vae import WAN22, WanVae, WanVaeConfig, diffusers_names
from minwm.nets.codec import State

FRAMES, LATENTS = 17, 5
WAN21 = WanVaeConfig()
TINY21 = WanVaeConfig(base=8, decoder_base=8, channels=4, depth=1, mean=(0.3, -0.8, 0.1, 0.0), std=(0.7, 1.2, 2.0, 1.1))
TINY22 = replace(
    TINY21, channels=6, residual=True, patch=2, mean=(*TINY21.mean, 0.2, -0.1), std=(*TINY21.std, 0.5, 1.0)
)
TINY = {"wan2.1": TINY21, "wan2.2": TINY22}


def randomise(vae: WanVae) -> WanVae:
    """Random parameters, every one of which matters; a weak head, so that hardly a pixel is clamped."""
    torch.manual_seed(0)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            nn.init.normal_(parameter, mean=1, std=0.2)
        else:
            fan = parameter[0].numel() if parameter.ndim > 1 else 25
            nn.init.normal_(parameter, std=fan**-0.5)
    vae.decoder.head[-1].weight.data *= 0.3  # pyright: ignore[reportOperatorIssue]
    vae.decoder.head[-1].bias.data *= 0.3  # pyright: ignore[reportOperatorIssue]
    return vae.eval().requires_grad_(False)


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


def clip(batch: int = 2, frames: int = FRAMES, height: int = 32, width: int = 48, seed: int = 1) -> Tensor:
    return torch.rand(batch, frames, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def draw(vae: WanVae, latents: int = LATENTS, height: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(2, latents, vae.channels, height, 3, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_same_as_diffusers(vae: WanVae) -> None:
    theirs, names = reference(vae.cfg), diffusers_names(vae.cfg)
    theirs.load_state_dict({names[name]: value for name, value in vae.state_dict().items()})
    pixels, latents = clip(), draw(vae)
    means = theirs.encode(pixels.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    assert means.std() > 0.1
    close(vae.encode(pixels), (means - vae.mean) / vae.std)
    drawn = theirs.decode((latents * vae.std + vae.mean).transpose(1, 2)).sample.transpose(1, 2)
    assert drawn.std() > 0.1 and (drawn.abs() == 1).float().mean() < 0.02, "clamping would hide errors"
    close(vae.decode(latents), drawn)


def test_parity_would_notice_any_parameter(vae: WanVae) -> None:
    """Every parameter moves what comes out, so agreement says something about each."""
    learns = copy.deepcopy(vae).requires_grad_()
    for out in (learns.encode(clip(1, 9)), learns.decode(draw(vae, 3))):
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


@pytest.mark.parametrize("sizes", [[1] * 17, [1, 4, 4, 8], [17], [5, 12], [3, 0, 9, 5], [0, 2, 2, 2, 2, 2, 2, 2, 2, 1]])
def test_streamed_encode_equals_whole(vae: WanVae, sizes: list[int]) -> None:
    pixels, state, parts = clip(), None, []
    for part in pixels.split(sizes, dim=1):
        latents, state = vae.encode_next(part, state)
        parts.append(latents)
    assert len(parts) == len(sizes)
    close(torch.cat(parts, dim=1), vae.encode(pixels))


@pytest.mark.parametrize("sizes", [[1] * 7, [1, 2, 4], [2, 3, 2], [7]])
def test_streamed_decode_equals_whole(vae: WanVae, sizes: list[int]) -> None:
    latents, state, parts = draw(vae, 7), None, []
    for i, part in enumerate(latents.split(sizes, dim=1)):
        pixels, state = vae.decode_next(part, state)
        assert pixels.shape[1] == 4 * part.shape[1] - 3 * (i == 0)
        parts.append(pixels)
    close(torch.cat(parts, dim=1), vae.decode(latents))


def test_sessions_interleave_and_rewind(vae: WanVae) -> None:
    clips = [draw(vae, seed=1), draw(vae, height=4, seed=2)]
    drawn: list[list[Tensor]] = [[], []]
    states: list[State | None] = [None, None]
    for i in range(LATENTS):
        for k in (0, 1):
            vae.decode_next(clips[k][:, i : i + 1] + 1, states[k])  # a step that is taken back
            pixels, states[k] = vae.decode_next(clips[k][:, i : i + 1], states[k])
            drawn[k].append(pixels)
    for k in (0, 1):
        close(torch.cat(drawn[k], dim=1), vae.decode(clips[k]))


def test_sessions_encode_side_by_side_and_share_a_batch(vae: WanVae) -> None:
    """Two streams in turn, then in one batch by joining their states: each as if it were alone."""
    clips = [clip(1, seed=1), clip(1, seed=2)]
    starts = [vae.encode_next(pixels[:, :7]) for pixels in clips]
    state = tuple(torch.cat(parts) for parts in zip(*(state for _, state in starts), strict=True))
    rest, _ = vae.encode_next(torch.cat([pixels[:, 7:] for pixels in clips]), state)
    for k in (0, 1):
        close(torch.cat([starts[k][0], rest[k : k + 1]], dim=1), vae.encode(clips[k]))


def test_causal_in_time(vae: WanVae) -> None:
    pixels, latents = clip(1, 9), draw(vae, 3)
    later, drawn = pixels.clone(), latents.clone()
    later[:, 5:], drawn[:, 2:] = 0, 0
    close(vae.encode(later)[:, :2], vae.encode(pixels)[:, :2])
    close(vae.decode(drawn)[:, :5], vae.decode(latents)[:, :5])


def test_state_is_small_and_of_one_shape(vae: WanVae) -> None:
    """From the first latent on: what a compiled graph needs, and no more memory than what is looked at again."""
    _, first = vae.decode_next(draw(vae, 1))
    _, later = vae.decode_next(draw(vae, 3), first)
    assert [x.shape for x in first] == [x.shape for x in later]
    assert all(x.shape[0] == 2 and x.untyped_storage().nbytes() == x.nbytes for x in later)


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


def test_half_precision(vae: WanVae) -> None:
    half = vae.cfg.build().to(torch.bfloat16)
    half.load_state_dict(vae.state_dict())
    with torch.inference_mode():
        pixels, latents = half.decode(draw(vae)), half.encode(clip())
    assert pixels.dtype == latents.dtype == torch.float32, "that of what was given"
    for got, want in ((pixels, vae.decode(draw(vae))), (latents, vae.encode(clip()))):
        assert (got - want).square().mean().sqrt() < 0.05 * want.std()


def test_errors_say_what_would_do(vae: WanVae) -> None:
    with pytest.raises(UserError, match=r"clip of 16 frames.*17"):
        vae.encode(clip(frames=16))
    with pytest.raises(UserError, match=rf"36x48.*multiples of {vae.scale}"):
        vae.encode(clip(height=36))
    with pytest.raises(UserError, match=rf"20 channels.*{vae.channels}"):
        vae.decode(torch.zeros(1, 1, 20, 2, 2))


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
    for cfg in (WAN21, WAN22, TINY22):
        assert loads(WanVaeConfig, dumps(cfg)) == cfg
    assert (WAN21.stride, WAN21.scale, WAN22.stride, WAN22.scale) == (4, 8, 4, 16)
