"""Sekai's .npz, one per clip, of its real and its game part.

`extrinsic` n 4 4 is camera-to-world in spite of its name, as its authors say; OpenCV axes, 30 per second.
`intrinsic` is one 3x3 for all frames, divided by width and height. Sekai scales each clip so that no coordinate of a
centre is above 1.
"""

from pathlib import Path

import numpy as np

from minwm.cameras.formats.base import CameraFile, Given, matrix, normalised, read_npz
from minwm.cameras.track import CameraTrack
from minwm.core.files import atomic


def read(path: Path, given: Given) -> CameraFile:
    c2w, K = read_npz(path, "extrinsic", (None, 4, 4)), read_npz(path, "intrinsic", (3, 3))
    return CameraFile(CameraTrack(c2w, normalised(K, (1, 1)), given.rate(), given.unit or "sfm"), size=given.size)


def write(path: Path, cameras: CameraFile) -> None:
    """K is that of the first frame; centres keep their units."""
    with atomic(path) as partial, partial.open("wb") as file:
        np.savez(file, extrinsic=cameras.track.c2w, intrinsic=matrix(cameras.track.K[0]))
