"""The switches that bring back the paper's or the released code's way of distillation (docs/paper.md)."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from backbones import condition, latents
from compiling import traced
from recipes import FRAMES, GEOMETRY, MODEL, Exact, clip, make, network, seeded, watched
from torch import Tensor

from minwm.core.config import ConfigError, dumps, loads, override
from minwm.core.flow import Latents, Times, interpolate, shift
from minwm.core.types import Clip
from minwm.nets.chunks import StreamConfig
from minwm.recipes import consistency, ode
from minwm.recipes.base import Recipe
from minwm.recipes.diffusion import AutoregressiveConfig, TimeLaw
from minwm.recipes.dmd import Dmd, DmdConfig, dmd_gradient
from minwm.recipes.ode import OdeConfig
from minwm.recipes.ops import sample_start
from minwm.store.model import ModelConfig
from minwm.stream.accelerate import GraphedStream
from minwm.stream.rollout import Stream, generate_latents, sample_noise, self_rollout
from minwm.stream.solvers import FewStepSampler

THREE = FewStepSampler(steps=3)


def dmd(**changes: Any) -> Dmd:
    return cast(Dmd, make("dmd", **changes))


def draws(sampler: FewStepSampler, batch: int = 2) -> Tensor:
    like = latents(FRAMES, batch)
    return sample_noise(tuple(like.shape), sampler.num_noise_samples(GEOMETRY), like, seeded(5))


def alone(given: Clip, i: int) -> Clip:
    states = given.trajectory
    return Clip(given.latents[i : i + 1], given.cond.clips([i]), None if states is None else states[:, i : i + 1])


def times_of(recipe: Recipe, given: Clip, step: int = 0, seed: int = 0) -> Times:
    """Of the graded pass over the frames that are predicted."""
    with watched(recipe.networks[recipe.cfg.turn[step]]) as passes:
        recipe.loss(given, step, seeded(seed))
    return passes[0][0][:, -FRAMES:]


# The exit step of a rollout, its context, and what the critic learns


@pytest.mark.parametrize("context", ["final", "exit"])
def test_clips_exit_each_at_its_own_step(context: Any) -> None:
    """As each would alone: videos, scored videos and gradients."""
    recipe, given = dmd(context=context), clip(batch=3)
    noise, exits = draws(THREE, batch=3), [1, 0, 1]
    found = recipe._rollout_by_exit(noise, given.cond, exits, 0)
    each = [recipe._rollout_by_exit(noise[:, i : i + 1], given.cond.clips([i]), exits[i : i + 1], 0) for i in range(3)]
    for together, parts in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(parts), atol=1e-5, rtol=1e-5)
    weights = list(recipe.networks["student"].parameters())
    got, *wanted = (torch.autograd.grad(x0.square().sum(), weights) for _, x0 in (found, *each))
    for gradient, parts in zip(got, zip(*wanted, strict=True), strict=True):
        torch.testing.assert_close(gradient, sum(parts), atol=1e-4, rtol=1e-4)


def test_what_shares_an_exit_step() -> None:
    """Clips of a micro-batch, micro-batches of a training step, or nothing; or all take the last."""
    drawn = {}
    for per in ("batch", "clip", "step", "last"):
        recipe, generator = dmd(exit_step=per), seeded()
        recipe.sampler = FewStepSampler(steps=4)
        drawn[per] = torch.tensor([[recipe._exit_steps(3, s, generator) for _ in range(5)] for s in range(40)])
    for per, clips, micro_batches in (("batch", True, False), ("clip", False, False), ("step", True, True)):
        steps = drawn[per]
        assert bool((steps == steps[..., :1]).all()) == clips
        assert bool((steps == steps[:, :1]).all()) == micro_batches
        assert set(steps.flatten().tolist()) == {0, 1, 2, 3}
    assert (drawn["last"] == 3).all()


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_context_from_the_exit_step_is_a_stream_of_fewer_steps(exit_step: int) -> None:
    net, cond, noise, passes = network(0), clip().cond, draws(THREE), []
    shorter = FewStepSampler(steps=exit_step + 1, timesteps=tuple(THREE.times[: exit_step + 1]))
    want = generate_latents(net, shorter, noise, cond, GEOMETRY)
    with net.register_forward_hook(lambda *_: passes.append(1)):
        made, scored = self_rollout(net, noise, cond, GEOMETRY, THREE, exit_step, context="exit")
    torch.testing.assert_close(made, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(made, scored) and scored.requires_grad and not made.requires_grad
    chunks = len(GEOMETRY.chunks(FRAMES)) - 1  # the image is given
    assert len(passes) == chunks * (exit_step + 2) + 1


def test_gradient_through_the_last_step_alone_scores_the_final_video() -> None:
    recipe, given = dmd(exit_step="last"), clip()
    final, scored, *_ = recipe._rollout(given, recipe._exit_steps(2, 0, seeded()), seeded())
    assert scored.requires_grad and torch.equal(final.latents, scored.detach())


@pytest.mark.parametrize("data", ["final", "exit"])
def test_a_critic_that_knows_the_videos_has_no_loss(data: Any) -> None:
    """Those that it learns from, and it has one on the others."""
    given, losses, exits = clip(), {}, []
    for known in ("final", "exit"):
        recipe, generator = dmd(critic_data=data), seeded()
        generator = seeded(4)
        sample_start(given, 1.0, 0.0, GEOMETRY, generator)
        exits = recipe._exit_steps(2, 1, generator) if data == "exit" else [0, 0]
        final, scored, *_ = recipe._rollout(given, exits, generator)
        recipe.networks["critic"] = Exact((final.latents if known == "final" else scored).detach())
        losses[known] = float(recipe.loss(given, 1, seeded(4)).total.detach())
    assert exits == [0, 0], "the last step's videos are the final ones"
    assert losses.pop(data) < 1e-12 < min(losses.values())


def test_scores_are_compared_where_the_exit_step_removes_noise() -> None:
    given = clip(image=False, batch=1)
    for per, low, high in (("last", 0.0, 5 / 6), ("clip", 0.0, 1.0)):
        recipe = dmd(exit_step=per, score_times="exit", critic_data="exit", t_min=0.0, t_max=1.0)
        recipe.networks["student"] = Exact(given.latents)
        seen = torch.cat([times_of(recipe, given, 1, seed)[:, 0] for seed in range(24)])
        assert low <= seen.min() < low + 0.3 and high - 0.1 < seen.max() <= high
    edges = dmd(score_times="exit", critic_data="exit")._exit_interval([0, 1], torch.device("cpu"))
    torch.testing.assert_close([shift(x, 5.0) for x in edges], [torch.tensor([5 / 6, 0.0]), torch.tensor([1.0, 5 / 6])])
    with pytest.raises(ConfigError, match=r"final videos have no exit step; set dmd\.critic_data=exit"):
        DmdConfig(score_times="exit")


def test_the_normaliser_of_a_batch_keeps_the_sizes_of_its_clips() -> None:
    x0, frames = latents(FRAMES, seed=1), torch.ones(2, FRAMES, dtype=torch.float64)
    real = x0 + torch.tensor([1.0, 3.0]).double()[:, None, None, None, None]
    own, shared = (
        dmd_gradient(x0, real, x0, frames, per_batch).abs().mean((1, 2, 3, 4)) for per_batch in (False, True)
    )
    torch.testing.assert_close((own, shared), (torch.tensor([1.0, 1.0]).double(), torch.tensor([0.5, 1.5]).double()))


# Times of training


@pytest.mark.parametrize(("name", "count"), [("ode", 2), ("consistency", 8)])
def test_an_index_for_every_clip(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is the mean of what each clip has alone; by default all clips of a batch share the index."""
    given, module = clip(), {"ode": ode, "consistency": consistency}[name]
    seen = [times_of(make(name, index=per), given, seed=seed)[:, -1] for per in ("batch", "clip") for seed in range(8)]
    same = [bool(a == b) for a, b in seen]
    assert all(same[:8]) and not all(same[8:])
    monkeypatch.setattr(module, "noise_like", lambda x, _: torch.sin(7 * x))
    losses = []
    for part, index in ((given, [0, count - 1]), (alone(given, 0), [0]), (alone(given, 1), [count - 1])):
        monkeypatch.setattr(module, "random_indices", lambda *_, index=index: index)
        losses.append(make(name, index="clip").loss(part, 0, seeded()).total.detach())
    torch.testing.assert_close(losses[0], (losses[1] + losses[2]) / 2, atol=1e-6, rtol=1e-6)


def test_consistency_without_the_last_pair() -> None:
    """Of two pairs only the first is left, from noise to the middle."""
    for reaches_zero, starts in ((True, 2), (False, 1)):
        recipe = make("consistency", grid=2, reaches_zero=reaches_zero)
        assert len({float(times_of(recipe, clip(), seed=seed)[0, -1]) for seed in range(8)}) == starts
    with pytest.raises(ConfigError, match=r"consistency\.grid=1: at least 2"):
        make("consistency", grid=1, reaches_zero=False)


def test_one_time_for_all_chunks_of_a_clip() -> None:
    t = times_of(make("autoregressive", time_per="clip"), clip(image=False))
    assert (t == t[:, :1]).all() and t[0, 0] != t[1, 0]


def test_times_of_a_part_of_the_grid() -> None:
    """minWM v0.2 never trains Wan above 996 and below 93."""
    t = TimeLaw(u_min=0.02, u_max=0.98).draw((10_000,), seeded())
    assert 0.092 < t.min() < 0.1 and 0.995 < t.max() < 0.9961
    with pytest.raises(ConfigError, match="no interval inside"):
        TimeLaw(u_min=0.5, u_max=0.5)
    with pytest.raises(ConfigError, match="law=logit_normal has no bounds"):
        TimeLaw(law="logit_normal", u_max=0.9)


# Lists of times


def test_a_list_of_the_default_times_changes_nothing() -> None:
    net, cond, noise = network(0), clip().cond, draws(THREE)
    listed = FewStepSampler(steps=3, timesteps=tuple(THREE.times), first_timesteps=tuple(THREE.times))
    for made in (
        [generate_latents(net, sampler, noise, cond, GEOMETRY) for sampler in (THREE, listed)],
        [self_rollout(net, noise, cond, GEOMETRY, sampler, 1)[1] for sampler in (THREE, listed)],
        [
            OdeConfig(ode_steps=6).collect_states(net, clip(), replace(MODEL, sampler=s), seeded())
            for s in (THREE, listed)
        ],
    ):
        assert torch.equal(*made)


FEW = FewStepSampler(steps=1, timesteps=(0.9,), first_timesteps=(1.0, 0.8, 0.3))
"""One step for all chunks but the first."""
TEXT = replace(GEOMETRY, first_chunk=None, window=2, sink=0)
"""Chunks of 2 latents, generated from the first on; a ring that wraps."""


def rolled(net: Any, noise: Tensor) -> Latents:
    """Six latents under FEW, chunk by chunk, with the samplers of each chunk given by hand."""
    cond, parts = condition(6), []
    stream = Stream(net, cond, TEXT)
    for index, (a, b) in enumerate(TEXT.chunks(6)):
        times = (1.0, 0.8, 0.3) if index == 0 else (0.9,)
        prepared = stream.prepare_chunk(cond.frames(a, b))
        sampler = FewStepSampler(steps=len(times), timesteps=times)
        parts.append(stream.next_chunk(prepared, noise[:, :, a:b], sampler))
        stream.update_cache(prepared, parts[-1], noise[-1, :, a:b])
    return torch.cat(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
def test_the_first_chunk_has_times_of_its_own(merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In streams, recorded ones too, and in self-rollouts, at whichever step they are scored."""
    monkeypatch.setitem(globals(), "TEXT", replace(TEXT, merged_refresh=merged))
    net, cond, like = network(0), condition(6), latents(6)
    assert FEW.num_noise_samples(TEXT) == 3 and FEW.passes == 1
    noise = sample_noise(tuple(like.shape), 3, like, seeded(5))
    want, passes = rolled(net, noise), []
    with net.register_forward_hook(lambda *_: passes.append(1)):
        torch.testing.assert_close(generate_latents(net, FEW, noise, cond, TEXT), want, atol=0, rtol=0)
    assert len(passes) == 3 + 1 + 1 + (0 if merged else 3)
    for exit_step in (None, 0, 1, 2):
        made, scored = self_rollout(net, noise, cond, TEXT, FEW, exit_step)
        torch.testing.assert_close(made, want, atol=1e-5, rtol=1e-5)
        first = exit_step in (None, 2), True
        assert tuple(torch.allclose(*x, atol=1e-5) for x in zip(scored.split(2, 1), want.split(2, 1), strict=True)) == (
            *first, True,
        )  # fmt: skip


@torch.no_grad()
def test_a_recorded_first_chunk_is_not_replayed_for_others() -> None:
    """In a ring of one slot all chunks have the same shape, place and rows."""
    net, cond, like = network(0), condition(2), latents(2)
    geometry, noise = replace(TEXT, window=1), sample_noise((2, 2, *like.shape[2:]), 3, like, seeded(5))

    made = []
    for stream in (Stream(net, cond, geometry), GraphedStream(net, cond, geometry, capture=traced)):
        prepared = stream.prepare_chunk(cond)
        for _ in range(2):
            x = stream.next_chunk(prepared, noise, FEW)
            stream.update_cache(prepared, x)
        made.append(x)
    torch.testing.assert_close(*made)


def test_states_are_collected_at_the_listed_times() -> None:
    """On the straight paths of a known clip; chunks with fewer steps than the first repeat theirs."""
    x = latents(6)
    given, net = Clip(x, condition(6)), Exact(x)
    model = replace(MODEL, sampler=FewStepSampler(steps=2, timesteps=(1.0, 0.7), first_timesteps=(1.0, 0.95, 0.5, 0.1)))
    model = replace(model, stream=replace(MODEL.stream, first_chunk=None), latents=6)
    states = OdeConfig(ode_steps=7).collect_states(net, given, model, seeded())
    rows = [(1.0, 1.0), (0.95, 1.0), (0.5, 0.7), (0.1, 0.7), (0.0, 0.0)]
    for state, (first, others) in zip(states, rows, strict=True):
        t = torch.tensor([first] * 2 + [others] * 4).double().expand(2, 6)
        torch.testing.assert_close(state, interpolate(x, states[0], t), atol=1e-5, rtol=1e-5)
    recipe = OdeConfig().build(model, {"student": net})
    losses = [float(recipe.loss(replace(given, trajectory=states), 0, seeded(s)).total.detach()) for s in range(8)]
    assert max(losses) < 1e-9, "and the loss asks at those times"
    with pytest.raises(ConfigError, match="5 trajectory states, these have 2"):
        recipe.loss(replace(given, trajectory=states[:2]), 0, seeded())


def test_lists_are_kept_in_the_model_and_checked() -> None:
    model = replace(MODEL, sampler=FEW)
    assert loads(ModelConfig, dumps(model)) == model
    assert "timesteps" in dumps(MODEL)
    short = override(MODEL, {"sampler.steps": "1", "sampler.timesteps": "1", "sampler.first_timesteps": "1,0.9,0.5"})
    assert short.sampler == FewStepSampler(steps=1, timesteps=(1.0,), first_timesteps=(1.0, 0.9, 0.5))
    assert FEW.with_steps(2) == FewStepSampler(steps=2)
    for times in ((), (1000.0, 750.0), (0.5, 0.5), (0.5, 0.7), (0.5, 0.0), (float("nan"),)):
        with pytest.raises(ConfigError, match="give times that fall, from 1 at most to above 0"):
            FewStepSampler(steps=len(times) or 1, timesteps=times)
    with pytest.raises(ConfigError, match=r"sampler\.timesteps has 2, but sampler\.steps=4; set sampler\.steps=2"):
        FewStepSampler(timesteps=(1.0, 0.5))


# Diffusion forcing, and learning from memory

LONG = replace(
    MODEL, latents=11, stream=StreamConfig(chunk=2, first_chunk=1, sink=1, window=2, retrieved=1, recompute="causal")
)
"""Of six chunks a stream sees four: the image, one that it retrieves, one more and the current one."""


def long_clip() -> Clip:
    x = latents(11)
    return Clip(x, replace(condition(11), first_latents=x[:, :1]))


def test_diffusion_forcing_sees_noisy_chunks_in_one_copy() -> None:
    recipe = make("autoregressive", forcing="diffusion")
    with watched(recipe.networks["student"]) as passes:
        total = recipe.loss(clip(), 0, seeded(1)).total
    (t, v), given = passes[0], clip()
    assert v.shape == given.latents.shape and (t[:, 0] == 0).all() and t[:, 1:].min() > 0
    assert torch.equal(t[:, 1:3:2], t[:, 2:4:2]) and (t[:, 2] != t[:, 3]).all()
    total.backward()
    assert v.grad is not None and (v.grad.abs().amax((0, 2, 3, 4)) > 0).tolist() == [False, True, True, True, True]
    with pytest.raises(ConfigError, match="self_conditioning is for forcing=teacher"):
        AutoregressiveConfig(forcing="diffusion", self_conditioning=0.5)


@pytest.mark.parametrize("forcing", ["teacher", "diffusion"])
def test_memory_is_what_a_stream_would_have(forcing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One random chunk is learned, after the image, what it retrieves, and the chunk before it."""
    recipe = make("autoregressive", LONG, forcing=forcing, memory=1.0, memory_grows=100, text_dropout=0.0)
    given, seen = long_clip(), list[Clip]()
    monkeypatch.setattr(AutoregressiveConfig, "augment", lambda _, clip, *__: seen.append(clip) or clip)
    for step in (0, 99, 100):
        for seed in range(6):
            with watched(recipe.networks["student"]) as passes:
                recipe.loss(given, step, seeded(seed)).total.backward()
            (t, v), noisy = passes[0], slice(-7, None)
            assert (
                v.grad is not None
                and (v.grad[:, noisy].abs().amax((0, 2, 3, 4)) > 0).tolist() == [False] * 5 + [True] * 2
            )
            if forcing == "diffusion":
                assert (t[:, 0] == 0).all() and t[:, 1:5].min() >= 0.016 and t[:, 1:5].max() <= 0.5
    ends = [next(i for i in range(11) if torch.equal(part.latents[:, -1], given.latents[:, i])) for part in seen]
    assert set(ends[:12]) == {8} and set(ends[12:]) == {8, 10}, "in whole clips at last"
    for part, end in zip(seen, ends, strict=True):
        assert torch.equal(part.latents[:, [0, 3, 4]], given.latents[:, [0, end - 3, end - 2]])
        assert part.cond.actions is not None and given.cond.actions is not None
        assert torch.equal(part.cond.actions[:, -2:], given.cond.actions[:, end - 1 : end + 1])
    start = make("autoregressive", LONG, forcing=forcing, memory=1e-9)
    with watched(start.networks["student"]) as passes:
        start.loss(given, 0, seeded()).total.backward()
    assert passes[0][1].shape[1] == 7 * (1 + (forcing == "teacher"))


def test_memory_needs_a_stream_that_has_one() -> None:
    for model in (MODEL, replace(LONG, latents=7)):
        with pytest.raises(ConfigError, match=r"needs stream\.recompute=causal"):
            AutoregressiveConfig(memory=0.8).check(model)
    AutoregressiveConfig(memory=0.8).check(LONG)
    with pytest.raises(ConfigError, match="is not trained in one pass"):
        AutoregressiveConfig().check(LONG)
    with pytest.raises(ConfigError, match="two times in"):
        AutoregressiveConfig(memory_times=(0.5, 0.1))
