"""Folders of videos as raw clips.

    videos/walk.mp4             any video
    videos/walk.camera.json     its cameras, in any format of cameras/formats; the first pose is that of the first frame
    videos/walk.txt             its caption: what is there, never how the camera moves

Cameras that are not there are estimated, captions are asked of a captioner. Every video leaves a file in `ingested/`,
written last: its clips, and what was dropped with rule and reason. A video that has one is done.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minwm.cameras.estimate.base import EstimateError, PoseEstimator
from minwm.cameras.estimate.colmap import Colmap
from minwm.cameras.estimate.depth_anything import DepthAnything3
from minwm.cameras.formats.base import CameraFile, Given
from minwm.cameras.formats.table import read_cameras
from minwm.cameras.track import CameraTrack
from minwm.core.config import ConfigError, UserError, to_dict
from minwm.core.files import find_files, locked, read_json, read_text, write_json
from minwm.core.media import VIDEO_SUFFIXES
from minwm.core.runtime import rank, world_size
from minwm.data.captions import Endpoint, LocalModel, caption
from minwm.data.clips import ClipFolder, ClipRecord, DataError, PoseKind, readable_id
from minwm.data.distribute import each
from minwm.data.footage import Window, WindowConfig, windows
from minwm.data.quality import Candidate, Failure, QualityConfig, caption_failures, failures

NOTE = {"video": str, "clips": list, "estimated": int, "dropped": list, "refused": str, "seconds": float}
"""What became of a video, and how many of its clips have estimated poses."""
POSITION = 1.0
"""Frames of the camera file by which the last picture may lie behind the last pose."""


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """What is made of a folder of videos."""

    source_license: str
    """Licence of the videos: an SPDX name, or the name of the terms that came with them."""
    source: str = "footage"
    """Name of the dataset."""
    latents: int = 9
    """Latents per clip, the first included: stride * (latents - 1) + 1 frames."""
    height: int = 64
    width: int = 64
    fps: float = 16.0
    """Frames per second of the clips; videos are resampled."""
    stride: int = 4
    """Pixel frames per latent."""
    cut: float = 27.0
    """Threshold of the detector of cuts; lower finds more."""
    cameras: str = "{name}.camera.json"
    """Camera file of the video `name`, in the same folder."""
    camera_format: str = "track"
    """A format of `minwm camera convert`."""
    camera_fps: float | None = None
    """Poses per second, for formats that say nothing of time."""
    camera_size: tuple[int, int] | None = None
    """Height and width that K is for, for formats that need it."""
    scale: float = 1.0
    """Units of the clips per unit of the camera files."""
    pose_kind: PoseKind = "estimated"
    """Where the poses of camera files come from."""
    estimator: Colmap | DepthAnything3 | None = field(default_factory=Colmap)
    """What finds the poses of a video without a camera file; none refuses such videos."""
    depth: float = 1.5
    """Units to which the median depth of a clip with estimated poses is scaled; 1.5 is that of procedural worlds."""
    captioner: LocalModel | Endpoint | None = None
    """What writes the captions of a video without a text file."""
    quality: QualityConfig = field(default_factory=QualityConfig)

    def __post_init__(self) -> None:
        if not self.source_license.strip():
            raise ConfigError("ingest.source_license is empty: name the licence of the videos, such as CC-BY-4.0")
        if min(self.latents - 1, self.height, self.width, self.stride) < 1 or not (0 < self.fps < 1000):
            raise ConfigError("ingest: latents from 2, height, width and stride from 1, fps above 0")
        for name in ("scale", "depth"):
            if not 0 < (value := vars(self)[name]) < math.inf:
                raise ConfigError(f"ingest.{name}={value}: a positive number")

    @property
    def frames(self) -> int:
        """Of a clip."""
        return self.stride * (self.latents - 1) + 1

    def windows(self, whole_rows: int) -> WindowConfig:
        """What is cut from a video; see `WindowConfig.whole_rows`."""
        return WindowConfig(
            frames=self.frames,
            fps=self.fps,
            height=self.height,
            width=self.width,
            cut=self.cut,
            whole_rows=whole_rows,
        )


def ingest(videos: Path, out: Path, cfg: IngestConfig, ray: bool = False) -> dict[str, Any]:
    """Make clips of the videos that are not done; returns counts of clips, videos and dropped parts by rule.

    Under torchrun every rank takes its part of the videos; with `ray` the workers of a cluster do.
    """
    found = find_files(videos, VIDEO_SUFFIXES, "videos")
    folder = ClipFolder.create(out, "ingested", to_dict(cfg))
    with locked(out / "ingested" / str(rank())):
        todo = [path for path in found[rank() :: world_size()] if not note_path(videos, path, out).exists()]
        for _ in each(partial(ingest_video, videos, folder=folder, cfg=cfg), todo, "videos", ray):
            pass
    folder.finish()
    return summary(out)


def note_path(videos: Path, path: Path, out: Path) -> Path:
    """Where it is noted what became of a video; a video that has it is done."""
    return out / "ingested" / f"{video_id(videos, path)}.json"


def ingest_video(videos: Path, path: Path, folder: ClipFolder, cfg: IngestConfig) -> None:
    """Write the clips of one video, and last its note. A second call writes the same again."""
    write_json(note_path(videos, path, folder.path), _ingest_video(videos, path, folder, cfg))


def video_id(videos: Path, path: Path) -> str:
    """Id of a video: the first part of those of its clips."""
    name = path.relative_to(videos).as_posix()
    return readable_id(name.rpartition(".")[0], name)


def _ingest_video(videos: Path, path: Path, folder: ClipFolder, cfg: IngestConfig) -> dict[str, Any]:
    """Write the clips of one video; what became of it, as JSON values."""
    name, start = video_id(videos, path), time.monotonic()
    clips, dropped, refused, estimated = list[str](), list[dict[str, Any]](), "", 0
    for number, found in enumerate(_candidates(path, cfg)):
        if isinstance(found, str):
            refused = found
            break
        window, wrong, text, author = found.window, found.wrong, found.caption, "sidecar"
        if not wrong and text is None and cfg.captioner:
            text, author = caption(cfg.captioner, window.frames), cfg.captioner.name
        if wrong := wrong or caption_failures(text or "", cfg.quality):
            dropped += [_line(window, failure) for failure in wrong]
            continue
        assert found.posed
        record = ClipRecord(
            id=f"{name}-{number:05d}",
            source=cfg.source,
            source_id=f"{path.relative_to(videos).as_posix()} at {window.start:.3f} s",
            source_license=cfg.source_license,
            split_key=name,
            track=found.posed.track.relative_to_first(),
            caption=text or "",
            caption_source=author,
            hw=(cfg.height, cfg.width),
            pose_kind=cfg.pose_kind if found.posed.from_file else "estimated",
            quality=found.posed.quality,
        )
        folder.write(record, window.frames)
        clips.append(record.id)
        estimated += not found.posed.from_file
    return {
        "video": str(path),
        "clips": clips,
        "estimated": estimated,
        "dropped": dropped,
        "refused": refused,
        "seconds": round(time.monotonic() - start, 3),
    }


@dataclass(frozen=True)
class _Posed:
    track: CameraTrack
    from_file: bool
    quality: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Found:
    """A window and what is known of it before it is captioned."""

    window: Window
    posed: _Posed | None
    wrong: list[Failure]
    """Rules of pictures and cameras that it does not meet."""
    caption: str | None
    """That of the text file beside the video."""


def _candidates(path: Path, cfg: IngestConfig) -> Iterator[_Found | str]:
    """Every window of a video; at the end, if the video or a file beside it cannot be used, the reason."""
    try:
        text, cameras = path.with_suffix(".txt"), None
        file = path.with_name(cfg.cameras.format(name=path.stem))
        for beside in (text, file):
            if beside.exists() and not (beside.is_file() or beside.is_dir()):
                raise DataError(f"{beside} is a pipe or a device, which may never end; put a file in its place")
        if file.exists() or cfg.estimator is None:
            cameras = read_cameras(file, cfg.camera_format, Given(fps=cfg.camera_fps, size=cfg.camera_size))
        caption = read_text(text).strip() if text.exists() else None
        for window in windows(path, cfg.windows(cfg.estimator.rows if cfg.estimator and cameras is None else 0)):
            posed = _posed(window, cameras, cfg)
            if isinstance(posed, Failure):
                yield _Found(window, None, [posed], caption)
            else:
                yield _Found(
                    window, posed, failures(Candidate(window.frames, posed.track, window.times), cfg.quality), caption
                )
    except (UserError, OSError) as error:
        yield str(error)


def _line(window: Window, failure: Failure) -> dict[str, Any]:
    seconds = round(window.start, 3)
    return {"shot": window.shot, "seconds": seconds, "rule": failure.rule, "reason": failure.reason}


def _posed(window: Window, cameras: CameraFile | None, cfg: IngestConfig) -> _Posed | Failure:
    """The cameras of a window, from the camera file or estimated."""
    if len(window.frames) < cfg.frames:
        return Failure("short", f"{len(window.frames)} frames are left of the shot, a clip has {cfg.frames}")
    posed = _estimated(window, cfg) if cameras is None else _read(window, cameras, cfg)
    if isinstance(posed, Failure):
        return posed
    return replace(posed, track=posed.track.cropped(window.picture, (cfg.height, cfg.width)))


def _read(window: Window, cameras: CameraFile, cfg: IngestConfig) -> _Posed | Failure:
    """In the world of the camera file: other readings of it would differ in another."""
    seconds = cameras.seconds()
    positions = np.interp(window.times, seconds - seconds[0], np.arange(len(seconds)))
    beyond = (window.times[-1] - (seconds[-1] - seconds[0])) * cameras.track.fps
    if beyond > POSITION:
        return Failure("no poses", f"its last frame is {beyond:.0f} poses behind the last one of the camera file")
    return _Posed(cameras.track.at(positions, cfg.fps).scaled(cfg.scale), True)


def _estimated(window: Window, cfg: IngestConfig) -> _Posed | Failure:
    estimator: PoseEstimator | None = cfg.estimator
    assert estimator and window.whole is not None
    try:
        found = estimator(window.whole, window.times, cfg.fps)
        factor = found.scale(cfg.depth)
    except EstimateError as error:
        return Failure("no poses", str(error))
    return _Posed(found.track.scaled(factor), False, {**found.quality, "scale": factor})


def notes(out: Path) -> Iterator[dict[str, Any]]:
    """What became of each video so far."""
    for path in sorted((out / "ingested").glob("*.json")):
        yield read_json(path, NOTE)


def summary(out: Path) -> dict[str, Any]:
    """Counts of videos, clips, those with estimated poses, and dropped parts by rule, with an example of each."""
    every = list(notes(out))
    lines = [(note["video"], line) for note in every for line in note["dropped"]]
    examples: dict[str, str] = {}
    for video, line in lines:
        examples.setdefault(line["rule"], f"{video} at {line['seconds']} s: {line['reason']}")
    return {
        "videos": len(every),
        "clips": sum(len(note["clips"]) for note in every),
        "estimated": sum(note["estimated"] for note in every),
        "seconds": sum(note["seconds"] for note in every),
        "dropped": dict(Counter(line["rule"] for _, line in lines)),
        "examples": examples,
        "refused": [note["refused"] for note in every if note["refused"]],
    }
