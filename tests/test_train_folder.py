"""Who may write into an output folder, and how a run is made longer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from projects import MODEL, trained_once

from minwm.core.config import ConfigError, UserError, from_dict, to_dict
from minwm.core.files import locked, read_json
from minwm.core.weights import load_safetensors
from minwm.experiments.pipeline import stop_if_ill
from minwm.experiments.presets import pipeline
from minwm.families.wan.text import Umt5Text
from minwm.recipes.diffusion import BidirectionalConfig
from minwm.train.build import train
from minwm.train.config import OptimConfig, Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    project = trained_once(tmp_path_factory)
    run = from_dict(Run, read_json(project / "camera" / "run.json")["run"])
    return replace(run, optim=OptimConfig(lr=1e-3))


def test_a_longer_run_is_the_run_in_one_go(run: Run, tmp_path: Path) -> None:
    train(replace(run, steps=2), tmp_path / "parts")
    assert train(replace(run, steps=4), tmp_path / "parts").steps == 4
    train(replace(run, steps=4), tmp_path / "whole")
    one, two = (load_safetensors(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read_json(tmp_path / "parts" / "run.json")["run"]["steps"] == 4
    with pytest.raises(ConfigError, match="holds a run of 4 steps, not 3: it can only be made longer"):
        train(replace(run, steps=3), tmp_path / "parts")
    with pytest.raises(ConfigError, match="another steps, seed"):
        train(replace(run, steps=5, seed=9), tmp_path / "parts")


def test_a_folder_has_one_writer(run: Run, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match="another process writes here"):
        train(run, tmp_path)
    train(run, tmp_path)


def test_a_pipeline_stops_after_a_red_verdict(run: Run, tmp_path: Path) -> None:
    """A run without a learning rate does not move; with --after-red it is left to the user."""
    start, said = replace(run.init, student=str(Path(run.data).parent / "camera")), list[str]()
    train(replace(run, init=start, optim=OptimConfig(lr=0.0)), tmp_path)
    with pytest.raises(UserError, match=r"will not become what it should .*give --after-red"):
        stop_if_ill(tmp_path, said.append)
    assert any("red: weights not moving" in line for line in said)
    stop_if_ill(tmp_path, said.append, after_red=True)


def test_dropped_prompts_are_never_the_negative_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(MODEL, negative="a red tower")
    assert BidirectionalConfig().null_text(model) is None
    empty = BidirectionalConfig(dropped_prompt="a dome").null_text(model)
    assert empty is not None and torch.equal(empty, MODEL.text.encode(["a dome"])["text"][0])
    monkeypatch.setattr(Umt5Text, "encode", lambda _, prompts: pytest.fail(f"{prompts} are not needed yet"))
    stages = {run.name: run for run in pipeline("wan2.1-1.3b", Path("x")).stages}
    assert [to_dict(stages[name].recipe)["dropped_prompt"] for name in ("camera", "ar")] == ["", ""]
    assert stages["dmd"].ema == 0
