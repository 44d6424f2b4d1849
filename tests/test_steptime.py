"""The benchmark of training: it makes the loop's steps, and counts the FLOPs of the operators that do useful work."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minwm.bench.training import StepTime, headline, measure_steps, random_network
from minwm.cli import main
from minwm.core.config import ConfigError, dumps, from_dict, loads, to_dict
from minwm.core.types import Clip
from minwm.data.dataset import loader
from minwm.experiments import presets
from minwm.nets.attention import Cached, Full, Masked, ReadOnlyCache, TextKV, WholeFrames, teacher_forcing
from minwm.recipes.base import Recipe
from minwm.recipes.dmd import DmdConfig
from minwm.train.config import Run
from minwm.train.flops import count_flops, pass_flops
from minwm.train.loop import Trainer, loop
from minwm.train.parallel import Parallel
from minwm.train.roles import build_recipe

NAMES = ("camera", "ar", "ode", "consistency", "dmd")


def stage(name: str, **changes: Any) -> Run:
    """A stage of the demo, with a small network and two clips of three chunks."""
    run = presets.stage(f"demo/{name}", Path())
    network, text = replace(run.model.network, layers=2, text_length=8), replace(run.model.text, length=8)
    model = replace(run.model, network=network, text=text, latents=5)
    return replace(run, model=model, batch=2, **changes)


def batch_of(run: Run) -> Any:
    return run.recipe.example_batch(run.model, run.batch)


def made(run: Run) -> tuple[Trainer, Recipe]:
    torch.manual_seed(0)
    recipe = build_recipe(run, lambda _: random_network(run))
    return Trainer(run, recipe, Parallel(run.parallel, torch.device("cpu"))), recipe


@pytest.mark.parametrize("name", NAMES)
def test_useful_flops_are_those_of_the_operators(name: str) -> None:
    """Within 3%: prompts and times are left out, and cameras and the first layer need no gradient of their inputs."""
    run = stage(name)
    (trainer, recipe), clips = made(run), repeat(batch_of(run))
    for step in range(len(run.recipe.trained)):  # DMD: the student's, then the critic's
        counting = count_flops(recipe.networks.values())
        with counting as passes, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as operators:
            trainer.gradients(step, clips)
        assert sum(passes) == pytest.approx(operators.get_total_flops(), rel=0.03)
        assert sum(passes) < operators.get_total_flops()


def test_what_is_computed_again_is_not_useful() -> None:
    work, done = {}, {}
    for how in (False, True, "attention"):
        run = stage("ar", checkpointing=how)
        trainer, recipe = made(run)
        with count_flops(recipe.networks.values()) as passes, FlopCounterMode(display=False) as operators:
            trainer.gradients(0, repeat(batch_of(run)))
        work[how], done[how] = sum(passes), operators.get_total_flops()
    assert work[False] == work[True] == work["attention"]
    assert done[False] < done["attention"] <= done[True]  # no counter knows the attention of CPUs


def test_a_pass_costs_what_its_scope_lets_it_see() -> None:
    """Teacher forcing: chunk i of n sees i clean chunks twice over, as what is clean and as what is noisy."""
    run = stage("ar")
    net, geometry, p = random_network(run), run.model.geometry, run.model.geometry.tokens
    chunks = geometry.chunks(5)
    forced = Masked(teacher_forcing(geometry, 5), 10, period=5)
    clean = sum(net.flops(b - a, p, p * b) for a, b in chunks)
    assert pass_flops(net, run.model.latent_shape(2, 10), forced) == 2 * 2 * clean
    assert pass_flops(net, run.model.latent_shape(2, 5), Full()) == 2 * net.flops(5, p, 5 * p)
    for scope in (Cached, ReadOnlyCache):
        seen = scope(net.arena(geometry, 1), 2)
        assert pass_flops(net, run.model.latent_shape(1, 2), seen) == net.flops(2, p, 5 * p)
    parts = Cached(net.arena(geometry, 1), 2, parts=(1, 1))
    assert pass_flops(net, run.model.latent_shape(1, 2), parts) == net.flops(1, p, 4 * p) + net.flops(1, p, 5 * p)
    with pytest.raises(ConfigError, match="Other attends to is not known"):
        pass_flops(net, run.model.latent_shape(1, 2), Other())


class Other(WholeFrames):
    def positions(self, frames: int) -> list[int]:
        return []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, text: TextKV | None = None) -> Tensor:
        return q


def test_steps_are_timed_in_whole_turns() -> None:
    recipe = DmdConfig(critic_updates=1)
    result = measure_steps(stage("dmd", recipe=recipe), steps=3, warmup=1, peak=2.0)
    assert {role: row.count for role, row in result.roles.items()} == {"student": 2, "critic": 2}
    for row in result.roles.values():
        assert 0 < row.update_ms < row.median_ms <= row.p90_ms
        assert row.mfu == pytest.approx(100 * row.tflops / result.machine.tflops)
    seconds = sum(row.count * row.gflop / row.tflops / 1e3 for row in result.roles.values())
    assert result.clips_per_s == pytest.approx(2 * 4 / seconds)
    assert result.tokens_per_s == pytest.approx(5 * 16 * result.clips_per_s)
    assert result.mfu_of_peak == pytest.approx(50 * result.tflops)
    assert result.mfu == pytest.approx(100 * result.tflops / result.machine.tflops)
    assert (result.allocated_gb, result.graphs) == (None, 0)
    assert loads(StepTime, dumps(result)) == result
    assert len(headline("x", result)) == 3
    for nonsense in ({"steps": 0}, {"warmup": 0}):
        with pytest.raises(ConfigError, match="at least one"):
            measure_steps(stage("camera"), **nonsense)


def test_the_benchmark_makes_the_steps_of_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fed the same clips, both end with the same weights, averages and all."""
    run = stage("camera", steps=4, data="", tensorboard=False)
    batch, trainers = batch_of(run), []
    make = Trainer.__init__

    def remember(self: Trainer, *args: Any) -> None:
        make(self, *args)
        trainers.append(self)

    monkeypatch.setattr(Trainer, "__init__", remember)
    monkeypatch.setattr(type(run.recipe), "example_batch", lambda *_: batch)
    measure_steps(run, steps=3, warmup=1)
    torch.manual_seed(run.seed)
    recipe = build_recipe(run, lambda _: random_network(run))
    averaged = loop(run, tmp_path, recipe, loader(Same(batch), 2, run.seed), trainers[0].parallel)
    for mine, theirs in (
        (trainers[0].networks["student"], recipe.networks["student"]),
        (trainers[0].ema.net, averaged),
    ):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


class Same:
    """A data set of two clips that come together."""

    fingerprint = 0

    def __init__(self, both: Clip) -> None:
        self.both = both

    def __len__(self) -> int:
        return 2

    def batch(self, indices: Sequence[int]) -> Clip:
        return self.both


@pytest.mark.parametrize(("name", "backend"), [("ar", "aot_eager"), ("dmd", "eager")])
def test_compiled_blocks_train_alike(name: str, backend: str) -> None:
    """With checkpointing, in bfloat16, in all forms that blocks have where clips start with an image or without.

    Without the import hook of these tests, whose checks no compiler can read.
    """
    script = f"""
    from dataclasses import replace
    from itertools import repeat
    import torch
    from minwm.families.wan.transformer import Wan
    from test_steptime import batch_of, made, stage

    compile_blocks = Wan.compile_blocks
    Wan.compile_blocks = lambda net: compile_blocks(net, "{backend}")
    clips, found = repeat(batch_of(stage("{name}"))), []
    for compiled in (False, True):
        run = stage("{name}", compile=compiled, checkpointing="attention", precision="bfloat16")
        run = replace(run, recipe=replace(run.recipe, image_start=0.5))
        trainer, _ = made(run)
        for step in range(6):
            gradients = trainer.gradients(step, clips)
            trainer.update(step, gradients)
            found.append((*gradients.losses.values(), gradients.norm))
    for plain, compiled in zip(found[:6], found[6:], strict=True):
        torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=0.02, atol=1e-3)
    from torch._dynamo.utils import counters
    assert counters["stats"]["unique_graphs"] >= 2
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd="tests")


def test_checkpointing_is_written_as_before() -> None:
    run = stage("ar")
    for how in (False, True, "attention"):
        changed = replace(run, checkpointing=how)
        assert to_dict(changed)["checkpointing"] is how or how == "attention"
        assert from_dict(Run, json.loads(dumps(changed))) == changed
    codec = presets.demo.demo(Path()).codec
    assert codec
    for field in ("checkpointing", "compile"):
        with pytest.raises(ConfigError, match="a codec has none"):
            replace(codec, **{field: True})


def test_the_command_measures_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.json"
    quick = ["--steps", "1", "--warmup", "1", "--json", str(file)]
    assert main(["bench-train", "smoke/ar", *quick, "--batch", "1", "--checkpointing", "attention"]) == 0
    assert "smoke/ar: student step" in capsys.readouterr().out
    found = json.loads(file.read_text())
    run = found["stages"]["ar"]["run"]
    assert run["batch"] == 1 and run["checkpointing"] == "attention" and found["versions"]["torch"]
    assert run["data"] == "" and not any(run["init"].values()), "no folder is read, and none named"
    assert main(["bench-train", "smoke/ar", *quick, "--checkpointing", "blocks"]) == 2
    assert main(["bench-train", "smoke/codec", *quick]) == 2
    assert "no closed form" in capsys.readouterr().err
