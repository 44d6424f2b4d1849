"""Every stage of every preset runs, in its own layout: from the files that a user brings to the report."""

from pathlib import Path

import pytest
from releases import save_text_encoder
from tiny_presets import tiny_preset

from minwm.experiments.pipeline import run_pipeline
from minwm.experiments.presets import PIPELINES


@pytest.mark.parametrize("name", PIPELINES)
def test_every_stage_of_a_preset_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINWM_CACHE", str(tmp_path / "cache"))
    save_text_encoder(tmp_path / "text")
    pipeline = tiny_preset(name, tmp_path / "run", tmp_path / "text")
    run_pipeline(pipeline, tmp_path / "run", print, until="dmd")
