"""Every stage of every preset runs, in its own layout: from the files that a user brings to the report."""

from pathlib import Path

import pytest
import torch
from releases import save_text_encoder
from tiny_presets import tiny_preset

from minwm.experiments.pipeline import evaluate_stages, run_pipeline
from minwm.experiments.presets import PIPELINES, PUBLISHED
from minwm.experiments.summary import report


@pytest.mark.parametrize("name", PIPELINES)
def test_every_stage_of_a_preset_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINWM_CACHE", str(tmp_path / "cache"))
    save_text_encoder(tmp_path / "text")
    out = tmp_path / "run"
    pipeline = tiny_preset(name, out, tmp_path / "text")
    run_pipeline(pipeline, out, print)
    page = report(pipeline, out, evaluate_stages(pipeline, out, print)).read_text()
    assert all(run.name in page for run in pipeline.stages)


def test_worldplay_samples_as_its_authors_do() -> None:
    """Their list [1000, 960, 888.8889, 727.2728, 0] with Euler steps and without guidance."""
    cfg, times = PUBLISHED["hy-worldplay-5b"](), list[float]()

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        times.append(1000 * t)
        return torch.ones_like(x)

    x = cfg.sampler.sample(velocity, torch.ones(1, 1, 4, 2, 2, 2))
    assert times == pytest.approx([1000, 960, 888.8889, 727.2728], abs=1e-3)
    assert torch.allclose(x, torch.zeros_like(x), atol=1e-6)
    assert cfg.stream.context_noise == 14 / 1000 and cfg.sampler.passes == 4
