"""Camera tracks in one checked convention, and the SE(3) functions behind them.

OpenCV axes (x right, y down, z forward). Poses are camera-to-world (c2w) 4x4 float64; `K` is (fx/W, fy/H, cx/W, cy/H).
World-to-camera matrices are made only for the networks, by `latent_cameras`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import UserError
from minwm.core.files import read_json, write_json

CONVENTION = "camera-to-world, OpenCV axes (x right, y down, z forward), K normalised by width and height"
SCHEMA = 1
UNITS = ("toy", "metric", "sfm")
MAX_FRAMES = 400_000
"""Longest track that `resample` makes; a mistyped rate must not exhaust the memory."""

Array = np.ndarray
Matrix = TypeVar("Matrix", np.ndarray, Tensor)
Intrinsics = Float[Array, "4"]


class CameraError(UserError):
    """A camera breaks the convention; the message names the frame, the value and a remedy."""


# ---------------------------------------------------------------------------------------------
# SE(3) and SO(3). All functions take any number of leading dimensions.


def se3_inverse(T: Matrix) -> Matrix:
    """Inverse of rigid 4x4 matrices in closed form (numpy or torch, differentiable)."""
    back = T[..., :3, :3].swapaxes(-1, -2)
    inverse: Any = T.clone() if isinstance(T, Tensor) else T.copy()
    inverse[..., :3, :3] = back
    inverse[..., :3, 3:] = -(back @ T[..., :3, 3:])
    return inverse


def rigid(R: Float[Array, "*n 3 3"], t: Float[Array, "*n 3"]) -> Float[Array, "*n 4 4"]:
    """The 4x4 matrix that rotates by R, then translates by t."""
    T = np.zeros((*R.shape[:-2], 4, 4))
    T[..., :3, :3], T[..., :3, 3], T[..., 3, 3] = R, t, 1.0
    return T


def _cross_matrix(v: Array) -> Array:
    x, y, z = np.moveaxis(v, -1, 0)
    o = np.zeros_like(x)
    return np.stack([o, -z, y, z, o, -x, -y, x, o], -1).reshape(*v.shape, 3)


def so3_exp(v: Float[Array, "*n 3"]) -> Float[Array, "*n 3 3"]:
    """Rotation about the axis v by |v| radians (Rodrigues' formula)."""
    angle = np.linalg.norm(v, axis=-1)[..., None, None]
    W = _cross_matrix(v)
    # np.sinc(x) is sin(pi x)/(pi x): no branch, and no loss of digits near zero
    return np.eye(3) + np.sinc(angle / np.pi) * W + 0.5 * np.sinc(angle / (2 * np.pi)) ** 2 * (W @ W)


def so3_log(R: Float[Array, "*n 3 3"]) -> Float[Array, "*n 3"]:
    """Rotation vector (axis times angle, angle in [0, pi]), by way of a quaternion: accurate near 0 and near pi."""
    q = quaternion(R)
    v, w = q[..., :3], q[..., 3:]
    size = np.linalg.norm(v, axis=-1, keepdims=True)
    return v * np.where(size > 0, 2 * np.arctan2(size, w) / np.where(size > 0, size, 1), 2.0)


def rotation_degrees(R: Float[Array, "*n 3 3"]) -> Float[Array, "*n"]:
    """Angle of each rotation, 0 to 180."""
    return np.asarray(np.degrees(np.linalg.norm(so3_log(R), axis=-1)))


def _left_jacobian(v: Array) -> Array:
    angle2 = (v * v).sum(-1)[..., None, None]
    angle = np.sqrt(angle2)
    W = _cross_matrix(v)
    third = np.where(angle2 > 1e-8, (1 - np.sinc(angle / np.pi)) / np.maximum(angle2, 1e-8), 1 / 6)
    return np.eye(3) + 0.5 * np.sinc(angle / (2 * np.pi)) ** 2 * W + third * (W @ W)


def se3_exp(twist: Float[Array, "*n 6"]) -> Float[Array, "*n 4 4"]:
    """Pose of a twist (translation 3, rotation 3 in radians): constant body velocity for one unit of time."""
    move, turn = twist[..., :3], twist[..., 3:]
    return rigid(so3_exp(turn), (_left_jacobian(turn) @ move[..., None])[..., 0])


def se3_log(T: Float[Array, "*n 4 4"]) -> Float[Array, "*n 6"]:
    """Twist (translation 3, rotation 3 in radians) of a pose; the inverse of `se3_exp`."""
    turn = so3_log(T[..., :3, :3])
    move = np.linalg.solve(_left_jacobian(turn), T[..., :3, 3:])[..., 0]
    return np.concatenate([move, turn], -1)


def quaternion(R: Float[Array, "*n 3 3"]) -> Float[Array, "*n 4"]:
    """Unit quaternion in the order x y z w (as in scipy), with w >= 0."""
    m = np.moveaxis(R.reshape(*R.shape[:-2], 9), -1, 0)
    xx, xy, xz, yx, yy, yz, zx, zy, zz = m
    x = np.stack([1 + xx - yy - zz, xy + yx, xz + zx, zy - yz], -1)
    y = np.stack([xy + yx, 1 - xx + yy - zz, yz + zy, xz - zx], -1)
    z = np.stack([xz + zx, yz + zy, 1 - xx - yy + zz, yx - xy], -1)
    w = np.stack([zy - yz, xz - zx, yx - xy, 1 + xx + yy + zz], -1)
    rows = np.stack([x, y, z, w], -2)  # row i is 4 q_i q: the row of the largest q_i keeps most digits
    largest = np.diagonal(rows, axis1=-2, axis2=-1).argmax(-1)
    q = np.take_along_axis(rows, largest[..., None, None], axis=-2)[..., 0, :]
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    return np.where(q[..., 3:] < 0, -q, q)


def from_quaternion(q: Float[Array, "*n 4"]) -> Float[Array, "*n 3 3"]:
    """Rotation of a quaternion x y z w of any length but zero. (COLMAP writes w x y z: reorder first.)"""
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    W = _cross_matrix(q[..., :3])
    return np.eye(3) + 2 * q[..., 3:, None] * W + 2 * (W @ W)


def slerp(
    a: Float[Array, "*n 3 3"], b: Float[Array, "*n 3 3"], t: float | Float[Array, "*n"]
) -> Float[Array, "*n 3 3"]:
    """Spherical interpolation from a (t = 0) to b (t = 1) along the shortest rotation."""
    rotation = so3_log(a.swapaxes(-1, -2) @ b)
    return a @ so3_exp(np.asarray(t)[..., None] * rotation)


def look_at(
    eye: Sequence[float] | Array,
    target: Sequence[float] | Array,
    up: Sequence[float] | Array = (0.0, -1.0, 0.0),
) -> Float[Array, "4 4"]:
    """Camera-to-world pose at `eye`, looking at `target`. The default `up` is that of a world with y down."""
    eye = np.asarray(eye, np.float64)
    forward = np.asarray(target, np.float64) - eye
    right = np.cross(forward, np.asarray(up, np.float64))
    size = float(np.linalg.norm(right))
    if size < 1e-9:
        raise CameraError(
            f"look_at: from {eye.tolist()} to {list(map(float, target))} is no direction, or is parallel to "
            f"up {list(map(float, up))}; move the target or choose another up"
        )
    x, z = right / size, forward / np.linalg.norm(forward)
    return rigid(np.stack([x, np.cross(z, x), z], -1), eye)


def intrinsics(fov_x_deg: float, width: int, height: int) -> Intrinsics:
    """Normalised K of square pixels, a centred principal point and a horizontal field of view in degrees."""
    if not 0 < fov_x_deg < 180:
        raise CameraError(f"fov_x = {fov_x_deg} degrees; a pinhole camera needs 0 < fov < 180")
    fx = 0.5 / np.tan(np.radians(fov_x_deg) / 2)
    return np.array([fx, fx * width / height, 0.5, 0.5])


# ---------------------------------------------------------------------------------------------
# Tracks


@dataclass(frozen=True, eq=False)
class CameraTrack:
    """The camera of every frame of a clip. Raises CameraError for poses or intrinsics out of the convention."""

    c2w: Array
    """n 4 4 float64: camera-to-world, OpenCV."""
    K: Array
    """n 4 float64: (fx/W, fy/H, cx/W, cy/H); a single (4,) is repeated for every frame."""
    fps: float
    """Poses per second."""
    unit: str = "toy"
    """Length unit of the translations: toy, metric or sfm (arbitrary scale)."""

    def __post_init__(self) -> None:
        c2w, K = np.array(self.c2w, np.float64), np.array(self.K, np.float64)
        if c2w.ndim != 3 or c2w.shape[1:] != (4, 4) or not len(c2w):
            raise CameraError(f"c2w has shape {c2w.shape}; a track needs (n, 4, 4) with at least one frame")
        if K.shape == (4,):
            K = np.repeat(K[None], len(c2w), 0)
        if K.shape != (len(c2w), 4):
            raise CameraError(f"K has shape {K.shape}; give (4,) or ({len(c2w)}, 4): fx/W, fy/H, cx/W, cy/H")
        if self.unit not in UNITS:
            raise CameraError(f"unit = {self.unit!r}; a track is in one of {', '.join(UNITS)}")
        if not (np.isfinite(self.fps) and self.fps > 0):
            raise CameraError(f"fps = {self.fps}; a track needs a positive number of poses per second")
        _check_poses(c2w)
        _check_intrinsics(K)
        object.__setattr__(self, "c2w", c2w)
        object.__setattr__(self, "K", K)

    def __len__(self) -> int:
        return len(self.c2w)

    def slice(self, start: int, stop: int) -> CameraTrack:
        """Frames [start, stop). Raises CameraError beyond the ends instead of returning fewer frames."""
        if not 0 <= start < stop <= len(self):
            raise CameraError(
                f"frames {start}..{stop} of a track of {len(self)}; need 0 <= start < stop <= {len(self)}"
            )
        return replace(self, c2w=self.c2w[start:stop], K=self.K[start:stop])

    def transformed(self, T: Float[Array, "4 4"]) -> CameraTrack:
        """The same cameras in another world frame; T maps old world coordinates to new ones."""
        return replace(self, c2w=T @ self.c2w)

    def relative_to_first(self) -> CameraTrack:
        """The same path in the coordinates of its first camera, whose pose becomes the identity."""
        c2w = se3_inverse(self.c2w[0]) @ self.c2w
        c2w[0] = np.eye(4)
        return replace(self, c2w=c2w)

    def continued(self, path: CameraTrack) -> CameraTrack:
        """This track, and from its last pose on a path that starts at the identity, at the same rate."""
        c2w = np.concatenate([self.c2w, self.c2w[-1] @ path.c2w[1:]])
        return replace(self, c2w=c2w, K=np.concatenate([self.K, path.K[1:]]))

    def cropped(self, picture: tuple[int, int], view: tuple[int, int]) -> CameraTrack:
        """K of the centre of a picture, cropped to the aspect ratio of a view as by `resize_and_crop`; sizes (h, w)."""
        (height, width), (rows, columns) = picture, view
        aspect = width / height / (columns / rows)
        part = np.array([min(1, 1 / aspect), min(1, aspect)])  # of width and height that is left
        return replace(self, K=np.concatenate([self.K[:, :2] / part, (self.K[:, 2:] - 0.5) / part + 0.5], axis=1))

    def scaled(self, factor: float) -> CameraTrack:
        """The path in other units: translations times `factor`."""
        return replace(self, c2w=rigid(self.c2w[:, :3, :3], factor * self.c2w[:, :3, 3]))

    def at_latent_rate(self, stride: int) -> CameraTrack:
        """One camera per latent: latent i has the pose of pixel frame `stride * i`.

        Raises CameraError unless the track has `stride * k + 1` frames.
        """
        extra = (len(self) - 1) % stride
        if extra:
            raise CameraError(
                f"{len(self)} frames do not fill whole latents: need {stride} * k + 1; "
                f"drop the last {extra} or add {stride - extra}"
            )
        return replace(self, c2w=self.c2w[::stride], K=self.K[::stride], fps=self.fps / stride)

    def resample(self, fps: float) -> CameraTrack:
        """The path at another frame rate: camera centres are interpolated linearly, rotations by `slerp`."""
        if not (np.isfinite(fps) and fps > 0):
            raise CameraError(f"cannot resample to fps = {fps}; give a positive rate")
        last = len(self) - 1
        if last * fps >= MAX_FRAMES * self.fps:
            raise CameraError(
                f"{len(self)} poses at {self.fps:g} per second are more than {MAX_FRAMES} at {fps:g}; correct their fps"
            )
        count = int(np.floor(last * fps / self.fps + 1e-9)) + 1
        return self.at(np.arange(count) * (self.fps / fps), fps)

    def at(self, positions: Float[Array, " m"], fps: float) -> CameraTrack:
        """The cameras at positions counted in frames, between 0 and n - 1, as in `resample`."""
        last = len(self) - 1
        positions = np.clip(positions, 0, last)
        a = np.minimum(positions.astype(int), max(last - 1, 0))
        b = np.minimum(a + 1, last)
        part = (positions - a)[:, None]
        R = slerp(self.c2w[a, :3, :3], self.c2w[b, :3, :3], part[:, 0])
        t = (1 - part) * self.c2w[a, :3, 3] + part * self.c2w[b, :3, 3]
        return replace(self, c2w=rigid(R, t), K=(1 - part) * self.K[a] + part * self.K[b], fps=fps)

    def w2c(self) -> Float[Array, "n 4 4"]:
        """World-to-camera matrices, float64."""
        return se3_inverse(self.c2w)

    def relative(self) -> Float[Array, "m 4 4"]:
        """Pose of each frame in the coordinates of the frame before it (n - 1); independent of the world frame."""
        return se3_inverse(self.c2w[:-1]) @ self.c2w[1:]

    def path_length(self) -> float:
        """Distance travelled by the camera centre, in `unit`."""
        return float(np.linalg.norm(np.diff(self.c2w[:, :3, 3], axis=0), axis=-1).sum())

    def save(self, path: str | Path) -> None:
        """Write as JSON, without loss of digits; the file appears whole or not at all."""
        head = {"schema": SCHEMA, "convention": CONVENTION, "fps": self.fps, "unit": self.unit}
        write_json(path, {**head, "K": self.K.tolist(), "c2w": self.c2w.tolist()}, indent=None)

    @classmethod
    def load(cls, path: str | Path) -> CameraTrack:
        """Read a file that `save` wrote. Raises CameraError for any other: conventions are never guessed."""
        try:
            record = read_json(Path(path))
        except (OSError, UserError) as error:
            raise CameraError(f"{path}: cannot read a camera track: {error}") from error
        known = {"schema": SCHEMA, "convention": CONVENTION}
        if {key: record.get(key) for key in known} != known:
            raise CameraError(
                f"{path}: no minwm camera track (schema {SCHEMA}, {CONVENTION}); "
                "write one with CameraTrack.save (OpenCV axes, camera to world)"
            )
        missing = {"c2w", "K", "fps", "unit"} - record.keys()
        if missing:
            raise CameraError(f"{path}: lacks {', '.join(sorted(missing))}; save the track again")
        try:
            c2w, K = np.array(record["c2w"], np.float64), np.array(record["K"], np.float64)
            return cls(c2w=c2w, K=K, fps=float(record["fps"]), unit=str(record["unit"]))
        except (CameraError, TypeError, ValueError, OverflowError) as error:
            raise CameraError(f"{path}: {error}") from error


def _check_poses(c2w: Array) -> None:
    def refuse(bad: Array, value: Array, problem: str) -> None:
        if bad.any():
            frame = int(bad.argmax())
            raise CameraError(f"frame {frame}: " + problem.format(value=np.round(value[frame], 5).tolist()))

    R = c2w[:, :3, :3]
    finite = np.isfinite(c2w).all((1, 2))
    refuse(
        np.logical_not(finite),
        c2w,
        "the pose {value} has a value that is not finite; drop or interpolate this frame",
    )
    bottom = c2w[:, 3]
    refuse(
        np.abs(bottom - [0, 0, 0, 1]).max(1) > 1e-6,
        bottom,
        "the bottom row is {value}, a pose has [0, 0, 0, 1]; a transposed matrix shows its translation there",
    )
    det = np.linalg.det(R)
    refuse(
        det < 0,
        det,
        "det(R) = {value}, a rotation has +1: this pose mirrors the world. OpenGL or Blender poses become "
        "OpenCV by negating BOTH the y and the z column; a left-handed engine (Unreal) needs other axes",
    )
    skew = np.abs(R.swapaxes(1, 2) @ R - np.eye(3)).max((1, 2))
    refuse(
        skew > 1e-4,
        skew,
        "R is no rotation: R^T R differs from the identity by {value} (limit 0.0001); "
        "a scaled or 16-bit matrix must be made orthonormal first",
    )


def _check_intrinsics(K: Array) -> None:
    fx, fy, cx, cy = K.T
    good = np.isfinite(K).all(1) & (fx > 0) & (fy > 0) & (fx < 20) & (fy < 20)
    good &= (np.abs(cx - 0.5) <= 1.5) & (np.abs(cy - 0.5) <= 1.5)
    if not good.all():
        frame = int((~good).argmax())
        raise CameraError(
            f"frame {frame}: K = {K[frame].tolist()} is out of range (0 < f < 20, -1 <= c <= 2); K is "
            "(fx/W, fy/H, cx/W, cy/H), so values in pixels must be divided by the image's width and height"
        )


def latent_cameras(
    tracks: Sequence[CameraTrack], stride: int
) -> tuple[Float[Tensor, "b f 4 4"], Float[Tensor, "b f 4"]]:
    """The network's camera input of a batch of pixel-rate tracks: world-to-camera matrices and K per latent, float32.

    Poses become relative to the first frame while still in float64, so a far world origin costs no precision.
    """
    lengths = sorted({len(track) for track in tracks})
    if len(lengths) != 1:
        raise CameraError(f"a batch needs tracks of one length, got lengths {lengths}; slice them first")
    latent = [track.relative_to_first().at_latent_rate(stride) for track in tracks]
    w2c, K = np.stack([track.w2c() for track in latent]), np.stack([track.K for track in latent])
    return torch.from_numpy(w2c.astype(np.float32)), torch.from_numpy(K.astype(np.float32))
