"""Camera poses spoiled in each way that files get them wrong, and what `minwm camera check --video` says of each."""

from collections.abc import Callable

import numpy as np

from minwm.cameras.epipolar import FLIP, MIRROR
from minwm.cameras.track import from_quaternion, quaternion, rigid, se3_exp, se3_inverse

Poses = np.ndarray
"""n 4 4"""


def reordered(c2w: Poses, roll: int) -> Poses:
    w2c = se3_inverse(c2w)
    return se3_inverse(rigid(from_quaternion(np.roll(quaternion(w2c[:, :3, :3]), roll, -1)), w2c[:, :3, 3]))


def noisy(c2w: Poses) -> Poses:
    noise = np.zeros((len(c2w), 6))
    noise[:, 3:] = np.random.default_rng(0).normal(size=(len(c2w), 3)) * np.radians(2) / np.sqrt(3)
    return c2w @ se3_exp(noise)


def late(c2w: Poses, by: int) -> Poses:
    return np.concatenate([np.repeat(c2w[:1], by, 0), c2w[:-by]])


WRONG: dict[str, tuple[Callable[[Poses], Poses], str]] = {
    "w2c": (se3_inverse, "world-to-camera, read as camera-to-world; name a format that is world-to-camera"),
    "opengl": (lambda c2w: c2w @ FLIP, "OpenGL axes .*; negate the y and the z column"),
    "both": (lambda c2w: se3_inverse(c2w @ FLIP), "world-to-camera with OpenGL axes; invert"),
    "wxyz": (lambda c2w: reordered(c2w, 1), "order w x y z, read as x y z w; put the first"),
    "xyzw": (lambda c2w: reordered(c2w, -1), "order x y z w, read as w x y z; put the last"),
    "sign": (lambda c2w: rigid(c2w[:, :3, :3], -c2w[:, :3, 3]), "translations have the wrong sign; negate"),
    "backwards": (lambda c2w: c2w[::-1], "run backwards in time; reverse"),
    "mirrored": (lambda c2w: MIRROR @ c2w @ MIRROR, "mirrored, or the poses are.*; mirror the video"),
    "late by 4": (lambda c2w: late(c2w, 4), "about 4 frames too late; drop the first 4 poses"),
    "late by 12": (lambda c2w: late(c2w, 12), "about 1[123] frames too late; drop the first 1[123] poses"),
    "noise": (noisy, "do not fit the video.*estimate them anew"),
}
"""What is done to true poses, and a pattern of the fault that is found then."""
