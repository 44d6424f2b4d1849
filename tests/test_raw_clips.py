"""Raw clips: what is written is read back, an interruption loses nothing, and every problem is named."""
# ruff: noqa: F811  (fixtures are imported, and then arguments)

import contextlib
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run
from noise_clips import Noise, codec, edit, made, raw  # noqa: F401  (fixtures)

from minwm.core.config import UserError
from minwm.core.files import locked
from minwm.data import clips as clips_module
from minwm.data.clips import ClipFolder, ClipRecord, DataError, check, report, sheet
from minwm.data.quality import QualityConfig, check_quality
from minwm.data.source import produce


def keep(raw: Path, *clips: str) -> None:
    """Without the other clips, which would only take time."""
    for path in (raw / "clips").iterdir():
        if path.stem not in clips:
            path.unlink()


def assert_same(one: ClipFolder, two: ClipFolder, clip: str) -> None:
    """Records to the bit; pixels but for the encoder's lookahead, which reads memory that it never wrote."""
    assert one.record(clip).to_json() == two.record(clip).to_json()
    assert np.abs(one.frames(clip).astype(int) - two.frames(clip)).mean() < 1


def test_a_clip_is_read_as_it_was_written(made: Path) -> None:
    written, frames = Noise().make(3)
    record = ClipFolder(made / "raw").record(written.id)
    assert np.array_equal(record.track.c2w, written.track.c2w)
    assert record.meta() == written.meta()
    error = ClipFolder(made / "raw").frames(written.id).astype(float) - frames
    assert 20 * np.log10(255 / np.sqrt((error**2).mean())) > 40


def test_an_interrupted_run_leaves_whole_clips_and_continues(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video, calls = clips_module.write_video, []

    def interrupted(path: Path, *arguments: Any, **options: Any) -> None:
        calls.append(path)
        write_video(path, *arguments, **options)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(clips_module, "write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        produce(Noise(), tmp_path / "raw", 4)
    monkeypatch.undo()
    folder = ClipFolder(tmp_path / "raw")
    assert folder.ids() == ["noise-000", "noise-001"] and check(tmp_path / "raw") == []
    before = (folder.clips / "noise-001.mp4").stat().st_mtime_ns
    produce(Noise(), tmp_path / "raw", 4)
    assert (folder.clips / "noise-001.mp4").stat().st_mtime_ns == before
    assert folder.manifest()["clips"] == 4 and check(tmp_path / "raw") == []
    for clip in folder.ids():
        assert_same(folder, ClipFolder(made / "raw"), clip)


def test_ranks_make_the_clips_of_one_process(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        produce(Noise(), tmp_path / "raw", 12)
    folder = ClipFolder(tmp_path / "raw")
    assert folder.manifest()["clips"] == 12
    for clip in folder.ids():
        assert_same(folder, ClipFolder(made / "raw"), clip)


@pytest.mark.slow  # two new processes import torch: many seconds on a busy machine
def test_workers_make_the_clips_of_one_process(tmp_path: Path, made: Path) -> None:
    folder = produce(Noise(), tmp_path / "raw", 4, workers=2)
    for clip in ("noise-000", "noise-001", "noise-002", "noise-003"):
        assert_same(folder, ClipFolder(made / "raw"), clip)


@dataclass(frozen=True)
class Waiting(Noise):
    """A worker that makes one of its clips tells its folder and waits for ever."""

    folder: str = ""

    def make(self, index: int) -> tuple[ClipRecord, np.ndarray]:
        with locked(Path(self.folder) / str(index)):
            time.sleep(3600)
        raise AssertionError


@pytest.mark.slow  # three new processes import torch
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    source = Waiting(folder=str(tmp_path / "busy"))
    parent = multiprocessing.get_context("spawn").Process(
        target=produce, args=(source, tmp_path / "raw", 2), kwargs={"workers": 2}
    )
    parent.start()
    busy = [tmp_path / "busy" / name for name in ("0", "1")]
    until(lambda: all((folder / ".lock").exists() for folder in busy))
    parent.kill()
    parent.join()
    for folder in busy:
        until(lambda folder=folder: is_free(folder))


def is_free(folder: Path) -> bool:
    with contextlib.suppress(UserError), locked(folder):
        return True
    return False


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_folder_without_clips_and_clips_that_no_codec_takes_are_problems(tmp_path: Path) -> None:
    ClipFolder.create(tmp_path / "none", "noise", {})
    assert check(tmp_path / "none") == ["no finished clips"]
    odd = ClipFolder.create(tmp_path / "odd", "noise", {})
    record, _ = Noise().make(0)
    odd.write(replace(record, hw=(14, 18)), np.random.default_rng(0).integers(0, 256, (9, 14, 18, 3), np.uint8))
    assert any("18x14 pixels; codecs need multiples of 8" in problem for problem in check(tmp_path / "odd"))


def test_a_folder_of_other_settings_is_refused(raw: Path) -> None:
    with pytest.raises(DataError, match="level: 200 -> 100"):
        produce(Noise(level=100), raw, 12)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"caption": "a red box as the camera pans"}, "speaks of motion"),
        ({"fps": 2500.0}, r"units \(toy\) per second: scale the poses to below 30"),
        ({"fps": 500.0}, r"degrees per second: are 500 poses per second true\?"),
        ({"caption": " "}, "empty caption"),
        ({"source_license": ""}, "no licence"),
        ({"split_key": "scene:9"}, "would leak"),
        ({"hw": [32, 32]}, "the record says"),
        ({"K": [[0.7, 0.9, 0.5, 0.5]] * 9}, "not square"),
        ({"c2w": np.diag([1.0, -1.0, 1.0, 1.0])[None].repeat(9, 0).tolist()}, "mirrors the world"),
        ({"schema": 99}, "schema 99"),
        ({"speed": 3}, r"unknown fields \['speed'\]"),
    ],
)
def test_check_names_the_clip_and_the_problem(raw: Path, changes: dict[str, Any], expected: str) -> None:
    keep(raw, "noise-004", "noise-005")
    edit(raw / "clips/noise-005.json", **changes)
    with pytest.raises(AssertionError, match=expected):
        assert [p for p in check(raw) if p.startswith("noise-005: ")] == []


def test_check_sees_jumps_and_lost_clips(raw: Path) -> None:
    assert check(raw) == []
    record, frames = Noise().make(0)
    c2w = record.track.c2w.copy()
    c2w[6:, 0, 3] += 1.0
    ClipFolder(raw).write(replace(record, track=replace(record.track, c2w=c2w)), frames)
    (raw / "clips/noise-011.json").unlink()
    first, second = check(raw)
    assert first.startswith("noise-000: frame 6: a step") and second.startswith("manifest: 12 clips")


def test_any_raw_clips_are_judged_by_the_rules_for_footage(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(raw, "noise-003", "noise-004")
    folder = ClipFolder(raw)
    folder.finish()
    assert run("data", "check", folder.path, "--quality") == 0
    record = replace(folder.record("noise-003"), caption="")
    folder.write(record, folder.frames("noise-003") // 20)
    found = check_quality(folder, QualityConfig())
    assert [line.split(": ")[:2] for line in (found[0], found[-1])] == [
        ["noise-003", r] for r in ("exposure", "caption")
    ]
    assert len({line.split(": ")[0] for line in found}) == 1
    folder.write(replace(record, caption="noise"), folder.frames("noise-003"))
    capsys.readouterr()
    assert run("data", "check", folder.path) == 0 and run("data", "check", folder.path, "--quality") == 2
    assert "noise-003: exposure" in capsys.readouterr().out


def test_report_counts_and_shows(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = report(made / "raw")
    assert (found["clips"], found["frames"], found["scenes"]) == (12, 108, 6)
    assert found["actions"] == {"forward+turn left": 12, "right": 12}
    assert found["licences"] == {"CC0-1.0": 12} and found["path_length"]["median"] == pytest.approx(0.25)
    json.dumps(found)
    whole = sheet(made / "raw", rows=3)
    assert whole.shape[0] >= 3 * 16
    monkeypatch.setattr(clips_module, "SHEET_PIXELS", 8)
    assert whole.shape[1] - sheet(made / "raw", rows=3).shape[1] == 3 * 8, "three frames of 16 pixels"
