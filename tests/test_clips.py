"""What is derived from a clip's record: its actions, and the split of its scene."""

import numpy as np
import pytest

from minwm.cameras.track import intrinsics
from minwm.cameras.trajectory import Motion, parse
from minwm.data.clips import actions, split_of

MOTION = Motion(move=0.5, turn=24.0, fps=16.0)
NAMES = {"w": "forward", "s": "back", "a": "left", "d": "right", "u": "up", "dn": "down", "static": "still"}
TURNS = {"i": "look up", "k": "look down", "j": "turn left", "l": "turn right"}


@pytest.mark.parametrize(("keys", "name"), (NAMES | TURNS).items())
def test_actions_read_off_poses_are_the_keys(keys: str, name: str) -> None:
    assert actions(parse(f"{keys}*2").track(MOTION, intrinsics(70.0, 16, 16))) == [name, name]


def test_the_split_depends_on_the_scene_alone() -> None:
    assert [split_of(f"world:{i}", 0.1) for i in range(20)].count("val") == 2  # fixed for ever
    share = np.mean([split_of(f"world:{i}", 0.1) == "val" for i in range(5000)])
    assert abs(share - 0.1) < 0.02
