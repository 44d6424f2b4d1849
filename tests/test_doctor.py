"""Each verdict on a run that was made to have the illness, and none on the healthy run beside it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from projects import MODEL, trained_once

from minwm.cli import main
from minwm.core.config import UserError, from_dict
from minwm.core.files import read_json
from minwm.core.types import Clip
from minwm.data.clips import ClipFolder
from minwm.data.dataset import ShardDataset
from minwm.experiments.presets import PIPELINES
from minwm.experiments.samples import compare_looks
from minwm.recipes.base import Loss
from minwm.recipes.consistency import ConsistencyConfig
from minwm.recipes.diffusion import BidirectionalConfig, BidirectionalDiffusion, TimeLaw
from minwm.recipes.dmd import DmdConfig
from minwm.recipes.ode import OdeConfig
from minwm.store.folder import load_config
from minwm.train import doctor
from minwm.train.build import train
from minwm.train.config import Init, OptimConfig, Run
from minwm.train.doctor import examine, from_config, from_samples, from_start
from minwm.train.loop import Ema


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Goes on from a model, and moves."""
    project = trained_once(tmp_path_factory)
    run = from_dict(Run, read_json(project / "camera" / "run.json")["run"])
    time_law = TimeLaw(shift=run.model.sampler.shift, weight="none")
    return replace(
        run, recipe=BidirectionalConfig(time=time_law), init=replace(run.init, student=str(project / "camera")),
        optim=OptimConfig(lr=1e-2), steps=30, batch=1, accumulate=1,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def batches_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is so small that putting a batch together takes as long as a step."""
    made, batch = dict[tuple[int, ...], Clip](), ShardDataset.batch

    def remembered(self: ShardDataset, indices: Sequence[int]) -> Clip:
        return made[key] if (key := tuple(indices)) in made else made.setdefault(key, batch(self, indices))

    monkeypatch.setattr(ShardDataset, "batch", remembered)


def found(run: Run, out: Path) -> dict[str, str]:
    train(run, out)
    return {verdict.name: verdict.level for verdict in examine(out)}


def test_a_healthy_run_has_no_verdict(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(run, tmp_path) == {}
    assert not [line for line in capsys.readouterr().err.splitlines() if ": red: " in line or ": yellow: " in line]
    assert main(["doctor", str(tmp_path)]) == 0
    assert "nothing wrong" in capsys.readouterr().out


def test_weights_that_do_not_move(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(replace(run, optim=OptimConfig(lr=1e-12), steps=3), tmp_path)["weights not moving"] == "red"
    assert "red: weights not moving: after 3 updates 100.0 %" in capsys.readouterr().err, "while it trains, too"
    assert main(["doctor", str(tmp_path)]) == 2
    assert "bit for bit the first ones; raise optim.lr" in capsys.readouterr().out


def test_weights_that_wait_for_the_learning_rate_to_rise(run: Run, tmp_path: Path) -> None:
    """The same run, ended while it warms up."""
    slow = OptimConfig(lr=1e-12, warmup=3)
    assert found(replace(run, optim=slow, steps=3), tmp_path)["weights not moving"] == "yellow"


def test_an_average_that_does_not_follow(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ema, "update", lambda *_: None)
    assert found(replace(run, steps=10), tmp_path) == {"average is stale": "red"}


def test_a_camera_that_is_ignored(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A camera branch starts at zero; whoever has seen few steps only may go on. It is told while it trains, too."""
    fresh = replace(run, init=replace(run.init, student=None), optim=OptimConfig(lr=1e-12), steps=2)
    assert found(fresh, tmp_path) == {"camera ignored": "yellow"}
    assert "yellow: camera ignored: with cameras that stand still" in capsys.readouterr().err
    monkeypatch.setitem(doctor.CAMERA_ONSET, "small", 2)
    assert {verdict.name: verdict.level for verdict in examine(tmp_path)} == {"camera ignored": "red"}


def test_a_loss_that_jumps(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it is told when a state is saved, while training goes on."""
    plain = BidirectionalDiffusion.loss

    def jump(self: BidirectionalDiffusion, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        return plain(self, replace(clip, latents=clip.latents * (100 if step == 25 else 1)), step, generator)

    monkeypatch.setattr(BidirectionalDiffusion, "loss", jump)
    assert found(run, tmp_path)["loss spike"] == "yellow"
    assert capsys.readouterr().err.count("yellow: loss spike: student: loss") == 1


SPOILT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "": lambda x: x + np.random.default_rng(0).normal(0, 2, x.shape),
    "static video": lambda x: np.repeat(x[:, :1], x.shape[1], 1),
    "flicker": lambda x: x + 40.0 * (np.arange(x.shape[1]) % 2)[:, None, None, None],
    "seams at chunk borders": lambda x: x - 40.0 * (np.arange(x.shape[1]) >= 9)[:, None, None, None],
    "oversaturation": lambda x: x.mean(-1, keepdims=True) + 2 * (x - x.mean(-1, keepdims=True)),
}


@pytest.mark.parametrize("name", SPOILT, ids=lambda name: name or "healthy")
def test_what_sample_videos_look_like(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """True clips that are spoilt in one way, and a little noise on healthy ones."""
    clips = ClipFolder(trained_once(tmp_path_factory) / "raw")
    true = np.stack([clips.frames(clip) for clip in clips.ids()])
    shown = SPOILT[name](true.astype(float)).round().clip(0, 255).astype(np.uint8)
    looks = {f"sample/{key}": value for key, value in compare_looks(shown, true, MODEL).items()}
    assert [verdict.name for verdict in from_samples([{"step": 9, **looks}, {"step": 10}])] == [name] * bool(name)


def test_clips_that_come_too_late(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ShardDataset.batch

    def slow(self: ShardDataset, indices: Sequence[int]) -> Clip:
        time.sleep(0.1)
        return batch(self, indices)

    monkeypatch.setattr(ShardDataset, "batch", slow)
    assert found(replace(run, steps=20), tmp_path) == {"starved of data": "yellow"}


def test_what_the_config_says(tmp_path_factory: pytest.TempPathFactory) -> None:
    project = trained_once(tmp_path_factory)
    dmd = from_dict(Run, read_json(project / "dmd" / "run.json")["run"])
    few_step, bidirectional = str(project / "dmd"), str(project / "camera")
    assert load_config(Path(few_step)).sampler.causal and not load_config(Path(bidirectional)).sampler.causal
    right = replace(dmd.init, student=few_step)
    assert not [*from_config(replace(dmd, init=right))]
    assert isinstance(dmd.recipe, DmdConfig)
    (verdict,) = from_config(replace(dmd, init=right, recipe=replace(dmd.recipe, critic_updates=1)))
    assert verdict.name == "critic falls behind"
    (verdict,) = from_config(replace(dmd, init=replace(right, real=few_step)))
    assert verdict.level == "red" and "init.real" in verdict.evidence and "needs a bidirectional" in verdict.evidence


def test_sampling_unlike_training(run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Shift, guidance and intrinsics, each of them ill once; and healthy ones that differ as little as they may."""
    recipe, model = run.recipe, run.model
    assert isinstance(recipe, BidirectionalConfig) and model.negative is None and model.sampler.guidance > 2
    few_step = str(trained_once(tmp_path_factory) / "dmd")
    few = load_config(Path(few_step))
    init, guided_by_none = Init(student=few_step, teacher=few_step), ConsistencyConfig(guidance=1.0)
    distilled = replace(run, model=few, init=init, recipe=guided_by_none)
    none = replace(model, sampler=replace(model.sampler, guidance=1.0))
    never, words = replace(recipe, text_dropout=0.0), replace(recipe, dropped_prompt="")
    for healthy in (
        run,
        distilled,
        replace(distilled, recipe=OdeConfig(guidance=2.0)),
        replace(run, recipe=never, model=none),
        replace(run, recipe=words, model=replace(model, negative="")),
        replace(run, model=replace(model, focal=(model.focal[0] * 1.01, model.focal[1]))),
    ):
        assert not [*from_config(healthy)]
    for ill, name, told in (
        (replace(run, recipe=replace(recipe, time=TimeLaw(shift=99.0))), "shift of training and", "shift 99.0"),
        (replace(distilled, recipe=replace(guided_by_none, shift=99.0)), "shift of training and", "shift 99.0"),
        (replace(distilled, recipe=ConsistencyConfig(guidance=3.0)), "guidance of training and", "init.teacher"),
        (replace(distilled, recipe=OdeConfig(guidance=3.0)), "guidance of training and", "init.student"),
        (replace(run, recipe=never), "guidance that was not trained", "text_dropout=0.0"),
        (replace(run, recipe=words), "guidance that was not trained", "dropped_prompt=''"),
        (replace(run, model=replace(model, focal=(0.5, 0.5))), "intrinsics of another model", "have (0.5, 0.5)"),
    ):
        (verdict,) = from_config(ill)
        assert verdict.name.startswith(name) and verdict.level == "yellow" and told in verdict.evidence


@pytest.mark.parametrize("name", PIPELINES)
def test_no_preset_is_ill(name: str, tmp_path: Path) -> None:
    """Neither by itself, nor by the stages that it starts from."""
    stages = {run.name: run for run in PIPELINES[name](tmp_path).stages}
    for run in stages.values():
        shipped = {role: folder for role, folder in vars(run.init).items() if folder and Path(folder).exists()}
        assert not [*from_config(replace(run, init=Init(**shipped)))], run.name
        for role, folder in vars(run.init).items():
            if folder and (start := stages.get(Path(folder).name)):
                assert not [*from_start(run, role, start.model)], (run.name, role)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no training run"):
        examine(tmp_path)
