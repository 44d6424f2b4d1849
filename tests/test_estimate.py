"""Videos without camera files: poses by COLMAP and by an adapter, in one scale, or a reason why there are none."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_ingest import CFG, HIGH, WIDE, K, footage, walk

from minwm.cameras.estimate.base import Estimate, EstimateError, chosen, filled, median_depth
from minwm.cameras.estimate.colmap import Colmap
from minwm.cameras.estimate.depth_anything import DepthAnything3
from minwm.cameras.formats.base import in_pixels, matrix
from minwm.cameras.track import CameraTrack, rotation_degrees
from minwm.core.config import ConfigError
from minwm.core.runtime import MissingExtraError
from minwm.data.clips import ClipFolder
from minwm.data.ingest import ingest, notes

SECONDS = np.arange(41) / 24
LENS = Colmap(focal=float(K[0]), pictures=14)


def turned(found: CameraTrack, true: CameraTrack) -> float:
    """Median angle in degrees between the turns since the first frame."""
    a, b = (track.relative_to_first().c2w[:, :3, :3] for track in (found, true))
    return float(np.median(rotation_degrees(np.swapaxes(a, 1, 2) @ b)))


def test_colmap_finds_the_cameras_and_the_depth_of_a_walk() -> None:
    true, pictures = walk()
    found = LENS(pictures, SECONDS, true.fps)
    assert len(found.track) == len(true) and found.quality["registered"] == 1
    assert turned(found.track, true) < 2
    a, b = (track.relative_to_first().c2w[:, :3, 3] for track in (found.track, true))
    factor = float((a * b).sum() / (a * a).sum())
    assert np.median(np.linalg.norm(factor * a - b, axis=1)) < 0.04 * true.path_length()
    assert 0.5 < found.depth * factor / 1.5 < 2  # the depth is that of its points, which lie where detail is
    again = LENS(pictures, SECONDS, true.fps)
    assert np.array_equal(again.track.c2w, found.track.c2w) and again.depth == found.depth


def test_a_camera_that_only_turns_gets_no_poses() -> None:
    with pytest.raises(EstimateError, match=r"no parallax \(a camera that only turns\)"):
        LENS(walk(4, "l*10")[1], SECONDS, 24.0)


def test_a_path_is_not_made_longer_than_what_was_seen() -> None:
    assert chosen(41, 5) == [0, 10, 20, 30, 40] and chosen(3, 5) == [0, 1, 2]
    true = walk()[0]
    used = CameraTrack(true.c2w[::10], K, 24.0)
    assert np.array_equal(filled(used, [0, 10, 20, 30, 40], SECONDS).c2w[::10].round(9), used.c2w.round(9))
    with pytest.raises(EstimateError, match="pictures 0 to 40 of 0 to 41 have poses"):
        filled(used, [0, 10, 20, 30, 40], np.arange(42) / 24)


def test_the_scale_makes_the_median_depth_the_one_that_is_asked_for() -> None:
    points = np.array([[0, 0, 4.0], [1, 0, 6.0], [0, 1, 8.0], [0, 0, -5.0]])
    track = CameraTrack(np.eye(4)[None], K, 1.0)
    depth = median_depth(points, track)
    factor = Estimate(track, depth).scale(1.5)
    assert median_depth(points * factor, track.scaled(factor)) == pytest.approx(1.5)
    with pytest.raises(EstimateError, match="the scale is not known"):
        Estimate(track, median_depth(points[3:], track)).scale(1.5)


def depth_anything(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """A module of the package's published interface, whose network knows the walk."""
    true = walk()[0]

    class Network:
        @classmethod
        def from_pretrained(cls, _: str) -> "Network":
            return cls()

        def to(self, device: object) -> "Network":
            return self

        def inference(self, image: list[np.ndarray]) -> SimpleNamespace:
            at = chosen(len(true), len(image))
            small = (HIGH // 2, WIDE // 2)  # its pictures have another size than ours
            answer: dict[str, Any] = {
                "depth": np.full((len(image), *small), 3.0, np.float32),
                "extrinsics": true.w2c()[at, :3].astype(np.float32),
                "intrinsics": matrix(in_pixels(true.K[at], small)).astype(np.float32),
            }
            return SimpleNamespace(**(answer | changes))

    api = ModuleType("depth_anything_3.api")
    api.DepthAnything3 = Network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "depth_anything_3", ModuleType("depth_anything_3"))
    monkeypatch.setitem(sys.modules, "depth_anything_3.api", api)


def test_the_adapter_of_depth_anything_reads_its_convention(monkeypatch: pytest.MonkeyPatch) -> None:
    depth_anything(monkeypatch)
    true, pictures = walk()
    found = DepthAnything3(model="walk", pictures=41)(pictures, SECONDS, true.fps)
    assert np.abs(found.track.c2w - true.c2w).max() < 1e-5 and np.abs(found.track.K - true.K).max() < 1e-6
    assert (found.depth, found.track.unit) == (3.0, "sfm")
    depth_anything(monkeypatch, extrinsics=None)
    with pytest.raises(EstimateError, match="blind gives no poses"):
        DepthAnything3(model="blind")(pictures, SECONDS, true.fps)


def test_an_estimator_that_is_not_installed_says_how_to_get_it() -> None:
    with pytest.raises(MissingExtraError, match="pip install depth-anything-3"):
        DepthAnything3(model="none")(walk()[1], SECONDS, 24.0)
    with pytest.raises(ConfigError, match=r"colmap\.focal=1280"):
        Colmap(focal=1280.0)


def test_videos_without_cameras_become_clips_in_one_scale(tmp_path: Path) -> None:
    for name, seed, route in (("moves", 2, "a*5,l*5"), ("turns", 4, "l*10")):
        video = footage(tmp_path / "in", name, walk(seed, route)[1])
        video.with_name(f"{name}.camera.json").unlink()
    made = ingest(tmp_path / "in", tmp_path / "out", replace(CFG, estimator=LENS))
    assert (made["clips"], made["estimated"], made["dropped"]) == (1, 1, {"short": 2, "no poses": 1})
    assert "only turns" in made["examples"]["no poses"]
    folder = ClipFolder(tmp_path / "out")
    record = folder.record(*folder.ids())
    true = walk()[0].slice(0, 25)
    assert record.pose_kind == "estimated" and record.track.unit == "sfm"
    assert record.track.K[0] == pytest.approx([K[0] * WIDE / HIGH, K[1], 0.5, 0.5], rel=1e-3)
    assert 0.4 < record.track.path_length() / true.path_length() < 2.5
    assert {"registered", "reprojection_px", "focal", "scale"} <= set(record.quality)
    assert all(note["seconds"] > 0 for note in notes(tmp_path / "out"))
