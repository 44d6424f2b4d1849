"""Captured scenes to clips: what is read, which paths are rendered, and what is dropped or refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import error_line, run

from minwm.cameras.formats.base import CameraFile
from minwm.cameras.formats.colmap import load_pycolmap
from minwm.cameras.formats.table import write_cameras
from minwm.cameras.track import CameraTrack, intrinsics, rigid, so3_exp
from minwm.cameras.trajectory import Motion, parse
from minwm.core.media import write_image, write_video
from minwm.data.clips import ClipFolder, DataError, check
from minwm.data.ingest import notes
from minwm.data.quality import Failure
from minwm.data.splat import SplatConfig, read_capture, splat_captures, walk
from minwm.render.captured import CapturedScene
from minwm.render.gaussians import Gaussians, read_ply, write_ply
from minwm.render.splat_fit import FitConfig
from minwm.render.worlds import World

line = pytest.fixture(error_line)
SIZE = 64
WORLD = World(7)
QUICK = FitConfig(steps=60, gaussians=1500)
ROUGH = FitConfig(steps=8, gaussians=1500)
CFG = SplatConfig(source_license="CC0-1.0", clips=2, rows=32, height=32, width=32, latents=3, fit=QUICK, psnr=15.0)


def footage() -> tuple[CameraTrack, np.ndarray]:
    """A camera that walks sideways in a world: its cameras there, and what it sees."""
    track = parse("d*5,w*2,a*4").track(Motion(), intrinsics(70.0, SIZE, SIZE))
    start = WORLD.spawn(np.random.default_rng(0), track)
    assert start is not None
    track = track.transformed(start)
    return track, WORLD.render(track, SIZE, SIZE).frames


TRACK, FRAMES = footage()


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    names = tuple(f"images/{i}.png" for i in range(len(FRAMES)))
    for name, frame in zip(names, FRAMES, strict=True):
        write_image(tmp_path / "walk" / name, frame)
    write_cameras(
        tmp_path / "walk" / "transforms.json", "nerfstudio", CameraFile(TRACK, size=(SIZE, SIZE), names=names)
    )
    (tmp_path / "walk" / "caption.txt").write_text("a red ball on a plaza\n")
    return tmp_path / "walk"


def test_clips_of_a_captured_world_show_that_world_from_their_cameras(capture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = splat_captures((capture,), out, CFG)
    assert (made["videos"], made["clips"], made["refused"]) == (1, 2, [])
    folder = ClipFolder(out)
    assert check(out) == []
    _, factor = read_capture(capture, CFG)
    for clip in folder.ids():
        record = folder.record(clip)
        assert (record.source, record.pose_kind, record.caption) == ("splat", "ground_truth", "a red ball on a plaza")
        assert record.split_key == record.source_id and record.generator.startswith("minwm.render.captured")
        commanded = parse(record.trajectory, stride=4).track(CFG.motion, CFG.intrinsics)
        assert np.abs(record.track.c2w - commanded.c2w).max() < 1e-12
        assert record.quality["psnr"] > 15 and record.quality["coverage"] >= CFG.coverage
        assert record.origin is not None
        there = record.track.transformed(record.origin).scaled(1 / factor)
        error = WORLD.render(there, 32, 32).frames.astype(float) - folder.frames(clip)
        beside = replace(there, c2w=there.c2w @ rigid(so3_exp(np.array([0, 0.2, 0])), np.zeros(3)))
        other = WORLD.render(beside, 32, 32).frames.astype(float) - folder.frames(clip)
        assert (error**2).mean() < 0.3 * (other**2).mean()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert splat_captures((capture,), out, CFG)["clips"] == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")} == before
    with pytest.raises(DataError, match=r"other settings .*coverage: 0\.95 -> 0\.5"):
        splat_captures((capture,), out, replace(CFG, coverage=0.5))


def wall(*more: tuple[float, float, float]) -> CapturedScene:
    """A wall at z = 4 of opaque Gaussians, seen from around the origin; and other opaque Gaussians."""
    y, x = np.mgrid[-3:3:25j, -3:3:25j]
    points = np.stack([x, y, np.full_like(x, 4.0)], -1).reshape(-1, 3)
    means = torch.from_numpy(np.concatenate([points, np.array(more).reshape(-1, 3)])).float()
    count = len(means)
    gaussians = Gaussians(
        means, torch.full((count, 3), np.log(0.2)), torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1),
        torch.full((count,), 8.0), torch.zeros(count, 1, 3),
    )  # fmt: skip
    return CapturedScene(gaussians, np.eye(4)[None], points, 0.75, "a wall")


@pytest.mark.parametrize(
    ("scene", "keys", "rule", "reason"),
    [
        (wall(), "l*8", "coverage", "of frame"),
        (wall((0.0, 0.0, 0.7)), "static*8", "floaters", "of frame 0 floats in front"),
        (wall(), "s*8", "reach", "within 0.75 units of all of it"),
        (wall(), "w*1,s*1,static*6", "", ""),
    ],
)
def test_a_path_that_leaves_what_was_seen_breaks_a_named_rule(
    scene: CapturedScene, keys: str, rule: str, reason: str
) -> None:
    cfg = replace(CFG, fov=50.0, latents=9)
    track = parse(keys).track(Motion(move=1.0, turn=30.0), cfg.intrinsics)
    origin = scene.spawn(np.random.default_rng(0), track)
    found = walk(scene, None if origin is None else track.transformed(origin), cfg)
    if isinstance(found, Failure):
        assert found.rule == rule and reason in found.reason
    else:
        assert not rule
        assert found[0].shape == (33, 32, 32, 3)


def test_dropped_paths_are_lines_of_the_note(capture: Path, tmp_path: Path) -> None:
    cfg = replace(CFG, reach=0.01, latents=9, trajectories=("s*8",), clips=1, fit=ROUGH, psnr=5.0)
    made = splat_captures((capture,), tmp_path / "out", cfg)
    assert (made["clips"], made["dropped"]) == (0, {"reach": 8})
    (note,) = notes(tmp_path / "out")
    assert note["dropped"][0]["reason"].startswith("clip 0, s*8: no camera of the capture is within 0.01 units")


def test_gaussians_that_a_capture_brings_are_used_in_its_units(capture: Path, tmp_path: Path) -> None:
    cfg = replace(CFG, fit=ROUGH, psnr=5.0, coverage=0.8)
    splat_captures((capture,), tmp_path / "a", cfg)
    (fitted,) = (tmp_path / "a" / "scenes").glob("*.ply")
    _, factor = read_capture(capture, cfg)
    write_ply(capture / "scene.ply", read_ply(fitted).scaled(1 / factor))
    splat_captures((capture,), tmp_path / "b", replace(cfg, ply="scene.ply"))
    one, other = ((ClipFolder(tmp_path / name), ClipFolder(tmp_path / name).ids()) for name in "ab")
    difference = one[0].frames(one[1][0]).astype(int) - other[0].frames(other[1][0])
    assert one[1] and one[1] == other[1] and np.abs(difference).mean() < 0.5


def test_points_and_pictures_of_a_colmap_model_and_a_video(capture: Path) -> None:
    names = tuple(f"{i}.png" for i in range(len(FRAMES)))
    write_cameras(capture / "model", "colmap", CameraFile(TRACK, size=(SIZE, SIZE), names=names))
    pycolmap = load_pycolmap()
    model, rng = pycolmap.Reconstruction(str(capture / "model")), np.random.default_rng(0)
    placed = TRACK.c2w[0, :3, 3] + rng.normal(size=(40, 3)) @ np.diag([1.0, 1.0, 3.0])
    for point in placed:
        model.add_point3D(point, pycolmap.Track(), np.zeros(3, np.uint8))
    model.write_binary(str(capture / "model"))
    cfg = replace(CFG, cameras="model", camera_format="colmap", pictures="images")
    found, factor = read_capture(capture, cfg)
    assert np.abs(np.sort(found.points / factor, axis=0) - np.sort(placed, axis=0)).max() < 1e-9
    assert found.frames.shape == (len(FRAMES), 32, 32, 3)
    TRACK.save(capture / "track.json")
    write_video(capture / "walk.mp4", FRAMES, TRACK.fps)
    seen, _ = read_capture(capture, replace(CFG, cameras="track.json", camera_format="track", pictures="walk.mp4"))
    assert np.abs(seen.frames.astype(int) - found.frames).mean() < 4
    assert (
        np.abs(seen.track.relative_to_first().c2w[:, :3, :3] - TRACK.relative_to_first().c2w[:, :3, :3]).max() < 1e-12
    )


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no cameras": (lambda p: (p / "transforms.json").unlink(), "transforms.json as nerfstudio"),
    "no caption": (lambda p: (p / "caption.txt").unlink(), "caption.txt"),
    "a picture is missing": (lambda p: (p / "images" / "3.png").unlink(), "3.png cannot be read as an image"),
    "another size": (lambda p: write_image(p / "images" / "3.png", FRAMES[3][:40]), "different sizes"),
    "another scene": (
        lambda p: [write_image(p / "images" / f"{i}.png", FRAMES[i][::-1]) for i in range(0, len(FRAMES), 2)],
        "points are known of the scene, 32 are needed",
    ),
}


def test_captures_that_cannot_be_used_are_named_and_the_rest_goes_on(
    capture: Path, tmp_path: Path, line: Callable[[], str]
) -> None:
    places = []
    for fault, (spoil, _) in FAULTS.items():
        places.append(tmp_path / fault)
        places[-1].mkdir()
        for path in [*capture.rglob("*")]:
            if path.is_file():
                target = places[-1] / path.relative_to(capture)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(path.read_bytes())
        spoil(places[-1])
    fields = ["--clips", "1", "--rows", "32", "--height", "32", "--width", "32", "--latents", "3", "--psnr", "50"]
    fields += ["--fit.steps", "2", "--fit.gaussians", "500", "--source-license", "CC0-1.0"]
    json_file = tmp_path / "made.json"
    assert run("data", "splat", *places, capture, "--out", tmp_path / "out", "--json", json_file, *fields) == 2
    assert "6 captures" in line()
    refused = json.loads(json_file.read_text())["refused"]
    for fault, (_, reason) in FAULTS.items():
        assert any(f"{fault}: " in one and reason in one for one in refused), (fault, refused)
    assert any("with" in one and "dB, less than psnr=50" in one for one in refused)
