"""What plans are for: whether it fits, what would help, and the command that says so."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planning import MODEL, allocated, item, micro_batch, real_recipe, stage

from minwm.bench.advice import PLAYING, TRAINING, advise
from minwm.bench.memory import (
    CONTEXT,
    FRAGMENTATION,
    GIB,
    Plan,
    plan_inference,
    plan_training,
    reserve,
    size,
)
from minwm.cli import main
from minwm.experiments import presets
from minwm.families.wan.vae import WanVaeConfig
from minwm.store.model import ModelConfig
from minwm.stream.solvers import AutoregressiveSampler, BidirectionalSampler
from minwm.train.config import Run

WIDE = replace(MODEL.network, channels=16)


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
        (replace(MODEL, sampler=AutoregressiveSampler()), {"no guidance", "a window of 1 instead of 3 chunks"}),
        (replace(MODEL, sampler=BidirectionalSampler()), {"clips of 3 latents instead of 5"}),
        (MODEL, {"a window of 1 instead of 3 chunks"}),
        (
            replace(MODEL, codec=WanVaeConfig(), network=WIDE, stream=replace(MODEL.stream, window=1)),
            {"tiny codec taew2_1"},
        ),
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
        (
            stage("autoregressive"),
            {"checkpointing", "bfloat16", "--batch 1 --accumulate 3", "clips of 3 latents", "cpu_offload"},
        ),
        (
            stage(
                "autoregressive",
                batch=1,
                checkpointing=True,
                precision="bfloat16",
                model=replace(MODEL, latents=17),
            ),
            {"clips of 9 latents", "cpu_offload"},
        ),
        (stage("codec"), {"cpu_offload", "--batch 1 --accumulate 3", "clips of 3 latents", "bfloat16"}),
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
    wide = stage("dmd", model=replace(MODEL, stream=replace(MODEL.stream, window=9), latents=3))
    offered = dict(done_by(wide))
    (what,) = [what for what in offered if what.startswith("--model.stream.window 1")]
    assert plan_training(*offered[what]).total < plan_training(wide).total
    ring = replace(wide.model, stream=replace(wide.model.stream, window=1, sink=1))
    assert not any("checkpoint" in what for what, _ in done_by(stage("dmd", model=replace(ring, latents=5))))


def test_8_bit_moments_are_offered_where_rows_are_wide() -> None:
    wide = stage("bidirectional", model=replace(MODEL, network=replace(MODEL.network, dim=256, layers=8)))
    offered = next(done for what, done in done_by(wide) if "adamw8bit" in what)
    assert plan_training(*offered).total < plan_training(wide).total
    assert not any("adamw8bit" in what for what, _ in done_by(stage("bidirectional")))


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
    whole, out = presets.demo.smoke(tmp_path), tmp_path / "plan.json"
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
