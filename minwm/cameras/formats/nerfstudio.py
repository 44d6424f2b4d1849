"""nerfstudio's transforms.json, also that of DL3DV and of Blender scenes.

Camera-to-world, OpenGL axes (y up, z backwards); K in pixels of the stored `w` and `h`, of the file or of each frame.
Frames are in the order of their file names, since the file lists them in no particular order.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minwm.cameras.formats.base import (
    CameraFile,
    Given,
    entry,
    in_pixels,
    normalised,
    numbers,
    refuse_distortion,
    square,
)
from minwm.cameras.track import CameraError, CameraTrack
from minwm.core.files import read_json, write_json

FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
"""OpenGL to OpenCV axes of a camera, and back."""
PINHOLES = (None, "PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "SIMPLE_RADIAL", "RADIAL")
"""Values of `camera_model` that are pinholes if all distortion coefficients are zero."""
COEFFICIENTS = ("k1", "k2", "k3", "k4", "p1", "p2")


def read(path: Path, given: Given) -> CameraFile:
    content = read_json(path / "transforms.json" if path.is_dir() else path)
    frames = entry(content, "frames")
    if not isinstance(frames, list) or not frames:
        raise CameraError("its 'frames' are no list of frames")
    named = [(str(entry(frame, "file_path", f"frame {i}")), frame) for i, frame in enumerate(frames)]
    named.sort(key=lambda pair: natural(pair[0]))
    cameras = [_intrinsics({**content, **frame}, given, name) for name, frame in named]
    if len(sizes := sorted({size for _, size in cameras})) > 1:
        raise CameraError(f"its pictures have different sizes (h, w): {sizes}; resize them to one")
    poses = [numbers(entry(frame, "transform_matrix", name), name, (4, 4), (3, 4)) for name, frame in named]
    track = CameraTrack(
        np.concatenate([square(pose[None]) for pose in poses]) @ FLIP,
        np.stack([K for K, _ in cameras]),
        given.rate(),
        given.unit or "sfm",
    )
    return CameraFile(track, size=sizes[0], names=tuple(name for name, _ in named))


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts names with their numbers as numbers: 9 before 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _intrinsics(values: Mapping[str, Any], given: Given, where: str) -> tuple[np.ndarray, tuple[int, int]]:
    """K and the size (h, w) of one frame, whose own values take the place of the file's."""
    if (model := values.get("camera_model")) not in PINHOLES:
        raise CameraError(f"{where}: camera_model {model!r} is no pinhole; undistort the pictures first")
    numeric = {name: value for name, value in values.items() if isinstance(value, int | float)}
    refuse_distortion({name: numeric[name] for name in COEFFICIENTS if name in numeric}, str(model or "OPENCV"))
    size = given.pixels((int(numeric["h"]), int(numeric["w"])) if {"h", "w"} <= numeric.keys() else None)
    if "fl_x" not in numeric and "camera_angle_x" in numeric:  # Blender: square pixels, the axis in the middle
        focal = 0.5 * size[1] / np.tan(numeric["camera_angle_x"] / 2)
        return normalised(np.array([focal, focal, size[1] / 2, size[0] / 2]), size), size
    K = [entry(numeric, name, where) for name in ("fl_x", "fl_y", "cx", "cy")]
    return normalised(numbers(K, where, (4,)), size), size


def write(path: Path, cameras: CameraFile) -> None:
    height, width = Given(size=cameras.size).pixels()
    names = cameras.names or tuple(f"frame_{i + 1:05d}.png" for i in range(len(cameras.track)))
    rows = [
        dict(zip(("fl_x", "fl_y", "cx", "cy"), row, strict=True))
        for row in in_pixels(cameras.track.K, (height, width)).tolist()
    ]
    one = all(row == rows[0] for row in rows)
    frames = [
        {"file_path": name, "transform_matrix": pose, **({} if one else row)}
        for name, pose, row in zip(names, (cameras.track.c2w @ FLIP).tolist(), rows, strict=True)
    ]
    head = {"camera_model": "PINHOLE", "w": width, "h": height, **(rows[0] if one else {})}
    write_json(path, {**head, "frames": frames})
