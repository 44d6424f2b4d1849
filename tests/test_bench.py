"""The benchmark: its clocks fit together, and its FLOPs are those of the closed form."""

import math
from dataclasses import replace

import numpy as np
import pytest

from minwm.checkpoint import ModelConfig
from minwm.core.config import UserError, dumps, loads
from minwm.core.trajectory import Motion
from minwm.eval.bench import BenchResult, bench_model, random_model
from minwm.nets.codec import CodecConfig
from minwm.nets.text import WordText
from minwm.nets.wan import WanConfig
from minwm.sampling import Autoregressive, Bidirectional, FewStep, Sampler

CONFIG = ModelConfig(
    network=WanConfig(
        dim=32, heads=2, layers=2, ffn=48, channels=4, text_dim=8, text_length=24, freq_dim=8, camera="dual"
    ),
    sampler=FewStep(),
    codec=CodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1),
    motion=Motion(move=0.5, turn=24.0, fps=16.0),
    text=WordText(dim=8),
    latents=7,
    height=32,
    width=32,
)
SAMPLERS = [Bidirectional(steps=3), Autoregressive(steps=3), FewStep(steps=2)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.kind)
def test_clocks_fit_together(sampler: Sampler) -> None:
    result = bench_model(random_model(replace(CONFIG, sampler=sampler)), repeats=2)
    assert result.sampler == sampler.kind
    assert result.passes == {"bidirectional": 6, "autoregressive": 6, "few_step": 2}[sampler.kind]
    assert (result.frames, result.chunk_frames, result.repeats, result.memory_gb) == (24, 8, 2, None)
    assert result.decode_ms > 0 and 0 < result.chunk_ms <= result.chunk_p90_ms
    assert result.first_pixel_ms > result.decode_ms
    assert all(math.isfinite(x) and x > 0 for x in (result.first_ms, result.fps, result.pass_gflop))
    if sampler.kind == "bidirectional":
        assert result.chunk_ms == pytest.approx(result.first_ms / 3)
        assert result.fps < 1000 * result.frames / result.first_ms
    assert loads(BenchResult, dumps(result)) == result


@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
def test_flops_are_those_of_the_closed_form(image: bool) -> None:
    """Linears 2 N (4 d^2 + 2 d^2 + 2 d ffn + d^2), attention 4 N L d twice, and the prompt 4 N l d; per layer."""
    config = replace(CONFIG, first=1 if image else 2, latents=7 if image else 8, sampler=FewStep(steps=1))
    cfg, tokens = config.network, config.geometry.tokens
    d, query, seen = cfg.dim, 2 * tokens, config.latents * tokens
    linear = 2 * query * (7 * d**2 + 2 * d * cfg.ffn)
    attention = 2 * 4 * query * seen * d + 4 * query * cfg.text_length * d
    ends = 2 * query * 2 * (4 * cfg.channels) * d  # patches in, patches out
    time = 2 * 2 * (cfg.freq_dim * d + 7 * d**2)  # per frame and not per token
    cameras = 2 * query * 4 * 4 * d  # 4x4 matrices on channel quadruples of q, k, v and output
    result = bench_model(random_model(config), repeats=1)
    want = cfg.layers * (linear + attention + cameras) + ends + time
    assert 1e9 * result.pass_gflop == pytest.approx(want, rel=1e-6)


def test_an_image_of_another_size_and_a_length_that_is_no_clip_are_refused() -> None:
    model = random_model(CONFIG)
    with pytest.raises(UserError, match="the first image is"):
        bench_model(model, np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="8 latents"):
        bench_model(model, latents=8)
