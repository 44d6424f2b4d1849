"""Counterfactual control: one first frame, one noise, every action; which action's true video does each resemble?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from minwm.cameras.track import CameraTrack
from minwm.cameras.trajectory import parse
from minwm.eval.cases import HELD_OUT, SCENES_PER_SEED, EvalError, Videos
from minwm.eval.image import psnr
from minwm.render.base import Scene, Scenes
from minwm.session.generate import generate
from minwm.session.views import Viewpoint, known_views
from minwm.store.model import Model

ACTIONS = ("w", "s", "a", "d", "j", "l", "i", "k")
FIRST_SCENE = HELD_OUT * SCENES_PER_SEED + 500_000


@dataclass(frozen=True)
class Confusion:
    """Row: the action that was given; column: the action with whose true video it is compared."""

    actions: list[str]
    psnr: list[list[float]]
    """dB, mean over all frames but the first."""
    accuracy: float
    """Share of rows whose highest entry is on the diagonal."""


def measure_confusion(
    generated: UInt8[np.ndarray, "a n h w 3"], truth: UInt8[np.ndarray, "a n h w 3"], actions: Sequence[str]
) -> Confusion:
    """Compare each action's generated video with every action's true one, all from one first frame."""
    if not len(generated) == len(truth) == len(actions):
        raise EvalError(f"{len(generated)} generated and {len(truth)} true videos for {len(actions)} actions")
    table = np.stack([psnr(np.broadcast_to(one, truth.shape)[:, 1:], truth[:, 1:]).mean(-1) for one in generated])
    accuracy = float((table.argmax(1) == np.arange(len(table))).mean())
    return Confusion(list(actions), table.tolist(), accuracy)


def counterfactual(model: Model, scenes: Scenes, seed: int) -> Confusion:
    """Each action held for a training clip, from one first frame and one noise."""
    config = model.config
    trajectories = [parse(f"{action}*{config.latents - 1}", stride=config.motion.stride) for action in ACTIONS]
    tracks = [trajectory.track(config.motion, config.intrinsics) for trajectory in trajectories]
    scene, origin = _open_scene(scenes, tracks)
    truth = np.stack([scene.render(t.transformed(origin), config.height, config.width).frames for t in tracks])
    views = known_views(model, [Viewpoint(scene, origin)])
    videos: Videos = np.concatenate(
        [generate(model, truth[:1, 0], [scene.caption], [track], seed, views) for track in tracks]
    )
    return measure_confusion(videos, truth, ACTIONS)


def _open_scene(scenes: Scenes, tracks: Sequence[CameraTrack]) -> tuple[Scene, np.ndarray]:
    """A held-out scene, and a pose in it from which every track is free."""
    joined = CameraTrack(np.concatenate([track.c2w for track in tracks]), tracks[0].K[0], fps=tracks[0].fps)
    for seed in range(FIRST_SCENE, FIRST_SCENE + 100):
        scene = scenes(seed)
        origin = scene.spawn(np.random.default_rng(seed), joined)
        if origin is not None:
            return scene, origin
    raise EvalError(f"no scene from {FIRST_SCENE} on has room for every action; use a slower motion")
