"""Folders of videos with camera files, as raw clips.

    videos/walk.mp4             any video
    videos/walk.camera.json     its cameras, in any format of cameras/formats; the first pose is that of the first frame
    videos/walk.txt             its caption: what is there, never how the camera moves

Every video leaves a file in `ingested/`, written last: its clips, and what was dropped with rule and reason. A video
that has one is done.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minwm.cameras.formats.base import CameraFile, Given
from minwm.cameras.formats.table import read_cameras
from minwm.cameras.track import CameraTrack
from minwm.core.config import ConfigError, UserError, to_dict
from minwm.core.files import find_files, locked, read_json, read_text, write_json
from minwm.core.media import VIDEO_SUFFIXES
from minwm.core.runtime import progress, rank, world_size
from minwm.data.clips import ClipFolder, ClipRecord, PoseKind, readable_id
from minwm.data.footage import Window, WindowConfig, windows
from minwm.data.quality import Candidate, Failure, QualityConfig, failures

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
    """Where the poses come from."""
    quality: QualityConfig = field(default_factory=QualityConfig)

    def __post_init__(self) -> None:
        if not self.source_license.strip():
            raise ConfigError("ingest.source_license is empty: name the licence of the videos, such as CC-BY-4.0")
        if min(self.latents - 1, self.height, self.width, self.stride) < 1 or not (0 < self.fps < 1000):
            raise ConfigError("ingest: latents from 2, height, width and stride from 1, fps above 0")
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"ingest.scale={self.scale}: a positive number")

    @property
    def windows(self) -> WindowConfig:
        frames = self.stride * (self.latents - 1) + 1
        return WindowConfig(frames=frames, fps=self.fps, height=self.height, width=self.width, cut=self.cut)


def ingest(videos: Path, out: Path, cfg: IngestConfig) -> dict[str, Any]:
    """Make clips of the videos that are not done; returns counts of clips, videos and dropped parts by rule.

    Under torchrun every rank takes its part of the videos.
    """
    found = find_files(videos, VIDEO_SUFFIXES, "videos")
    folder = ClipFolder.create(out, "ingested", to_dict(cfg))
    mine = found[rank() :: world_size()]
    with locked(out / "ingested" / str(rank())), progress(len(mine), "videos") as bar:
        for path in mine:
            note = out / "ingested" / f"{video_id(videos, path)}.json"
            if not note.exists():
                write_json(note, _ingest_video(videos, path, folder, cfg))
            bar.advance()
    folder.finish()
    return summary(out)


def video_id(videos: Path, path: Path) -> str:
    """Id of a video: the first part of those of its clips."""
    name = path.relative_to(videos).as_posix()
    return readable_id(name.rpartition(".")[0], name)


def _ingest_video(videos: Path, path: Path, folder: ClipFolder, cfg: IngestConfig) -> dict[str, Any]:
    """Write the clips of one video; what became of it, as JSON values."""
    name = video_id(videos, path)
    clips, dropped = list[str](), list[dict[str, Any]]()
    refused = ""
    try:
        given = Given(fps=cfg.camera_fps, size=cfg.camera_size)
        cameras = read_cameras(path.with_name(cfg.cameras.format(name=path.stem)), cfg.camera_format, given)
        text = path.with_suffix(".txt")
        caption = read_text(text).strip() if text.exists() else ""
        for number, window in enumerate(windows(path, cfg.windows)):
            made = _clip(window, cameras, cfg)
            wrong = (
                [made] if isinstance(made, Failure) else failures(Candidate(window.frames, made, caption), cfg.quality)
            )
            if wrong or isinstance(made, Failure):
                dropped += [_line(window, failure) for failure in wrong]
                continue
            record = ClipRecord(
                id=f"{name}-{number:05d}",
                source=cfg.source,
                source_id=f"{path.relative_to(videos).as_posix()} at {window.start:.3f} s",
                source_license=cfg.source_license,
                split_key=name,
                track=made.relative_to_first(),
                caption=caption,
                caption_source="sidecar",
                hw=(cfg.height, cfg.width),
                pose_kind=cfg.pose_kind,
            )
            folder.write(record, window.frames)
            clips.append(record.id)
    except (UserError, OSError) as error:
        refused = str(error)
    return {"video": str(path), "clips": clips, "dropped": dropped, "refused": refused}


def _line(window: Window, failure: Failure) -> dict[str, Any]:
    seconds = round(window.start, 3)
    return {"shot": window.shot, "seconds": seconds, "rule": failure.rule, "reason": failure.reason}


def _clip(window: Window, cameras: CameraFile, cfg: IngestConfig) -> CameraTrack | Failure:
    """The cameras of a window, in the world of the camera file: other readings of it would differ in another."""
    if len(window.frames) < cfg.windows.frames:
        return Failure("short", f"{len(window.frames)} frames are left of the shot, a clip has {cfg.windows.frames}")
    seconds = cameras.seconds()
    positions = np.interp(window.times, seconds - seconds[0], np.arange(len(seconds)))
    beyond = (window.times[-1] - (seconds[-1] - seconds[0])) * cameras.track.fps
    if beyond > POSITION:
        return Failure("no poses", f"its last frame is {beyond:.0f} poses behind the last one of the camera file")
    track = cameras.track.at(positions, cfg.fps).cropped(window.picture, (cfg.height, cfg.width))
    c2w = track.c2w.copy()
    c2w[:, :3, 3] *= cfg.scale
    return CameraTrack(c2w, track.K, cfg.fps, track.unit)


def notes(out: Path) -> Iterator[dict[str, Any]]:
    """What became of each video so far."""
    for path in sorted((out / "ingested").glob("*.json")):
        yield read_json(path, {"video": str, "clips": list, "dropped": list, "refused": str})


def summary(out: Path) -> dict[str, Any]:
    """Counts of videos, clips and dropped parts by rule, with an example of each."""
    every = list(notes(out))
    lines = [(note["video"], line) for note in every for line in note["dropped"]]
    examples: dict[str, str] = {}
    for video, line in lines:
        examples.setdefault(line["rule"], f"{video} at {line['seconds']} s: {line['reason']}")
    return {
        "videos": len(every),
        "clips": sum(len(note["clips"]) for note in every),
        "dropped": dict(Counter(line["rule"] for _, line in lines)),
        "examples": examples,
        "refused": [note["refused"] for note in every if note["refused"]],
    }
