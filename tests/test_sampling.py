"""Solvers against a reference and their order; rollouts against loops written by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from minwm.cameras.track import se3_exp
from minwm.core.config import ConfigError
from minwm.core.flow import Latents, interpolate, with_first
from minwm.core.types import Condition
from minwm.families.wan.transformer import WanConfig
from minwm.nets.backbone import Backbone, Context, teacher_forced
from minwm.nets.chunks import Geometry
from minwm.stream.rollout import generate_latents, sample_noise, self_rollout, stream_latents
from minwm.stream.solvers import (
    AutoregressiveSampler,
    BidirectionalSampler,
    FewStepSampler,
    Sampler,
    Velocity,
    solve_euler,
    unipc,
)

GEOMETRY = Geometry(tokens=4, chunk=2, first_chunk=1, window=8, sink=1)
LONG_FIRST = replace(GEOMETRY, first_chunk=3, image_start=True, image_time=0.1)
"""The image is the first of three latents, of which the others are generated."""
FRAMES = 5
SIZE = (1, FRAMES, 4, 4, 4)
SAMPLER = FewStepSampler(steps=3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def net() -> Backbone:
    torch.manual_seed(0)
    cfg = WanConfig(
        dim=32, heads=2, layers=2, ffn=32, channels=4, text_dim=6, text_length=5, freq_dim=16, camera="dual"
    )
    net = cfg.build().double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.25)
    return net


def condition(image: bool = True) -> Condition:
    poses = 0.2 * torch.randn(FRAMES, 6, generator=seeded(1), dtype=torch.float64).cumsum(0)
    return Condition(
        text=torch.randn(1, 5, 6, generator=seeded(2), dtype=torch.float64),
        w2c=torch.from_numpy(se3_exp(poses.numpy())).float()[None],
        K=torch.tensor([0.5, 0.5, 0.5, 0.5]).expand(1, FRAMES, 4),
        first_latents=torch.randn(1, 1, *SIZE[2:], generator=seeded(3), dtype=torch.float64) if image else None,
    )


def noise(draws: int, seed: int = 5) -> Tensor:
    return sample_noise(SIZE, draws, torch.empty(0, dtype=torch.float64), seeded(seed))


# ---------------------------------------------------------------------------------------------
# Solvers


Solver = Callable[[Velocity, Latents, int, float], Latents]
MATRIX = 0.4 * torch.randn(4, 4, generator=seeded(8), dtype=torch.float64)


def field(x: Tensor, t: float, _: float = 0.0) -> Tensor:
    """A velocity that is linear in nothing."""
    return torch.tanh(x @ MATRIX) + t * x + math.sin(3 * t)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_unipc_is_that_of_diffusers(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, solver_order=2
    )
    grid = 0.999 * torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigmas = 5 * grid / (1 + 4 * grid)
    reference.set_timesteps(steps)
    reference.sigmas, reference.timesteps = sigmas, 1000 * sigmas[:-1]
    start = noise(1)[0]
    x = start
    for sigma, t in zip(sigmas.tolist(), reference.timesteps, strict=False):
        x = reference.step(field(x, sigma), t, x).prev_sample
    torch.testing.assert_close(unipc(field, start, steps, 5.0), x, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 4, 17])
@pytest.mark.parametrize(("solver", "begin"), [(solve_euler, 1.0), (unipc, 0.999 * 5 / (1 + 0.999 * 4))])
def test_a_straight_flow_is_solved_exactly(solver: Solver, begin: float, steps: int) -> None:
    """Down from the first time of the solver's grid."""
    start, slope = noise(2)
    end = solver(lambda *_: slope, start, steps, 5.0)
    torch.testing.assert_close(end, start - begin * slope, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("solver", "order"), [(solve_euler, 1), (unipc, 2)])
def test_order_of_convergence(solver: Solver, order: int) -> None:
    """Twice the steps, 2^order smaller error."""
    start = noise(1)[0]
    fine = solver(field, start, 2048, 1.0)
    errors = [float((solver(field, start, steps, 1.0) - fine).norm()) for steps in (64, 128, 256)]
    for coarse, finer in pairwise(errors):
        assert coarse / finer == pytest.approx(2**order, rel=0.25)


def test_passes_count_both_branches() -> None:
    assert BidirectionalSampler(steps=50, guidance=3.0).passes == 100
    assert AutoregressiveSampler(steps=50, guidance=1.0).passes == 50
    assert FewStepSampler().passes == 4
    assert FewStepSampler().times == pytest.approx([1, 0.9375, 0.833333, 0.625], abs=1e-6)
    with pytest.raises(ConfigError, match=r"sampler\.steps=0"):
        AutoregressiveSampler(steps=0)


@pytest.mark.parametrize("kind", [BidirectionalSampler, AutoregressiveSampler])
@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
@torch.no_grad()
def test_guidance_without_a_prompt_is_no_guidance(net: Backbone, kind: type, image: bool) -> None:
    """The two branches are then equal; and with a prompt, guidance does something."""
    geometry = GEOMETRY if image else replace(GEOMETRY, first_chunk=1)
    cond = condition(image)
    null = cond.unconditional()
    one, three = (kind(steps=3, guidance=g, solver="euler") for g in (1.0, 3.0))
    a, b = (generate_latents(net, sampler, noise(1), null, geometry) for sampler in (one, three))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    c, d = (generate_latents(net, sampler, noise(1), cond, geometry) for sampler in (one, three))
    assert (c - d).abs().max() > 0.01


def test_noise_is_the_same_for_a_seed() -> None:
    assert torch.equal(noise(2, seed=1), noise(2, seed=1))
    assert not torch.equal(noise(2, seed=1)[0], noise(2, seed=1)[1])
    assert noise(2).dtype == torch.float64
    assert [s.num_noise_samples(GEOMETRY) for s in (FewStepSampler(steps=3), BidirectionalSampler())] == [3, 1]
    noisy = replace(GEOMETRY, context_noise=0.1)
    assert [
        s.num_noise_samples(noisy) for s in (FewStepSampler(steps=3), AutoregressiveSampler(), BidirectionalSampler())
    ] == [4, 2, 1]


# ---------------------------------------------------------------------------------------------
# Rollouts


@torch.no_grad()
def by_hand(
    net: Backbone,
    draws: Tensor,
    cond: Condition,
    times: list[float],
    level: float = 0.0,
    merged: bool = False,
    geometry: Geometry = GEOMETRY,
) -> Latents:
    """Few-step generation without a cache: every pass sees the whole past through the teacher's mask.

    With a merged refresh the past is what the last pass over each chunk was given.
    """
    clip, last, first = torch.zeros_like(draws[0]), torch.zeros_like(draws[0]), cond.first_latent
    cond = replace(cond, first_latents=None)  # held here, and not by the network's callers

    def held(x: Latents, t: float) -> tuple[Latents, Tensor]:
        times = torch.full(x.shape[:2], t, dtype=x.dtype)
        if first is not None:
            x, times[:, :1] = torch.cat([first, x[:, 1:]], 1), geometry.image_time
        return x, times

    for a, b in geometry.chunks(FRAMES):
        _, t_past = held(clip, times[-1] if merged else level)
        past = Context(held(last if merged else interpolate(clip, draws[-1], t_past), 0)[0], t_past)
        x = draws[0].clone()
        for step, t in enumerate(times):
            x0 = x - t * teacher_forced(net, past, *held(x, t), cond, geometry)
            last[:, a:b] = x[:, a:b]
            if step + 1 < len(times):
                x = interpolate(x0, draws[step + 1], torch.full_like(t_past, times[step + 1]))
        clip[:, a:b] = held(x0, 0)[0][:, a:b]
    return clip


every_start = pytest.mark.parametrize(
    ("geometry", "image"),
    [(GEOMETRY, True), (GEOMETRY, False), (LONG_FIRST, True), (LONG_FIRST, False)],
    ids=["image", "text", "image in a chunk", "text of a model with an image in a chunk"],
)


@every_start
@pytest.mark.parametrize("level", [0.0, 0.3])
def test_few_step_rollout_is_the_loop_by_hand(net: Backbone, geometry: Geometry, image: bool, level: float) -> None:
    sampler, cond, geometry = FewStepSampler(steps=3), condition(image), replace(geometry, context_noise=level)
    draws = noise(sampler.num_noise_samples(geometry))
    want = by_hand(net, draws, cond, sampler.times, level, geometry=geometry)
    torch.testing.assert_close(generate_latents(net, sampler, draws, cond, geometry), want, atol=1e-5, rtol=1e-5)
    rolled, _ = self_rollout(net, draws, cond, geometry, sampler, None)
    torch.testing.assert_close(rolled, want, atol=1e-5, rtol=1e-5)


@every_start
@pytest.mark.parametrize("steps", [1, 3])
def test_a_merged_refresh_keeps_the_last_pass_and_saves_one_per_chunk(
    net: Backbone, geometry: Geometry, image: bool, steps: int
) -> None:
    """In streams and in the self-rollouts of training, whichever pass is scored; a chunk that is nothing but an image
    still needs its own."""
    plain, sampler, cond, level = geometry, FewStepSampler(steps=steps), condition(image), 0.3
    geometry = replace(plain, merged_refresh=True, context_noise=level)
    draws, passes, alone = noise(sampler.num_noise_samples(geometry)), [], image and plain is GEOMETRY
    counting = net.register_forward_hook(lambda *_: passes.append(1))
    with counting:
        made = generate_latents(net, sampler, draws, cond, geometry)
        generated = len(plain.chunks(FRAMES)) - alone
        assert (len(passes), len(draws)) == (steps * generated + alone, steps)
        passes.clear()
        usual = generate_latents(net, sampler, draws, cond, plain)
        assert len(passes) == (steps + 1) * generated + alone
    want = by_hand(net, draws, cond, sampler.times, merged=True, geometry=plain)
    torch.testing.assert_close(made, want, atol=1e-5, rtol=1e-5)
    first = 3 if alone else plain.first_chunk_frames  # up to the first generated chunk nothing is another
    assert torch.equal(made[:, :first], usual[:, :first]) and not torch.allclose(made, usual, atol=1e-3)
    for exit_step in (None, *range(steps)):
        rolled, _ = self_rollout(net, draws, cond, geometry, sampler, exit_step)
        torch.testing.assert_close(rolled, want, atol=1e-5, rtol=1e-5)


def test_fewer_steps_ask_at_times_that_more_steps_know() -> None:
    """Of 1000, 937.5, 833.3, 625 (warped from 1000, 750, 500, 250): those of 1000 and 500, and of 1000."""
    times = {steps: [round(1000 * t, 1) for t in FewStepSampler(steps=steps).times] for steps in (1, 2, 4)}
    assert times == {1: [1000.0], 2: [1000.0, 833.3], 4: [1000.0, 937.5, 833.3, 625.0]}
    with pytest.raises(ConfigError, match=r"steps=0: at least 1"):
        FewStepSampler(steps=0)


@torch.no_grad()
@pytest.mark.parametrize("geometry", [GEOMETRY, LONG_FIRST], ids=["image", "image in a chunk"])
@pytest.mark.parametrize(("solver", "solve"), [("euler", solve_euler), ("unipc", unipc)])
def test_autoregressive_rollout_is_the_teachers_ode(
    net: Backbone, geometry: Geometry, solver: Literal["euler", "unipc"], solve: Solver
) -> None:
    cond, clip, start = condition(), torch.zeros(SIZE, dtype=torch.float64), noise(1)[0]
    sampler = AutoregressiveSampler(steps=3, guidance=1.0, solver=solver)
    for a, b in geometry.chunks(FRAMES):

        def velocity(x: Latents, t: float, _: float) -> Latents:
            t_past = x.new_zeros(x.shape[:2])
            return teacher_forced(net, Context(clip, t_past), x, t_past + t, cond, geometry)

        clip[:, a:b] = with_first(solve(velocity, start, 3, sampler.shift), cond.first_latent)[:, a:b]
    got = generate_latents(net, sampler, noise(1), cond, geometry)
    torch.testing.assert_close(got, clip, atol=1e-5, rtol=1e-5)
    assert torch.equal(got[:, :1], clip[:, :1]), "the image is what was given"


@torch.no_grad()
@pytest.mark.parametrize("sampler", [FewStepSampler(steps=2), AutoregressiveSampler(steps=2, guidance=2.0)], ids=str)
def test_a_chunk_is_generated_with_its_image(net: Backbone, sampler: Sampler) -> None:
    """Another image, another rest of the chunk; what noise stands in its place does not matter."""
    cond, draws = condition(), noise(sampler.num_noise_samples(LONG_FIRST))
    assert cond.first_latent is not None
    made = generate_latents(net, sampler, draws, cond, LONG_FIRST)
    other = generate_latents(net, sampler, draws, replace(cond, first_latents=-cond.first_latent), LONG_FIRST)
    assert all((made - other).abs().amax((0, 2, 3, 4)) > 0.01)
    draws[:, :, 0] = -draws[:, :, 0]
    assert torch.equal(generate_latents(net, sampler, draws, cond, LONG_FIRST), made)


@torch.no_grad()
def test_a_stream_can_be_left_and_makes_what_it_made_before(net: Backbone) -> None:
    """A chunk depends on nothing that comes later."""
    sampler, cond = FewStepSampler(steps=3), condition()
    whole = generate_latents(net, sampler, noise(3), cond, GEOMETRY)
    chunks = stream_latents(net, sampler, noise(3), cond, GEOMETRY)
    torch.testing.assert_close(torch.cat([next(chunks), next(chunks)], 1), whole[:, :3], atol=0, rtol=0)


@every_start
@pytest.mark.parametrize("noisy", [0.0, 0.2], ids=["clean context", "noisy context"])
@torch.no_grad()
def test_given_chunks_are_the_clean_past(net: Backbone, geometry: Geometry, image: bool, noisy: float) -> None:
    """Generation goes on from whole chunks of a video as from its own: exactly so where context has no noise."""
    geometry = replace(geometry, context_noise=noisy)
    cond, draws, chunks = condition(image), noise(3), geometry.chunks(FRAMES)
    made = generate_latents(net, SAMPLER, draws, cond, geometry)
    for given in [stop for _, stop in chunks[:-1] if stop > 1]:
        start = replace(cond, first_latents=made[:, :given])
        again = generate_latents(net, SAMPLER, draws, start, geometry)
        assert torch.equal(again[:, :given], made[:, :given])
        as_made = not noisy and (image or not geometry.image_time)  # its first frame is now an image
        assert torch.equal(again, made) == as_made
        rollout, scored = self_rollout(net, draws, start, geometry, SAMPLER, 0)
        torch.testing.assert_close(rollout, again, atol=1e-5, rtol=1e-5)
        assert torch.equal(scored[:, :given], made[:, :given])
    start = replace(cond, first_latents=made[:, :3])
    whole = generate_latents(net, BidirectionalSampler(steps=2), draws, start, geometry)
    assert torch.equal(whole[:, :3], made[:, :3]) and not torch.equal(whole, made)


@pytest.mark.parametrize("geometry", [GEOMETRY, LONG_FIRST], ids=["image", "image in a chunk"])
@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_self_rollout_is_the_stream_whatever_is_scored(net: Backbone, geometry: Geometry, exit_step: int) -> None:
    """Context is the fully denoised chunk, not the scored prediction; the last step scores the clip itself."""
    cond = condition()
    assert cond.first_latent is not None
    want = generate_latents(net, FewStepSampler(steps=3), noise(3), cond, geometry)
    clip, scored = self_rollout(net, noise(3), cond, geometry, SAMPLER, exit_step)
    torch.testing.assert_close(clip, want, atol=1e-5, rtol=1e-5)
    assert not clip.requires_grad and scored.requires_grad
    assert torch.equal(scored[:, :1], cond.first_latent)
    torch.testing.assert_close(bool(torch.allclose(scored, clip, atol=1e-5)), exit_step == 2)


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_gradient_flows_through_the_scored_pass_alone(net: Backbone, exit_step: int) -> None:
    """Every chunk's score depends on its own cameras, and on no camera of another chunk, nor on other draws."""
    cond, draws = condition(), noise(3).requires_grad_()
    assert cond.w2c is not None
    cond = replace(cond, w2c=cond.w2c.requires_grad_())
    _, scored = self_rollout(net, draws, cond, GEOMETRY, SAMPLER, exit_step)
    for a, b in GEOMETRY.chunks(FRAMES)[1:]:
        wanted = [cond.w2c, draws]
        cameras, start = torch.autograd.grad(scored[:, a:b].square().sum(), wanted, retain_graph=True)
        frames = cameras.abs().amax((0, 2, 3)) > 0
        assert frames.tolist() == [a <= frame < b for frame in range(FRAMES)]
        used = start.abs().amax((1, 3, 4, 5)) > 0
        if exit_step == 0:  # its input is the draw itself; later inputs were computed without gradient
            assert used[0].tolist() == frames.tolist()
        assert not used[1:].any() or exit_step > 0
    grads = torch.autograd.grad(scored.square().sum(), list(net.parameters()))
    assert all(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("stream", [{"first_chunk": 3}, {"first_chunk": 3, "image_start": False}], ids=str)
def test_an_image_needs_a_model_that_takes_one(net: Backbone, stream: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"set stream\.image_start=true"):
        generate_latents(net, FewStepSampler(steps=1), noise(1), condition(), replace(GEOMETRY, **stream))
    with pytest.raises(ConfigError, match=r"stream\.image_time=1\.5 is a time in"):
        replace(GEOMETRY, image_time=1.5)


def test_latents_may_be_kept_in_bfloat16_between_steps() -> None:
    seen = list[Latents]()

    def velocity(x: Latents, t: float, _: float) -> Latents:
        seen.append(x)
        return x * t

    noise = torch.randn(1, *SIZE, generator=seeded(), dtype=torch.float64)
    sampler = AutoregressiveSampler(steps=3, solver="euler", rounded=True)
    out = sampler.sample(velocity, noise)
    assert all(torch.equal(x, x.bfloat16().double()) for x in (*seen, out))
    assert not torch.equal(out, replace(sampler, rounded=False).sample(velocity, noise))
    with pytest.raises(ConfigError, match="solver=euler, not unipc"):
        replace(sampler, solver="unipc")
