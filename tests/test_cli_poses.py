"""Pose files on the command line: judged, compared with the model, cropped with a picture."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import error_line, run

from minwm.cameras.track import intrinsics
from minwm.cameras.trajectory import Motion, parse
from minwm.cli.base import read_track
from minwm.core.media import write_image
from minwm.experiments.presets.demo import tiny_model

line = pytest.fixture(error_line)


def poses(path: Path, **changes: object) -> Path:
    """A pose file of a straight walk, with fields of it changed."""
    parse("w*4").track(Motion(), intrinsics(70.0, 64, 64)).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"fps": 1e-9}, "1e-09 poses per second say nothing"),
        ({"fps": 0.05}, "0.05 poses per second say nothing"),
        ({"fps": float("nan")}, "fps = nan"),
        ({"unit": "banana"}, "unit = 'banana'; a track is in one of toy, metric, sfm"),
    ],
)
def test_pose_files_are_judged(
    changes: dict[str, object], problem: str, line: Callable[[], str], tmp_path: Path
) -> None:
    assert run("camera", "show", poses(tmp_path / "x.JSON", **changes)) == 2
    assert problem in line()


def test_poses_unlike_those_of_training_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("camera", "show", poses(tmp_path / "x.json")) == 0
    assert "note: " not in capsys.readouterr().out
    fast = poses(tmp_path / "fast.json", fps=64.0, K=[2.0, 2.0, 0.5, 0.5])
    assert run("camera", "show", fast) == 0
    assert re.search(r"moves 2 units .*keys 0.5;.*\n.*its K is \[2.0, 2.0", capsys.readouterr().out)


def test_the_k_of_a_picture_is_cropped_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = tiny_model()
    fx, fy, cx, cy = cfg.intrinsics
    whole = poses(tmp_path / "whole.json", K=[fx / 2, fy, cx, cy])
    write_image(tmp_path / "wide.png", np.zeros((20, 40, 3), np.uint8))
    for file in (whole, poses(tmp_path / "model.json", K=cfg.intrinsics.tolist())):
        track, _ = read_track(str(file), cfg, tmp_path / "wide.png")
        assert np.allclose(track.K, cfg.intrinsics)
    (said,) = capsys.readouterr().out.splitlines()
    assert said == f"{whole}: its K is taken for that of {tmp_path / 'wide.png'}, 40x20 pixels, and cropped with it"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("poses.txt", b"1 0 0 0", "poses are read from .json files"),
        ("x.json", b"[" * 200_000, "brackets are nested too deep"),
        ("x.json", "{}".encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_files_that_are_no_poses(
    name: str, content: bytes, problem: str, line: Callable[[], str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert run("camera", "show", tmp_path / name) == 2
    assert problem in line()
