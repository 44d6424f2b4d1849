"""What must hold for every training stage: its loss falls, it moves one network, it follows its equation."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from backbones import DUAL, SMALL, UNREAD, small
from recipes import (
    CASES,
    FRAMES,
    GEOMETRY,
    LONG_FIRST,
    MODEL,
    TURNS,
    Exact,
    clip,
    every_recipe,
    every_turn,
    gradients,
    make,
    network,
    seeded,
    watched,
    weights,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from minwm.cameras.track import se3_inverse
from minwm.core.config import ConfigError
from minwm.core.flow import Latents, Times
from minwm.core.memory import MemoryMeter
from minwm.core.types import Condition
from minwm.nets.backbone import Checkpointing, keep_attention
from minwm.recipes.base import Loss, Recipe
from minwm.recipes.diffusion import TimeLaw
from minwm.recipes.dmd import Dmd, DmdConfig, standing_still
from minwm.recipes.ops import random_part, self_conditioned_context, teacher_context
from minwm.store.model import ModelConfig
from minwm.train.config import Run
from minwm.train.loop import autocast

# Every recipe


@every_turn
def test_one_network_moves(name: str, step: int) -> None:
    recipe = make(name)
    before = {role: weights(net) for role, net in recipe.networks.items()}
    loss = recipe.loss(clip(), step, seeded())
    loss.total.backward()
    assert loss.trains == recipe.cfg.turn[step]
    assert all(value.ndim == 0 and not value.requires_grad for value in loss.logs.values())
    for role, net in recipe.networks.items():
        assert torch.equal(weights(net), before[role]), "a loss has no side effect on weights that are equal"
        assert bool(gradients(net)) == (role == loss.trains)
    torch.optim.AdamW(recipe.networks[loss.trains].parameters(), 1e-3).step()
    assert {r for r, n in recipe.networks.items() if not torch.equal(weights(n), before[r])} == {loss.trains}


@every_recipe
def test_frozen_roles_are_frozen_and_not_saved(name: str) -> None:
    recipe = make(name)
    assert set(recipe.stateful) == set(recipe.networks) - set(recipe.cfg.frozen)
    for role in recipe.cfg.frozen:
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
    run = Run(name="x", model=MODEL, recipe=recipe.cfg, data="", precision=precision, checkpointing=True)
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
        if keep_attention(None, func, *args) is CheckpointPolicy.MUST_SAVE:
            self.count += 1
            self.given += sum(x.nbytes for x in out if isinstance(x, Tensor))
        return out


@pytest.mark.parametrize("name", ["bidirectional", "autoregressive"])
def test_what_checkpointing_computes_again_and_what_it_keeps(name: str) -> None:
    """Whole blocks: attention runs twice. All but attention: once, and no more is kept than what it gave."""
    runs, kept, gave = {}, {}, {}
    for how in (False, True, "attention"):
        recipe = make(name)
        with Attentions() as forward, MemoryMeter() as memory:
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
    assert given.cond.w2c is not None and given.cond.first_latent is not None

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
        "first": (replace(given.cond, first_latents=image[:, :1]), image),
    }
    for what, change in changes.items():
        assert (gradient(*change) - before).norm() > 1e-3 * before.norm(), what


@every_turn
@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("model", [MODEL, LONG_FIRST], ids=["alone", "in a chunk"])
def test_a_given_first_frame_is_not_scored(model: ModelConfig, name: str, step: int, image: bool) -> None:
    recipe = make(name, model)
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
        elif v.shape[1] == model.stream.first_chunk_frames:
            first, other = first + float(size[0]), other + float(size[1:].sum())
        else:
            other += float(size.min())
    assert other > 0
    assert (first == 0) == image


@pytest.mark.parametrize(("name", "step"), [turn for turn in TURNS if turn[0] != "ode"])
@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
def test_given_chunks_of_a_video_are_clean_and_not_scored(name: str, step: int, image: bool) -> None:
    """Of three chunks (an image, 2, 2) one or two are given; what is given decides the rest."""
    recipe, given, counts = make(name, image_start=float(image), video_start=1.0), clip(), set[int]()
    for seed in range(6):
        trains = recipe.loss(given, step, seeded(seed)).trains
        with watched(recipe.networks[trains]) as passes:
            recipe.loss(given, step, seeded(seed)).total.backward()
        times, v = passes[-1] if name != "dmd" or step else (None, None)
        if times is None or v is None or v.grad is None:
            continue  # the student of DMD has no pass over given chunks
        size = v.grad.abs().amax((0, 2, 3, 4))[-FRAMES:]
        counts.add(int((size == 0).sum()))
        assert not times[:, -FRAMES:][:, size == 0].any(), "given frames are shown at t = 0"
        assert size.tolist() == sorted(size.tolist(), key=bool), "they come first"
    assert counts == (set() if name == "dmd" and not step else {1, 3})


def test_dmd_goes_on_from_the_real_video_that_is_given() -> None:
    recipe, given = make("dmd", video_start=1.0), clip()
    assert isinstance(recipe, Dmd)
    start = replace(given, cond=replace(given.cond, first_latents=given.latents[:, :3]))
    rollout, scored, *_ = recipe._rollout(start, [0, 0], seeded())
    for x in (rollout.latents, scored):
        assert torch.equal(x[:, :3], given.latents[:, :3]) and not torch.equal(x[:, 3:], given.latents[:, 3:])
    other = replace(start, cond=replace(start.cond, first_latents=-given.latents[:, :3]))
    assert not torch.allclose(recipe._rollout(other, [0, 0], seeded())[1][:, 3:], scored[:, 3:])
    assert standing_still(start.cond, FRAMES).tolist() == [0, 1, 2, 2, 2]


def test_a_video_start_needs_a_chunk_after_it() -> None:
    one = replace(MODEL, stream=replace(MODEL.stream, chunk=FRAMES, first_chunk=None, image_start=False))
    with pytest.raises(ConfigError, match=r"video_start=0\.5: a clip of 5 latents is a single chunk"):
        DmdConfig(video_start=0.5).check(one)


@every_turn
def test_all_randomness_is_in_the_generator(name: str, step: int) -> None:
    losses = [float(make(name).loss(clip(), step, seeded(seed)).total.detach()) for seed in (3, 3, 6)]
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
    given, cfg = clip(image), CASES[name]
    recipe = cfg.build(MODEL, {role: Exact(given.latents) for role in (*cfg.trained, *cfg.frozen)})
    if cfg.needs_trajectories:
        states = cfg.collect_states(Exact(given.latents), given, MODEL, seeded())
        given = replace(given, trajectory=states)
    assert max(float(recipe.loss(given, 0, seeded(i)).total.detach()) for i in range(8)) < 1e-20


@every_recipe
def test_roles_must_fit(name: str) -> None:
    with pytest.raises(ConfigError, match=r"needs the roles .*'student'"):
        CASES[name].build(MODEL, {"pupil": network(0)})


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
    assert (clean == 0).all() and (noisy[:, 0] == 0).all()
    assert torch.equal(noisy[:, 1], noisy[:, 2]) and torch.equal(noisy[:, 3], noisy[:, 4])
    assert len(noisy[:, 1:].unique()) == 2 * 2, "two clips of two chunks after the image"


def test_a_random_part_of_a_clip_is_a_clip() -> None:
    whole, taken = clip(), set[tuple[int, int]]()
    for seed in range(60):
        part = random_part(whole, 3, seeded(seed), apart=9)
        start, second = (
            next(i for i in range(FRAMES) if torch.equal(whole.latents[:, i], part.latents[:, k])) for k in (0, 1)
        )
        step = second - start
        taken.add((start, step))
        assert torch.equal(part.latents, whole.latents[:, start : start + 2 * step + 1 : step])
        assert part.cond.first_latent is not None and torch.equal(part.cond.first_latent, part.latents[:, :1])
        assert part.cond.w2c is not None and whole.cond.w2c is not None and part.cond.K is not None
        torch.testing.assert_close(part.cond.w2c[:, 0], torch.eye(4).expand(2, 4, 4), atol=1e-6, rtol=0)
        there = whole.cond.w2c[:, start + 2 * step] @ se3_inverse(whole.cond.w2c[:, second])
        torch.testing.assert_close(part.cond.w2c[:, 2] @ se3_inverse(part.cond.w2c[:, 1]), there, atol=1e-5, rtol=1e-5)
    assert taken == {(start, step) for step in (1, 2) for start in range(FRAMES - 2 * step)}
    assert torch.equal(random_part(whole, FRAMES, seeded()).latents, whole.latents)
    parts = [random_part(whole, 3, seeded(seed), sink=True).latents for seed in range(60)]
    found = [
        [next(i for i in range(FRAMES) if torch.equal(whole.latents[:, i], x)) for x in p.unbind(1)] for p in parts
    ]
    assert {tuple(part) for part in found} == {(a, b, b + 1) for b in range(1, FRAMES - 1) for a in range(b)}
    assert random_part(clip(image=False), 3, seeded()).cond.first_latent is None


@pytest.mark.parametrize(
    ("name", "seen"), [("bidirectional", 3), ("autoregressive", 6), ("consistency", 6), ("dmd", 2)]
)
def test_a_step_may_take_parts_of_clips(name: str, seen: int) -> None:
    """The student of `dmd` has a chunk of 2 to generate after the image."""
    assert times_of(make(name, latents=3)).shape[1] == seen
    with pytest.raises(ConfigError, match=rf"{name}\.latents={FRAMES + 1}: give 0, or one of .*\b{FRAMES}$"):
        make(name, latents=FRAMES + 1).cfg.check(MODEL)
    for wrong in ({"latents": 3, "latents_apart": 0}, {"latents_apart": 2}):
        with pytest.raises(ConfigError, match=r"latents_apart=[02]: give at least 1, and 1 for whole clips"):
            make(name, **wrong)
    uneven = make(name, latents=4).cfg
    if name != "bidirectional":
        with pytest.raises(ConfigError, match=r"latents=4: give 0, or one of 3, 5"):
            uneven.check(MODEL)
    else:
        uneven.check(MODEL)


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


def test_the_past_is_shown_at_a_time_of_its_own() -> None:
    """HY-WorldPlay's past is clean and shown at 14/1000."""
    shown = teacher_context(clip(), replace(GEOMETRY, context_time=0.014), seeded())
    torch.testing.assert_close(shown.latents, clip().latents)
    assert shown.t[:, 0].max() == 0 and (shown.t[:, 1:] == 0.014).all()


@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
def test_self_conditioning_is_what_the_network_streams(image: bool) -> None:
    """A network that knows the clip streams the clip; another one does not, and sees none of it but a given image."""
    given, net = clip(image), network(0)
    other = replace(given, latents=torch.cat([given.latents[:, :1], -given.latents[:, 1:]], 1))
    knows, guesses, unseen = (
        self_conditioned_context(made_by, of, 3.0, GEOMETRY, seeded())
        for made_by, of in ((Exact(given.latents), given), (net, given), (net, other))
    )
    torch.testing.assert_close(knows.latents, given.latents)
    changed = (guesses.latents - given.latents).abs().amax((0, 2, 3, 4)) > 0.01
    assert changed.tolist() == [not image, *[True] * (FRAMES - 1)]
    assert torch.equal(guesses.latents, unseen.latents)
    assert not guesses.latents.requires_grad and not guesses.t.any()
    for name in ("autoregressive", "consistency"):
        with watched((recipe := make(name, self_conditioning=1.0)).networks["student"]) as passes:
            one = recipe.loss(given, 0, seeded()).total
        assert len(passes) == 1, "no gradient reaches the past"
        assert one != make(name).loss(given, 0, seeded()).total


@pytest.mark.parametrize("family", [name for name in DUAL if name != "wan-dual"])
@every_turn
def test_every_recipe_trains_every_family_and_checkpointing_changes_nothing(name: str, step: int, family: str) -> None:
    """The loss of one batch falls, and every parameter that is read has a gradient. Wan is what other tests train."""
    model, found = replace(MODEL, network=SMALL[family]), []
    how: Checkpointing
    for how in (False, True, "attention"):
        cfg = CASES[name]
        networks = {role: small(family, seed) for seed, role in enumerate((*cfg.trained, *cfg.frozen))}
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
        assert all(key.startswith(UNREAD.get(SMALL[family].kind, ())) for key in idle), idle
        assert how is not False or losses[-1] < losses[0], losses
        found.append((losses[0], gradients))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
