"""What must hold for every backbone (design: one network, three uses)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones import (
    CAMERA,
    CHANNELS,
    DUAL,
    HEIGHT,
    SMALL,
    WIDTH,
    condition,
    latents,
    open_cache,
    prepared,
    sized,
    small,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minwm.cameras.track import se3_exp
from minwm.control.prope import Projection
from minwm.core.config import ConfigError, dumps, loads, to_dict
from minwm.core.flow import with_first
from minwm.core.types import Condition
from minwm.nets.attention import Cached, Masked, ReadOnlyCache, chunk_causal
from minwm.nets.backbone import Backbone, BackboneConfig, Context, teacher_forced
from minwm.nets.chunks import Geometry
from minwm.store.layouts import FAMILIES
from minwm.stream.rollout import Stream, generate_latents, sample_noise
from minwm.stream.solvers import AutoregressiveSampler, BidirectionalSampler, FewStepSampler, Sampler

TOLERANCE = 2e-6  # cameras and modulation are float32 inside a float64 network
GEOMETRIES = {
    "plain": Geometry(tokens=6, chunk=2, window=8, sink=0),
    "image": Geometry(tokens=6, chunk=2, first_chunk=1, window=8, sink=1),
    "ring": Geometry(tokens=6, chunk=2, first_chunk=1, window=2, sink=1),
    "no-sink": Geometry(tokens=6, chunk=2, window=2, sink=0),
}


def frames_of(geometry: Geometry) -> int:
    return geometry.first_chunk_frames + 4 * geometry.chunk


def frames_in_place(net: Backbone, geometry: Geometry) -> int:
    """Frames that streams have where clips have them. In a full window no more than those, where text is not rotated:
    streams then keep the chunk in place, and clips do not (`test_rolling_sinks_stand_right_before_the_window`)."""
    return geometry.start(geometry.slots) if net.text_rows else frames_of(geometry)


def streamed(net: Backbone, x: torch.Tensor, t: torch.Tensor, cond: Condition, geometry: Geometry) -> torch.Tensor:
    (arena, text), parts = open_cache(net, geometry, cond), []
    for i, (a, b) in enumerate(geometry.chunks(x.shape[1])):
        bound = prepared(net, text, cond.frames(a, b))
        parts.append(net(x[:, a:b], t[:, a:b], bound, Cached(arena, i)))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_streaming_equals_one_masked_pass(name: str, geometry: Geometry) -> None:
    net, frames = small(name), frames_of(geometry)
    x, cond, t = latents(frames), condition(frames), torch.rand(2, frames, dtype=torch.float64)
    whole = net(x, t, cond, Masked(chunk_causal(geometry), frames))
    got, same = streamed(net, x, t, cond, geometry), slice(0, frames_in_place(net, geometry))
    torch.testing.assert_close(got[:, same], whole[:, same], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("scope", [Cached, ReadOnlyCache])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_teacher_forcing_equals_streaming_with_the_same_past(name: str, scope: type, geometry: Geometry) -> None:
    net, frames = small(name), frames_of(geometry)
    past, noisy, cond = latents(frames), latents(frames, seed=5), condition(frames)
    t = torch.rand(2, frames, dtype=torch.float64)
    t_past = 0.1 * torch.rand(2, frames, dtype=torch.float64)
    forced = teacher_forced(net, Context(past, t_past), noisy, t, cond, geometry)
    arena, text = open_cache(net, geometry, cond)
    for i, (a, b) in enumerate(geometry.chunks(frames)):
        bound = prepared(net, text, cond.frames(a, b))
        v = net(noisy[:, a:b], t[:, a:b], bound, scope(arena, i))
        if b > frames_in_place(net, geometry):
            break
        torch.testing.assert_close(v, forced[:, a:b], atol=TOLERANCE, rtol=TOLERANCE)
        net(past[:, a:b], t_past[:, a:b], bound, Cached(arena, i))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_a_new_prompt_holds_from_the_next_chunk_on(name: str, guidance: float) -> None:
    """The next chunk reads the new prompt alone, and a past that has read the old one."""
    net, old = small(name), condition(5)
    geometry = sized(net, GEOMETRIES["image"])
    new = replace(old, text=old.text.flip(0, 1))
    x = latents(5)
    changed, kept, second = (Stream(net, cond, geometry, guidance) for cond in (old, old, new))
    for stream, prompt in ((changed, old), (kept, old), (second, new)):
        for a, b in geometry.chunks(5)[:-1]:
            stream.update_cache(stream.prepare_chunk(prompt.frames(a, b)), x[:, a:b])
    changed.set_prompt(new)

    def velocity(stream: Stream) -> torch.Tensor:
        return stream.velocity(stream.prepare_chunk(old.frames(3, 5)), x[:, 3:], 0.5)

    after = velocity(changed)
    assert min((after - velocity(stream)).abs().max() for stream in (kept, second)) > 1e-3
    first, text = second.geometry.text_rows, changed.arena.kv
    second.arena.kv[..., first:, :] = text[..., first:, :]  # the past of the stream that has read the old prompt
    torch.testing.assert_close(after, velocity(second), atol=TOLERANCE, rtol=TOLERANCE)


@settings(max_examples=20, deadline=None)
@given(
    chunk=st.integers(1, 3),
    first_chunk=st.integers(1, 4),
    chunks=st.integers(1, 3),
    times=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0.1, 1)),
)
@torch.no_grad()
def test_streaming_holds_an_image_as_the_masked_pass_does(
    chunk: int, first_chunk: int, chunks: int, times: tuple[float, float, float]
) -> None:
    """First chunks of any length with the image as their first latent, whatever stands in its place."""
    image_time, level, t = times
    geometry = Geometry(
        tokens=6, chunk=chunk, first_chunk=first_chunk, window=2, image_start=True, image_time=image_time,
        context_noise=level,
    )  # fmt: skip
    net, frames = small("wan-dual"), first_chunk + (chunks - 1) * chunk
    cond, bare = condition(frames, image=True), condition(frames)
    image = cond.first_latent
    past, noisy, noise = latents(frames), latents(frames, seed=5), latents(frames, seed=6)

    def held(x: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.full((2, frames), t, dtype=torch.float64)
        rows[:, 0] = image_time
        return with_first(x, image), rows

    context = Context(*held((1 - level) * past + level * noise, level))
    masked = teacher_forced(net, context, *held(noisy, t), bare, geometry)
    v = teacher_forced(net, Context(past, context.t), noisy, torch.full_like(context.t, t), cond, geometry)
    if not level:
        torch.testing.assert_close(v, masked, atol=TOLERANCE, rtol=TOLERANCE)
    stream = Stream(net, cond, sized(net, geometry))
    for a, b in geometry.chunks(frames):
        bound = stream.prepare_chunk(cond.frames(a, b))
        v = stream.velocity(bound, noisy[:, a:b], t)
        torch.testing.assert_close(v, masked[:, a:b], atol=TOLERANCE, rtol=TOLERANCE)
        stream.update_cache(bound, past[:, a:b], noise[:, a:b])


@pytest.mark.parametrize("name", DUAL)
@torch.no_grad()
def test_streams_see_an_image_as_teacher_forcing_does(name: str) -> None:
    """As the clean first latent, and where a network has channels or text tokens for it, there too."""
    geometry = Geometry(tokens=6, chunk=2, first_chunk=3, window=2, image_start=True, image_time=0.1)
    net, cond, past, noisy = small(name), condition(7, image=True), latents(7), latents(7, seed=5)
    assert cond.first_latent is not None
    past[:, :1] = cond.first_latent
    t, clean = (torch.full((2, 7), level, dtype=torch.float64) for level in (0.5, 0.0))
    forced = teacher_forced(net, Context(past, clean), noisy, t, cond, geometry)
    for guidance in (1.0, 2.0):
        stream = Stream(net, cond, sized(net, geometry), guidance)
        for a, b in geometry.chunks(7):
            bound = stream.prepare_chunk(cond.frames(a, b))
            v = stream.velocity(bound, noisy[:, a:b], 0.5)
            if guidance == 1:
                torch.testing.assert_close(v, forced[:, a:b], atol=TOLERANCE, rtol=TOLERANCE)
            stream.update_cache(bound, past[:, a:b])


@pytest.mark.parametrize("name", CAMERA)
@torch.no_grad()
def test_world_frame_does_not_matter_and_cameras_do(name: str) -> None:
    net, x, cond, t = small(name), latents(4), condition(4), torch.full((2, 4), 0.5, dtype=torch.float64)
    assert cond.w2c is not None
    world = torch.from_numpy(se3_exp(np.array([0.3, -1.0, 2.0, 0.4, 0.9, -0.2]))).float()
    before, after = net(x, t, cond), net(x, t, replace(cond, w2c=cond.w2c @ world))
    if net.needs_first_frame_coordinates:  # who sees where the origin is must say so, or a stream would move it
        assert (after - before).abs().max() > 0.01
    else:
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    other = replace(cond, w2c=cond.w2c.flip(1))
    assert (net(x, t, other) - before).abs().max() > 0.01


@torch.no_grad()
def test_rounded_networks_are_those_given_rounded_numbers() -> None:
    """The compatibility switch: the same as rounding cameras and modulation by hand, and not nothing."""
    net, x, cond, t = small("wan-dual"), latents(4), condition(4), torch.full((2, 4), 0.5, dtype=torch.float64)
    rounded = replace(SMALL["wan-dual"], rounded=True).build().double()
    rounded.load_state_dict(net.state_dict())
    assert cond.w2c is not None and cond.K is not None
    assert (rounded(x, t, cond) - net(x, t, cond)).abs().max() > 1e-3
    grid = 2.0**-6 * torch.randint(-60, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    shifts = torch.eye(4).repeat(2, 4, 1, 1)
    shifts[:, :, :3, 3] = grid[:, None, :3]  # moves by what bfloat16 holds, and turns by none
    exact = replace(cond, w2c=shifts, K=torch.full_like(cond.K, 0.5))
    for module in (net, rounded):
        for name, parameter in module.named_parameters():
            if name.startswith(("time_projection", "time_embedding.2")):
                nn.init.zeros_(parameter)  # so that modulation is what is learned, the head's included
            if name.endswith("modulation"):
                parameter.copy_(parameter.bfloat16())
    torch.testing.assert_close(rounded(x, t, exact), net(x, t, exact), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", [*DUAL, "wan-plucker"])
def test_zero_initialised_camera_branch_is_the_base_model_and_learns(name: str) -> None:
    base, camera = small(name.partition("-")[0] + "-none").float(), SMALL[name].build()
    missing = camera.load_state_dict(base.state_dict(), strict=False).missing_keys
    assert missing and all(key.endswith(FAMILIES[SMALL[name].kind].CAMERA_PARAMETERS) for key in missing)
    x, cond, t = latents(3).float(), condition(3), torch.full((2, 3), 0.4)
    assert cond.glyphs is not None
    cond = replace(cond, text=cond.text.float(), glyphs=cond.glyphs.float())
    out = camera(x, t, cond)
    torch.testing.assert_close(out, base(x, t, cond), atol=0, rtol=0)
    out.square().mean().backward()
    for key in missing:
        grad = camera.get_parameter(key).grad
        assert grad is not None and grad.abs().max() > 0


@pytest.mark.parametrize("cfg", SMALL.values(), ids=SMALL)
def test_configs_have_what_others_read_of_them(cfg: BackboneConfig) -> None:
    assert isinstance(cfg, BackboneConfig) and (cfg.channels, cfg.kind) == (CHANNELS, type(cfg).kind)
    assert loads(type(cfg), dumps(cfg)) == cfg and set(cfg.unpublished) <= to_dict(cfg).keys()
    net = cfg.build()
    assert net.tokens_per_frame(HEIGHT, WIDTH) == (HEIGHT // cfg.patch) * (WIDTH // cfg.patch)
    assert {"layers", "cache_heads", "head_width"} <= vars(net).keys()


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_the_future_never_changes_the_past(name: str) -> None:
    net, geometry, cond = small(name), GEOMETRIES["image"], condition(5)
    x, t = latents(5), torch.rand(2, 5, dtype=torch.float64)
    scope = Masked(chunk_causal(geometry), 5)
    later = x.clone()
    later[:, 3:] = latents(2, seed=77)
    a, b = net(x, t, cond, scope), net(later, t, cond, scope)
    assert torch.equal(a[:, :3], b[:, :3])
    assert not torch.allclose(a[:, 3:], b[:, 3:])


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_one_time_for_all_equals_that_time_per_frame_only_if_equal(name: str) -> None:
    net, x, cond = small(name), latents(3), condition(3)
    t = torch.full((2, 3), 0.3, dtype=torch.float64)
    mixed = t.clone()
    mixed[:, 2] = 0.9
    assert (net(x, t, cond) - net(x, mixed, cond)).abs().max() > 1e-3


@pytest.mark.parametrize("name", DUAL)
def test_graded_pass_leaves_the_arena_alone_and_its_past_without_gradient(name: str) -> None:
    net, geometry, cond = small(name), GEOMETRIES["image"], condition(3)
    cond.text.requires_grad_()
    arena, text = open_cache(net, geometry, cond)
    past, now = latents(1).requires_grad_(), latents(2, seed=3).requires_grad_()
    with torch.no_grad():
        net(past, torch.zeros(2, 1), prepared(net, text, cond.frames(0, 1)), Cached(arena, 0))
    before = arena.kv.clone()
    v = net(now, torch.ones(2, 2), prepared(net, text, cond.frames(1, 3)), ReadOnlyCache(arena, 1))
    v.sum().backward()
    assert torch.equal(arena.kv, before)
    assert past.grad is None
    for x in (now, cond.text):
        assert x.grad is not None and x.grad.abs().max() > 0


@pytest.mark.parametrize("name", DUAL)
@torch.no_grad()
def test_arena_never_moves_nor_allocates_over_fifty_chunks(name: str) -> None:
    net, geometry, cond = small(name), GEOMETRIES["ring"], condition(2)
    arena, text = open_cache(net, geometry, cond)
    pointer, size = arena.kv.data_ptr(), arena.kv.numel()
    for i in range(50):
        frames = geometry.first_chunk_frames if i == 0 else geometry.chunk
        bound = prepared(net, text, cond.frames(0, frames))
        v = net(latents(frames, seed=i), torch.zeros(2, frames), bound, Cached(arena, i))
        assert v.isfinite().all()
    assert (arena.kv.data_ptr(), arena.kv.numel()) == (pointer, size)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", SMALL)
def test_moving_the_cache_to_the_camera_changes_nothing(name: str, guidance: float) -> None:
    """Ten chunks away from the origin; one stream re-expresses its cache at nearly every chunk, the other never."""
    net, geometry, cond = small(name), GEOMETRIES["ring"], condition(21)
    assert cond.w2c is not None
    cond.w2c[:, :, :3, 3] += torch.arange(21)[:, None] * torch.tensor([0.3, 0.1, 0.5])
    noise = sample_noise((2, 21, 4, 4, 6), 2, latents(1), torch.Generator().manual_seed(0))
    still, moving = (Stream(net, cond, sized(net, geometry), guidance, reach=reach) for reach in (None, 0.5))
    sampler, origins = (
        FewStepSampler(steps=2) if guidance == 1 else AutoregressiveSampler(steps=2, guidance=guidance),
        [],
    )
    for a, b in geometry.chunks(21):
        before = moving.snapshot()
        moving.prepare_chunk(cond.frames(a, b))
        moving.restore(before)  # undoing a move leaves no trace either
        videos = []
        for stream in (still, moving):
            bound = stream.prepare_chunk(cond.frames(a, b))
            videos.append(stream.next_chunk(bound, noise[:, :, a:b], sampler))
            stream.update_cache(bound, latents(b - a, seed=a))
        torch.testing.assert_close(*videos, atol=1e-4, rtol=1e-4)
        origins.append(moving.origin)
    assert len({float(origin.sum()) for origin in origins}) > 5 or net.needs_first_frame_coordinates
    assert torch.equal(still.origin, torch.eye(4).double().expand(2, 4, 4))


@torch.no_grad()
@pytest.mark.parametrize("sink", [0, 1])
@pytest.mark.parametrize("name", SMALL)
def test_rolling_sinks_stand_right_before_the_window(name: str, sink: int) -> None:
    """One layer, so that a frame's keys depend on nothing else: the stream equals a clip without the forgotten.

    Without a sink, so does the window alone. Sinks that do not roll are further from the window than any clip has them.
    """
    torch.manual_seed(0)
    net = replace(SMALL[name], layers=1).build().double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.25)
    frames, geometry = 12 + sink, replace(GEOMETRIES["ring" if sink else "no-sink"], rolling_sink=True)
    x, cond = latents(frames), condition(frames)
    stream = Stream(net, cond, sized(net, geometry))
    for a, b in geometry.chunks(frames):
        bound = stream.prepare_chunk(cond.frames(a, b))
        v = net(x[:, a:b], torch.ones(2, b - a), bound, Cached(stream.arena, stream.chunk))
        stream.update_cache(bound, x[:, a:b])
    kept = [*range(sink), *range(frames - 4, frames)]
    short = replace(cond, **{name: x[:, kept] for name, x in cond.per_frame().items()})
    t = (torch.arange(len(kept)) >= len(kept) - 2).double().expand(2, -1)
    alone = net(x[:, kept], t, short, Masked(chunk_causal(geometry), len(kept)))
    torch.testing.assert_close(v, alone[:, -2:], atol=1e-5, rtol=1e-5)
    assert stream.sink_shift == 8 and stream.time_origin == (8 if net.text_rows else 0)


@pytest.mark.parametrize(
    "sampler", [BidirectionalSampler(steps=3), AutoregressiveSampler(steps=3), FewStepSampler()], ids=lambda s: s.kind
)
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("name", DUAL)
def test_generation_is_deterministic_and_keeps_the_image(name: str, sampler: Sampler, image: bool) -> None:
    net = small(name)
    geometry, cond = GEOMETRIES["image"], condition(5, image=image)
    noise = sample_noise(
        (2, 5, 4, 4, 6), sampler.num_noise_samples(geometry), latents(1), torch.Generator().manual_seed(0)
    )
    a, b = (generate_latents(net, sampler, noise, cond, sized(net, geometry)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (2, 5, 4, 4, 6) and a.isfinite().all()
    if cond.first_latent is not None:
        assert torch.equal(a[:, :1], cond.first_latent)


@pytest.mark.parametrize("name", [name for name in SMALL if name.endswith(("-none", "-dual"))])
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
    if type(net).flops is Backbone.flops:
        pytest.skip("no closed form")
    visible = geometry.start(geometry.slots) * geometry.tokens
    assert counter.get_total_flops() == net.flops(2, geometry.tokens, visible)


def test_errors_name_the_thing() -> None:
    with pytest.raises(ConfigError, match="try 48"):
        replace(SMALL["wan-dual"], dim=50)
    with pytest.raises(ConfigError, match="needs a camera for every latent frame"):
        small("wan-dual")(latents(2), torch.ones(2, 2), replace(condition(2), w2c=None))
    with pytest.raises(ConfigError, match="pad with zero rows"):
        small("wan-none")(latents(2), torch.ones(2, 2), Condition(text=torch.zeros(2, 3, 6)))
    with pytest.raises(ConfigError, match="try 5"):
        GEOMETRIES["image"].chunks(4)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_cameras_are_never_rounded_to_bfloat16(autocast: bool) -> None:
    """Five units away, the products of a camera in bfloat16 would be off by far more than their own rounding."""
    cond = condition(3)
    assert cond.w2c is not None and cond.K is not None
    cond.w2c[..., :3, 3] += torch.tensor([5.03, -3.01, 2.07])
    cameras = Projection.from_cameras(cond.w2c, cond.K)
    x = torch.randn(2, 18, 2, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for project in (cameras.queries, cameras.keys, cameras.outputs):
            assert torch.equal(project(x), project(x.float()).bfloat16())
            assert project(x.float()).dtype == torch.float32
