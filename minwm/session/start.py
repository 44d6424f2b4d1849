"""What a model goes on from: a video and its cameras."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from minwm.cameras.track import CameraTrack
from minwm.core.config import UserError
from minwm.core.media import read_video, resize_and_crop
from minwm.store.model import ModelConfig


@dataclass(frozen=True, eq=False)
class StartVideo:
    """A video of whole chunks, as a model sees it, and its cameras."""

    frames: UInt8[np.ndarray, "n H W 3"]
    track: CameraTrack
    """Of every frame, relative to the first one."""

    def __post_init__(self) -> None:
        if len(self.frames) != len(self.track):
            raise UserError(f"a start of {len(self.frames)} frames has {len(self.track)} cameras; give one for each")


def open_start_video(path: Path, poses: Path | None, cfg: ModelConfig) -> StartVideo:
    """`read_start_video` with the cameras of `poses`, or of VIDEO.json if None; UserError if that file is missing."""
    if cfg.network.camera == "none":
        return read_start_video(path, None, cfg)
    poses = poses or path.with_suffix(".json")
    if not poses.exists():
        raise UserError(
            f"{path}: {poses} is missing, and cameras are not guessed; give --start-poses, or start_poses in a list"
        )
    return read_start_video(path, CameraTrack.load(poses), cfg)


def read_start_video(path: Path, track: CameraTrack | None, cfg: ModelConfig) -> StartVideo:
    """The newest frames of a video that are whole chunks of a model, cropped and resized, with K, to its size.

    `track` has the cameras of all frames; None for a model without camera control. Raises UserError for another frame
    rate than the model's, another number of cameras than of frames, or a video shorter than the first chunk.
    """
    frames, fps = read_video(path)
    size, stride, (first, chunk) = (
        frames.shape[1:3],
        cfg.motion.stride,
        (cfg.stream.first_chunk_frames, cfg.stream.chunk),
    )
    if abs(fps / cfg.motion.fps - 1) > 0.01:
        raise UserError(f"{path}: {fps:g} frames per second, and this model makes {cfg.motion.fps:g}; convert it first")
    if track is None:
        track = CameraTrack(np.tile(np.eye(4), (len(frames), 1, 1)), cfg.intrinsics, fps)
    elif len(track) != len(frames):
        raise UserError(f"{path}: {len(frames)} frames, and {len(track)} cameras; give one for each")
    else:
        track = track.cropped(size, (cfg.height, cfg.width))
    latents = 1 + (len(frames) - 1) // stride
    if latents < first:
        raise UserError(f"{path}: {len(frames)} frames are no first chunk; give {1 + stride * (first - 1)} or more")
    kept = 1 + stride * (first + (latents - first) // chunk * chunk - 1)
    newest = [resize_and_crop(frame, cfg.height, cfg.width) for frame in frames[-kept:]]
    return StartVideo(np.stack(newest), track.slice(len(frames) - kept, len(frames)).relative_to_first())
