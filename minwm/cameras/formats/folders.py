"""Folders of two numpy files, poses.npy and intrinsics.npy, as LingBot-World and SpatialVid have them."""

from pathlib import Path

import numpy as np

from minwm.cameras.formats.base import CameraFile, Given, in_pixels, inverted, normalised, read_npy
from minwm.cameras.track import CameraError, CameraTrack, from_quaternion, quaternion, rigid
from minwm.core.files import new_folder

LINGBOT_SIZE = (480, 832)
"""Height and width of the pictures that LingBot-World's K is for, whatever size it generates."""


def read_lingbot(path: Path, given: Given) -> CameraFile:
    """Camera-to-world n 4 4, OpenCV axes; (fx, fy, cx, cy) in pixels of 832x480 pictures; one of each per frame."""
    c2w, K = read_npy(path / "poses.npy", (None, 4, 4)), read_npy(path / "intrinsics.npy", (None, 4))
    track = CameraTrack(c2w, normalised(K, LINGBOT_SIZE), given.rate(), given.unit or "sfm")
    return CameraFile(track, size=LINGBOT_SIZE)


def write_lingbot(path: Path, cameras: CameraFile) -> None:
    _write(path, cameras.track.c2w, in_pixels(cameras.track.K, LINGBOT_SIZE))


def read_spatialvid(path: Path, given: Given) -> CameraFile:
    """World-to-camera n 7 (translation, quaternion x y z w), OpenCV axes; fx/(2 cx), fy/(2 cy), 0.5, 0.5."""
    poses, K = read_npy(path / "poses.npy", (None, 7)), read_npy(path / "intrinsics.npy", (None, 4))
    if given.fps is None:
        raise CameraError("it says nothing of time: there is a pose every int(0.2 * rate) frames; give --fps")
    c2w = from_vectors(poses)
    return CameraFile(CameraTrack(c2w, K, given.fps, given.unit or "sfm"), size=given.size)


def from_vectors(poses: np.ndarray) -> np.ndarray:
    """Camera-to-world n 4 4 of world-to-camera n 7: translation, then a unit quaternion x y z w."""
    off = np.abs(np.linalg.norm(poses[:, 3:], axis=-1) - 1)
    if not off.max() < 1e-3:
        frame = int(np.nan_to_num(off, nan=np.inf).argmax())
        raise CameraError(f"frame {frame}: {poses[frame, 3:].tolist()} is no unit quaternion x y z w")
    return inverted(rigid(from_quaternion(poses[:, 3:]), poses[:, :3]))


def write_spatialvid(path: Path, cameras: CameraFile) -> None:
    w2c, K = cameras.track.w2c(), cameras.track.K.copy()
    K[:, 2:] = 0.5
    _write(path, np.concatenate([w2c[:, :3, 3], quaternion(w2c[:, :3, :3])], axis=1), K)


def _write(path: Path, poses: np.ndarray, K: np.ndarray) -> None:
    """Both files in a new folder, float64."""
    with new_folder(path) as folder:
        np.save(folder / "poses.npy", poses)
        np.save(folder / "intrinsics.npy", K)
