from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minwm.core.config import ConfigError, UserError, dumps, loads
from minwm.nets.small_codec import SmallCodec, SmallCodecConfig, gradient_size

FRAMES, LATENTS = 17, 5


def small() -> SmallCodec:
    """A codec whose every weight matters: residual branches start at zero and would hide errors in time."""
    torch.manual_seed(0)
    codec = SmallCodecConfig(channels=4, width=16, fine=12, finest=8).build()
    for parameter in codec.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    codec.mean.normal_()
    codec.std.uniform_(0.5, 1.5)
    return codec.eval()


def clip(batch: int = 2, frames: int = FRAMES, height: int = 16, width: int = 24, seed: int = 1) -> Tensor:
    return torch.rand(batch, frames, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def test_shapes() -> None:
    codec = small()
    for height, width in ((64, 64), (8, 8), (40, 24)):
        latents = codec.encode(clip(height=height, width=width))
        assert latents.shape == (2, LATENTS, 4, height // 8, width // 8)
        pixels = codec.decode(latents)
        assert pixels.shape == (2, FRAMES, 3, height, width) and pixels.abs().max() <= 1
    assert codec.encode(clip(frames=1)).shape[1] == 1


@torch.no_grad()
def test_causal_in_time() -> None:
    codec, pixels = small(), clip()
    latents = codec.encode(pixels)
    for i in range(LATENTS - 1):
        changed = pixels.clone()
        changed[:, 4 * i + 1 :] = 0
        torch.testing.assert_close(codec.encode(changed)[:, : i + 1], latents[:, : i + 1], atol=1e-6, rtol=0)
        seen = pixels.clone()
        seen[:, 4 * i] = 0
        assert (codec.encode(seen)[:, i] - latents[:, i]).abs().max() > 1e-3, "a latent sees its own last frame"
        later = latents.clone()
        later[:, i + 1 :] = 0
        same = slice(0, 4 * i + 1)
        torch.testing.assert_close(codec.decode(later)[:, same], codec.decode(latents)[:, same], atol=1e-6, rtol=0)


def scenes(count: int) -> list[Tensor]:
    """Clips with structure: a few smooth patterns, mixed and moved."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(count, 5, 3, 6, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse.flatten(0, 1), size=(32, 32), mode="bicubic")
    return list((fine.unflatten(0, (count, 5)) * 0.3).split(4))


@torch.no_grad()
def test_fit_finds_the_best_linear_code() -> None:
    clips = scenes(24)
    codec = SmallCodecConfig(width=8, fine=8, finest=8, decoder_depth=1).build()
    codec.fit(clips)
    pixels = torch.cat(clips)
    latents = codec.encode(pixels)
    torch.testing.assert_close(latents.mean((0, 1, 3, 4)), torch.zeros(16), atol=1e-4, rtol=0)
    variance = latents.var((0, 1, 3, 4))
    assert (variance.diff() < 0).all(), "channels are ordered from coarse to fine"
    torch.testing.assert_close(variance.mean(), torch.tensor(1.0), atol=0.02, rtol=0)
    blocks = codec._blocks(torch.cat([pixels[:, :1].expand(-1, 3, -1, -1, -1), pixels], 1))
    rows = blocks.movedim(1, -1).flatten(0, -2)
    lost = torch.linalg.svdvals(rows - rows.mean(0))[16:].square().sum()
    error = (codec.synthesis(codec.analysis(blocks)) - blocks).square().sum()
    assert lost > 0, "or there is nothing to lose"
    torch.testing.assert_close(error, lost, atol=0, rtol=1e-3)
    drawn, _ = codec._reconstruct(latents, None)
    linear = torch.nn.functional.pixel_shuffle(codec.synthesis(codec.analysis(blocks)), 8)
    torch.testing.assert_close(drawn, linear.unflatten(0, (24, 2)).reshape(24, 8, 3, 32, 32)[:, 3:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_fit_needs_clips() -> None:
    with pytest.raises(UserError, match="no clips"):
        small().fit([])


def test_learns_and_is_deterministic() -> None:
    def train() -> list[float]:
        torch.manual_seed(0)
        codec = SmallCodecConfig(width=32, fine=16, finest=8).build()
        smooth = torch.nn.functional.interpolate(clip(1, 5, 8, 8)[0], size=(32, 32), mode="bicubic")[None]
        generator = torch.Generator().manual_seed(0)
        optimiser = torch.optim.Adam(codec.parameters(), lr=3e-3)
        losses = []
        for _ in range(40):
            total, logs = codec(smooth, generator)
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            losses.append(float(total.detach()))
        assert logs.keys() >= {"l1", "mse", "psnr"}
        return losses

    losses = train()
    assert losses[-1] < 0.7 * losses[0] and losses == train()


def test_texture_as_strong_as_the_truth_is_better_than_none() -> None:
    """What cannot be known, here noise, is wrong by less on average where it is left out: but for the energy term."""
    truth, other = (torch.randn(1, 4, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    size, smooth = gradient_size(truth), torch.zeros_like(truth)
    assert (smooth - truth).abs().mean() < (other - truth).abs().mean()
    assert (gradient_size(other) - size).abs().mean() < 0.2 * (gradient_size(smooth) - size).abs().mean()
    codec = small()
    plain, _ = codec(clip(), torch.Generator().manual_seed(0))
    codec.cfg = replace(codec.cfg, energy=2.0)
    total, logs = codec(clip(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(total, plain + 2 * logs["energy"])


def test_training_never_moves_the_encoder() -> None:
    codec = small().train()
    total, _ = codec(clip(), torch.Generator().manual_seed(0))
    total.backward()
    assert all(p.grad is None for p in codec.analysis.parameters())
    assert all(p.grad is not None for p in (*codec.decoder.parameters(), *codec.synthesis.parameters()))


def test_errors_say_what_would_do() -> None:
    codec = small()
    with pytest.raises(UserError, match=r"clip of 16 frames.*17"):
        codec.encode(clip(frames=16))
    with pytest.raises(UserError, match=r"20x24.*multiples of 8"):
        codec.encode(clip(height=20))
    with pytest.raises(UserError, match=r"16 channels.*4"):
        codec.decode(torch.zeros(1, 1, 16, 2, 2))
    with pytest.raises(ConfigError, match=r"channels=1000.*768"):
        SmallCodecConfig(channels=1000).build()
    with pytest.raises(ConfigError, match=r"codec.width=0"):
        SmallCodecConfig(width=0)
    with pytest.raises(ConfigError, match=r"codec.noise=-1"):
        SmallCodecConfig(noise=-1)


def test_config_round_trip() -> None:
    cfg = SmallCodecConfig(width=32, noise=0.1)
    assert loads(SmallCodecConfig, dumps(cfg)) == cfg
