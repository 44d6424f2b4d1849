"""The compiled raycaster draws what the plain one draws."""

import numpy as np
import pytest

from minwm.cameras.random_paths import random_track
from minwm.cameras.trajectory import Motion
from minwm.render import raycast
from minwm.render.place import HOURS, Place
from minwm.render.worlds import World

K = np.array([0.714, 0.714, 0.5, 0.5])
WORLDS = (0, 1, 2, 3, 4)
"""Seeds whose grounds have each of the patterns."""


def test_the_worlds_have_every_ground() -> None:
    assert {World(seed).scene.ground.pattern for seed in WORLDS} == set(raycast.GROUND_PATTERNS)


@pytest.mark.parametrize(
    "scene", [*(World(seed) for seed in WORLDS), Place(0), Place(2)], ids=lambda s: s.caption[-24:]
)
def test_compiled_pictures_and_depths_are_the_plain_ones(scene: World, rng: np.random.Generator) -> None:
    fast = pytest.importorskip("minwm.render.fast", reason="numba is not installed")
    track, _ = random_track(rng, 33, Motion(move=0.5, turn=16.0, fps=16.0), K)
    origin = scene.spawn(rng, track)
    assert origin is not None
    view = track.transformed(origin).c2w[::4]
    focal = np.tile(K, (len(view), 1))
    frames, depth = fast.render(scene.scene, view, focal, 48, 64, 2)
    plain, plain_depth = raycast.render(scene.scene, view, focal, 48, 64, 2, "cpu")
    error = np.abs(frames.astype(int) - plain)
    assert error.mean() < 0.01 and (error > 1).mean() < 1e-3
    np.testing.assert_array_equal(np.isinf(depth), np.isinf(plain_depth))
    near = np.isfinite(depth)
    np.testing.assert_allclose(depth[near], plain_depth[near], rtol=2e-3)


def test_the_place_is_closed_and_walks_in_it_are_free(rng: np.random.Generator) -> None:
    place = Place(0)
    edge = np.array(
        [[x, -0.6, z] for t in np.linspace(-6, 6, 97) for x, z in ((t, 5.6), (t, -4.75), (-5.9, t), (5.9, t))]
    )
    inside = edge[(edge[:, 2] > -4.8) & (edge[:, 2] < 5.7)]
    assert not place.free(inside).any()
    track, _ = random_track(rng, 81, Motion(move=0.5, turn=16.0, fps=16.0), K)
    origin = place.spawn(rng, track)
    assert origin is not None and place.free(track.transformed(origin).c2w[:, :3, 3]).all()


def test_every_hour_is_named_and_lit_in_its_own_way() -> None:
    captions = {Place(hour).caption for hour in range(len(HOURS))}
    assert len(captions) == len(HOURS) and all(name in " ".join(captions) for name in HOURS)
