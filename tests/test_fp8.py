"""FP8: what it rounds and what it leaves alone, and that its gate lets nothing pass that a trial speaks against."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import run_script, traced
from contracts.backbones import CHANNELS, HEIGHT, SMALL, WIDTH, condition, sized, small

import minwm
from minwm.core.config import ConfigError
from minwm.nets import fp8
from minwm.nets.attention import Cached, KVArena, ReadOnlyCache
from minwm.nets.backbone import Backbone
from minwm.nets.chunks import Geometry
from minwm.nets.fp8 import Fp8Arena, Linear, quantize
from minwm.session.prepare import fp8_trial
from minwm.store.folder import load_model
from minwm.store.model import Model
from minwm.stream.accelerate import EngineConfig, Fp8, Fp8Trial, GraphedStream, check_fp8, prepare_network
from minwm.stream.rollout import Stream
from minwm.stream.solvers import FewStepSampler

RING = Geometry(tokens=6, chunk=2, first_chunk=1, window=2, sink=1)
SHIPPED = Path(minwm.__file__).parent / "assets" / "world" / "dmd"
TWO = FewStepSampler(steps=2)


def noise_of(frames: int, seed: int, draws: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(draws, 1, frames, CHANNELS, HEIGHT, WIDTH, generator=generator)


def network(name: str = "wan-dual") -> Backbone:
    return small(name).float()


@torch.no_grad()
def walk(stream: Stream, chunks: int, cond: Any = None) -> Iterator[torch.Tensor]:
    cond = cond or condition(RING.start(chunks), batch=1)
    for i in range(stream.chunk, chunks):
        a, b = stream.geometry.start(i), stream.geometry.start(i + 1)
        bound, noise = stream.prepare_chunk(cond.frames(a, b)), noise_of(b - a, i)
        yield (x := stream.next_chunk(bound, noise, TWO))
        stream.update_cache(bound, x, noise[-1])


def change(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------------------ products


def test_rounding_is_bounded_whatever_the_size_of_a_row() -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 8, 200)[:, None]
    x[3] = 0
    quantized, scale = quantize(x)
    error, largest = (quantized.float() * scale - x).abs(), x.abs().amax(1, keepdim=True)
    assert (error <= x.abs() / 16 + 3e-6 * largest).all()
    torch.testing.assert_close((quantized.float() * scale).abs().amax(1, keepdim=True), largest)
    assert error.max() > 0 and quantized.itemsize == 1


@torch.no_grad()
def test_products_of_what_fp8_can_hold_are_exact_and_rows_do_not_disturb_each_other() -> None:
    """Whole quantized up to 7, times any power of two per row."""
    generator, layer = torch.Generator().manual_seed(0), Linear(32, 48)
    x, weight = (torch.randint(-7, 8, (n, 32), generator=generator).float() for n in (10, 48))
    x[:, 0], weight[:, 1] = 7, -7
    layer.weight.copy_(weight * 2.0 ** torch.arange(-24, 24)[:, None])
    x = x * 2.0 ** torch.arange(-5, 5)[:, None]
    want, out = layer(x), torch.zeros(2, 10, 48)
    layer.use_fp8()
    assert torch.equal(layer(x.view(2, 5, 32)), want.view(2, 5, 48))
    layer.product(x, layer.bias + 1, out=out[1])
    assert torch.equal(out[1], layer.product(x, layer.bias + 1)) and not out[0].any()
    torch.testing.assert_close(out[1], want + 1)
    layer.weight.mul_(2)
    assert torch.equal(layer(x), want)  # what products are taken with was made once
    layer.use_fp8()
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (want - layer.bias))
    with pytest.raises(ConfigError, match="24 to 48 channels has no FP8 form"):
        Linear(24, 48).use_fp8()


def test_blocks_go_to_fp8_and_back_and_what_is_sensitive_never_does() -> None:
    net = network()
    kept, before = (
        {name: x.clone() for name, x in net.state_dict().items()},
        list(walk(Stream(net, condition(1, 1), RING), 3)),
    )
    net.use_fp8()
    rounded = {
        name.split(".", 2)[2] for name, m in net.named_modules() if isinstance(m, Linear) and m.quantized is not None
    }
    assert rounded == {*(f"self_attn.{x}" for x in "qkvo"), "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"}
    assert kept.keys() == net.state_dict().keys()
    assert all(torch.equal(x, kept[name]) for name, x in net.state_dict().items())
    made = list(walk(Stream(net, condition(1, 1), RING), 3))
    assert 0.001 < change(torch.cat(made, 1), torch.cat(before, 1)) < 0.3  # random weights, large and unlike a model's
    net.use_fp8(False)
    assert all(torch.equal(a, b) for a, b in zip(walk(Stream(net, condition(1, 1), RING), 3), before, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("what", ["linears", "cache"])
def test_replayed_chunks_in_fp8_equal_plain_ones(what: Fp8) -> None:
    net, cond = network(), condition(RING.start(6), batch=1)
    net.arena_type = Fp8Arena if what == "cache" else KVArena
    net.use_fp8(what == "linears")
    graphed = GraphedStream(net, cond, RING, capture=traced)
    for a, b in zip(walk(Stream(net, cond, RING), 6), walk(graphed, 6), strict=True):
        torch.testing.assert_close(a, b)


def test_blocks_in_fp8_compile_to_one_graph() -> None:
    run_script("""
    from compiling import backend, graphs, walk
    from contracts.backbones import small

    net = small("wan-dual").float()
    net.use_fp8()
    plain = walk(net, chunks=4, steps=1)
    net.compile_blocks(backend)
    compiled = walk(net, chunks=4, steps=1)
    assert (compiled - plain).norm() < 0.05 * plain.norm(), (compiled - plain).norm() / plain.norm()
    assert len(graphs) == 2 and all("scaled_mm" in graph.code for graph in graphs)
    """)


# ------------------------------------------------------------------------------------------------ the cache


def stream_with(kind: type[KVArena], geometry: Geometry = RING, name: str = "wan-dual", **kwargs: Any) -> Stream:
    net = network(name)
    net.arena_type = kind
    return Stream(net, condition(1, batch=1), sized(net, geometry), **kwargs)


@pytest.mark.parametrize("name", SMALL)
def test_a_cache_in_fp8_rounds_the_window_alone(name: str) -> None:
    """The first chunk sees nothing but itself, the second itself and the sink; only then is anything rounded."""
    plain, rounded = (walk(stream_with(kind, name=name), 7) for kind in (KVArena, Fp8Arena))
    off = [change(b, a) for a, b in zip(plain, rounded, strict=True)]
    assert max(off[:2]) < 1e-6 and min(off[2:]) > 1e-4 and max(off) < 0.5, off  # random weights amplify


def test_a_cache_in_fp8_takes_half_of_the_memory_of_bfloat16() -> None:
    geometry = Geometry(tokens=100, chunk=4, window=10, sink=0)
    plain, rounded = (kind(geometry, (30, 1, 2, 128), torch.bfloat16) for kind in (KVArena, Fp8Arena))
    held = sum(x.nbytes for x in (rounded.kv, rounded.quantized, rounded.scales))  # pyright: ignore
    assert held == pytest.approx((0.5 + 2 / 128) * plain.kv.nbytes)
    assert rounded.unpacked.nbytes == plain.kv.nbytes / 30  # pyright: ignore[reportAttributeAccessIssue]


def test_sinks_that_are_turned_in_every_chunk_are_not_rounded_again_and_again() -> None:
    plain, rounded = (stream_with(kind, replace(RING, rolling_sink=True)) for kind in (KVArena, Fp8Arena))
    for stream in (plain, rounded):
        list(walk(stream, 40))
    assert plain.sink_shift > 60
    torch.testing.assert_close(rounded.arena.kv, plain.arena.kv[..., : RING.tokens, :], atol=1e-5, rtol=1e-5)


def test_a_cache_in_fp8_follows_the_camera_and_can_be_undone() -> None:
    """In another world frame it says the same up to its rounding; a step that is undone is made again bit by bit."""
    cond = condition(RING.start(9), batch=1)
    assert cond.w2c is not None
    cond.w2c[:, :, :3, 3] += torch.arange(RING.start(9))[:, None] * torch.tensor([0.3, 0.1, 0.5])
    still, moving = (stream_with(Fp8Arena, reach=reach) for reach in (None, 2.0))
    for i, (a, b) in enumerate(zip(walk(still, 9, cond), walk(moving, 9, cond), strict=True)):
        assert change(a, b) < (1e-4 if i < 2 else 0.3)
    assert not torch.equal(moving.origin, still.origin)
    before, more = still.snapshot(), condition(RING.start(10), batch=1)
    (once,) = walk(still, 10, more)
    still.restore(before)
    (again,) = walk(still, 10, more)
    assert torch.equal(once, again)


@torch.no_grad()
def test_a_peek_sees_what_the_stream_sees() -> None:
    stream = stream_with(Fp8Arena)
    list(walk(stream, 5))
    q, k, v = torch.randn(3, 1, 4, 12, 24, generator=torch.Generator().manual_seed(0))
    seen = ReadOnlyCache(stream.arena, 5)(1, q, k, v)
    torch.testing.assert_close(Cached(stream.arena, 5)(1, q, k, v), seen)


# ------------------------------------------------------------------------------------------------ the gate


@pytest.fixture
def shipped() -> Model:
    return load_model(SHIPPED)


@pytest.mark.parametrize("what", ["linears", "cache", "all"])
def test_the_shipped_model_passes_the_gate(shipped: Model, what: Fp8) -> None:
    cfg, geometry = EngineConfig(fp8=what), shipped.config.geometry
    _, times, fidelity = prepare_network(cfg, shipped.net, geometry, fp8_trial(shipped))
    assert times is None and fidelity and fidelity.psnr and fidelity.psnr > 35
    assert 0.001 < fidelity.error < fidelity.limit
    in_fp8 = any(m.quantized is not None for m in shipped.net.modules() if isinstance(m, Linear))
    assert (in_fp8, shipped.net.arena_type is Fp8Arena) == (what != "cache", what != "linears")


@pytest.mark.parametrize("factor", [1.2, float("nan")])
@pytest.mark.parametrize("what", ["linears", "cache"])
def test_a_broken_scale_does_not_pass_and_leaves_the_network_plain(
    shipped: Model, what: Fp8, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantized, scale = quantize(x)
        return quantized, factor * scale

    monkeypatch.setattr(fp8, "quantize", broken)
    with pytest.raises(ConfigError, match=rf"engine\.fp8={what}: .* is above engine\.fp8_limit=0\.1"):
        check_fp8(EngineConfig(fp8=what), shipped.net, shipped.config.geometry, fp8_trial(shipped))
    assert not any(m.quantized is not None for m in shipped.net.modules() if isinstance(m, Linear))
    assert shipped.net.arena_type is KVArena


def test_fp8_is_never_used_without_a_trial() -> None:
    with pytest.raises(ConfigError, match="checked with a trial, and none was given"):
        prepare_network(EngineConfig(fp8="cache"), network(), RING)
    short = Fp8Trial(condition(5, batch=1), noise_of(5, 0), TWO)
    with pytest.raises(ConfigError, match="is above"):
        prepare_network(EngineConfig(fp8="linears", fp8_limit=1e-4), network(), RING, short)
