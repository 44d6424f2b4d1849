"""Clips that a model generates: from pictures, videos and prompts to a training step; resumed, shared, under terms."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import error_line, run
from projects import MODEL

from minwm.bench.stream import random_model
from minwm.cameras.trajectory import parse
from minwm.core.config import dumps
from minwm.core.media import read_video, write_image, write_video
from minwm.data.clips import ClipFolder
from minwm.families.base import WORLDPLAY
from minwm.nets.chunks import StreamConfig
from minwm.recipes.diffusion import AutoregressiveConfig
from minwm.session.batch import Request, generate_batch
from minwm.store.folder import ORIGIN, save_model
from minwm.store.model import ModelConfig
from minwm.train.build import train
from minwm.train.config import Init, Run

line = pytest.fixture(error_line)
TEXT_START = replace(MODEL, stream=StreamConfig(chunk=2), latents=4)
TRAJECTORIES = ("--trajectories", '["w*4", "a*2,l*2"]')


def model_folder(path: Path, config: ModelConfig = MODEL) -> Path:
    model = random_model(config)
    save_model(path, config, model.net, model.codec)
    return path


def pictures(folder: Path, rng: np.random.Generator) -> Path:
    """A picture, and a video in a folder below, each with its caption."""
    frames = rng.integers(0, 255, (3, 40, 48, 3), np.uint8)
    write_image(folder / "a b.png", frames[0])
    write_video(folder / "more" / "é.mp4", frames, 8.0)
    (folder / "a b.txt").write_text("a red tower\n")
    (folder / "more" / "é.txt").write_text("a blue dome\n")
    return folder


def records(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((out / "clips").glob("*.json"))}


def step(out: Path, config: ModelConfig) -> None:
    """One step of teacher forcing on encoded clips."""
    init, data = Init(codec=str(out / "model")), str(out / "latents")
    cfg = Run(name="ar", model=config, recipe=AutoregressiveConfig(), init=init, data=data)
    train(replace(cfg, batch=2, steps=1, tensorboard=False), out / "trained")


def test_pictures_and_videos_become_clips_that_train_a_model(tmp_path: Path, rng: np.random.Generator) -> None:
    model, starts = model_folder(tmp_path / "model"), pictures(tmp_path / "starts", rng)
    words = ("data", "generate", starts, "--model", model, "--out", tmp_path / "raw", "--source-license", "CC0-1.0")
    assert run(*words, "--clips", 2, *TRAJECTORIES, "--batch", 3, "--json", tmp_path / "made.json") == 0
    made = records(tmp_path / "raw")
    assert sorted((r["source_id"], r["caption"], r["trajectory"]) for r in made.values()) == [
        ("a b.png", "a red tower", "a*2,l*2"),
        ("a b.png", "a red tower", "w*4"),
        ("more/é.mp4", "a blue dome", "a*2,l*2"),
        ("more/é.mp4", "a blue dome", "w*4"),
    ]
    folder = ClipFolder(tmp_path / "raw")
    for clip in folder.ids():
        record = folder.record(clip)
        true = parse(record.trajectory).track(MODEL.motion, MODEL.intrinsics)
        assert np.abs(record.track.c2w - true.c2w).max() < 1e-9 and record.pose_kind == "commanded"
        assert record.parent_model == str(model) and folder.frames(clip).shape == (17, 32, 32, 3)
    assert run("data", "check", tmp_path / "raw", "--model", model) == 0
    assert run("data", "encode", tmp_path / "raw", "--codec", model, "--out", tmp_path / "latents", "--val", 0.0) == 0
    step(tmp_path, MODEL)


def test_prompts_become_clips_that_train_a_model(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", TEXT_START)
    (tmp_path / "prompts.txt").write_text("a red tower\n\na blue dome\n")
    words = ("--model", model, "--out", tmp_path / "raw", "--source-license", "CC0-1.0")
    assert run("data", "generate", tmp_path / "prompts.txt", *words) == 0
    made = records(tmp_path / "raw")
    assert {r["split_key"] for r in made.values()} == {"a red tower", "a blue dome"}
    assert all(len(r["c2w"]) == 13 for r in made.values()), "random keys, as long as the training clips"
    assert run("data", "encode", tmp_path / "raw", "--codec", model, "--out", tmp_path / "latents", "--val", 0.0) == 0
    step(tmp_path, TEXT_START)


def test_a_clip_is_the_same_in_every_batch() -> None:
    """The noise is its own, and neighbours do not show."""
    model = random_model(TEXT_START)
    requests = [Request(name=p, prompt=p, trajectory="w*3", seed=i) for i, p in enumerate(("a red tower", "a dome"))]
    tracks = [parse("w*3").track(MODEL.motion, MODEL.intrinsics)] * 2
    together = np.concatenate(list(generate_batch(model, requests, tracks, [None, None])), axis=1)
    for i in range(2):
        alone = np.concatenate(list(generate_batch(model, requests[i : i + 1], tracks[:1], [None])), axis=1)
        assert np.abs(alone[0].astype(int) - together[i]).max() <= 1
    assert np.abs(together[0].astype(int) - together[1]).mean() > 1


def test_what_is_there_is_kept_and_processes_share_the_rest(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, line: Callable[[], str]
) -> None:
    model, starts = model_folder(tmp_path / "model"), pictures(tmp_path / "starts", rng)
    words = ("data", "generate", starts, "--model", model, "--out", tmp_path / "raw", "--source-license", "CC0-1.0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    counts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run(*words, "--clips", 2) == 0
        counts.append(len(records(tmp_path / "raw")))
    assert counts == [2, 4]
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "raw" / "clips").iterdir()}
    lost = sorted(before)[0].with_suffix(".json")
    lost.unlink()
    write_image(starts / "late.png", np.zeros((40, 40, 3), np.uint8))
    (starts / "late.txt").write_text("darkness")
    assert run(*words, "--clips", 2) == 0
    assert len(records(tmp_path / "raw")) == 6 and lost.read_bytes() == before[lost][1]
    kept = [p for p in before if p.stem != lost.stem]
    assert len(kept) == 9 and all(p.stat().st_mtime_ns == before[p][0] for p in kept)
    assert run(*words, "--source-license", "CC-BY-4.0") == 2
    assert "other settings (license: 'CC0-1.0' -> 'CC-BY-4.0')" in line()


def test_a_start_that_cannot_be_read_is_named_and_the_rest_made(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    model, starts = model_folder(tmp_path / "model"), pictures(tmp_path / "starts", rng)
    (starts / "a b.png").write_bytes(b"no picture")
    words = ("--model", model, "--out", tmp_path / "raw", "--source-license", "CC0-1.0")
    assert run("data", "generate", starts, *words) == 2
    printed = capsys.readouterr()
    assert "refused: a b.png: " in printed.out and "1 of 2 clips were refused" in printed.err
    assert [r["source_id"] for r in records(tmp_path / "raw").values()] == ["more/é.mp4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a b.txt": None}, "a b.png has no caption"),
        ({"list.json": '[{"prompt": "x", "trajectory": "w*2"}]'}, "starts from an image"),
        ({"prompts.txt": "x"}, "starts from an image"),
    ],
)
def test_nothing_is_made_of_starts_that_do_not_fit(
    change: dict[str, str | None], message: str, tmp_path: Path, rng: np.random.Generator, line: Callable[[], str]
) -> None:
    model, starts = model_folder(tmp_path / "model"), pictures(tmp_path / "starts", rng)
    for name, text in change.items():
        path = starts / name
        path.unlink() if text is None else path.write_text(text)
        starts = starts if text is None else path
    words = ("--model", model, "--out", tmp_path / "raw", "--source-license", "CC0-1.0")
    assert run("data", "generate", starts, *words) == 2
    assert message in line() and not (tmp_path / "raw").exists()


def test_limits_of_the_weights_are_refused_or_stamped(
    tmp_path: Path, rng: np.random.Generator, line: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, starts = model_folder(tmp_path / "model"), pictures(tmp_path / "starts", rng)
    (model / ORIGIN).write_text(dumps(WORLDPLAY))
    words = ("data", "generate", starts, "--model", model, "--out", tmp_path / "raw", "--source-license", "CC0-1.0")
    assert run(*words) == 2
    refusal = line()
    assert "tencent/HY-WorldPlay" in refusal and "may improve no other model" in refusal
    assert "--accept-limits" in refusal and not (tmp_path / "raw").exists()
    assert run(*words, "--accept-limits") == 0
    for record in records(tmp_path / "raw").values():
        assert record["source_license"].startswith("CC0-1.0; outputs of tencent/HY-WorldPlay under tencent-hy")
        assert "may improve no other model" in record["source_license"]
        assert record["parent_model"] == f"{model}, from tencent/HY-WorldPlay"
    capsys.readouterr()
    assert run("data", "report", tmp_path / "raw", "--json", tmp_path / "report.json") == 0
    printed = json.loads((tmp_path / "report.json").read_text())
    assert [name for name in printed["licences"] if WORLDPLAY.license.limits in name]
    assert printed["parent_models"] == {f"{model}, from tencent/HY-WorldPlay": 2}
    assert read_video(next((tmp_path / "raw" / "clips").glob("*.mp4")))[0].shape[1:] == (32, 32, 3)
