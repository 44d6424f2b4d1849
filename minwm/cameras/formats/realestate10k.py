"""RealEstate10K: a text file per clip.

Line 1 is the address of the video. Each further line has 19 numbers: the timestamp in microseconds, fx/W, fy/H, cx/W,
cy/H, two zeros, and a 3x4 world-to-camera matrix row by row, in OpenCV axes. The scale is arbitrary.
"""

from pathlib import Path

import numpy as np

from minwm.cameras.formats.base import CameraFile, Given, inverted, numbers, square
from minwm.cameras.track import CameraError, CameraTrack
from minwm.core.files import read_text, write_text


def read(path: Path, given: Given) -> CameraFile:
    source, *lines = read_text(path).splitlines() or [""]
    rows = [line.split() for line in lines if line.strip()]
    if not rows:
        raise CameraError("it has no line of 19 numbers after the first, which is the video's address")
    for number, row in enumerate(rows, start=2):
        if len(row) != 19:
            raise CameraError(f"line {number} has {len(row)} numbers, not 19 (timestamp, fx fy cx cy 0 0, 3x4 w2c)")
    table = numbers(rows, "the table", (None, 19))
    if np.abs(table[:, 5:7]).max() > 0:
        raise CameraError(f"columns 6 and 7 are {table[0, 5:7].tolist()}, where the format has zeros")
    times = table[:, 0] / 1e6
    c2w = inverted(square(table[:, 7:].reshape(-1, 3, 4)))
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else None
    track = CameraTrack(c2w, table[:, 1:5], given.rate(rate), given.unit or "sfm")
    return CameraFile(track, times, given.size, source=source.strip())


def write(path: Path, cameras: CameraFile) -> None:
    w2c = cameras.track.w2c()[:, :3].reshape(-1, 12)
    stamps = np.round(cameras.seconds() * 1e6).astype(int)
    lines = [cameras.source]
    for stamp, K, pose in zip(stamps, cameras.track.K, w2c, strict=True):
        lines.append(" ".join([str(stamp), *map(repr, K.tolist()), "0.0", "0.0", *map(repr, pose.tolist())]))
    write_text(path, "\n".join(lines) + "\n")
