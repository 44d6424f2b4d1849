"""Every stage of every preset runs, in its own layout: from the files that a user brings to the report."""

from pathlib import Path

import pytest
from releases import save_text_encoder
from tiny_presets import tiny_preset

from minwm.experiments.pipeline import evaluate_stages, run_pipeline
from minwm.experiments.presets import PIPELINES
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
