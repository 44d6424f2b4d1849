"""Camera scores as others publish them, on paths whose score is known."""

import numpy as np
import pytest

from minwm.cameras.track import CameraTrack, rigid, se3_exp, so3_exp
from minwm.cameras.trajectory import Action, Motion, integrate_actions
from minwm.eval.camera.navigation import Turn, navigation
from minwm.eval.camera.published import (
    cam_mc,
    half_speed,
    relative_pose_errors,
    rot_err,
    score_published,
    trans_err,
    turns_of,
    worldscore,
)
from minwm.eval.camera.recover import RecoveredCamera

TURN = 24
"""Frames per turn."""
KEYS = ("w", "l", "w", "j", "s")


def walk(keys: tuple[str, ...], speed: float = 1.0) -> np.ndarray:
    """2.4 units, or 72 degrees, per turn of TURN frames."""
    motion = Motion(move=2.4 * speed, turn=72.0 * speed, fps=TURN, stride=1)
    actions = [Action.of([key]) for key in keys for _ in range(TURN)]
    return np.concatenate([np.eye(4)[None], integrate_actions(np.eye(4), actions, motion)])


@pytest.mark.parametrize(
    ("path", "score"),
    [
        (walk(KEYS), 0.994),
        (walk(KEYS, 0.5), 0.994),
        (walk(KEYS, 0.1), 0.744),
        (walk(("s", "j", "s", "l", "w")), 0.681),
        (walk(("w",) * 5), 0.558),
        (walk(("static",) * 5), 0.500),
    ],
    ids=["exact", "half speed", "a tenth", "opposite", "always ahead", "static"],
)
def test_wbench_scores_of_baselines(path: np.ndarray, score: float) -> None:
    """What WBench's own evaluation gives for these paths, to three digits."""
    turns = [Turn(i * TURN, (i + 1) * TURN, key) for i, key in enumerate(KEYS)]
    assert navigation(path, turns).score == pytest.approx(score, abs=5e-4)


def test_a_single_action_has_no_consistency() -> None:
    found = navigation(walk(("w",)), [Turn(0, TURN, "w")])
    assert found.consistency is found.score is None and found.accuracy == pytest.approx(1)
    mixed = navigation(walk(("w", "l")), [Turn(0, TURN, "w"), Turn(TURN, 2 * TURN, "l")])
    assert mixed.score is None


def test_errors_of_known_paths() -> None:
    path = walk(("w", "l"))[::8]
    bigger = rigid(path[:, :3, :3], 3 * path[:, :3, 3])
    moved = se3_exp(np.array([1.0, 2.0, 3.0, 0.1, 0.2, 0.3])) @ bigger
    assert trans_err(bigger, path) == pytest.approx(0) and cam_mc(bigger, path) == pytest.approx(0)
    assert np.abs(relative_pose_errors(moved, path)).max() < 1e-6, "aligned by rotation, translation and scale"
    assert worldscore(bigger, path) == pytest.approx(1)
    tilted = path @ rigid(so3_exp(np.radians([0, 0, 3.0])), np.zeros(3))
    assert rot_err(tilted, path) == pytest.approx(len(path) * np.radians(3))
    assert worldscore(tilted, path) == pytest.approx(np.sqrt(1 - 3 / 15))
    assert cam_mc(tilted, path) == pytest.approx(len(path) * np.sqrt(8) * np.sin(np.radians(1.5)))
    still = np.repeat(np.eye(4)[None], 5, 0)
    line = rigid(still[:, :3, :3], np.outer(np.arange(5), [0, 0, 0.25]))
    assert trans_err(still, line) == pytest.approx(2.5) and worldscore(still, line) == 0
    away, _ = relative_pose_errors(still, line)
    assert away == pytest.approx(0.25)


def test_baselines_stand_beside_every_score() -> None:
    path = walk(KEYS)
    ends = [*range(0, len(path), TURN // 4)]
    poses = np.linalg.inv(path[ends[:-1]]) @ path[ends[1:]]
    kinds, linked = ["move"] * len(poses), np.ones(len(poses), bool)
    exact = RecoveredCamera(ends, kinds, poses, linked, anchored=False)  # type: ignore[arg-type]
    found = score_published(exact, CameraTrack(path, np.array([0.7, 0.7, 0.5, 0.5]), 24.0))
    assert found["nav_score"][0] > 0.98 > found["nav_score (half speed)"][0] - 0.02
    assert found["nav_score (static)"][0] == pytest.approx(0.5, abs=0.02) and found["worldscore (opposite)"][0] < 0.5
    assert max(found["rpe_deg"]) < 1e-3 and found["rpe_t[w]"][0] < 1e-6
    assert [turn.keys for turn in turns_of(path[ends], ends)] == [*KEYS]
    half = half_speed(path)
    assert len(half) == len(path) and half[-1, :3, 3] == pytest.approx(path[60, :3, 3])


def test_turns_of_a_benchmark_are_told_apart() -> None:
    path, starts = walk(("w", "w", "static", "j"))[:: TURN // 4], [0, TURN + 1, 2 * TURN + 1, 3 * TURN + 1, 4 * TURN]
    ends = [*range(0, 4 * TURN + 1, TURN // 4)]
    assert turns_of(path, ends) == [Turn(0, 9, "w"), Turn(12, 17, "j")]
    assert turns_of(path, ends, starts) == [Turn(0, 5, "w"), Turn(4, 9, "w"), Turn(12, 17, "j")]
