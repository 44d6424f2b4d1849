"""What must hold for every training stage: its loss falls, it moves one network, it follows its equation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from backbones import SMALL, condition, latents
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode

from minwm.core.config import ConfigError
from minwm.core.flow import Latents, Times, schedule
from minwm.core.memory import Meter
from minwm.core.types import Clip, Condition
from minwm.nets.attention import Geometry, Scope
from minwm.nets.backbone import Backbone, Bound, Checkpointing, Past, TextKV, policy
from minwm.presets import tiny_model
from minwm.recipes.base import Loss, Recipe, noise_like, own_past, past_of
from minwm.recipes.consistency import Consistency, ConsistencyConfig, guided_teacher
from minwm.recipes.diffusion import Autoregressive, AutoregressiveConfig, Bidirectional, BidirectionalConfig, TimeLaw
from minwm.recipes.dmd import Dmd, DmdConfig, direction, surrogate
from minwm.recipes.ode import Ode, OdeConfig, collect
from minwm.sampling import draw, self_rollout
from minwm.train import Run, autocast

GEOMETRY = Geometry(tokens=6, chunk=2, first=1, window=8, sink=1)
FRAMES = 5
PLAIN = TimeLaw(weight="none")
CASES: dict[str, tuple[type, Any]] = {
    "bidirectional": (Bidirectional, BidirectionalConfig(time=PLAIN)),
    "autoregressive": (Autoregressive, AutoregressiveConfig(time=PLAIN)),
    "ode": (Ode, OdeConfig()),
    "consistency": (Consistency, ConsistencyConfig(grid=8)),
    "dmd": (Dmd, DmdConfig(steps=2)),
}
every_recipe = pytest.mark.parametrize("name", CASES)
TURNS = [(name, step) for name in CASES for step in ((0, 1) if name == "dmd" else (0,))]
"""Every recipe, at a step of each network that it trains: DMD starts with the student."""
every_turn = pytest.mark.parametrize(("name", "step"), TURNS)


def network(seed: int) -> Backbone:
    """Initialised as for training, but with a head and a camera branch that are no longer zero."""
    torch.manual_seed(seed)
    net = SMALL["wan-dual"].build().double()
    for key, parameter in net.named_parameters():
        if key.startswith("head.head") or "prope_o" in key:
            nn.init.normal_(parameter, std=0.2)
    return net


def make(name: str, **changes: Any) -> Recipe:
    """A recipe with random networks in all roles."""
    cls, cfg = CASES[name]
    roles = {role: network(seed) for seed, role in enumerate((*cls.trained, *cls.frozen))}
    return cls(replace(cfg, **changes), roles, GEOMETRY)


def clip(image: bool = True, batch: int = 2) -> Clip:
    x, cond = latents(FRAMES, batch), condition(FRAMES, batch)
    states = torch.stack([latents(FRAMES, batch, seed=20 + k) for k in range(5)])
    return Clip(x, replace(cond, first=x[:, :1] if image else None), states)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


@contextmanager
def watched(net: Backbone) -> Iterator[list[tuple[Times, Latents]]]:
    """Times and outputs of every pass of a network that is under gradient."""
    seen, velocity = [], net.velocity

    def recording(x: Latents, t: Times, bound: Bound, scope: Scope) -> Latents:
        v = velocity(x, t, bound, scope)
        if v.requires_grad:
            v.retain_grad()
            seen.append((t, v))
        return v

    net.velocity = recording  # pyright: ignore[reportAttributeAccessIssue]
    yield seen
    net.velocity = velocity


class Exact(Backbone):
    """The exact velocity field of a data set with one clip in it: everything flows straight to that clip."""

    layers, heads, head_width = 1, 1, 4

    def __init__(self, datum: Latents) -> None:
        super().__init__()
        self.datum = nn.Parameter(datum.clone())

    def read(self, text: Tensor) -> TextKV:
        return []

    def watch(self, cond: Condition) -> None:
        return None

    def tokens(self, height: int, width: int) -> int:
        return GEOMETRY.tokens

    def later(self, keys: Tensor, frames: int) -> Tensor:
        return keys

    def rebased(self, kv: Tensor, frame: Tensor) -> Tensor:
        return kv

    def velocity(self, x: Latents, t: Tensor, bound: Bound, scope: Scope) -> Latents:
        ends = self.datum[:, scope.positions(x.shape[1])].repeat(len(x) // len(self.datum), 1, 1, 1, 1)
        t = t[:, :, None, None, None]
        return torch.where(t > 0, (x - ends) / t.clamp_min(1e-3), 0)


# Every recipe


@every_turn
def test_one_network_moves(name: str, step: int) -> None:
    recipe = make(name)
    before = {role: weights(net) for role, net in recipe.networks.items()}
    loss = recipe.loss(clip(), step, seeded())
    loss.total.backward()
    assert loss.trains in recipe.trained
    assert all(isinstance(value, float) for value in loss.logs.values())
    for role, net in recipe.networks.items():
        assert torch.equal(weights(net), before[role]), "a loss has no side effect on weights that are equal"
        assert bool(gradients(net)) == (role == loss.trains)
    torch.optim.AdamW(recipe.networks[loss.trains].parameters(), 1e-3).step()
    assert {r for r, n in recipe.networks.items() if not torch.equal(weights(n), before[r])} == {loss.trains}


@every_recipe
def test_frozen_roles_are_frozen_and_not_saved(name: str) -> None:
    recipe = make(name)
    assert set(recipe.stateful) == set(recipe.networks) - set(recipe.frozen)
    for role in recipe.frozen:
        assert not recipe.networks[role].training
        assert not any(p.requires_grad for p in recipe.networks[role].parameters())


@every_turn
def test_every_parameter_of_the_network_gets_a_gradient(name: str, step: int) -> None:
    """The camera branch included."""
    recipe = make(name)
    loss = recipe.loss(clip(), step, seeded())
    loss.total.backward()
    for key, parameter in recipe.networks[loss.trains].named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@every_turn
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpointing_changes_no_gradient(name: str, step: int, precision: Any) -> None:
    recipe = make(name)
    expected, *others = (
        torch.autograd.grad(loss.total, list(recipe.networks[loss.trains].parameters()))
        for loss in (checkpointed(recipe, how, step, precision) for how in (False, True, "attention"))
    )
    for found in others:
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)


def checkpointed(recipe: Recipe, how: Checkpointing, step: int, precision: Any = "float32") -> Loss:
    # with weights cast anew for every pass, which sums gradients in float32, however much is kept
    run = Run(name="x", model=tiny_model(), recipe=recipe.cfg, data="", precision=precision, checkpointing=True)
    for net in recipe.networks.values():
        net.checkpointing = how
        if precision == "bfloat16":
            net.float()
    with autocast(run, torch.device("cpu")):
        return recipe.loss(clip(), step, seeded())


class Attentions(TorchDispatchMode):
    """Forward runs of attention among the video's tokens, and the bytes that they give."""

    count = given = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if policy(None, func, *args) is CheckpointPolicy.MUST_SAVE:
            self.count += 1
            self.given += sum(x.nbytes for x in out if isinstance(x, Tensor))
        return out


@pytest.mark.parametrize("name", ["bidirectional", "autoregressive"])
def test_what_checkpointing_computes_again_and_what_it_keeps(name: str) -> None:
    """Whole blocks: attention runs twice. All but attention: once, and no more is kept than what it gave."""
    runs, kept, gave = {}, {}, {}
    for how in (False, True, "attention"):
        recipe = make(name)
        with Attentions() as forward, Meter() as memory:
            loss = checkpointed(recipe, how, 0)
            kept[how], gave[how] = memory.live, forward.given
        with Attentions() as backward:
            loss.total.backward()
        runs[how] = (forward.count + backward.count) / forward.count
    assert runs == {False: 1, True: 2, "attention": 1}
    assert kept[True] < kept["attention"] < 0.6 * kept[False]
    assert kept["attention"] - kept[True] == gave["attention"]


@every_turn
def test_cameras_prompt_and_image_reach_the_loss(name: str, step: int) -> None:
    recipe = make(name, **({"text_dropout": 0.0} if name in ("bidirectional", "autoregressive") else {}))
    given = clip()
    assert given.cond.w2c is not None and given.cond.first is not None

    def gradient(cond: Condition, x: Latents) -> Tensor:
        loss = recipe.loss(replace(given, cond=cond, latents=x), step, seeded())
        net = recipe.networks[loss.trains]
        return torch.autograd.grad(loss.total, [p for p in net.parameters() if p.ndim == 2])[0]

    before = gradient(given.cond, given.latents)
    image = given.latents.clone()
    image[:, :1] += 1
    changes = {
        "w2c": (replace(given.cond, w2c=given.cond.w2c.flip(1)), given.latents),
        "text": (replace(given.cond, text=-given.cond.text), given.latents),
        "first": (replace(given.cond, first=image[:, :1]), image),
    }
    for what, change in changes.items():
        assert (gradient(*change) - before).norm() > 1e-3 * before.norm(), what


@every_turn
@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
def test_a_given_first_frame_is_not_scored(name: str, step: int, image: bool) -> None:
    recipe = make(name)
    trains = recipe.loss(clip(image), step, seeded()).trains
    with watched(recipe.networks[trains]) as passes:
        recipe.loss(clip(image), step, seeded()).total.backward()
    first, other = 0.0, 0.0
    for _, v in passes:
        assert v.grad is not None
        size, start = v.grad.abs().amax((0, 2, 3, 4)), v.shape[1] - FRAMES
        if start in (0, FRAMES):  # all frames at once, or behind their clean copy
            assert size[:start].sum() == 0, "the clean half is context"
            first, other = first + float(size[start]), other + float(size[start + 1 :].min())
        elif v.shape[1] == 1:
            first += float(size)
        else:
            other += float(size.min())
    assert other > 0
    assert (first == 0) == image


@every_turn
def test_all_randomness_is_in_the_generator(name: str, step: int) -> None:
    losses = [float(make(name).loss(clip(), step, seeded(seed)).total.detach()) for seed in (3, 3, 5)]
    recipe = make(name)
    state = torch.get_rng_state()
    recipe.loss(clip(), step, seeded())
    assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("name", ["bidirectional", "autoregressive", "ode", "consistency"])
def test_loss_falls_on_one_batch(name: str) -> None:
    """Of consistency too, where few pairs of times separate every one from the fixed end."""
    recipe, given = make(name, **({"grid": 2} if name == "consistency" else {})), clip()
    optimizer = torch.optim.AdamW(recipe.networks["student"].parameters(), 5e-3)

    def measure() -> float:
        with torch.no_grad():
            return sum(float(recipe.loss(given, 0, seeded(100 + i)).total) for i in range(8))

    before = measure()
    for step in range(40):
        recipe.loss(given, step, seeded(step)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert measure() < 0.6 * before


@pytest.mark.parametrize("name", ["bidirectional", "autoregressive", "ode", "consistency"])
@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
def test_the_exact_field_has_no_loss(name: str, image: bool) -> None:
    """And its gradient vanishes: what a recipe trains for is the flow of the data."""
    given, (cls, cfg) = clip(image), CASES[name]
    exact = {role: Exact(given.latents) for role in (*cls.trained, *cls.frozen)}
    if name == "ode":
        given = replace(given, trajectory=collect(Exact(given.latents), given, cfg, GEOMETRY, seeded()))
    recipe = cls(cfg, exact, GEOMETRY)
    assert max(float(recipe.loss(given, 0, seeded(i)).total.detach()) for i in range(8)) < 1e-20


@every_recipe
def test_roles_must_fit(name: str) -> None:
    cls, cfg = CASES[name]
    with pytest.raises(ConfigError, match=r"needs the roles .*'student'"):
        cls(cfg, {"pupil": network(0)}, GEOMETRY)


# Diffusion


def times_of(recipe: Recipe) -> Times:
    with watched(recipe.networks["student"]) as passes:
        recipe.loss(clip(), 0, seeded())
    return passes[0][0]


def test_bidirectional_has_one_time_per_clip_and_a_clean_image() -> None:
    t = times_of(make("bidirectional"))
    assert (t[:, 0] == 0).all() and (t[:, 1:] == t[:, 1:2]).all() and t[0, 1] != t[1, 1]


def test_autoregressive_has_one_time_per_chunk_and_a_clean_past() -> None:
    clean, noisy = times_of(make("autoregressive")).split(FRAMES, 1)
    assert (clean == 0).all()
    assert torch.equal(noisy[:, 1], noisy[:, 2]) and torch.equal(noisy[:, 3], noisy[:, 4])
    assert len(noisy.unique()) == 2 * 3, "two clips of three chunks"


WAN = TimeLaw(law="uniform", shift=5.0), [0.053, 0.626, 0.834, 0.938, 0.998]
HUNYUAN = TimeLaw(law="logit_normal", shift=3.0), [0.225, 0.604, 0.750, 0.855, 0.969]


@pytest.mark.parametrize(("law", "want"), [WAN, HUNYUAN], ids=["wan", "hunyuan"])
def test_time_quantiles(law: TimeLaw, want: list[float]) -> None:
    """Of the foundation models' training, at 1, 25, 50, 75 and 99 %; theirs are those of a grid of 1000."""
    t = law.draw((200_000,), seeded())
    got = t.quantile(torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99]))
    torch.testing.assert_close(got, torch.tensor(want), atol=7e-3, rtol=0)


@pytest.mark.parametrize("name", ["bidirectional", "autoregressive"])
def test_text_dropout_removes_whole_prompts(name: str) -> None:
    given = clip()
    other = replace(given, cond=replace(given.cond, text=-given.cond.text))
    for rate, same in ((1.0, True), (0.0, False)):
        a, b = (make(name, text_dropout=rate).loss(x, 0, seeded()).total for x in (given, other))
        assert bool(a == b) == same


@pytest.mark.parametrize(("name", "step"), [turn for turn in TURNS if turn[0] != "ode"])
def test_image_start_zero_trains_on_text_alone(name: str, step: int) -> None:
    a = make(name, image_start=0.0).loss(clip(image=True), step, seeded()).total
    assert a == make(name, image_start=0.0).loss(clip(image=False), step, seeded()).total


@pytest.mark.parametrize("name", ["autoregressive", "consistency"])
@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
def test_context_noise_is_on_the_past_alone(name: str, image: bool) -> None:
    """At the stream's level, or below it where it is learned; a given image stays clean."""
    recipe, level = make(name), 0.2
    recipe.geometry = replace(GEOMETRY, context_noise=level)
    with watched(recipe.networks["student"]) as passes:
        for seed in range(20):
            recipe.loss(clip(image), 0, seeded(seed))
    past = torch.cat([t[:, :FRAMES] for t, _ in passes])
    assert (past[:, 0].max() == 0) == image
    later = past[:, 1:]
    assert torch.equal(later[:, ::2], later[:, 1::2]), "one level per chunk"
    if name == "consistency":
        torch.testing.assert_close(later, torch.full_like(later, level))
    else:
        assert 0 <= later.min() < level / 4 < 0.75 * level < later.max() <= level


@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
def test_own_past_is_what_the_network_tells(image: bool) -> None:
    """A network that knows the clip tells the clip; another one does not, but for the image that it was given."""
    given, zeros = clip(image), torch.zeros(2, FRAMES, dtype=torch.float64)
    truth = Past(given.latents, zeros)
    knows, guesses = (
        own_past(net, given, truth, 3.0, GEOMETRY, seeded()) for net in (Exact(given.latents), network(0))
    )
    torch.testing.assert_close(knows.latents, given.latents)
    changed = (guesses.latents - given.latents).abs().amax((0, 2, 3, 4)) > 0.01
    assert changed.tolist() == [not image, *[True] * (FRAMES - 1)]
    assert not guesses.latents.requires_grad and guesses.t is truth.t
    for name in ("autoregressive", "consistency"):
        with watched((recipe := make(name, own_past=1.0)).networks["student"]) as passes:
            one = recipe.loss(given, 0, seeded()).total
        assert len(passes) == 1, "no gradient reaches the past"
        assert one != make(name).loss(given, 0, seeded()).total


# Distillation


@torch.no_grad()
@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize(("guidance", "level"), [(1.0, 0.0), (3.0, 0.0), (3.0, 0.2)])
def test_collected_trajectories_are_those_of_teacher_forcing(guidance: float, level: float, image: bool) -> None:
    """Chunk by chunk from a cache of the real past, or all chunks at once, each behind its clean copy: the same.

    The ring is smaller than the clip, sinks would roll and the cache would keep what was denoised last: windows must
    agree, and places and past must be those of the clip.
    """
    net, given, cfg = network(0), clip(image), OdeConfig(steps=2, ode_steps=4, guidance=guidance)
    geometry = replace(GEOMETRY, context_noise=level, window=1, roll=True, merged_refresh=True)
    states = collect(net, given, cfg, geometry, seeded())
    assert states.shape == (3, *given.latents.shape)
    generator = seeded()
    past, x = past_of(given, level, generator), noise_like(given.latents, generator)
    torch.testing.assert_close(states[0], x)
    for step, (t, t_next) in enumerate(pairwise(schedule(4, cfg.shift))):
        x = x + (t_next - t) * guided_teacher(net, past, given.cond, x, t, guidance, geometry)
        if step % 2:
            torch.testing.assert_close(states[(step + 1) // 2], x, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_collecting_costs_half_of_teacher_forcing() -> None:
    net, given, cfg = network(0), clip(), OdeConfig(steps=2, ode_steps=20)
    past = past_of(given, 0.0, seeded())
    with FlopCounterMode(display=False) as streamed:
        collect(net, given, cfg, GEOMETRY, seeded())
    with FlopCounterMode(display=False) as forced:
        for t in schedule(20, cfg.shift)[:-1]:
            guided_teacher(net, past, given.cond, given.latents, t, cfg.guidance, GEOMETRY)
    assert streamed.get_total_flops() < 0.6 * forced.get_total_flops()


def test_ode_says_that_trajectories_are_missing() -> None:
    with pytest.raises(ConfigError, match="5 trajectory states, these have 0; collect"):
        make("ode").loss(replace(clip(), trajectory=None), 0, seeded())
    with pytest.raises(ConfigError, match="try 48"):
        OdeConfig(ode_steps=47)


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
    recipe = make("dmd", critic_updates=2, steps=1)
    assert [recipe.loss(clip(), s, seeded()).trains[0] for s in range(7)] == list("sccsccs")


def test_the_surrogate_has_the_step_as_its_gradient() -> None:
    x0, step = latents(FRAMES).requires_grad_(), latents(FRAMES, seed=8)
    (gradient,) = torch.autograd.grad(surrogate(x0, step), x0)
    torch.testing.assert_close(gradient * x0.numel(), step)


def test_direction_is_normalised_per_clip_over_generated_frames() -> None:
    x0, real, fake = (latents(FRAMES, seed=s) for s in (1, 2, 3))
    frames = torch.ones(2, FRAMES, dtype=torch.float64)
    frames[:, 0] = 0
    step = direction(x0, real, fake, frames)
    assert step[:, 0].abs().max() == 0
    torch.testing.assert_close(direction(7 * x0, 7 * real, 7 * fake, frames), step)
    alone = direction(x0[:1], real[:1], fake[:1], frames[:1])
    torch.testing.assert_close(alone, step[:1])
    x0[:, 0] += 100
    torch.testing.assert_close(direction(x0, real, fake, frames), step)
    # A critic that knows the student: the step leads from the student's video straight to the real one.
    towards = direction(x0, real, x0, frames)[:, 1:]
    torch.testing.assert_close(towards.abs().mean((1, 2, 3, 4)), torch.ones(2, dtype=torch.float64))
    assert (towards * (x0 - real)[:, 1:] >= 0).all()


def test_equal_scores_give_no_gradient() -> None:
    recipe = make("dmd", guidance=1.0)
    recipe.networks["critic"].load_state_dict(recipe.networks["real"].state_dict())
    recipe.loss(clip(), 0, seeded()).total.backward()
    assert max(g.abs().max() for g in gradients(recipe.networks["student"])) == 0


def test_dmd_pulls_the_student_to_the_data() -> None:
    """With the exact score of one plain clip and a critic that learns online, its video nears that clip."""
    given = clip(batch=1)
    plain = torch.tensor([-1.0, 2.0, 0.5, -0.5]).double()[:, None, None].expand_as(given.latents)
    given = Clip(plain, replace(given.cond, first=plain[:, :1]))
    roles = {"student": network(0), "critic": network(1), "real": Exact(given.latents)}
    recipe = Dmd(DmdConfig(steps=2, critic_updates=1, guidance=1.0), roles, GEOMETRY)
    optimizers = {r: torch.optim.AdamW(roles[r].parameters(), 5e-3, (0.0, 0.99)) for r in Dmd.trained}

    def distance() -> float:
        noise = draw(tuple(given.latents.shape), 2, given.latents, seeded(9))
        video, _ = self_rollout(roles["student"], noise, given.cond, GEOMETRY, schedule(2, 5.0)[:-1], None)
        return float((video - given.latents).abs().mean())

    before = distance()
    for step in range(50):
        loss = recipe.loss(given, step, seeded(step))
        loss.total.backward()
        optimizers[loss.trains].step()
        optimizers[loss.trains].zero_grad()
    assert distance() < 0.6 * before


def test_dmd_never_looks_at_real_video() -> None:
    recipe, given = make("dmd"), clip()
    other = replace(given, latents=latents(FRAMES, seed=99))
    for step in (0, 1):
        a, b = (recipe.loss(x, step, seeded()).total for x in (given, other))
        assert a == b


@pytest.mark.parametrize(("still", "same"), [(1.0, True), (0.0, False)])
def test_who_stands_still_in_dmd_goes_nowhere(still: float, same: bool) -> None:
    """Only the place counts where the camera starts."""
    recipe, given = make("dmd", still=still), clip()
    assert given.cond.w2c is not None
    elsewhere = torch.cat([given.cond.w2c[:, :1], given.cond.w2c[:, 1:].flip(1)], 1)
    other = replace(given, cond=replace(given.cond, w2c=elsewhere))
    for step in (0, 1):
        a, b = (recipe.loss(x, step, seeded()).total for x in (given, other))
        assert (a == b) == same
