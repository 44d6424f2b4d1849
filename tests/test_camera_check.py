"""Faults of camera files: found by themselves and against the video, and named with their cure."""

import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run
from viser.transforms import SO3
from wrong_cameras import WRONG, Poses, noisy

from minwm.cameras.check import check_video, faults
from minwm.cameras.frusta import serve
from minwm.cameras.track import (
    CameraTrack,
    intrinsics,
    se3_inverse,
)
from minwm.cameras.trajectory import Motion, parse
from minwm.core.media import read_image, write_video
from minwm.render.worlds import World

SIDE = 128
K = intrinsics(70.0, SIDE, SIDE)
MOTION = Motion(move=0.5, turn=16.0, fps=16.0)


@cache
def clip(route: str = "a*4,l*4,w*4,w+i*3", seed: int = 2) -> tuple[CameraTrack, np.ndarray]:
    """A walk through a procedural world in its true cameras, and its frames."""
    track, world = parse(route).track(MOTION, K), World(seed)
    start = world.spawn(np.random.default_rng(seed), track)
    assert start is not None
    track = track.transformed(start)
    return track, world.render(track, SIDE, SIDE).frames


def grey(frames: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(frame) for frame in frames.mean(-1).astype(np.uint8)]


CASES = {**WRONG, "another clip": (lambda _: clip("d*8,i*3,s*4", 5)[0].c2w, "do not fit the video.*another clip's")}


def test_true_cameras_pass_on_every_kind_of_walk() -> None:
    for seed, route in enumerate(("a*4,l*4,w*4,w+i*3", "w*15", "j*15", "w+l*15", "s+a*15")):
        track, frames = clip(route, seed)
        result = check_video(track, grey(frames), 16.0)
        assert not result.faults, (route, result)
        assert result.fit is not None
        assert result.fit.residual < 0.6
        assert result.fit.in_front > 0.9


@pytest.mark.parametrize("fault", CASES)
def test_each_wrong_reading_is_told_from_the_true_one(fault: str) -> None:
    spoil, said = CASES[fault]
    track, frames = clip()
    wrong = CameraTrack(spoil(track.c2w), K, 16.0)
    (found,) = check_video(wrong, grey(frames), 16.0).faults
    assert re.search(said, str(found)), found


def test_a_wrong_focal_length_shows_while_the_camera_turns() -> None:
    track, frames = clip()
    wrong = CameraTrack(track.c2w, track.K * [0.8, 0.8, 1, 1], 16.0)
    (found,) = check_video(wrong, grey(frames), 16.0).faults
    assert found.what == "the focal length is 1.25 times that of K"
    assert "correct K" in found.cure


def test_poses_at_another_rate_are_interpolated_and_too_few_are_refused() -> None:
    track, frames = clip()
    result = check_video(track.at_latent_rate(4), grey(frames), 16.0)
    assert not result.faults
    assert result.notes == ["4 poses per second are compared with 16 frames, by interpolation"]
    (found,) = check_video(track.slice(0, 40), grey(frames), 16.0).faults
    assert found.what == "there are 40 poses in 2.44 s and 61 frames in 3.75 s"


def test_a_video_without_detail_says_nothing() -> None:
    track, frames = clip()
    result = check_video(track, grey(np.zeros_like(frames)), 16.0)
    assert (result.fit, result.faults) == (None, [])
    assert "nothing can be followed" in result.notes[-1]


def jump(c2w: Poses) -> Poses:
    return np.concatenate([c2w[:20], c2w[20:] + np.array([[0, 0, 0, 5.0]] + [[0, 0, 0, 0]] * 3)])


@pytest.mark.parametrize(
    ("spoil", "k", "size", "said"),
    [
        (jump, K, None, "from frame 19 to 20 it moves 5.* toy units, the median step is .*; cut the clip"),
        (noisy, K, None, r"jitter by [0-9.]+ degrees from frame to frame \(limit 0.3\); estimate them anew"),
        (lambda c2w: c2w, K * [0.2, 0.2, 1, 1], None, "focal lengths .* outside 0.2 to 3"),
        (lambda c2w: c2w, K + np.array([0, 0, 0.4, 0]), None, "principal point .* outside 0.2 to 0.8"),
        (lambda c2w: c2w, K, (128, 200), "pixels of 200x128 pictures are 1.562 times as high as wide; .*crop K"),
    ],
)
def test_faults_of_the_poses_alone(
    spoil: Callable[[Poses], Poses], k: np.ndarray, size: tuple[int, int] | None, said: str
) -> None:
    found = faults(CameraTrack(spoil(clip()[0].c2w), k, 16.0), size)
    assert any(re.search(said, str(fault)) for fault in found), found


def test_a_good_track_has_no_fault() -> None:
    for route in ("static*5", "w*1", "j*8", "w*4,s*4"):
        assert not faults(parse(route).track(MOTION, K), (SIDE, SIDE))


def test_check_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track, frames = clip()
    write_video(tmp_path / "v.mp4", frames, 16.0, crf=23)
    track.save(tmp_path / "good.json")
    CameraTrack(se3_inverse(track.c2w), K, 16.0).save(tmp_path / "bad.json")
    words = ("--video", tmp_path / "v.mp4", "--json", tmp_path / "n.json", "--plot", tmp_path / "p.png")
    assert run("camera", "check", tmp_path / "good.json", *words) == 0
    assert json.loads((tmp_path / "n.json").read_text())["in_front"] > 0.9
    drawn = read_image(tmp_path / "p.png")
    assert drawn.shape == (480, 960, 3)
    blue, red = ((drawn == colour).all(-1).sum() for colour in ([0, 60, 255], [255, 60, 0]))
    assert blue > 5
    assert red > 5
    assert run("camera", "check", tmp_path / "bad.json", *words) == 2
    told = capsys.readouterr()
    assert "fault: the poses are world-to-camera" in told.out
    assert "bad.json: faults found, 1 in all" in told.err
    assert "world-to-camera" in json.loads((tmp_path / "n.json").read_text())["faults"][0]


def test_cameras_are_shown_in_the_browser(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    track, _ = clip()
    server = serve(track)
    shown = {name: node for name, node in server.scene._handle_from_node_name.items() if name.startswith("/cameras/")}
    own = track.relative_to_first()
    assert len(shown) == 13
    for name, node in shown.items():
        c2w = own.c2w[int(name.rpartition("/")[2])]
        np.testing.assert_allclose(node.position, c2w[:3, 3], atol=1e-5)
        np.testing.assert_allclose(SO3(node.wxyz).as_matrix(), c2w[:3, :3], atol=1e-5)
        assert np.degrees(node.fov) == pytest.approx(70.0) and node.aspect == pytest.approx(1)
    server.stop()
    track.save(tmp_path / "track.json")
    monkeypatch.setattr(type(server), "sleep_forever", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("camera", "check", tmp_path / "track.json", "--view") == 0
    assert re.search(r"http://127.0.0.1:[1-9][0-9]* shows them", capsys.readouterr().out)
    monkeypatch.setitem(sys.modules, "viser", None)
    assert run("camera", "check", tmp_path / "track.json", "--view") == 2
    assert 'pip install "minwm[view]"' in capsys.readouterr().err
