"""What every camera format shares: what is read from a file, what the user says beside it, checked arrays.

A format reads and writes one convention, which its name stands for; no convention is ever guessed from the numbers.
"""

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from minwm.cameras.track import MAX_FRAMES, CameraError, CameraTrack, se3_inverse

Array = np.ndarray
UNEVEN = 0.02
"""Timestamps are even if none is off by more than this share of a step; rates are equal within it."""


@dataclass(frozen=True)
class Given:
    """What the user says of a camera file, for what does not stand in it."""

    fps: float | None = None
    """Poses per second."""
    size: tuple[int, int] | None = None
    """Height and width in pixels of the pictures that K was given for."""
    unit: str | None = None
    """Length unit of the translations."""
    clip: int = 0
    """Which clip of a file that holds many."""

    def rate(self, stated: float | None = None) -> float:
        """Poses per second; CameraError if nobody says it, or if the file says otherwise."""
        if stated and self.fps and abs(stated / self.fps - 1) > UNEVEN:
            raise CameraError(f"it has {stated:g} poses per second, not {self.fps:g}; leave --fps out")
        if not (rate := self.fps or stated):
            raise CameraError("it says nothing of time; give --fps, its poses per second")
        return rate

    def pixels(self, stated: tuple[int, int] | None = None) -> tuple[int, int]:
        """Height and width; CameraError if nobody says them, or if the file says otherwise."""
        if stated and self.size and stated != self.size:
            (height, width), (other_height, other_width) = stated, self.size
            raise CameraError(f"its pictures are {width}x{height}, not {other_width}x{other_height}; leave --size out")
        if not (size := stated or self.size):
            raise CameraError("its K is in pixels of a picture whose size it does not say; give --size WIDTHxHEIGHT")
        return size


@dataclass(frozen=True, eq=False)
class CameraFile:
    """What a camera file says, in our convention."""

    track: CameraTrack
    """The poses of the file, each once. Its fps is their mean rate if they have uneven timestamps."""
    times: Float[Array, " n"] | None = None
    """Seconds; only where the file has a timestamp for each pose."""
    size: tuple[int, int] | None = None
    """Height and width in pixels of the pictures."""
    names: tuple[str, ...] = ()
    """The file name of the picture of each pose."""
    source: str = ""
    """Address of the video."""

    def __post_init__(self) -> None:
        if self.times is not None and not (np.isfinite(self.times).all() and (np.diff(self.times) > 0).all()):
            raise CameraError(f"its timestamps do not increase: {np.round(self.times[:9], 6).tolist()}, ...; sort them")

    def uneven(self) -> bool:
        """Whether timestamps are off an even rate."""
        if self.times is None or len(self.times) < 3:
            return False
        even = np.linspace(self.times[0], self.times[-1], len(self.times))
        return bool(np.abs(self.times - even).max() > UNEVEN * (even[1] - even[0]))

    def even(self) -> CameraTrack:
        """The track at an even rate: interpolated if the timestamps are not."""
        if self.times is None or not self.uneven():
            return self.track
        even = np.linspace(self.times[0], self.times[-1], len(self.times))
        return self.track.at(np.interp(even, self.times, np.arange(len(self.times))), self.track.fps)

    def seconds(self) -> Float[Array, " n"]:
        """The timestamp of each pose; from zero on if the file had none."""
        return np.arange(len(self.track)) / self.track.fps if self.times is None else self.times


Read = Callable[[Path, Given], CameraFile]
Write = Callable[[Path, CameraFile], None]


@dataclass(frozen=True)
class CameraFormat:
    """One way of writing cameras."""

    about: str
    """What the file is and its convention, one line."""
    read: Read
    write: Write | None = None
    """None for formats that are only read."""
    keeps: frozenset[str] = frozenset()
    """What of `PARTS` a written file holds, besides poses and focal lengths."""
    fps: float | None = None
    """Poses per second, where the format has one rate."""
    one_lens: bool = False
    """Whether it holds one K for all poses."""


PARTS = ("fps", "times", "size", "names", "source", "unit", "principal point")
"""What a format may or may not keep."""


# ---------------------------------------------------------------------------------------------
# Checked arrays


def numbers(value: Any, what: str, *shapes: tuple[int | None, ...]) -> Array:
    """A float64 array of one of the shapes (None: any length); CameraError, naming `what`, for anything else."""
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise CameraError(f"{what} is no array of numbers ({error})") from error
    check_shape(array.shape, what, *shapes)
    return array


def check_shape(shape: tuple[int, ...], what: str, *shapes: tuple[int | None, ...]) -> None:
    """CameraError unless `shape` is one of the shapes (None: any length up to MAX_FRAMES, but not none)."""
    for wanted in shapes:
        pairs = zip(shape, wanted, strict=False)
        if len(shape) == len(wanted) and all(0 < n <= MAX_FRAMES if m is None else n == m for n, m in pairs):
            return
    text = " or ".join(str(tuple("n" if m is None else m for m in wanted)).replace("'", "") for wanted in shapes)
    raise CameraError(f"{what} has shape {shape}, not {text}")


def read_npy(path: Path, *shapes: tuple[int | None, ...]) -> Array:
    """The array of a .npy file; its shape is checked before it is loaded."""
    with path.open("rb") as file:
        _check_header(file, path.name, shapes)
        file.seek(0)
        return numbers(np.load(file, allow_pickle=False), path.name, *shapes)


def read_npz(path: Path, name: str, *shapes: tuple[int | None, ...]) -> Array:
    """An array of a .npz file; its shape is checked before it is unpacked."""
    npz_shape(path, name, *shapes)
    with np.load(path, allow_pickle=False) as arrays:
        return numbers(arrays[name], f"{name!r}", *shapes)


def npz_shape(path: Path, name: str, *shapes: tuple[int | None, ...]) -> tuple[int, ...]:
    """The shape of an array of a .npz file, without unpacking it; CameraError if it has none of the shapes."""
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                held = ", ".join(sorted(member.removesuffix(".npy") for member in archive.namelist()))
                raise CameraError(f"it lacks {name!r}; it holds {held}")
            with archive.open(f"{name}.npy") as file:
                return _check_header(file, f"{name!r}", shapes)
    except zipfile.BadZipFile as error:
        raise CameraError(f"it is no .npz file ({error})") from error


def _check_header(file: Any, what: str, shapes: tuple[tuple[int | None, ...], ...]) -> tuple[int, ...]:
    try:
        version = np.lib.format.read_magic(file)
        old = version == (1, 0)
        header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
    except (ValueError, EOFError) as error:
        raise CameraError(f"{what} is no numpy array ({error})") from error
    if dtype.kind not in "fiu":
        raise CameraError(f"{what} is an array of {dtype}, not of numbers")
    if shapes:
        check_shape(shape, what, *shapes)
    return shape


def entry(record: Mapping[str, Any], key: str, where: str = "it") -> Any:
    """The value under a key; CameraError, naming what is there, if it is missing."""
    if not isinstance(record, Mapping) or key not in record:
        held = ", ".join(map(str, list(record)[:12])) if isinstance(record, Mapping) else type(record).__name__
        raise CameraError(f"{where} lacks {key!r} (there is: {held})")
    return record[key]


# ---------------------------------------------------------------------------------------------
# Poses and K in other forms


def square(T: Float[Array, "n r 4"]) -> Float[Array, "n 4 4"]:
    """3x4 matrices with the bottom row of a pose; 4x4 ones as they are."""
    if T.shape[1] == 4:
        return T
    return np.concatenate([T, np.tile([0.0, 0.0, 0.0, 1.0], (len(T), 1, 1))], 1)


def inverted(w2c: Float[Array, "n 4 4"]) -> Float[Array, "n 4 4"]:
    """Camera-to-world poses of world-to-camera ones, which are checked first."""
    return se3_inverse(CameraTrack(w2c, np.full(4, 0.5), 1.0).c2w)


def normalised(K: Float[Array, "*n 3 3"] | Float[Array, "*n 4"], size: tuple[float, float]) -> Float[Array, "*n 4"]:
    """(fx/W, fy/H, cx/W, cy/H) of intrinsics in pixels, 3x3 or (fx, fy, cx, cy); `size` is (h, w)."""
    if K.shape[-2:] == (3, 3):
        if np.abs(K[..., 0, 1]).max() > 1e-6:
            raise CameraError(f"K has a skew of {np.abs(K[..., 0, 1]).max():g}; a track holds only cameras without")
        K = np.stack([K[..., 0, 0], K[..., 1, 1], K[..., 0, 2], K[..., 1, 2]], -1)
    height, width = size
    return K / np.array([width, height, width, height])


def in_pixels(K: Float[Array, "*n 4"], size: tuple[int, int]) -> Float[Array, "*n 4"]:
    """(fx, fy, cx, cy) in pixels: the inverse of `normalised`."""
    height, width = size
    return K * np.array([width, height, width, height])


def matrix(K: Float[Array, "*n 4"]) -> Float[Array, "*n 3 3"]:
    """(fx, fy, cx, cy) as 3x3."""
    out = np.zeros((*K.shape[:-1], 3, 3))
    out[..., 0, 0], out[..., 1, 1], out[..., 0, 2], out[..., 1, 2] = np.moveaxis(K, -1, 0)
    out[..., 2, 2] = 1
    return out


def refuse_distortion(coefficients: Mapping[str, float], model: str) -> None:
    """CameraError unless all distortion coefficients are zero."""
    if bad := {name: value for name, value in coefficients.items() if value}:
        given = ", ".join(f"{name} = {value:g}" for name, value in bad.items())
        raise CameraError(
            f"its lens is distorted ({model}: {given}), which a track cannot say; undistort pictures and cameras "
            "first (colmap image_undistorter, or ns-process-data with a pinhole model)"
        )
