"""HunyuanVideo-1.5 beyond what every backbone must do: text with a time, mean velocities, a mistaken cache."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from backbones import HUNYUAN, condition, latents, sized, small
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minwm.core.config import ConfigError
from minwm.core.flow import schedule, with_first
from minwm.core.types import Condition
from minwm.families.hunyuan.transformer import HunyuanConfig
from minwm.nets.attention import FULL, AttentionScope, Masked, teacher_forcing
from minwm.nets.chunks import Geometry, StreamConfig
from minwm.stream.rollout import Stream, sample_bidirectional
from minwm.stream.solvers import BidirectionalSampler
from minwm.train.flops import pass_flops


@torch.no_grad()
def test_text_that_attends_to_video_has_its_time_or_zero() -> None:
    net, zero = small("hunyuan-dual"), replace(HUNYUAN, camera="dual", text_time="zero").build().double()
    zero.load_state_dict(net.state_dict())
    x, cond = latents(2), condition(2)
    start, later = (torch.full((2, 2), t, dtype=torch.float64) for t in (0, 0.5))
    torch.testing.assert_close(zero(x, start, cond), net(x, start, cond), atol=0, rtol=0)
    assert (zero(x, later, cond) - net(x, later, cond)).abs().max() > 1e-3


@torch.no_grad()
def test_the_camera_branch_may_read_the_other_branch_of_the_cache() -> None:
    """minWM's mistake: nothing in the first chunk; then as if the past of one branch were copied over the other's."""
    net, mistaken = small("hunyuan-dual"), replace(HUNYUAN, camera="dual", prope_cache="rope_compat").build().double()
    mistaken.load_state_dict(net.state_dict())
    cond, x, geometry = condition(6), latents(6), sized(net, Geometry(tokens=1, chunk=2, window=3))
    right, copied, wrong = (Stream(one, cond, geometry) for one in (net, net, mistaken))
    for a, b in geometry.chunks(6):
        bound = [stream.prepare_chunk(cond.frames(a, b)) for stream in (right, copied, wrong)]
        v = [one.velocity(given, x[:, a:b], 0.5) for one, given in zip((right, copied, wrong), bound, strict=True)]
        torch.testing.assert_close(v[2], v[1], atol=1e-9, rtol=1e-9)
        assert torch.equal(v[2], v[0]) == (a == 0) and (a == 0 or (v[2] - v[0]).abs().max() > 1e-3)
        for stream, given in zip((right, copied, wrong), bound, strict=True):
            stream.update_cache(given, x[:, a:b])
        start, stop = geometry.start(a // 2), geometry.start(a // 2 + 1)
        rows = slice(net.text_rows + start * geometry.tokens, net.text_rows + stop * geometry.tokens)
        copied.arena.kv[:, :, :, HUNYUAN.heads :, rows] = copied.arena.kv[:, :, :, : HUNYUAN.heads, rows]
    with pytest.raises(ConfigError, match="rope_compat needs camera=dual"):
        replace(HUNYUAN, prope_cache="rope_compat")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@torch.no_grad()
def test_mean_velocities_are_asked_for_until_the_step_ends(guidance: float) -> None:
    """A given frame stays at 0, and has no duration."""
    torch.manual_seed(0)
    net = replace(HUNYUAN, meanflow=True).build().double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    sampler = BidirectionalSampler(steps=3, solver="euler", guidance=guidance)
    noise, cond = latents(3), condition(3, image=True)
    x, times = with_first(noise, cond.first_latent), schedule(3, sampler.shift)
    for t, t_next in pairwise(times):
        both = [torch.tensor([[0.0, time, time]], dtype=torch.float64) for time in (t, t_next)]
        v, null = (net(x, net.adaln_modulation(*both), given) for given in (cond, cond.unconditional()))
        x = with_first(x - (t - t_next) * (null + guidance * (v - null)), cond.first_latent)
    got = sample_bidirectional(net, sampler, noise, cond)
    torch.testing.assert_close(got, x, atol=1e-9, rtol=1e-9)
    net.takes_step_end = False
    assert (sample_bidirectional(net, sampler, noise, cond) - got).abs().max() > 1e-3


@pytest.mark.parametrize("scope", [FULL, Masked(teacher_forcing(StreamConfig(chunk=1), 2), 2)], ids=["all", "masked"])
@pytest.mark.parametrize("meanflow", [False, True])
@torch.no_grad()
def test_flops_of_a_pass_with_its_text(scope: AttentionScope, meanflow: bool) -> None:
    """The text's side too, which attends to the video only where all see all."""
    net, x = replace(HUNYUAN, meanflow=meanflow).build(), latents(2, batch=1).float()
    cond = Condition(text=condition(2, batch=1).text.float())
    modulation = net.adaln_modulation(torch.zeros(1, 2))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x, modulation, cond, scope)
    assert counter.get_total_flops() == pass_flops(net, x.shape, scope)


def test_errors_name_the_thing() -> None:
    with pytest.raises(ConfigError, match="sum 128"):
        HunyuanConfig(rope=(16, 56, 54))
    with pytest.raises(ConfigError, match="2048"):
        HunyuanConfig(dim=2050)
    with pytest.raises(ConfigError, match="none and dual"):
        HunyuanConfig(camera="single")
    with pytest.raises(ConfigError, match="glyph states have shape"):
        cond = condition(1)
        small("hunyuan-none")(latents(1), torch.ones(2, 1), replace(cond, glyphs=cond.text))
