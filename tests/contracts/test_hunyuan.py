"""HunyuanVideo-1.5 beyond what every backbone must do: it trains under every recipe, its text has a time, it costs."""

from dataclasses import replace

import pytest
import torch
from backbones import HUNYUAN, condition, latents, sized, small
from recipes import CASES, MODEL, TURNS, clip, seeded
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minwm.core.config import ConfigError
from minwm.core.types import Condition
from minwm.families.hunyuan.transformer import HunyuanConfig
from minwm.nets.attention import FULL, AttentionScope, Cached, Masked, teacher_forcing
from minwm.nets.backbone import Checkpointing
from minwm.nets.chunks import Geometry, StreamConfig
from minwm.stream.rollout import Stream
from minwm.train.flops import pass_flops

UNREAD = [f"double_blocks.1.txt.{name}" for name in ("attn_q", "attn_q_norm", "attn_proj", "mlp.fc1", "mlp.fc2")]
"""What the last block makes of text that nobody reads; and no clip here has image states."""


@pytest.mark.parametrize(("name", "step"), TURNS)
def test_every_recipe_trains_it_and_checkpointing_changes_nothing(name: str, step: int) -> None:
    """The loss of one batch falls, and every parameter that is read has a gradient."""
    model, found = replace(MODEL, height=64, width=96), []
    how: Checkpointing
    for how in (False, True, "attention"):
        cfg = CASES[name]
        networks = {role: small("hunyuan-dual", seed) for seed, role in enumerate((*cfg.trained, *cfg.frozen))}
        for net in networks.values():
            net.checkpointing = how
            for parameter in net.parameters():
                parameter.data.mul_(0.4)
        recipe, losses, gradients = cfg.build(model, networks), [], dict[str, torch.Tensor]()
        for i in range(8 if how is False else 1):
            loss = recipe.loss(clip(), step, seeded())
            net = networks[loss.trains]
            if not i:
                optimizer = torch.optim.Adam(net.parameters(), 2e-3)
            optimizer.zero_grad()
            loss.total.backward()
            if not i:
                gradients = {key: p.grad.clone() for key, p in net.named_parameters() if p.grad is not None}
            optimizer.step()
            losses.append(float(loss.total.detach()))
        idle = {key for key, _ in net.named_parameters() if key not in gradients or not gradients[key].any()}
        assert all(key.startswith(("vision_in", *UNREAD)) for key in idle), idle
        assert how is not False or losses[-1] < 0.95 * losses[0], losses
        found.append((losses[0], gradients))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


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


@pytest.mark.parametrize("name", ["hunyuan-none", "hunyuan-dual"])
@torch.no_grad()
def test_flops_are_those_of_the_operators(name: str) -> None:
    net, cond = small(name).float(), condition(2, batch=1)
    geometry = sized(net, Geometry(tokens=1, chunk=2, window=2))
    stream = Stream(net, replace(cond, text=cond.text.float(), glyphs=None), geometry)
    stream.chunk = geometry.slots
    bound, x = stream.prepare_chunk(cond), latents(2, batch=1).float()
    modulation = net.adaln_modulation(torch.zeros(1, 1))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x, modulation, bound, Cached(stream.arena, stream.chunk))
    visible = geometry.start(geometry.slots) * geometry.tokens
    assert counter.get_total_flops() == net.flops(2, geometry.tokens, visible)


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
