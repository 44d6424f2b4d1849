"""The training data of minWM, only read: one camera per latent, 16 frames per second and 4 frames per latent."""

from pathlib import Path
from typing import Any

import numpy as np

from minwm.cameras.formats.base import CameraFile, Given, check_shape, entry, numbers
from minwm.cameras.formats.folders import from_vectors
from minwm.cameras.track import CameraError, CameraTrack
from minwm.cameras.trajectory import Motion, parse
from minwm.core.config import parse_json
from minwm.core.files import read_text
from minwm.core.runtime import require
from minwm.core.weights import read_pickle

MOTION = Motion(move=0.32, turn=12.0, fps=16.0, stride=4)
"""0.08 units or 3 degrees per latent, as the pose strings are read."""
K = np.array([969.6969696969696 / 1920, 969.6969696969696 / 1080, 0.5, 0.5])
"""Of all its clips."""


def read_folder(path: Path, given: Given) -> CameraFile:
    """A folder with preencode_input.json, whose entries have a `pose_str` such as "w-12, right-7"."""
    try:
        clips = parse_json(read_text(path / "preencode_input.json"))
    except ValueError as error:
        raise CameraError(f"preencode_input.json is no JSON ({error})") from error
    if not isinstance(clips, list):
        raise CameraError(f"preencode_input.json holds a {type(clips).__name__}, not a list of clips")
    _check_clip(given, len(clips))
    text = entry(clips[given.clip], "pose_str", f"clip {given.clip}")
    return _file(parse(str(text)).track(MOTION, K, steps_per_latent=1).c2w, K, given)


def read_lmdb(path: Path, given: Given) -> CameraFile:
    """An LMDB of the Wan line: `poses_{i}_data` float32 f 7 (world-to-camera) and `intrinsics_{i}_data` float32 4."""
    lmdb = require("lmdb", "data")
    if not (path / "data.mdb").is_file():
        raise CameraError("it is no LMDB folder (it lacks data.mdb)")
    try:
        with lmdb.open(str(path), readonly=True, lock=False) as database, database.begin() as rows:
            count, *shape = map(int, _row(rows, "poses_shape").decode().split())
            check_shape(tuple(shape), "poses_shape", (None, 7))
            _check_clip(given, count)
            poses, row = (np.frombuffer(_row(rows, f"{n}_{given.clip}_data"), "<f4") for n in ("poses", "intrinsics"))
    except (lmdb.Error, ValueError) as error:
        raise CameraError(f"it cannot be read as an LMDB of minWM ({error})") from error
    if poses.size != np.prod(shape):
        raise CameraError(f"the poses of clip {given.clip} are {poses.size} numbers, not {shape[0]} x 7")
    return _file(from_vectors(poses.astype(np.float64).reshape(shape)), numbers(row, "intrinsics", (4,)), given)


def read_pt(path: Path, given: Given) -> CameraFile:
    """A .pt of the HunyuanVideo line: `poses` f 7 (world-to-camera) and `intrinsics` 4."""
    content = read_pickle(path)
    poses, row = (
        numbers(entry(content, name), name, shape) for name, shape in (("poses", (None, 7)), ("intrinsics", (4,)))
    )
    return _file(from_vectors(poses), row, given)


def _row(rows: Any, key: str) -> bytes:
    if (value := rows.get(key.encode())) is None:
        raise CameraError(f"it lacks {key!r}; it was not made by minWM for training with cameras")
    return value


def _check_clip(given: Given, count: int) -> None:
    if not 0 <= given.clip < count:
        raise CameraError(f"it holds clips 0 to {count - 1}; there is no clip {given.clip}")


def _file(c2w: np.ndarray, intrinsics: np.ndarray, given: Given) -> CameraFile:
    return CameraFile(CameraTrack(c2w, intrinsics, given.rate(), given.unit or "toy"), size=given.size)
