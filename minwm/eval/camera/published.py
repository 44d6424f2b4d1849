"""Camera scores as others publish them, by their definitions, on paths relative to their first pose.

All but the rotations fit the scale of the shown path, or ask for none: they cannot see speed, and a static video gets
half of WBench's marks. So `score_published` gives them for the baselines static, opposite and half speed as well.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
from jaxtyping import Float

from minwm.cameras.track import CameraTrack, rigid, rotation_degrees, se3_inverse, slerp, so3_log
from minwm.eval.camera.navigation import Navigation, Path, Turn, navigation
from minwm.eval.camera.recover import RecoveredCamera
from minwm.eval.camera.score import Samples, keys_of

Array = np.ndarray
MAX_DEGREES, MAX_AWAY = 15.0, 0.5
"""Errors at which WorldScore gives no marks."""


def rot_err(shown: Path, commanded: Path) -> float:
    """RotErr (CameraCtrl): sum of the angles between the rotations, radians."""
    return float(np.linalg.norm(so3_log(commanded[:, :3, :3].swapaxes(1, 2) @ shown[:, :3, :3]), axis=-1).sum())


def trans_err(shown: Path, commanded: Path) -> float:
    """TransErr (CamI2V, relative): sum of the distances, each path divided by its own farthest way."""
    return float(np.linalg.norm(_to_unit(shown)[:, :3, 3] - _to_unit(commanded)[:, :3, 3], axis=1).sum())


def cam_mc(shown: Path, commanded: Path) -> float:
    """CamMC (CamI2V): sum of the Frobenius norms between [R|t], the paths divided likewise."""
    return float(np.linalg.norm((_to_unit(shown) - _to_unit(commanded))[:, :3], axis=(1, 2)).sum())


def _to_unit(path: Path) -> Path:
    farthest = float(np.linalg.norm(path[:, :3, 3], axis=1).max())
    return rigid(path[:, :3, :3], path[:, :3, 3] / max(farthest, 1e-9))


def worldscore(shown: Path, commanded: Path) -> float:
    """WorldScore's camera control, 0 to 1: of the mean angle and the mean distance at the best scale."""
    degrees = np.degrees(rot_err(shown, commanded)) / len(shown)
    a, b = shown[:, :3, 3], commanded[:, :3, 3]
    weight, scale = np.ones(len(a)), 0.0
    for _ in range(50):  # iteratively reweighted least squares: the sum of distances, not of their squares
        scale = float((weight * (a * b).sum(1)).sum() / max((weight * (a * a).sum(1)).sum(), 1e-12))
        weight = 1 / np.maximum(np.linalg.norm(scale * a - b, axis=1), 1e-9)
    away = float(np.linalg.norm(scale * a - b, axis=1).mean())
    return float(np.sqrt((1 - min(degrees, MAX_DEGREES) / MAX_DEGREES) * (1 - min(away, MAX_AWAY) / MAX_AWAY)))


def relative_pose_errors(shown: Path, commanded: Path) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """MIND's RPE: distance and degrees between the steps of both paths, after Sim(3) alignment (Umeyama)."""
    aligned = _aligned(shown, commanded)
    steps = [se3_inverse(path[:-1]) @ path[1:] for path in (commanded, aligned)]
    error = se3_inverse(steps[0]) @ steps[1]
    return np.linalg.norm(error[:, :3, 3], axis=1), rotation_degrees(error[:, :3, :3])


def _aligned(shown: Path, commanded: Path) -> Path:
    a, b = shown[:, :3, 3], commanded[:, :3, 3]
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    variance = float((centred_a**2).sum())
    if variance < 1e-12:
        return shown
    u, s, v = np.linalg.svd(centred_b.T @ centred_a)
    sign = np.array([1, 1, np.linalg.det(u @ v)])
    R, scale = u @ np.diag(sign) @ v, float((s * sign).sum()) / variance
    return rigid(R @ shown[:, :3, :3], scale * a @ R.T + b.mean(0) - scale * R @ a.mean(0))


def turns_of(commanded: Path, ends: Sequence[int], starts: Sequence[int] = ()) -> list[Turn]:
    """The turns of a path: steps during which the same keys seem held. Standing still is none.

    `ends` are the frames of its poses, `starts` the first frames of the turns, and the number of frames, if the
    path was commanded in turns: then equal ones in a row are several.
    """
    keys = [keys_of(step) for step in se3_inverse(commanded[:-1]) @ commanded[1:]]
    turns = np.searchsorted(starts[:-1], ends[1:], side="right").tolist()
    found, start = list[Turn](), 0
    for (_, key), run in groupby(zip(turns, keys, strict=True)):
        stop = start + len([*run])
        if key != "static":
            found.append(Turn(start, stop + 1, key))
        start = stop
    return found


def half_speed(path: Path) -> Path:
    """The first half of the way in the same time."""
    at = np.arange(len(path)) / 2
    before = at.astype(int)
    one, two, part = path[before], path[np.ceil(at).astype(int)], (at - before)
    t = (1 - part[:, None]) * one[:, :3, 3] + part[:, None] * two[:, :3, 3]
    return rigid(slerp(one[:, :3, :3], two[:, :3, :3], part), t)


BASELINES: dict[str, Callable[[Path], Path]] = {
    "static": lambda path: np.repeat(path[:1], len(path), 0),
    "opposite": se3_inverse,
    "half speed": half_speed,
}
"""Made from the commanded path."""


def score_published(recovered: RecoveredCamera, commanded: CameraTrack, starts: Sequence[int] = ()) -> Samples:
    """All scores of a video by name, and those of `BASELINES` (`nav_score (static)`). Poses are a second apart; a lost
    camera stands still. `starts` as in `turns_of`."""
    goal = se3_inverse(commanded.c2w[0]) @ commanded.c2w[recovered.ends]
    turns = turns_of(goal, recovered.ends, starts)
    found = _scores(recovered.c2w, goal, turns)
    for name, baseline in BASELINES.items():
        found |= {f"{score} ({name})": value for score, value in _scores(baseline(goal), goal, turns).items()}
    return found


def _scores(shown: Path, commanded: Path, turns: Sequence[Turn]) -> Samples:
    values = {"rot_err": rot_err, "trans_err": trans_err, "cam_mc": cam_mc, "worldscore": worldscore}
    found: Samples = {name: [score(shown, commanded)] for name, score in values.items()}
    away, degrees = relative_pose_errors(shown, commanded)
    for i, step in enumerate(se3_inverse(commanded[:-1]) @ commanded[1:]):
        for label in ("", f"[{keys_of(step)}]"):
            found.setdefault(f"rpe_t{label}", []).append(float(away[i]))
            found.setdefault(f"rpe_deg{label}", []).append(float(degrees[i]))
    if turns:
        result: Navigation = navigation(shown, turns)
        marks = {f"nav_{name}": value for name, value in vars(result).items()}
        found |= {name: [value] for name, value in marks.items() if value is not None}
    return found
