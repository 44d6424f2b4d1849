"""Every stage of every preset runs, in its own layout: from the files that a user brings to the report."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from releases import save_text_encoder
from tiny_presets import tiny_preset, tiny_run

from minwm.cli.base import parse_fields
from minwm.core.config import ConfigError
from minwm.core.files import read_json
from minwm.core.types import Condition
from minwm.data.rerender import RenderConfig
from minwm.experiments.pipeline import evaluate_stages, run_pipeline
from minwm.experiments.presets import PIPELINES, PUBLISHED
from minwm.experiments.presets.base import Pipeline
from minwm.experiments.summary import report
from minwm.families.wan.transformer import WanConfig
from minwm.stream.rollout import generate_latents
from minwm.train.config import Init, OptimConfig, Run

ALIKE = {"wan2.1-14b": "wan2.1-1.3b", "demo": "demo-scratch", "world-64": "world"}
"""Presets that in miniature are like another one, but for learning rates and what their stages start from."""
SWITCHED = ("paper-hunyuan",)
"""Presets that are another one but for switches (tests/test_docs.py), each of which tests/contracts/ has."""


def miniature(name: str) -> tuple[Pipeline, list[Run]]:
    """The other parts of a preset, and its stages in miniature."""
    pipeline = PIPELINES[name](Path("out"))
    runs = [tiny_run(run, Path("text")) for run in (pipeline.codec, *pipeline.stages) if run]
    render = pipeline.render and RenderConfig(scenes=pipeline.render.scenes)
    rest = replace(pipeline, name="", render=render, codec=None, stages=(), clips=0)
    return rest, [replace(run, init=Init(), optim=OptimConfig()) for run in runs]


@pytest.mark.parametrize(("name", "other"), ALIKE.items())
def test_a_preset_that_is_not_run_is_like_one_that_is(name: str, other: str) -> None:
    assert other not in ALIKE and miniature(name) == miniature(other)


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in (*ALIKE, *SWITCHED)])
def test_every_stage_of_a_preset_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINWM_CACHE", str(tmp_path / "cache"))
    save_text_encoder(tmp_path / "text")
    out = tmp_path / "run"
    pipeline = tiny_preset(name, out, tmp_path / "text")
    run_pipeline(pipeline, out, print, after_red=True)  # two steps from random weights hardly move
    page = report(pipeline, out, evaluate_stages(pipeline, out, print)).read_text()
    assert all(run.name in page for run in pipeline.stages)
    assert page.count(", no camera</p>") == sum(run.model.network.camera == "none" for run in pipeline.stages)


def test_a_pipeline_runs_with_the_fields_that_are_set(tmp_path: Path) -> None:
    """And what is finished is refused by name with others."""
    out = tmp_path / "run"
    plan = tiny_preset("smoke", out, tmp_path).override({"codec.steps": "1", "render.supersample": "1"})
    run_pipeline(plan, out, print, "codec")
    assert read_json(out / "codec" / "run.json")["run"]["steps"] == 1
    assert read_json(out / "raw" / "manifest.json")["config"]["supersample"] == 1
    run_pipeline(plan, out, print, "codec")
    for field, problem in {
        "render.supersample": "holds the part 'render' with another supersample: 1, now 2; give another --out",
        "clips": "holds the part 'render' with another clips: 8, now 2",
        "codec.steps": "codec holds a finished stage of 1 steps, not 2, and later parts came from it",
        "codec.accumulate": "holds a run with another accumulate",
    }.items():
        with pytest.raises(ConfigError, match=problem):
            run_pipeline(plan.override({field: "2"}), out, print, "codec")
    command = f"minwm pipeline smoke --out {out} --codec.steps 1 --render.supersample 1"
    assert plan.command(out) == command and parse_fields(tuple(shlex.split(command)[5:])) == plan.changes
    recipe = plan.stage("dmd").recipe
    assert plan.override({"dmd.recipe.guidance": "2"}).stage("dmd").recipe == replace(recipe, guidance=2.0)


def test_worldplay_samples_as_its_authors_do() -> None:
    """Their list [1000, 960, 888.8889, 727.2728, 0] with Euler steps and without guidance."""
    cfg, times = PUBLISHED["hy-worldplay-5b"](), list[float]()

    def velocity(x: torch.Tensor, t: float, _: float) -> torch.Tensor:
        times.append(1000 * t)
        return torch.ones_like(x)

    x = cfg.sampler.sample(velocity, torch.ones(1, 1, 4, 2, 2, 2))
    assert times == pytest.approx([1000, 960, 888.8889, 727.2728], abs=1e-3)
    assert torch.allclose(x, torch.zeros_like(x), atol=1e-6)
    assert cfg.sampler.passes == 4


@torch.no_grad()
def test_worldplay_shows_its_network_the_times_of_its_authors() -> None:
    """Of every pass: the image, and all that is past, at 14/1000. The first chunk has four latents with the image, and
    from the third on the past is read again in one pass."""
    cfg, seen = PUBLISHED["hy-worldplay-5b"](), list[list[float]]()
    assert cfg.stream.chunks(cfg.latents) == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)] and cfg.image_start
    net = WanConfig(dim=24, heads=1, layers=1, ffn=8, channels=4, text_dim=4, text_length=2, freq_dim=8).build()
    net.register_forward_hook(
        lambda _, args, __: seen.append((1000 * args[1].t).expand(1, args[0].shape[1])[0].tolist())
    )
    cond = Condition(text=torch.zeros(1, 2, 4), first_latents=torch.ones(1, 1, 4, 2, 2))
    draws = torch.zeros(cfg.sampler.num_noise_samples(cfg.geometry), 1, 12, 4, 2, 2)
    made = generate_latents(net, cfg.sampler, draws, cond, cfg.stream.geometry(tokens=1))
    times = [1000, 960, 888.8889, 727.2728]
    first, later = [[14.0, t, t, t] for t in (*times, 14)], [[t] * 4 for t in times]
    want = [*first, *later, [14.0] * 8, *later]
    assert [t for row in seen for t in row] == pytest.approx([t for row in want for t in row], abs=1e-3)
    assert torch.equal(made[:, :1], torch.ones(1, 1, 4, 2, 2))


def test_stage_3_of_the_paper_starts_from_either_stage_2() -> None:
    plan = PIPELINES["paper"](Path("runs/paper"))
    other = plan.override({"dmd.init.student": "runs/paper/consistency"})
    starts = [Path(str(pipeline.stage("dmd").init.student)).name for pipeline in (plan, other)]
    assert starts == ["ode", "consistency"]
