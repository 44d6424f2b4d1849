"""Two estimators of cameras beside each other: videos in which they differ are counted and named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import error_line, run

from minwm.cameras.track import CameraTrack, intrinsics, rigid, se3_inverse, so3_exp
from minwm.cameras.trajectory import Motion, parse
from minwm.core.config import parse_json
from minwm.core.media import write_video
from minwm.eval.camera.estimators import ESTIMATORS, Estimator
from minwm.eval.camera.recover import RecoveredCamera
from minwm.eval.metrics import measure
from minwm.eval.source import function_source
from minwm.eval.witness import LIMITS, call_witness

line = pytest.fixture(error_line)
FPS = 4.0
TRACKS = {
    keys: parse(keys).track(Motion(move=0.5, turn=16.0, fps=FPS), intrinsics(70.0, 32, 32))
    for keys in ("w*2", "l*2", "w+l*2")
}


def off_by(degrees: float, anchored: bool = True) -> Estimator:
    """An estimator that reads the commanded camera, whose index is the colour of the frames, turned too far."""

    def estimate(frames: np.ndarray, *_: Any, **__: Any) -> RecoveredCamera:
        track = [*TRACKS.values()][frames[0, 0, 0, 0]]
        ends = [0, 4, 8]
        steps = se3_inverse(track.c2w[ends[:-1]]) @ track.c2w[ends[1:]]
        turn = so3_exp(np.array([0, np.radians(degrees), 0])) if frames[0, 0, 0, 0] else np.eye(3)
        return RecoveredCamera(ends, ["move", "move"], steps @ rigid(turn, np.zeros(3)), np.ones(2, bool), anchored)

    return estimate


def painted(track: CameraTrack) -> np.ndarray:
    index = next(i for i, other in enumerate(TRACKS.values()) if other is track)
    return np.full((len(track), 32, 32, 3), index, np.uint8)


def test_videos_in_which_two_estimators_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ESTIMATORS, "right", off_by(0))
    monkeypatch.setitem(ESTIMATORS, "wrong", off_by(5, anchored=False))
    source = function_source(painted, TRACKS)
    first = measure(source, ["camera", "published", "texture"], estimator="right")
    witness = call_witness(source, first, "wrong")
    assert witness.scores.estimator == "wrong" and witness.differences.keys() == {"camera", "published"}
    found = witness.differences["camera"]
    rotation = found["rot_err_deg"]
    assert rotation.median and rotation.median.value == pytest.approx(5) and rotation.videos == 3
    assert rotation.beyond == ["l*2", "w+l*2"] and rotation.limit == LIMITS["rot_err_deg"] and not rotation.only_one
    assert found["lost"].median and found["lost"].median.value == 0 and not found["lost"].beyond
    speed = found["speed_ratio"]
    assert speed.median is None and speed.videos == 0 and speed.only_one == ["w*2", "w+l*2"], "without a known depth"
    summed = witness.differences["published"]["rot_err"]
    assert summed.median and summed.median.value > 0 and summed.limit is None and not summed.beyond


def test_both_are_in_the_result_and_on_the_page(
    tmp_path: Path, line: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    still = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8).repeat(9, 0)
    for keys, track in TRACKS.items():
        write_video(tmp_path / f"{keys}.mp4", still, FPS)
        track.save(tmp_path / f"{keys}.json")
    words = ("eval", "--videos", tmp_path, "--metrics", "camera", "--estimator", "klt")
    assert run(*words, "colmap", "--json", tmp_path / "a.json", "--html", tmp_path / "a.html") == 0
    said = capsys.readouterr().out
    assert "camera: rot_err_deg by klt and colmap: 0 apart (median of 3 videos), 0 by more than 3" in said
    (row,) = parse_json((tmp_path / "a.json").read_text())["witnesses"].values()
    assert row["scores"]["estimator"] == "colmap" and row["differences"]["camera"]["lost"]["videos"] == 3
    assert "Two estimators of cameras" in (tmp_path / "a.html").read_text()
    assert run(*words, "klt") == 2 and "give one, or two that differ" in line()
    assert run(*words[:4], "texture", *words[5:], "colmap") == 2 and "camera or published" in line()
