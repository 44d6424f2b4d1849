"""Cameras recovered from pixels alone: they must read what was rendered, and what was rendered wrongly."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from commands import error_line, run
from numpy.testing import assert_allclose
from test_batch import CONFIG
from test_ingest import walk
from tiny_presets import tiny_model

from minwm.bench.stream import random_model
from minwm.cameras.track import CameraError, CameraTrack, intrinsics, rigid, se3_exp, se3_inverse, so3_exp, so3_log
from minwm.cameras.trajectory import Motion, parse
from minwm.core.config import ConfigError, UserError, parse_json
from minwm.core.media import write_video
from minwm.eval.camera.estimators import recover_by_colmap
from minwm.eval.camera.points import distances, moved_camera
from minwm.eval.camera.recover import RecoveredCamera, recover
from minwm.eval.camera.score import keys_of, score_camera
from minwm.eval.metrics import measure
from minwm.eval.source import Video, VideoSource, function_source
from minwm.eval.suite import requests, suite
from minwm.experiments import presets
from minwm.nets.chunks import StreamConfig
from minwm.render.worlds import World
from minwm.store.folder import save_model
from minwm.stream.solvers import BidirectionalSampler

line = pytest.fixture(error_line)
SIZE, FPS = 96, 8.0
MOTION = Motion(move=0.5, turn=16.0, fps=FPS)
K = intrinsics(70.0, SIZE, SIZE)


def path(keys: str, motion: Motion = MOTION) -> CameraTrack:
    return parse(keys).track(motion, K)


@cache
def place() -> tuple[World, np.ndarray]:
    """A scene, and a pose in it from where the way ahead is free."""
    scene = World(9_000_000_123)
    origin = scene.spawn(np.random.default_rng(1), path("w*8"))
    assert origin is not None
    return scene, origin


@cache
def shown(keys: str, speed: float = 1.0, depth: bool = False) -> RecoveredCamera:
    """The camera of a true video along keys, at another speed than they command."""
    scene, origin = place()
    motion = replace(MOTION, move=0.5 * abs(speed), turn=16.0 * abs(speed))
    track = path(keys, motion)
    if speed < 0:
        track = CameraTrack(se3_inverse(track.c2w), track.K, track.fps)
    view = scene.render(track.transformed(origin), SIZE, SIZE)
    return recover(view.frames, K, FPS, view.depth[0] if depth else None)


def mean(keys: str, speed: float = 1.0, depth: bool = False) -> dict[str, float]:
    samples = score_camera(shown(keys, speed, depth), path(keys))
    return {name: float(np.mean(values)) for name, values in samples.items()}


def test_the_camera_of_a_true_video_is_the_commanded_one() -> None:
    ahead = mean("w*4", depth=True)
    assert ahead["lost"] == 0 and ahead["rot_err_deg[w]"] < 0.5 and ahead["direction_err_deg@2"] < 4
    assert ahead["speed_ratio"] == pytest.approx(1, abs=0.1)
    turn = mean("l*2,j*2")
    assert shown("l*2,j*2").kinds == ["turn"] * 2, "an essential matrix would be arbitrary"
    assert turn["rot_err_deg"] < 0.5 and turn["turn_ratio"] == pytest.approx(1, abs=0.03) and turn["strays"] == 0


def test_wrong_videos_read_as_what_they_are() -> None:
    half = mean("w*4", 0.5, depth=True)
    assert half["speed_ratio"] == pytest.approx(0.5, abs=0.06) and half["direction_err_deg"] < 4
    assert mean("l*2,j*2", 0.5)["turn_ratio"] == pytest.approx(0.5, abs=0.03)
    back = mean("w*4", -1.0, depth=True)
    assert back["direction_err_deg"] > 175 and back["speed_ratio"] == pytest.approx(-1, abs=0.15)
    assert mean("l*2,j*2", -1.0)["turn_ratio"] == pytest.approx(-1, abs=0.03)
    assert shown("static*4").kinds == ["still"] * 2
    against = score_camera(shown("static*4"), path("w+l*4"))
    assert against["speed_ratio"] == against["turn_ratio"] == [0.0, 0.0] and against["direction_err_deg"] == [
        90.0,
        90.0,
    ]


def test_without_a_depth_only_relative_speeds_are_told() -> None:
    found = mean("w*4", 0.5)
    assert "speed_ratio" not in found and found["relative_speed"] == pytest.approx(1, abs=0.05)


def test_noise_is_lost_and_charged(rng: np.random.Generator) -> None:
    noise = rng.integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    found = score_camera(recover(noise, K, FPS), path("w*4"))
    assert found["lost"] == [1.0, 1.0] and found["direction_err_deg"] == [90.0, 90.0]
    assert found["speed_ratio"] == [0.0, 0.0] or found["relative_speed"] == [0.0, 0.0]


def test_colmap_is_asked_where_a_camera_moves() -> None:
    true, pictures = walk()
    depth = World(2).render(CameraTrack(true.c2w[:1], true.K[:1], true.fps), *pictures.shape[1:3]).depth[0]
    found = recover_by_colmap(pictures, true.K[0], true.fps, depth)
    assert found.kinds == ["move"] and found.anchored and not found.failure
    scores = score_camera(found, true)
    assert scores["rot_err_deg"][0] < 2 and scores["direction_err_deg"][0] < 10 and scores["failed"] == [0.0]
    assert scores["speed_ratio"][0] == pytest.approx(1, abs=0.2)
    scene, origin = place()
    turn = scene.render(path("l*4").transformed(origin), SIZE, SIZE).frames
    assert recover_by_colmap(turn, K, FPS).kinds == ["turn"] * 2, "without parallax COLMAP has no poses"


def test_what_colmap_loses_is_counted_and_said(rng: np.random.Generator) -> None:
    video = Video("noise", rng.integers(0, 256, (17, 64, 64, 3), dtype=np.uint8), FPS, path("w*4"))
    log = list[str]()
    result = measure(VideoSource(["noise"], lambda _: video), ["camera"], log.append, estimator="colmap")
    found = result.scores["camera"]
    assert found["failed"].videos == found["lost"].videos == {"noise": 1.0} and result.estimator == "colmap"
    assert found["direction_err_deg"].mean.value == 90
    assert len(log) == 1 and log[0].startswith("noise: no camera was found: COLMAP places 0 of 9 pictures")
    with pytest.raises(CameraError, match=r"square pixels.*give --estimator klt"):
        recover_by_colmap(video.frames[:, :32], K, FPS)


def test_a_motion_is_found_among_wrong_pairs(rng: np.random.Generator) -> None:
    points = np.concatenate([rng.uniform(-2, 2, (80, 2)), rng.uniform(3, 8, (80, 1))], 1)
    pose = se3_exp(np.array([0.3, 0.05, 0.2, 0.02, 0.1, -0.03]))
    seen = (points - pose[:3, 3]) @ pose[:3, :3]
    a, b = points[:, :2] / points[:, 2:], seen[:, :2] / seen[:, 2:]
    b[:20] += rng.uniform(-0.3, 0.3, (20, 2))
    found = moved_camera(a, b, np.eye(3), 1e-3)
    assert found is not None
    assert np.linalg.norm(so3_log(pose[:3, :3].T @ found[0][:3, :3])) < 2e-3
    assert_allclose(found[0][:3, 3], pose[:3, 3] / np.linalg.norm(pose[:3, 3]), atol=1e-2)
    w2c = se3_inverse(pose)
    there = distances(a[20:], b[20:], w2c[:3, :3], w2c[:3, 3])
    assert_allclose(there, np.stack([np.linalg.norm(x[20:], axis=1) for x in (points, seen)], 1), rtol=1e-6)


def test_keys_are_told_from_the_path() -> None:
    for keys in ("w", "s", "a", "d", "u", "dn", "j", "l", "i", "k", "w+d", "w+j", "s+l", "static"):
        assert keys_of(path(f"{keys}*2").c2w[-1]) == keys
    assert keys_of(rigid(so3_exp(np.radians([0, 1.0, 0])), np.array([0, 0, 0.01]))) == "static"


def test_any_function_is_scored_and_what_is_missing_is_said() -> None:
    scene, origin = place()
    tracks = {"turn": path("l*2"), "ahead": path("w*2")}
    source = function_source(lambda t: scene.render(t.transformed(origin), SIZE, SIZE).frames, tracks)
    log = list[str]()
    result = measure(source, None, log.append)
    assert result.scores["camera"]["turn_ratio"].videos.keys() == {"turn"}
    assert result.scores["camera"]["rot_err_deg"].mean.high < 1 and result.scores["texture"]["flicker"]
    reason = "skipped: 2 of 2 videos have no reference"
    assert result.skipped["likeness"] == result.skipped["flip"] == reason and f"flip: {reason}" in log
    assert result.skipped.keys() == {"likeness", "flip", "seams", "revisits", "lpips", "dreamsim", "fvd"}
    with pytest.raises(ConfigError, match="did you mean 'camera'"):
        measure(source, ["camra"])
    with pytest.raises(UserError, match="x: 3 frames and 17 poses"):
        Video("x", np.zeros((3, 8, 8, 3), np.uint8), FPS, path("w*4"))


def test_likeness_needs_a_reference_and_reads_the_difference(rng: np.random.Generator) -> None:
    frames = rng.integers(0, 200, (9, 24, 24, 3), dtype=np.uint8)
    off = Video("off", frames + np.uint8(40), FPS, reference=frames)
    same = Video("same", frames, FPS, reference=frames)
    found = measure(VideoSource(["off", "same"], {"off": off, "same": same}.__getitem__), ["likeness", "flip"])
    flip, psnr = found.scores["flip"]["flip"].videos, found.scores["likeness"]["psnr"].videos
    assert flip["same"] == 0 and 0.05 < flip["off"] < 0.6
    assert psnr["off"] == pytest.approx(20 * np.log10(255 / 40), abs=1e-3) and psnr["same"] > 50
    assert found.scores["likeness"]["psnr@1"].videos.keys() == {"off", "same"}


def test_a_suite_fits_its_model(tmp_path: Path) -> None:
    stream = suite(CONFIG)
    assert stream[0] == "w*20" and stream[12] == "w*10,s*10" and stream[16] == "l*90", "a full turn, at 4 degrees"
    assert parse(stream[-1]).latents == 240, "a minute"
    whole = replace(CONFIG, sampler=BidirectionalSampler(steps=1))
    assert {parse(keys).latents for keys in suite(whole)} == {CONFIG.latents - 1}
    with pytest.raises(UserError, match="give --images DIR too"):
        requests(CONFIG, tmp_path, prompts=["x"])
    with pytest.raises(UserError, match="give --prompts FILE"):
        requests(replace(CONFIG, stream=StreamConfig(chunk=4)), tmp_path, images=tmp_path)


@pytest.mark.parametrize("stream", [StreamConfig(chunk=2, first_chunk=1), StreamConfig(chunk=4)], ids=["image", "text"])
def test_models_of_any_start_and_folders_are_scored(
    stream: StreamConfig, tmp_path: Path, line: Callable[[], str]
) -> None:
    model = random_model(replace(CONFIG, stream=stream))
    save_model(tmp_path / "model", model.config, model.net, model.codec)
    (tmp_path / "paths.txt").write_text("w*5\nj*4\n")
    words = ("eval", "--model", tmp_path / "model", "--trajectories", tmp_path / "paths.txt", "--out", tmp_path / "out")
    assert run(*words, "--json", tmp_path / "a.json") == 0
    first = parse_json((tmp_path / "a.json").read_text())["videos"]["model"]
    assert first["scores"]["camera"]["lost"]["videos"].keys() == {"000", "001"}
    assert first["skipped"].keys() >= {"likeness", "flip", "lpips"}

    write_video(tmp_path / "out" / "model" / "alone.mp4", np.zeros((9, 32, 32, 3), np.uint8), 16.0)
    assert run("eval", "--videos", tmp_path / "out" / "model", "--json", tmp_path / "b.json") == 0
    (again,) = parse_json((tmp_path / "b.json").read_text())["videos"].values()
    assert again["scores"]["camera"] == first["scores"]["camera"]
    assert again["skipped"]["camera"] == "not of all: 1 of 3 videos have no camera"
    assert run("eval", "--videos", tmp_path / "paths.txt") == 2 and "holds no mp4 files" in line()
    assert run("eval", "--json", tmp_path / "c.json") == 2 and "give --model DIR, or --videos DIR" in line()
    assert run(*words, "--quick") == 2 and "are for rendered scenes" in line()


@pytest.mark.parametrize("preset", ["wan2.1-1.3b", "wan2.2-ti2v-5b", "hunyuan1.5-8b", "hy-worldplay-8b"])
def test_a_model_of_every_family_is_scored_as_it_starts(preset: str, tmp_path: Path) -> None:
    """From text with a first chunk of 4 latents, and from images; with the family's own transformer and VAE."""
    released = preset in presets.PUBLISHED and preset not in presets.PIPELINES
    config = presets.published(preset) if released else presets.stage(f"{preset}/dmd", tmp_path).model
    model = random_model(tiny_model(config, tmp_path))
    assert model.config.image_start or model.config.stream.first_chunk_frames == 4
    save_model(tmp_path / "model", model.config, model.net, model.codec)
    (tmp_path / "paths.txt").write_text("w*7\n")
    words = ("eval", "--model", tmp_path / "model", "--trajectories", tmp_path / "paths.txt", "--metrics", "camera")
    assert run(*words, "--json", tmp_path / "a.json", "--html", tmp_path / "a.html") == 0
    found = parse_json((tmp_path / "a.json").read_text())["videos"]["model"]
    assert found["scores"]["camera"]["lost"]["videos"].keys() == {"000"}
    assert ("image" in found["tasks"]["000"]) == model.config.image_start
    assert 'section id="scores"' in (tmp_path / "a.html").read_text()
