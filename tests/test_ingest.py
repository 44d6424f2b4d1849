"""Videos with camera files become clips; what does not is named with its reason, and the rest goes on."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from minwm.cameras.check import jitter
from minwm.cameras.formats.base import CameraFile
from minwm.cameras.formats.table import write_cameras
from minwm.cameras.track import CameraTrack, intrinsics, se3_inverse
from minwm.cameras.trajectory import Motion, parse
from minwm.core.config import ConfigError, UserError
from minwm.core.media import write_video
from minwm.data.clips import ClipFolder, check
from minwm.data.footage import WindowConfig, windows
from minwm.data.ingest import IngestConfig, ingest, notes, summary
from minwm.data.quality import Candidate, QualityConfig, caption_failures, failures
from minwm.render.worlds import World

WIDE, HIGH = 160, 128
K = intrinsics(75.0, WIDE, HIGH)
CFG = IngestConfig(source_license="CC0-1.0", latents=5, height=128, width=128, fps=16.0, estimator=None)


@cache
def walk(seed: int = 2, route: str = "a*5,l*5") -> tuple[CameraTrack, np.ndarray]:
    """41 frames at 24 per second in a procedural world, and their cameras."""
    track, world = parse(route).track(Motion(move=0.7, turn=24.0, fps=24.0), K), World(seed)
    start = world.spawn(np.random.default_rng(seed), track)
    assert start is not None
    track = track.transformed(start)
    return track, world.render(track, HIGH, WIDE).frames


def footage(
    folder: Path, name: str = "walk", frames: np.ndarray | None = None, track: CameraTrack | None = None
) -> Path:
    """A video with its cameras and caption."""
    true, pictures = walk()
    write_video(folder / f"{name}.mp4", pictures if frames is None else frames, 24.0, crf=10)
    (track or true).save(folder / f"{name}.camera.json")
    (folder / f"{name}.txt").write_text("a town of coloured blocks\n")
    return folder / f"{name}.mp4"


def test_a_video_becomes_clips_with_the_cameras_of_their_frames(tmp_path: Path) -> None:
    footage(tmp_path / "in")
    made = ingest(tmp_path / "in", tmp_path / "out", CFG)
    assert (made["videos"], made["clips"], made["refused"]) == (1, 1, [])
    assert made["dropped"] == {"short": 1}
    assert check(tmp_path / "out") == []
    folder = ClipFolder(tmp_path / "out")
    (clip,) = folder.ids()
    record, frames = folder.record(clip), folder.frames(clip).astype(int)
    true, pictures = walk()
    shown = (np.arange(17) * 24 / 16).astype(int)  # what a player shows at 16 per second
    expected = true.slice(0, 41).c2w[shown]
    assert np.abs(record.track.c2w - se3_inverse(expected[0]) @ expected).max() < 1e-9
    crop = pictures[shown][:, :, (WIDE - HIGH) // 2 : (WIDE + HIGH) // 2].astype(int)
    assert np.abs(frames - crop).mean() < 2
    assert record.track.K[0] == pytest.approx([K[0] * WIDE / HIGH, K[1], 0.5, 0.5])
    assert (record.caption, record.source_license, record.pose_kind) == (
        "a town of coloured blocks",
        "CC0-1.0",
        "estimated",
    )


def test_a_second_run_makes_only_what_is_missing(tmp_path: Path) -> None:
    footage(tmp_path / "in", "a")
    ingest(tmp_path / "in", tmp_path / "out", CFG)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "clips").iterdir()}
    footage(tmp_path / "in", "b/c", walk(3)[1], walk(3)[0])
    assert ingest(tmp_path / "in", tmp_path / "out", CFG)["videos"] == 2
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    with pytest.raises(UserError, match=r"other settings \(fps: 16\.0 -> 8\.0\)"):
        ingest(tmp_path / "in", tmp_path / "out", replace(CFG, fps=8.0))


def test_no_clip_goes_across_a_cut(tmp_path: Path) -> None:
    """Two shots of 41 frames each: 28 frames at 16 per second, of which 17 make a clip."""
    (one, first), (two, second) = walk(2), walk(5)
    track = CameraTrack(np.concatenate([one.c2w, two.c2w]), K, 24.0)
    footage(tmp_path / "in", "two", np.concatenate([first, second]), track)
    made = ingest(tmp_path / "in", tmp_path / "out", CFG)
    assert made["clips"] == 2
    folder = ClipFolder(tmp_path / "out")
    starts = [folder.record(clip).source_id.rpartition(" at ")[2] for clip in folder.ids()]
    assert starts == ["0.000 s", f"{41 / 24:.3f} s"]
    assert all(line["rule"] == "short" for note in notes(tmp_path / "out") for line in note["dropped"])


def test_cameras_of_any_format_in_other_units(tmp_path: Path) -> None:
    video = footage(tmp_path / "in")
    video.with_name("walk.camera.json").unlink()
    write_cameras(tmp_path / "in" / "walk.cameras.txt", "re10k", CameraFile(walk()[0]))
    cfg: dict[str, Any] = {"cameras": "{name}.cameras.txt", "camera_format": "re10k", "scale": 3.0}
    ingest(tmp_path / "in", tmp_path / "out", replace(CFG, **cfg))
    folder = ClipFolder(tmp_path / "out")
    (clip,) = folder.ids()
    assert folder.record(clip).track.path_length() == pytest.approx(3 * walk()[0].slice(0, 25).path_length(), rel=1e-3)


def test_a_steady_turn_between_uneven_frames_is_no_jitter(tmp_path: Path) -> None:
    """At 16 of 24 frames per second, one step in two is twice as long as the other."""
    true, frames = walk(7, "w+j*10")
    footage(tmp_path / "in", "turns", frames, true)
    assert ingest(tmp_path / "in", tmp_path / "out", CFG)["clips"] == 1
    shown = np.sort(np.concatenate([np.arange(0.0, 41, 3), np.arange(1.0, 41, 3)]))
    assert jitter(true) < 0.01 and jitter(true.at(shown, 16.0)) > 0.3
    assert jitter(true.at(shown, 16.0), shown / 24) < 0.01
    twice = np.repeat(np.arange(41.0), 2)
    assert jitter(true.at(twice, 48.0), twice / 24) < 0.01


def test_wrong_cameras_are_dropped_with_the_cure(tmp_path: Path) -> None:
    footage(tmp_path / "in", track=CameraTrack(se3_inverse(walk()[0].c2w), K, 24.0))
    made = ingest(tmp_path / "in", tmp_path / "out", CFG)
    assert made["clips"] == 0
    assert made["dropped"]["poses"] == 1
    assert "world-to-camera, read as camera-to-world; name a format" in made["examples"]["poses"]


# ---------------------------------------------------------------------------------------------
# Rules


def still(frames: np.ndarray) -> np.ndarray:
    return np.repeat(frames[:1], len(frames), 0)


def boxed(frames: np.ndarray) -> np.ndarray:
    frames = frames.copy()
    frames[:, :10] = frames[:, -10:] = 0
    return frames


def subtitled(frames: np.ndarray) -> np.ndarray:
    out = [Image.fromarray(frame) for frame in frames]
    for image in out:
        ImageDraw.Draw(image).text((20, 110), "this is a subtitle", "white", stroke_width=1, stroke_fill="black")
    return np.stack([np.asarray(image) for image in out])


def stuttering(frames: np.ndarray) -> np.ndarray:
    return frames[np.arange(len(frames)) // 2 * 2]


def test_a_good_clip_meets_every_rule() -> None:
    track, frames = walk()
    assert failures(Candidate(frames, track), QualityConfig()) == []


@pytest.mark.parametrize(
    ("caption", "reason"),
    [(" ", "it has none"), ("the camera pans over a town", "it speaks of motion: 'camera'"), ("a town", "")],
)
def test_captions_say_what_is_there(caption: str, reason: str) -> None:
    assert [failure.reason for failure in caption_failures(caption, QualityConfig())] == [reason] * bool(reason)


@pytest.mark.parametrize(
    ("rule", "spoil", "reason"),
    [
        ("exposure", lambda x: x // 32, "mean brightness is"),
        ("exposure", lambda x: 255 - x // 32, "mean brightness is"),
        ("letterbox", boxed, "20 of 128 rows at its edges are black"),
        ("letterbox", lambda x: boxed(x.swapaxes(1, 2)).swapaxes(1, 2), "20 of 160 columns"),
        ("overlay", lambda _: subtitled(walk(3, "w*10")[1]), "are edges that stay while their surroundings change"),
        ("static", still, "its camera moves, but pixels change by 0.00"),
        ("repeated frames", stuttering, "50% of its frames repeat"),
    ],
)
def test_each_rule_finds_its_fault(rule: str, spoil: Callable[[Any], Any], reason: str) -> None:
    track, frames = walk()
    clip = Candidate(spoil(frames), track)
    found = {failure.rule: failure.reason for failure in failures(clip, QualityConfig(epipolar=False))}
    assert reason in found[rule]


# ---------------------------------------------------------------------------------------------
# Files that cannot be used


def encoded(path: Path, frames: np.ndarray, times: list[int] | None = None, **options: Any) -> Path:
    """A video of these frames at 24 per second, or at times in milliseconds."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(options.get("codec", "libx264"), rate=24, options=options.get("options", {}))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = options.get("pix_fmt", "yuv420p")
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for name in ("color_trc", "color_primaries", "colorspace"):
            if name in options:
                setattr(stream.codec_context, name, options[name])
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if times:
                picture.pts, picture.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def test_a_variable_frame_rate_shows_what_a_player_shows(tmp_path: Path) -> None:
    """Four frames at 0, 0.1, 0.5 and 0.6 s, five wanted at 10 per second."""
    grey = np.stack([np.full((16, 16, 3), value, np.uint8) for value in (30, 90, 150, 210)])
    path = encoded(tmp_path / "v.mkv", grey, [0, 100, 500, 600])
    (window, rest) = windows(path, WindowConfig(frames=5, fps=10.0, height=16, width=16, cut=1000.0))
    assert window.times == pytest.approx([0, 0.1, 0.1, 0.1, 0.1], abs=0.002)
    assert rest.times == pytest.approx([0.5, 0.6], abs=0.002)
    assert np.abs(window.frames.mean((1, 2, 3)) - [30, 90, 90, 90, 90]).max() < 4


def test_settings_and_folders_are_judged(tmp_path: Path) -> None:
    faults: list[tuple[dict[str, Any], str]] = [
        ({"source_license": " "}, "name the licence"),
        ({"latents": 1}, "latents from 2"),
        ({"scale": 0.0}, "a positive number"),
    ]
    for changes, reason in faults:
        with pytest.raises(ConfigError, match=reason):
            replace(CFG, **changes)
    with pytest.raises(UserError, match="is no folder of videos"):
        ingest(tmp_path / "none", tmp_path / "out", CFG)
    with pytest.raises(UserError, match="holds no videos"):
        ingest(tmp_path, tmp_path / "out", CFG)
    assert summary(tmp_path / "out")["videos"] == 0
