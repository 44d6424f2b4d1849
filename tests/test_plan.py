"""Plans against reality: what is planned without data is what tensors with data take."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from minwm import presets
from minwm.checkpoint import ModelConfig
from minwm.cli import main
from minwm.core.memory import Meter
from minwm.core.trajectory import Motion
from minwm.core.types import Clip, Condition
from minwm.nets.codec import Codec, CodecConfig
from minwm.nets.text import WordText
from minwm.nets.wan import WanConfig
from minwm.nets.wan_vae import WanVaeConfig
from minwm.plan import (
    CONTEXT,
    FRAGMENTATION,
    GIB,
    PLAYING,
    TRAINING,
    Plan,
    advise,
    plan_inference,
    plan_training,
    reserve,
    size,
)
from minwm.recipes.codec import CodecRecipe, CodecTraining
from minwm.recipes.consistency import ConsistencyConfig
from minwm.recipes.diffusion import AutoregressiveConfig, BidirectionalConfig
from minwm.recipes.dmd import DmdConfig
from minwm.recipes.ode import OdeConfig
from minwm.sampling import Autoregressive, Bidirectional, FewStep, Stream, draws_of
from minwm.train import RECIPES, Ema, Init, Run

MODEL = ModelConfig(
    network=WanConfig(
        dim=32, heads=2, layers=1, ffn=64, channels=4, text_dim=8, text_length=24, freq_dim=8, camera="dual"
    ),
    sampler=FewStep(steps=2),
    codec=CodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1),
    motion=Motion(move=0.5, turn=24.0, fps=16.0),
    text=WordText(dim=8),
    latents=5,
    height=32,
    width=32,
    window=3,
)
"""Three chunks; its ring is larger."""
WIDE = replace(MODEL.network, channels=16)
RECIPE = {
    "bidirectional": BidirectionalConfig(),
    "autoregressive": AutoregressiveConfig(),
    "ode": OdeConfig(ode_steps=4),
    "consistency": ConsistencyConfig(grid=4),
    "dmd": DmdConfig(steps=2),
    "codec": CodecTraining(),
}


def stage(name: str, **changes: Any) -> Run:
    run = Run(name=name, model=MODEL, recipe=RECIPE[name], data="nowhere", init=Init(codec="nowhere"), batch=3)
    return replace(run, **changes)


def item(plan: Plan, name: str) -> int:
    (found,) = [one.bytes for one in (*plan.held, *plan.turns) if one.name == name]
    return found


def bytes_of(net: nn.Module) -> int:
    return sum(x.nbytes for x in (*net.parameters(), *net.buffers()))


# ------------------------------------------------------------------------------------------------ playing


def real_stream(config: ModelConfig, net: Any) -> tuple[Stream, Condition]:
    f = config.chunk
    w2c, K = torch.eye(4).expand(1, f, 4, 4), torch.tensor([0.7, 0.7, 0.5, 0.5]).expand(1, f, 4)
    cond = Condition(text=config.text.encode(["a room"]), w2c=w2c, K=K)
    stream = Stream(net, cond, config.geometry, config.sampler.guidance)
    stream.chunk = config.geometry.slots
    return stream, cond


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampler", [FewStep(steps=2), Autoregressive(steps=3)], ids=lambda s: s.kind)
def test_what_a_stream_holds_is_what_a_real_one_holds(sampler: Any, dtype: torch.dtype) -> None:
    config = replace(MODEL, sampler=sampler)
    plan = plan_inference(config, dtype)
    net, codec = config.network.build().to(dtype), config.codec.build().to(dtype)
    stream, cond = real_stream(config, net)
    assert item(plan, "network weights") == bytes_of(net)
    assert item(plan, "codec weights") == bytes_of(codec)
    assert item(plan, "cache") == stream.arena.kv.nbytes
    assert item(plan, "prompt") == sum(x.nbytes for pair in stream.text for x in pair)
    lost = stream.arena.about_to_lose(stream.chunk)
    assert item(plan, "undo") == sum(x.nbytes for x in lost) > 0
    _, state = codec.decode_next(torch.zeros(config.latent_shape(1, 3)))
    assert item(plan, "decoder state") == sum(x.nbytes for x in state)
    noise = torch.zeros(draws_of(sampler, MODEL.geometry), *config.latent_shape(1, config.chunk))
    bound = stream.look(cond)
    with Meter() as first:
        latents = stream.next_chunk(bound, noise, sampler)
        stream.keep(bound, latents)
    assert item(plan, "times") == pytest.approx(first.live - latents.nbytes, rel=0.15)  # and a table of places
    with Meter() as passing:
        latents = stream.next_chunk(bound, noise, sampler)
    assert item(plan, "activations: network") == pytest.approx(passing.peak, rel=0.15)
    with Meter() as decoding:
        codec.decode_next(latents, state)
    assert item(plan, "activations: decoder") == pytest.approx(decoding.peak, rel=0.02)


def test_guidance_doubles_the_cache_and_bfloat16_halves_it() -> None:
    few = plan_inference(MODEL, torch.float32)
    guided = plan_inference(replace(MODEL, sampler=Autoregressive()), torch.float32)
    half = plan_inference(MODEL)
    for name in ("cache", "prompt", "undo"):
        assert item(guided, name) == 2 * item(few, name) == 4 * item(half, name)
    for name in ("network weights", "codec weights", "decoder state"):
        assert item(guided, name) == item(few, name) == 2 * item(half, name)


def test_a_bidirectional_model_has_no_cache_and_makes_the_clip_at_once() -> None:
    config = replace(MODEL, sampler=Bidirectional())
    plan, longer = plan_inference(config), plan_inference(replace(config, latents=9))
    assert [one.name for one in plan.held] == ["network weights", "codec weights"]
    for name in ("activations: network", "activations: decoder"):
        assert 1.4 * item(plan, name) < item(longer, name) < 9 / 5 * item(plan, name)


# ------------------------------------------------------------------------------------------------ training


def batch(run: Run, generator: torch.Generator) -> Any:
    config = run.model
    if isinstance(run.recipe, CodecTraining):
        return torch.rand(run.batch, 4 * config.latents - 3, 3, config.height, config.width, generator=generator)
    x = torch.randn(config.latent_shape(run.batch), generator=generator)
    w2c = torch.eye(4).repeat(run.batch, config.latents, 1, 1)
    K = torch.tensor([0.7, 0.7, 0.5, 0.5]).repeat(run.batch, config.latents, 1)
    cond = Condition(text=config.text.encode(["a room"] * run.batch), w2c=w2c, K=K, first=x[:, :1].clone())
    return Clip(x, cond, x.repeat(5, 1, 1, 1, 1, 1) if isinstance(run.recipe, OdeConfig) else None)


def real_recipe(run: Run) -> Any:
    if isinstance(run.recipe, CodecTraining):
        codec = run.model.codec.build()
        assert isinstance(codec, Codec)
        return CodecRecipe(codec)
    kind = RECIPES[type(run.recipe)]
    nets = {role: run.model.network.build() for role in (*kind.trained, *kind.frozen)}
    for role in kind.trained:
        nets[role].checkpointing = run.checkpointing
    return kind(run.recipe, nets, run.model.geometry)


def allocated(work: Callable[[], Any]) -> int:
    """Peak of what torch's own allocator hands out: an instrument that shares nothing with the plan's."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    live = peak = 0
    assert record.profiler is not None and record.profiler.kineto_results is not None
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, live)
    return peak


def micro_batch(run: Run, recipe: Any, step: int) -> Tensor:
    """What the loop does between two updates, up to the backward pass."""
    generator = torch.Generator().manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=run.precision == "bfloat16"):
        return recipe.loss(batch(run, generator), step, generator).total


VARIANTS = {
    "plain": {},
    "bfloat16": {"precision": "bfloat16"},
    "checkpointing": {"checkpointing": True},
    "attention": {"checkpointing": "attention"},
    "accumulate": {"accumulate": 2, "batch": 1},
}
CASES = [*((name, "plain") for name in RECIPE), *(("autoregressive", variant) for variant in [*VARIANTS][1:])]
CASES += [("dmd", "checkpointing"), ("dmd", "attention")]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_activations_are_what_the_allocator_gives_out(name: str, variant: str) -> None:
    run = stage(name, **VARIANTS[variant])
    plan, recipe = plan_training(run), real_recipe(run)
    for step, role in enumerate(recipe.trained):
        real = allocated(lambda step=step: [micro_batch(run, recipe, step).backward() for _ in range(run.accumulate)])
        assert item(plan, f"activations: {role}") == pytest.approx(real, rel=0.05)
        recipe.stateful[role].zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", RECIPE)
def test_what_training_holds_is_what_its_objects_hold(name: str) -> None:
    run = stage(name, batch=2)
    plan, recipe = plan_training(run), real_recipe(run)
    nets = {"student": recipe.codec} if name == "codec" else recipe.networks
    total = bytes_of(Ema(nets["student"], run.ema).net)
    assert item(plan, "averaged student weights") == total
    for role, net in nets.items():
        assert item(plan, f"{role} weights") == bytes_of(net)
        total += bytes_of(net)
    for step, role in enumerate(recipe.trained):
        optimizer = run.optim.build(nets[role])
        optimizer.param_groups[0]["foreach"] = True  # as on a GPU
        micro_batch(run, recipe, step).backward()
        gradients = [p.grad for p in nets[role].parameters() if p.grad is not None]
        optimizer.step()
        moments = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.ndim)
        assert item(plan, f"{role} optimiser") == moments
        total += moments
        with Meter() as update:
            optimizer.step()
        real = sum(x.nbytes for x in gradients) + update.peak
        assert item(plan, f"update: {role}") == pytest.approx(real, rel=0.02)
        nets[role].zero_grad(set_to_none=True)
    assert sum(one.bytes for one in plan.held) == total


@pytest.mark.parametrize(("dim", "layers", "latents"), [(32, 1, 3), (48, 3, 5), (64, 4, 9)])
def test_activations_are_what_autograd_saves_and_some(dim: int, layers: int, latents: int) -> None:
    """At least what is saved for the backward pass; not half as much again."""
    network = replace(MODEL.network, dim=dim, ffn=2 * dim, layers=layers)
    run = stage("bidirectional", model=replace(MODEL, network=network, latents=latents))
    recipe, saved = real_recipe(run), {}
    parameters = {p.untyped_storage().data_ptr() for p in recipe.networks["student"].parameters()}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        loss = micro_batch(run, recipe, 0)
    kept = sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in parameters)
    assert loss.requires_grad
    assert kept <= item(plan_training(run), "activations: student") <= 1.5 * kept


def test_planning_leaves_nothing_behind() -> None:
    before = torch.get_rng_state()
    net = MODEL.network.build()
    torch.set_rng_state(before)
    first = torch.rand(())
    torch.set_rng_state(before)
    plan_training(stage("dmd"))
    plan_inference(MODEL)
    assert torch.equal(torch.rand(()), first)
    stream, cond = real_stream(MODEL, net)
    stream.commit(stream.look(cond), torch.zeros(MODEL.latent_shape(1, MODEL.chunk)))  # no table without data is used
    assert type(stream.arena.kv) is Tensor and bool(stream.arena.kv.isfinite().all())


# ------------------------------------------------------------------------------------------------ verdicts


def test_the_verdict_turns_where_the_reserve_is_all_that_is_left() -> None:
    plan = plan_training(stage("dmd"))
    assert plan.total == sum(one.bytes for one in plan.held) + max(one.bytes for one in plan.turns)
    enough = int((plan.total + CONTEXT) / (1 - FRAGMENTATION)) + 3
    assert reserve(enough) == pytest.approx(CONTEXT + FRAGMENTATION * enough, abs=1)
    assert plan.fits(enough) and plan.spare(enough) < 5
    assert not plan.fits(enough - 9) and plan.spare(enough - 9) < 0


def test_shards_share_what_is_held_and_nothing_else() -> None:
    plan = plan_training(stage("dmd"))
    held, turn = plan.total - plan.turn.bytes, plan.turn.bytes
    room = int((turn + held / 2.5 + CONTEXT) / (1 - FRAGMENTATION))
    assert plan.shards(room) == 3
    assert plan.shards(CONTEXT + turn) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (replace(MODEL, sampler=Autoregressive()), {"no guidance", "a window of 1 instead of 3 chunks"}),
        (replace(MODEL, sampler=Bidirectional()), {"clips of 3 latents instead of 5"}),
        (MODEL, {"a window of 1 instead of 3 chunks"}),
        (replace(MODEL, codec=WanVaeConfig(), network=WIDE, window=1), {"tiny codec taew2_1"}),
    ],
    ids=["autoregressive", "bidirectional", "few_step", "vae"],
)
def test_what_would_help_while_playing(config: ModelConfig, expected: set[str]) -> None:
    advice = advise(plan_inference, (config,), PLAYING)
    assert len(advice.changes) == len(expected)
    for words in expected:
        assert sum(words in change.what for change in advice.changes) == 1
    check_savings(plan_inference, (config,), advice, PLAYING)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (stage("autoregressive"), {"checkpointing", "bfloat16", "--batch 1 --accumulate 3", "clips of 3 latents"}),
        (
            stage(
                "autoregressive",
                batch=1,
                checkpointing=True,
                precision="bfloat16",
                model=replace(MODEL, latents=17),
            ),
            {"clips of 9 latents"},
        ),
        (stage("codec"), {"--batch 1 --accumulate 3", "clips of 3 latents", "bfloat16"}),
    ],
    ids=["autoregressive", "frugal", "codec"],
)
def test_what_would_help_in_training(run: Run, expected: set[str]) -> None:
    advice = advise(plan_training, (run,), TRAINING)
    assert len(advice.changes) == len(expected)
    for words in expected:
        assert sum(words in change.what for change in advice.changes) == 1
    check_savings(plan_training, (run,), advice, TRAINING)


def check_savings(plan: Callable[..., Plan], subject: tuple[Any, ...], advice: Any, options: Any) -> None:
    """Doing what an option says saves what it said; doing all of it saves at least as much as any."""
    now = plan(*subject).total
    saved = [change.saves for change in advice.changes]
    assert saved == sorted(saved, reverse=True) and min(saved) > 0
    tried = dict(done for option in options if (done := option(*subject)))
    for change in advice.changes:
        assert now - plan(*tried[change.what]).total == change.saves
    assert advice.plan == plan(*advice.subject)
    assert now - advice.plan.total >= saved[0]


def test_a_self_rollout_needs_no_more_slots_than_it_fills() -> None:
    wide = stage("dmd", model=replace(MODEL, window=9, latents=3))
    offered = dict(done_by(wide))
    (what,) = [what for what in offered if what.startswith("--model.window 1")]
    assert plan_training(*offered[what]).total < plan_training(wide).total
    ring = replace(wide.model, window=1, sink=1)
    assert not any("checkpoint" in what for what, _ in done_by(stage("dmd", model=replace(ring, latents=5))))


def done_by(run: Run) -> list[tuple[str, tuple[Any, ...]]]:
    return [done for option in TRAINING if (done := option(run))]


def test_saved_by_one_clip_at_a_time_is_saved_in_reality() -> None:
    many, one = stage("autoregressive", batch=4), stage("autoregressive", batch=1, accumulate=4)
    real = [
        allocated(lambda run=run, made=made: [micro_batch(run, made, 0).backward() for _ in range(run.accumulate)])
        for run, made in ((many, real_recipe(many)), (one, real_recipe(one)))
    ]
    planned = [item(plan_training(run), "activations: student") for run in (many, one)]
    assert planned[0] - planned[1] == pytest.approx(real[0] - real[1], rel=0.1)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.00 KiB"), (1536, "1.50 KiB"), (2**20, "1.00 MiB"), (1023 * 2**20, "1023 MiB"), (24 * GIB, "24.0 GiB")],
)
def test_sizes_have_three_digits(count: int, text: str) -> None:
    assert size(count) == text


# ------------------------------------------------------------------------------------------------ the command


def run_plan(*words: object) -> int:
    return main(["plan", *(str(word) for word in words)])


def test_a_pipeline_has_a_line_for_each_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = presets.smoke(tmp_path), tmp_path / "plan.json"
    short = replace(whole, stages=(whole.stage("camera"), whole.stage("ode")))
    monkeypatch.setitem(presets.PIPELINES, "short", lambda _: short)
    assert run_plan("--preset", "short", "--gpu-memory", 8, "--json", out) == 0
    lines = capsys.readouterr().out.splitlines()
    stages = json.loads(out.read_text())["stages"]
    assert list(stages) == ["codec", "camera", "ode"]
    for name, row in stages.items():
        (line,) = [line for line in lines if line.startswith(name)]
        assert list(row) == (["training"] if name == "codec" else ["training", "playing"])
        for plan in row.values():
            assert plan["fits"] and size(plan["total"]) in line and size(plan["spare"]) in line


def test_a_stage_is_explained_and_told_what_would_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert run_plan("--preset", "smoke/ar", "--gpu-memory", 1.09, "--json", out) == 0
    printed = capsys.readouterr().out
    row = json.loads(out.read_text())["stages"]["ar"]
    for kind, plan in row.items():
        assert f"{kind} smoke/ar needs {size(plan['total'])}" in printed
        assert plan["fits"] == (kind == "playing") == ("changes" not in plan)
        for change in plan.get("changes", ()):
            assert change["what"] in printed and size(change["saves"]) in printed
        for one in (*plan["held"], *plan["turns"]):
            assert one["name"] in printed and size(one["bytes"]) in printed


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--preset", "smoky"), "did you mean 'smoke'?"),
        (("--preset", "smoke/dmt"), "did you mean 'dmd'?"),
        (("--preset", "smoke", "--gpu-memory", 0), "give the GiB of a GPU, such as 24"),
        (("--preset", "smoke", "--gpu-memory", "nan"), "give the GiB of a GPU, such as 24"),
    ],
)
def test_bad_input_is_one_line(words: tuple[object, ...], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan(*words) == 2
    assert problem in capsys.readouterr().err
