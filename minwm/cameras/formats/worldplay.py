"""HY-WorldPlay's JSON: one entry per pose under the keys "0", "1", ..., in the order of the file. OpenCV axes.

Files for inference have `extrinsic`, which is camera-to-world in spite of its name, and `K` per latent (4 frames at 24
per second). Files for training have `w2c` and `intrinsic` per video frame. K is 3x3 in pixels; the released code
divides it by twice its principal point, which is thus always the middle: the size of its picture does not matter.
"""

from pathlib import Path

import numpy as np

from minwm.cameras.formats.base import (
    CameraFile,
    Given,
    Read,
    Write,
    entry,
    in_pixels,
    inverted,
    matrix,
    normalised,
    numbers,
)
from minwm.cameras.track import CameraTrack
from minwm.core.files import read_json, write_json

SIZE = (1080, 1920)
"""Height and width of the pictures that the released files give K for."""


def reader(pose: str, K: str) -> Read:
    """Reads files that have poses and intrinsics under these names; `w2c` are world-to-camera."""

    def read(path: Path, given: Given) -> CameraFile:
        content = read_json(path)
        matrices = np.stack([numbers(entry(row, pose, f"entry {key!r}"), key, (4, 4)) for key, row in content.items()])
        pixels = [numbers(entry(row, K, f"entry {key!r}"), key, (3, 3)) for key, row in content.items()]
        centred = [normalised(one, (2 * float(one[1, 2]), 2 * float(one[0, 2]))) for one in pixels]
        c2w = inverted(matrices) if pose == "w2c" else matrices
        return CameraFile(CameraTrack(c2w, np.stack(centred), given.rate(), given.unit or "toy"), size=SIZE)

    return read


def writer(pose: str, K: str) -> Write:
    """The inverse of `reader`."""

    def write(path: Path, cameras: CameraFile) -> None:
        track = cameras.track
        poses = track.w2c() if pose == "w2c" else track.c2w
        centred = np.concatenate([track.K[:, :2], np.full((len(track), 2), 0.5)], axis=1)
        pixels = matrix(in_pixels(centred, SIZE))
        rows = zip(poses.tolist(), pixels.tolist(), strict=True)
        write_json(path, {str(i): {pose: one, K: k} for i, (one, k) in enumerate(rows)})

    return write
