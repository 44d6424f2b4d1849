"""Action labels: from the camera alone, the same in training and in play, and nothing at first in a network."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from backbones import SMALL, condition, latents, small

from minwm.cameras.track import latent_cameras, se3_inverse
from minwm.cameras.trajectory import Action, Motion, integrate_actions, parse
from minwm.control.action import LEAST_MOVE, LEAST_TURN, action_labels, with_action_labels
from minwm.core.config import ConfigError
from minwm.core.types import Condition

MOVES = ("", "w", "s", "d", "a", "wd", "wa", "sd", "sa")
TURNS = ("", "l", "j", "i", "k", "li", "lk", "ji", "jk")
WORLDPLAY = Motion(move=0.48, turn=18.0, fps=24.0)
"""0.08 units and 3 degrees per latent."""


def labels(c2w: np.ndarray) -> list[int]:
    return action_labels(torch.from_numpy(se3_inverse(c2w))[None])[0].tolist()


@pytest.mark.parametrize("motion", [Motion(), WORLDPLAY], ids=["ours", "worldplay"])
def test_every_label_is_that_of_the_keys_that_move_the_camera_so(motion: Motion) -> None:
    """All 81, from any pose."""
    start = integrate_actions(np.eye(4), [Action.of("wli")] * 9, motion)[-1]
    for label, keys in enumerate(map("".join, product(MOVES, TURNS))):
        path = integrate_actions(start, [Action.of(keys)] * 8, motion)
        assert labels(np.stack([start, path[3], path[7]])) == [0, label, label], keys


def test_small_motions_are_none() -> None:
    path = np.eye(4)[None].repeat(2, 0)
    for size, moved in ((0.99, 0), (1.01, 9)):
        path[1, 2, 3] = size * LEAST_MOVE
        assert labels(path) == [0, moved]
        cos, sin = np.cos(size * LEAST_TURN), np.sin(size * LEAST_TURN)
        turned = np.eye(4)[None].repeat(2, 0)
        turned[1, :3, :3] = [[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]
        assert labels(turned) == [0, moved // 9]


def test_clips_and_their_chunks_have_the_same_labels() -> None:
    tracks = [parse(keys).track(Motion(), np.full(4, 0.5)) for keys in ("w*2,l*2", "a+j*4")]
    w2c, K = latent_cameras(tracks, 4)
    cond = with_action_labels(Condition(text=torch.zeros(2, 1, 1), w2c=w2c, K=K))
    assert cond.actions is not None and cond.actions.tolist() == [[0, 9, 9, 1, 1], [0, 38, 38, 38, 38]]
    later = cond.frames(2, 5).actions
    assert later is not None and torch.equal(later, cond.actions[:, 2:])


@pytest.mark.parametrize("name", ["wan-dual", "hunyuan-dual"])
def test_networks_with_actions_start_as_those_without_and_learn_them(name: str) -> None:
    net, x, t = small(name), latents(3), torch.full((2, 3), 0.4, dtype=torch.float64)
    acting = replace(SMALL[name], actions=True).build().double()
    fresh = {key: p for key, p in acting.named_parameters() if key not in net.state_dict()}
    missing = acting.load_state_dict(net.state_dict(), strict=False).missing_keys
    assert set(missing) == fresh.keys() and len(missing) == 4 and all(key.startswith("action_") for key in missing)
    cond = replace(condition(3), actions=torch.tensor([[0, 9, 80], [0, 3, 3]]))
    out = acting(x, t, cond)
    torch.testing.assert_close(out, net(x, t, cond), atol=0, rtol=0)
    with pytest.raises(ConfigError, match="a network with actions needs cameras"):
        acting(x, t, replace(cond, actions=None))
    for p in fresh.values():
        torch.nn.init.normal_(p)
    acting(x, t, cond).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in fresh.values())
    swapped = replace(cond, actions=torch.tensor([[0, 10, 80], [0, 3, 3]]))
    assert (acting(x, t, swapped) - acting(x, t, cond)).abs().amax((0, 2, 3, 4))[1] > 1e-3
