"""Action labels, which HY-WorldPlay's networks see beside the cameras: how the camera moved since the latent before.

label = 9 * translation + rotation, 81 in all. Each is one of nine classes: none, one direction, or two at once.

translation   1 forward  2 back  3 right  4 left   5 forward right  6 forward left  7 back right  8 back left
rotation      1 right    2 left  3 up     4 down   5 right up       6 right down    7 left up     8 left down

Labels follow from cameras and are never given by hand, so they mean the same in training and in play.
Facts: HY-WorldPlay `hyvideo/generate.py`, `trainer/dataset/ar_camera_hunyuan_w_mem_dataset.py`.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minwm.cameras.track import se3_inverse
from minwm.core.config import ConfigError
from minwm.core.types import Condition

Labels = Int[Tensor, "b f"]
LEAST_MOVE = 0.01
"""World units per latent up to which a camera stands still, as in HY-WorldPlay's training; its keys move by 0.08."""
LEAST_TURN = math.radians(0.05)
"""The same of a rotation, about the camera's x or y axis."""
SIDEWAYS = math.cos(math.radians(60))
"""Cosine of the largest angle between a motion and a direction that it counts for."""
_CLASSES = ((0, 3, 4), (1, 5, 6), (2, 7, 8))
"""Class of (none, first, second direction of one pair) and the same of the other pair."""


def action_labels(w2c: Float[Tensor, "b f 4 4"]) -> Labels:
    """The label of every latent, from the world-to-camera matrices of a path; that of the first is 0."""
    w2c = w2c.double()
    step = torch.cat([w2c[:, :1], w2c[:, :-1]], dim=1) @ se3_inverse(w2c)  # the pose in the camera before
    move = step[..., :3, 3]
    distance = move.norm(dim=-1)
    right, _, forward = (move / distance.clamp_min(LEAST_MOVE)[..., None]).unbind(-1)
    pitch = torch.atan2(step[..., 2, 1], step[..., 2, 2])  # Euler angles about fixed axes x, y, z
    yaw = torch.asin((-step[..., 2, 0]).clamp(-1, 1))
    translation = _class(forward, right, SIDEWAYS) * (distance > LEAST_MOVE)
    return 9 * translation + _class(yaw, pitch, LEAST_TURN)


def _class(first: Float[Tensor, "b f"], second: Float[Tensor, "b f"], least: float) -> Labels:
    """The class of two pairs of opposite directions."""
    one, two = ((x > least) + 2 * (x < -least) for x in (first, second))
    return torch.tensor(_CLASSES, device=first.device)[one, two]


def with_action_labels(cond: Condition) -> Condition:
    """The condition of a clip with the labels of its cameras, if it has any."""
    return cond if cond.w2c is None else replace(cond, actions=action_labels(cond.w2c))


def given_labels(actions: Labels | None) -> Labels:
    """The labels of a condition; ConfigError if they are missing."""
    if actions is None:
        raise ConfigError("a network with actions needs cameras, whose motion they are; this clip has none")
    return actions
