"""Files that pose estimators write, only read. OpenCV axes; K in pixels of the pictures that the estimator saw."""

from pathlib import Path

import numpy as np

from minwm.cameras.formats.base import (
    CameraFile,
    Given,
    inverted,
    normalised,
    npz_shape,
    read_npz,
    square,
)
from minwm.cameras.track import CameraError, CameraTrack


def read_megasam(path: Path, given: Given) -> CameraFile:
    """MegaSaM's .npz: `cam_c2w` n 4 4, `intrinsic` 3x3, and `images` n h w 3, whose size K is for."""
    size = given.pixels(npz_shape(path, "images")[1:3])  # type: ignore[arg-type]
    c2w, K = read_npz(path, "cam_c2w", (None, 4, 4)), read_npz(path, "intrinsic", (3, 3))
    return CameraFile(CameraTrack(c2w, normalised(K, size), given.rate(), given.unit or "sfm"), size=size)


def read_vggt(path: Path, given: Given) -> CameraFile:
    """VGGT's predictions.npz: `extrinsic` n 3 4 world-to-camera, `intrinsic` n 3 3, and `images` n 3 h w."""
    size = given.pixels(npz_shape(path, "images")[2:4])  # type: ignore[arg-type]
    w2c, K = read_npz(path, "extrinsic", (None, 3, 4), (None, 4, 4)), read_npz(path, "intrinsic", (None, 3, 3))
    track = CameraTrack(inverted(square(w2c)), normalised(K, size), given.rate(), given.unit or "sfm")
    return CameraFile(track, size=size)


def read_vipe(path: Path, given: Given) -> CameraFile:
    """ViPE's pose/NAME.npz, beside intrinsics/NAME.npz: `data` camera-to-world n 4 4 and (fx, fy, cx, cy), `inds`."""
    other = path.parent.parent / "intrinsics" / path.name
    if not other.is_file():
        raise CameraError(f"{other} is missing; give the file in ViPE's folder pose/, beside intrinsics/")
    frames = read_npz(path, "inds", (None,))
    if not (np.array_equal(frames, read_npz(other, "inds", (None,))) and (np.diff(frames) == 1).all()):
        raise CameraError("its frames have gaps, or are not those of its intrinsics; run ViPE on the whole clip")
    size = given.pixels()
    c2w, K = read_npz(path, "data", (None, 4, 4)), read_npz(other, "data", (None, 4))
    return CameraFile(CameraTrack(c2w, normalised(K, size), given.rate(), given.unit or "metric"), size=size)
