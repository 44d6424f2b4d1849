"""Recovered cameras against commanded ones, second by second: what can be said of a video of an unknown scene.

Angles are absolute. The way is known up to a factor unless the depth of the first frame is known: then the speed ratio
is absolute too; else only how speeds within the video relate, to which the commanded path as a whole is fitted.
"""

from collections import defaultdict

import numpy as np
from jaxtyping import Float

from minwm.cameras.track import CameraTrack, rotation_degrees, se3_inverse, so3_log
from minwm.eval.camera.motion import MIN_DEGREES, MIN_UNITS
from minwm.eval.camera.recover import RecoveredCamera

Array = np.ndarray
Samples = dict[str, list[float]]
"""Values by quantity."""
KEY_SHARE = 0.35
"""Share of a way, or of a turn, along an axis from which on its key counts as held."""
NO_DIRECTION = 90.0
"""Degrees that a video is charged which should move and does not, or whose camera is lost."""


def score_camera(recovered: RecoveredCamera, commanded: CameraTrack) -> Samples:
    """Samples by quantity, over all seconds, and those of the keys held (`rot_err_deg[w+j]`) and of each second
    (`rot_err_deg@2`).

    - lost: seconds without a camera, charged as standing still; failed: whether they are all of the video
    - rot_err_deg: error of the rotation; turn_ratio: shown over commanded rotation, about its axis
    - direction_err_deg: angle between the directions of movement; strays: seconds that move where none was commanded
    - speed_ratio (with the depth of the first frame) or relative_speed (without): shown over commanded way
    """
    ends = recovered.ends
    steps = se3_inverse(commanded.c2w[ends[:-1]]) @ commanded.c2w[ends[1:]]
    scale = 1.0 if recovered.anchored else _fitted_scale(recovered, steps)
    speed = "speed_ratio" if recovered.anchored else "relative_speed"
    samples = defaultdict[str, list[float]](list)
    if recovered.kinds:
        samples["failed"] = [float(set(recovered.kinds) == {"lost"})]
    for second, step in enumerate(steps):
        values = _second(recovered, second, step)
        if speed_known(recovered, second) and np.linalg.norm(step[:3, 3]) >= MIN_UNITS and scale is not None:
            values[speed] = (
                scale * float(recovered.poses[second, :3, 3] @ step[:3, 3]) / float((step[:3, 3] ** 2).sum())
            )
        for name, value in values.items():
            for label in (name, f"{name}[{keys_of(step)}]", f"{name}@{second + 1}"):
                samples[label].append(value)
    return dict(samples)


def speed_known(recovered: RecoveredCamera, second: int) -> bool:
    """Whether the way of a second is in the units of the others; nothing moves in a still or lost one."""
    return bool(recovered.linked[second]) or recovered.kinds[second] == "lost"


def _second(recovered: RecoveredCamera, second: int, step: Float[Array, "4 4"]) -> dict[str, float]:
    pose, kind = recovered.poses[second], recovered.kinds[second]
    turn, turned, way = so3_log(step[:3, :3]), so3_log(pose[:3, :3]), step[:3, 3]
    angle, length = float(np.linalg.norm(turn)), float(np.linalg.norm(way))
    values = {"lost": float(kind == "lost")}
    values["rot_err_deg"] = float(rotation_degrees(step[:3, :3].T @ pose[:3, :3]))
    if np.degrees(angle) >= MIN_DEGREES:
        values["turn_ratio"] = float(turned @ turn) / angle**2
    if length >= MIN_UNITS:
        moved = pose[:3, 3]
        cosine = moved @ way / max(float(np.linalg.norm(moved)) * length, 1e-9)
        right = kind == "move"
        values["direction_err_deg"] = float(np.degrees(np.arccos(cosine.clip(-1, 1)))) if right else NO_DIRECTION
    else:
        values["strays"] = float(kind == "move")
    return values


def _fitted_scale(recovered: RecoveredCamera, steps: Float[Array, "s 4 4"]) -> float:
    """The factor that takes the shown ways to the commanded ones, as a sum; 1 where no way is known."""
    known = np.array([speed_known(recovered, second) for second in range(len(steps))], bool)
    shown, goal = (np.linalg.norm(x[known, :3, 3], axis=1).sum() for x in (recovered.poses, steps))
    return float(goal / shown) if shown > 0 else 1.0


def keys_of(step: Float[Array, "4 4"]) -> str:
    """The keys that a camera's step looks like, such as `w+j`; `static` for one that is none."""
    x, y, z = step[:3, 3]
    pitch, yaw, _ = np.degrees(so3_log(step[:3, :3]))
    held = _held({"w": z, "s": -z, "a": -x, "d": x, "u": -y, "dn": y}, MIN_UNITS)
    return "+".join([*held, *_held({"j": -yaw, "l": yaw, "i": pitch, "k": -pitch}, MIN_DEGREES)]) or "static"


def _held(parts: dict[str, float], least: float) -> list[str]:
    size = float(np.linalg.norm([*parts.values()])) / np.sqrt(2)  # every axis counts twice
    return [key for key, part in parts.items() if size >= least and part >= KEY_SHARE * size]
