"""WBench's score of navigation (`navigation_trajectory`, first person): does each turn look like its action?

The expected path of a turn is made from the shown one: as long, or turned as far, but in the commanded direction. So
the score cannot see speed, and gives a static video half of the marks; never show it without the speed ratio and the
baselines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minwm.cameras.track import rigid, rotation_degrees, se3_inverse, slerp, so3_exp
from minwm.cameras.trajectory import Action

Array = np.ndarray
Path = Float[Array, "n 4 4"]
SAMPLES = 20
"""Poses per turn that are compared, evenly along the way."""
LEAST_PATH, LEAST_TURN = 0.5, 10.0
"""Units and degrees by which errors are divided at least."""
NO_PATH, NO_TURN = 0.1, 3.0
"""Units and degrees of a turn below which nothing was shown."""
DEFAULT_PATH = 1.0
"""Units that are expected where nothing was shown."""
LEAST_EXPECTED_TURN = 30.0
"""Degrees that are expected at least of a turn that rotates."""
STRIDE = 2.0
"""Units of a turn that moves and rotates, before it is scaled to what was shown."""
OPPOSITE = {"s": "w", "d": "a", "l": "j", "k": "i"}
MIRRORED_AXIS = {"w": 2, "a": 0, "j": 0, "i": 1}
"""Axis of the camera along which a turn is mirrored to be compared with that of the opposite key."""


class Turn(NamedTuple):
    """Poses [start, stop) of a path, during which keys such as `w+j` were held."""

    start: int
    stop: int
    keys: str


@dataclass(frozen=True)
class Navigation:
    """Scores in [0, 1], 1 is best. Consistency and the whole are None without two turns of equal or opposite keys."""

    nate_t: float
    """Mean distance of the paths over the length of the shown one; 0 is best."""
    nate_r: float
    accuracy: float
    consistency: float | None
    score: float | None


def navigation(c2w: Path, turns: Sequence[Turn]) -> Navigation:
    """Score the turns of a path."""
    heading, position = c2w[turns[0].start, :3, :3], c2w[turns[0].start, :3, 3]
    shown, expected = list[Array](), list[Array]()
    for turn in turns:
        part, action = c2w[turn.start : turn.stop], Action.of(turn.keys.split("+"))
        if action.yaw or action.pitch:
            goal = _rotating(part, action)
            heading = goal[-1, :3, :3]
        else:
            goal = _straight(part, action, heading)
        goal[:, :3, 3] += position - goal[0, :3, 3]
        position = goal[-1, :3, 3]
        shown.append(_along(part))
        expected.append(_along(goal))
    away, angle = _errors(np.concatenate(expected), np.concatenate(shown))
    whole = c2w[turns[0].start : turns[-1].stop]
    nate_t, nate_r = _normalised(away, angle, _length(whole), _turned(whole))
    accuracy = 1 - (nate_t + nate_r) / 2
    pairs = [_difference(c2w, one, two) for one, two in combinations(turns, 2) if _groups(one) == _groups(two)]
    consistency = 1 - float(np.mean(pairs)) if pairs else None
    return Navigation(
        nate_t, nate_r, accuracy, consistency, None if consistency is None else (accuracy + consistency) / 2
    )


def _straight(part: Path, action: Action, heading: Float[Array, "3 3"]) -> Path:
    """As far as shown, along the commanded direction."""
    direction = heading @ np.array([action.move_x, -action.move_y, action.move_z])
    direction = direction / max(float(np.linalg.norm(direction)), 1e-12)
    length = float(np.linalg.norm(part[-1, :3, 3] - part[0, :3, 3]))
    way = np.linspace(0, length if length > NO_PATH else DEFAULT_PATH, len(part))
    return rigid(np.repeat(heading[None], len(part), 0), part[0, :3, 3] + way[:, None] * direction)


def _rotating(part: Path, action: Action) -> Path:
    """Turned as far as shown, and moved as far, by the commanded keys."""
    turned, steps = _turned(part), len(part) - 1
    angle = np.radians(max(turned, LEAST_EXPECTED_TURN))
    axis = np.array([0.0, action.yaw, 0.0]) if action.yaw else np.array([action.pitch, 0.0, 0.0])
    R = so3_exp(np.linspace(0, angle, steps + 1)[:, None] * axis)
    direction = np.array([action.move_x, -action.move_y, action.move_z])
    step = STRIDE / max(steps, 1) * direction / max(float(np.linalg.norm(direction)), 1.0)
    moves = np.concatenate([np.zeros((1, 3)), np.cumsum(R[1:] @ step, axis=0)])
    far, goal_far = (float(np.linalg.norm(x, axis=1).mean()) for x in (part[:, :3, 3] - part[0, :3, 3], moves))
    scale = 1.0 if turned < NO_TURN or far < NO_PATH else far / (goal_far + 1e-12)
    first = part[0, :3, :3]
    return rigid(first @ R, part[0, :3, 3] + scale * moves @ first.T)


def _along(path: Path) -> Float[Array, "20 4 4"]:
    """`SAMPLES` poses, evenly along the way; evenly in time if there is none."""
    steps = np.linalg.norm(np.diff(path[:, :3, 3], axis=0), axis=1)
    way = np.concatenate([[0.0], np.cumsum(steps)])
    if len(path) <= 2 or way[-1] < 1e-8:
        return path[np.linspace(0, len(path) - 1, SAMPLES).astype(int)]
    way = way / way[-1] + 1e-12 * np.arange(len(way))
    at = np.linspace(0, 1, SAMPLES)
    before = (np.searchsorted(way, at, side="right") - 1).clip(0, len(path) - 2)
    part = ((at - way[before]) / (way[before + 1] - way[before])).clip(0, 1)
    one, two = path[before], path[before + 1]
    R = slerp(one[:, :3, :3], two[:, :3, :3], part)
    return rigid(R, (1 - part[:, None]) * one[:, :3, 3] + part[:, None] * two[:, :3, 3])


def _errors(one: Path, two: Path) -> tuple[float, float]:
    """Mean distance and angle."""
    away = np.linalg.norm(one[:, :3, 3] - two[:, :3, 3], axis=1)
    return float(away.mean()), float(rotation_degrees(one[:, :3, :3].swapaxes(1, 2) @ two[:, :3, :3]).mean())


def _normalised(away: float, angle: float, length: float, turned: float) -> tuple[float, float]:
    return min(away / max(length, LEAST_PATH), 1.0), min(angle / max(turned, LEAST_TURN), 1.0)


def _length(path: Path) -> float:
    return float(np.linalg.norm(np.diff(path[:, :3, 3], axis=0), axis=1).sum())


def _turned(path: Path) -> float:
    return float(rotation_degrees(path[:-1, :3, :3].swapaxes(1, 2) @ path[1:, :3, :3]).sum())


def _groups(turn: Turn) -> frozenset[str]:
    """The keys, each as itself or its opposite."""
    return frozenset(OPPOSITE.get(key, key) for key in turn.keys.split("+"))


def _difference(c2w: Path, one: Turn, two: Turn) -> float:
    """Mean of the normalised errors between two turns, the second mirrored where it has opposite keys."""
    a, b = (se3_inverse(c2w[turn.start]) @ c2w[turn.start : turn.stop] for turn in (one, two))
    opposite = {OPPOSITE.get(key, key) for key in {*one.keys.split("+")} ^ {*two.keys.split("+")}}
    mirror = np.eye(4)
    for axis in {MIRRORED_AXIS[key] for key in opposite}:
        mirror[axis, axis] = -1.0
    b = mirror @ b @ mirror
    count = min(len(a), len(b))
    a, b = (path[np.linspace(0, len(path) - 1, count).astype(int)] for path in (a, b))
    length, turned = (_length(a) + _length(b)) / 2, (_turned(a) + _turned(b)) / 2
    return float(np.mean(_normalised(*_errors(a, b), length, turned)))
