"""What every scene must keep: evaluation, ground truth and rendered clips ask for nothing more."""

import numpy as np
import pytest
from scenes import SCENES

from minwm.cameras.trajectory import parse
from minwm.experiments.presets.demo import tiny_model
from minwm.render.base import Scenes
from minwm.session.engines import SceneEngine

CONFIG = tiny_model()
TRACK = parse("w*1,l*1").track(CONFIG.motion, CONFIG.intrinsics)
every_scene = pytest.mark.parametrize("scenes", SCENES.values(), ids=[*SCENES])


@every_scene
def test_a_seed_is_a_scene_and_a_spawned_path_is_free(scenes: Scenes) -> None:
    found = []
    for _ in range(2):
        scene = scenes(3)
        origin = scene.spawn(np.random.default_rng(0), TRACK)
        assert origin is not None and scene.caption
        assert scene.free((origin @ TRACK.c2w)[:, :3, 3]).all()
        found.append(scene.render(TRACK.transformed(origin).slice(0, 2), 16, 24))
    one, other = found
    assert one.frames.shape == (2, 16, 24, 3) and one.frames.dtype == np.uint8
    assert one.depth.shape == (2, 16, 24) and (one.depth > 0).all()
    assert np.array_equal(one.frames, other.frames) and np.array_equal(one.depth, other.depth)


@every_scene
def test_ground_truth_is_walked_through_in_every_scene(scenes: Scenes) -> None:
    engine = SceneEngine.spawn(3, TRACK, CONFIG, scenes)
    frames = [*engine.advance(TRACK.c2w[1:9])]
    assert engine.start().shape == (1, 64, 64, 3) and [len(part) for part in frames] == [4, 4]
