"""What is scored: videos, with all that is known of each, from a model, any function, or a folder."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from minwm.cameras.track import CameraTrack
from minwm.core.config import UserError
from minwm.core.media import read_video
from minwm.eval.camera.estimators import ESTIMATORS
from minwm.eval.camera.recover import RecoveredCamera
from minwm.session.batch import read_turns
from minwm.session.views import Viewpoint

Array = np.ndarray
Frames = UInt8[Array, "n h w 3"]


@dataclass(frozen=True)
class Video:
    """A video to be scored. What is not known is None, and metrics that need it are skipped."""

    name: str
    frames: Frames
    fps: float
    camera: CameraTrack | None = None
    """The commanded one of every frame."""
    reference: Frames | None = None
    """What the video should show: a recording, or a true render."""
    truth: Frames | None = None
    """A true video of the same task, with which sets are compared; of a start from text it shows another scene."""
    first_depth: Float[Array, "h w"] | None = None
    """z-depth of the first frame in units of the camera, inf or NaN where it is unknown."""
    viewpoint: Viewpoint | None = None
    """Of the first frame, in a scene that can be rendered."""
    chunks: tuple[Sequence[tuple[int, int]], int] | None = None
    """Of a video that was made in chunks: their frames [start, stop), as `chunk_spans`, and the frames per latent."""
    turns: Sequence[int] = ()
    """Of a benchmark of turns: the first frame of each, and the number of frames."""
    task: Mapping[str, str] = field(default_factory=dict)
    """What else was asked for, such as its prompt; videos of other tasks are not compared."""
    estimator: str = "klt"
    """What recovers the camera from pixels; a name of `ESTIMATORS`."""

    def __post_init__(self) -> None:
        if self.camera is not None and len(self.camera) != len(self.frames):
            raise UserError(f"{self.name}: {len(self.frames)} frames and {len(self.camera)} poses; give one per frame")
        if self.reference is not None and self.reference.shape != self.frames.shape:
            raise UserError(
                f"{self.name}: frames of shape {self.frames.shape}, its reference {self.reference.shape}; both must be "
                "alike"
            )

    def described(self) -> dict[str, str]:
        """The task, with digests of camera and reference."""
        found = dict(self.task)
        if self.camera is not None:
            poses = np.concatenate([self.camera.c2w.reshape(-1, 16), self.camera.K], 1)
            found["camera"] = digest(poses.round(4) + 0.0)  # no negative zeros
        if self.reference is not None:
            found["reference"] = digest(self.reference)
        return found

    @cached_property
    def recovered(self) -> RecoveredCamera:
        """The camera that its pixels show."""
        if self.camera is None:
            raise UserError(f"{self.name}: without a pose file the lens is not known, and no camera can be recovered")
        return ESTIMATORS[self.estimator](self.frames, self.camera.K[0], self.fps, self.first_depth)


def digest(values: Array) -> str:
    """Equal for equal arrays."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:12]


class VideoSource:
    """Videos in order, made or read when they are asked for."""

    def __init__(self, names: Sequence[str], video: Callable[[str], Video]) -> None:
        self.names, self.video = names, video

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Video]:
        return map(self.video, self.names)


def depth_file(folder: Path, name: str) -> Path:
    """Where a folder of videos has the z-depth of a first frame, an array h w, if that is known."""
    return folder / "starts" / f"{name}.depth.npy"


def folder_source(folder: Path) -> VideoSource:
    """The mp4 files of a folder, each with the cameras of NAME.json (`CameraTrack.save`) and its `depth_file`, if they
    are there."""
    names = sorted(path.stem for path in folder.glob("*.mp4"))
    if not names:
        raise UserError(f"{folder} holds no mp4 files; make some with minwm generate --list")

    turns = read_turns(folder)

    def read(name: str) -> Video:
        frames, fps = read_video(folder / f"{name}.mp4")
        poses = folder / f"{name}.json"
        camera, known = CameraTrack.load(poses) if poses.exists() else None, depth_file(folder, name)
        depth = np.load(known) if known.exists() else None
        return Video(name, frames, fps, camera, first_depth=depth, turns=turns.get(name, ()))

    return VideoSource(names, read)


def function_source(make: Callable[[CameraTrack], Frames], tracks: dict[str, CameraTrack]) -> VideoSource:
    """What any function makes along tracks, by name."""
    return VideoSource([*tracks], lambda name: Video(name, make(tracks[name]), tracks[name].fps, tracks[name]))
