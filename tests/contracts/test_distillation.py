"""What must hold for the distillation stages beside what holds for all: trajectories, targets, scores, rollouts."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from backbones import latents
from recipes import FRAMES, GEOMETRY, LONG_FIRST, MODEL, Exact, clip, gradients, make, network, seeded, watched, weights
from torch.utils.flop_counter import FlopCounterMode

from minwm.core.config import ConfigError
from minwm.core.flow import schedule, with_first
from minwm.core.types import Clip
from minwm.recipes.consistency import teacher_velocity
from minwm.recipes.dmd import Dmd, DmdConfig, back_and_forth, dmd_gradient, surrogate_loss
from minwm.recipes.ode import OdeConfig
from minwm.recipes.ops import noise_like, teacher_context
from minwm.store.model import ModelConfig
from minwm.stream.rollout import sample_noise, self_rollout


@torch.no_grad()
@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("model", [MODEL, LONG_FIRST], ids=["alone", "in a chunk"])
@pytest.mark.parametrize(("guidance", "level"), [(1.0, 0.0), (3.0, 0.0), (3.0, 0.2)])
def test_collected_trajectories_are_those_of_teacher_forcing(
    guidance: float, level: float, model: ModelConfig, image: bool
) -> None:
    """Chunk by chunk from a cache of the real past, or all chunks at once, each behind its clean copy: the same.

    The ring is smaller than the clip, sinks would roll and the cache would keep what was denoised last: windows must
    agree, and places and past must be those of the clip. An image that is given is in every state.
    """
    net, given, cfg = network(0), clip(image), OdeConfig(ode_steps=4, guidance=guidance)
    stream = replace(model.stream, context_noise=level, window=1, rolling_sink=True, merged_refresh=True)
    model, first = replace(model, stream=stream), given.cond.first_latent
    states, geometry = cfg.collect_states(net, given, model, seeded()), model.geometry
    assert states.shape == (3, *given.latents.shape)
    generator = seeded()
    context, x = (
        teacher_context(given, replace(GEOMETRY, context_noise=level), generator),
        noise_like(given.latents, generator),
    )
    torch.testing.assert_close(states[0], with_first(x, first))
    for step, (t, t_next) in enumerate(pairwise(schedule(4, model.sampler.shift))):
        v = teacher_velocity(net, context, given.cond, x, x.new_full(x.shape[:2], t), guidance, geometry)
        x = x + (t_next - t) * v
        if step % 2:
            torch.testing.assert_close(states[(step + 1) // 2], with_first(x, first), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_collecting_costs_half_of_teacher_forcing() -> None:
    net, given, cfg = network(0), clip(), OdeConfig(ode_steps=20)
    context = teacher_context(given, GEOMETRY, seeded())
    with FlopCounterMode(display=False) as streamed:
        cfg.collect_states(net, given, MODEL, seeded())
    with FlopCounterMode(display=False) as forced:
        for t in schedule(20, MODEL.sampler.shift)[:-1]:
            times = given.latents.new_full((2, FRAMES), t)
            teacher_velocity(net, context, given.cond, given.latents, times, cfg.guidance, GEOMETRY)
    assert streamed.get_total_flops() < 0.6 * forced.get_total_flops()


def test_ode_says_that_trajectories_are_missing() -> None:
    with pytest.raises(ConfigError, match="3 trajectory states, these have 0; collect"):
        make("ode").loss(replace(clip(), trajectory=None), 0, seeded())


def test_consistency_target_follows_the_student() -> None:
    recipe = make("consistency", target_decay=0.9)
    student, target = recipe.networks["student"], recipe.networks["target"]
    start = weights(target)
    for count in (1, 2, 3):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.fill_(1.0)
        for _ in range(2):  # micro-batches of one step move it once
            recipe.loss(clip(), count, seeded())
        want = 1 - 0.9**count * (1 - start)
        torch.testing.assert_close(weights(target), want, atol=1e-12, rtol=0)
    assert not gradients(target)


def test_critic_steps_follow_every_student_step() -> None:
    recipe = make("dmd", critic_updates=2)
    assert [recipe.loss(clip(), s, seeded()).trains[0] for s in range(7)] == list("sccsccs")


def test_the_surrogate_has_the_step_as_its_gradient() -> None:
    x0, step = latents(FRAMES).requires_grad_(), latents(FRAMES, seed=8)
    (gradient,) = torch.autograd.grad(surrogate_loss(x0, step), x0)
    torch.testing.assert_close(gradient * x0.numel(), step)


def test_direction_is_normalised_per_clip_over_generated_frames() -> None:
    x0, real, fake = (latents(FRAMES, seed=s) for s in (1, 2, 3))
    frames = torch.ones(2, FRAMES, dtype=torch.float64)
    frames[:, 0] = 0
    step = dmd_gradient(x0, real, fake, frames)
    assert step[:, 0].abs().max() == 0
    torch.testing.assert_close(dmd_gradient(7 * x0, 7 * real, 7 * fake, frames), step)
    alone = dmd_gradient(x0[:1], real[:1], fake[:1], frames[:1])
    torch.testing.assert_close(alone, step[:1])
    x0[:, 0] += 100
    torch.testing.assert_close(dmd_gradient(x0, real, fake, frames), step)
    # A critic that knows the student: the step leads from the student's video straight to the real one.
    towards = dmd_gradient(x0, real, x0, frames)[:, 1:]
    torch.testing.assert_close(towards.abs().mean((1, 2, 3, 4)), torch.ones(2, dtype=torch.float64))
    assert (towards * (x0 - real)[:, 1:] >= 0).all()


def test_equal_scores_give_no_gradient() -> None:
    recipe = make("dmd", guidance=1.0)
    recipe.networks["critic"].load_state_dict(recipe.networks["real"].state_dict())
    recipe.loss(clip(), 0, seeded()).total.backward()
    assert max(g.abs().max() for g in gradients(recipe.networks["student"])) == 0


@pytest.mark.parametrize("long", [0.0, 1.0])
def test_dmd_pulls_the_student_to_the_data(long: float) -> None:
    """With the exact score of one plain clip and a critic that learns online, its video nears that clip."""
    given = clip(batch=1)
    plain = torch.tensor([-1.0, 2.0, 0.5, -0.5]).double()[:, None, None].expand_as(given.latents)
    given = Clip(plain, replace(given.cond, first_latents=plain[:, :1]))
    roles = {"student": network(0), "critic": network(1), "real": Exact(given.latents)}
    cfg = DmdConfig(critic_updates=1, guidance=1.0, long_rollouts=long, max_prefix_chunks=2)
    recipe = cfg.build(MODEL, roles)
    optimizers = {r: torch.optim.AdamW(roles[r].parameters(), 5e-3, (0.0, 0.99)) for r in cfg.trained}

    def distance() -> float:
        noise = sample_noise(tuple(given.latents.shape), 2, given.latents, seeded(9))
        video, _ = self_rollout(roles["student"], noise, given.cond, GEOMETRY, MODEL.sampler, None)
        return float((video - given.latents).abs().mean())

    before = distance()
    for step in range(50):
        loss = recipe.loss(given, step, seeded(step))
        loss.total.backward()
        optimizers[loss.trains].step()
        optimizers[loss.trains].zero_grad()
    assert distance() < 0.6 * before


@pytest.mark.parametrize("long", [0.0, 1.0])
def test_scores_of_a_long_rollout_get_no_image_start(long: float) -> None:
    """And gradient flows through as many chunks of it as of one at the beginning of a stream, but for its start."""
    recipe = make("dmd", long_rollouts=long, max_prefix_chunks=3)
    with watched(recipe.networks["critic"]) as scored:
        recipe.loss(clip(), 1, seeded())
    assert (scored[0][0][:, 0] > 0).all() == bool(long)
    with watched(recipe.networks["student"]) as graded:
        recipe.loss(clip(), 0, seeded())
    assert [v.shape[1] for _, v in graded] == [2, 2]


def test_a_long_rollout_is_scored_at_its_end() -> None:
    """Of a student that knows what is to be seen: latents, scored latents and cameras are those of the same times."""
    given, recipe, whole = clip(), make("dmd", long_rollouts=1.0, max_prefix_chunks=1), latents(FRAMES + 2, seed=7)
    recipe.networks["student"] = Exact(torch.cat([given.latents[:, :1], whole[:, 1:]], 1))
    assert isinstance(recipe, Dmd)
    own, x0, truth, known = recipe._rollout(given, [0, 0], seeded())
    torch.testing.assert_close((own.latents, x0), (whole[:, 2:], whole[:, 2:]))
    path = back_and_forth(FRAMES, FRAMES + 2)[2:]
    assert own.cond.w2c is not None and given.cond.w2c is not None and own.cond.first_latent is None
    assert torch.equal(own.cond.w2c, given.cond.w2c[:, path]) and torch.equal(truth, given.latents[:, path])
    assert known.tolist() == [True, True, True, False, False], "two of its latents lie on the way back"


def test_a_stream_longer_than_its_clip_walks_to_and_fro() -> None:
    assert back_and_forth(5, 12).tolist() == [0, 1, 2, 3, 4, 3, 2, 1, 0, 1, 2, 3]
    assert back_and_forth(1, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("regression", [0.0, 0.5])
def test_dmd_looks_at_real_video_for_its_regression_alone(regression: float) -> None:
    """And there at what the student makes along the clip: not at the first frame, which is given."""
    recipe, given = make("dmd", regression=regression), clip()
    other = replace(given, latents=latents(FRAMES, seed=99))
    student, critic = ([recipe.loss(x, step, seeded()) for x in (given, other)] for step in (0, 1))
    assert critic[0].total == critic[1].total
    assert (student[0].total == student[1].total) == (not regression)
    if regression:
        still = make("dmd", regression=regression, static_cameras=1.0).loss(given, 0, seeded())
        assert still.logs["regression"] == 0 < student[0].logs["regression"], "what is seen there is in no clip"


@pytest.mark.parametrize("start", [{}, {"long_rollouts": 1.0, "max_prefix_chunks": 1}])
def test_the_regression_of_dmd_is_the_error_along_the_clip(start: dict[str, Any]) -> None:
    """A student that makes just that has none, at any exit step."""
    recipe, given = make("dmd", regression=0.5, **start), clip()
    recipe.networks["student"] = Exact(torch.cat([given.latents, given.latents.flip(1)[:, 1:]], dim=1))
    for seed in range(4):
        assert recipe.loss(given, 0, seeded(seed)).logs["regression"] < 1e-10


@pytest.mark.parametrize(("still", "same"), [(1.0, True), (0.0, False)])
def test_who_stands_still_in_dmd_goes_nowhere(still: float, same: bool) -> None:
    """Only the place counts where the camera starts."""
    recipe, given = make("dmd", static_cameras=still), clip()
    assert given.cond.w2c is not None
    elsewhere = torch.cat([given.cond.w2c[:, :1], given.cond.w2c[:, 1:].flip(1)], 1)
    other = replace(given, cond=replace(given.cond, w2c=elsewhere))
    for step in (0, 1):
        a, b = (recipe.loss(x, step, seeded()).total for x in (given, other))
        assert (a == b) == same
