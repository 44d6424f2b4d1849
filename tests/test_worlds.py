"""Procedural worlds: deterministic, geometrically exact, free to walk in, described without motion words."""

import re

import numpy as np
import pytest
import torch

from minwm.cameras.track import CameraTrack
from minwm.render.solids import Grid, hit
from minwm.render.worlds import CLEARANCE, World

K = (0.63, 0.63, 0.5, 0.5)
MOTION_WORDS = re.compile(r"\b(camera|mov\w*|turn\w*|walk\w*|pan\w*|forward|backward|left|right|zoom\w*|fly\w*)\b")


def track(frames: int = 9, yaw: float = 0.0, right: float = 0.0, forward: float = 0.0) -> CameraTrack:
    """Anchored track with these totals: degrees to the right, world units."""
    share = np.linspace(0, 1, frames)
    angle = np.radians(yaw) * share
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, 0, 0], c2w[:, 0, 2], c2w[:, 2, 0], c2w[:, 2, 2] = (
        np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle),
    )  # fmt: skip
    c2w[:, :3, 3] = share[:, None] * [right, 0, forward]
    return CameraTrack(c2w, np.tile(K, (frames, 1)), 16.0)


def placed(world: World, path: CameraTrack, seed: int = 0) -> CameraTrack:
    placement = world.spawn(np.random.default_rng(seed), path)
    assert placement is not None
    return path.transformed(placement)


def bilinear(image: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Sample h w c at pixel positions ... 2 (x, y), pixel centres at +0.5, all inside."""
    x, y = at[..., 0] - 0.5, at[..., 1] - 0.5
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    top = image[y0, x0] * (1 - fx) + image[y0, x0 + 1] * fx
    return top * (1 - fy) + (image[y0 + 1, x0] * (1 - fx) + image[y0 + 1, x0 + 1] * fx) * fy


@pytest.mark.parametrize("path", [track(right=0.3), track(forward=0.4), track(yaw=14.0)])
@pytest.mark.parametrize("seed", [0, 3])
def test_depth_poses_and_pixels_agree(path: CameraTrack, seed: int) -> None:
    """Every pixel of the last frame, moved by its depth into the first, finds its colour and depth there."""
    size = 96
    world = World(seed)
    view = placed(world, path)
    clip = world.render(view, size, size)
    rows, columns = np.mgrid[:size, :size] + 0.5
    rays = np.stack([(columns / size - K[2]) / K[0], (rows / size - K[3]) / K[1], np.ones_like(rows)], -1)
    points = rays * np.nan_to_num(clip.depth[-1], posinf=1e4)[..., None]
    move = np.linalg.inv(view.c2w[0]) @ view.c2w[-1]
    points = points @ move[:3, :3].T + move[:3, 3]
    at = (points[..., :2] / points[..., 2:] * K[:2] + K[2:]) * size
    inside = (points[..., 2] > 0.1) & (at > 1).all(-1) & (at < size - 1.01).all(-1)
    at = np.where(inside[..., None], at, size / 2)
    there = bilinear(np.nan_to_num(clip.depth[0], posinf=1e4)[..., None], at)[..., 0]
    visible = inside & (np.abs(there / points[..., 2] - 1) < 0.03)
    error = bilinear(clip.frames[0].astype(float), at) - clip.frames[-1]
    assert visible.sum() > 0.45 * inside.sum() and inside.sum() > 0.5 * size * size
    assert 10 * np.log10(255**2 / np.mean(error[visible] ** 2)) > 31


def test_same_seed_same_bits_and_other_seeds_differ() -> None:
    first, again, other = World(5), World(5), World(6)
    view = placed(first, track(yaw=20.0, forward=0.5))
    clip = first.render(view, 32, 32)
    repeat = again.render(placed(again, track(yaw=20.0, forward=0.5)), 32, 32)
    assert first.caption == again.caption
    assert np.array_equal(clip.frames, repeat.frames) and np.array_equal(clip.depth, repeat.depth)
    difference = clip.frames.astype(float) - other.render(view, 32, 32).frames
    assert np.abs(difference).mean() > 10


def test_still_camera_gives_a_still_picture() -> None:
    world = World(1)
    clip = world.render(placed(world, track(frames=5)), 48, 48)
    assert clip.frames.dtype == np.uint8 and clip.frames.shape == (5, 48, 48, 3)
    assert clip.depth.dtype == np.float32 and clip.depth.shape == (5, 48, 48)
    assert np.ptp(clip.frames.astype(int), axis=0).max() == 0


def test_frames_do_not_depend_on_their_neighbours() -> None:
    """A player renders frame by frame what a data set renders as one clip."""
    world = World(2)
    view = placed(world, track(frames=5, yaw=30.0, right=0.5))
    clip = world.render(view, 48, 48)
    for i in (0, 2, 4):
        alone = world.render(view.slice(i, i + 1), 48, 48)
        assert np.abs(alone.frames[0].astype(int) - clip.frames[i]).max() <= 1
        np.testing.assert_allclose(alone.depth[0], clip.depth[i], rtol=1e-4)


def test_translation_moves_the_world_but_not_the_sky() -> None:
    world = World(8)
    clip = world.render(placed(world, track(right=0.8)), 64, 64)
    sky = np.isinf(clip.depth).all(0)
    # A pixel next to a solid mixes both, so look only well inside the sky.
    inner = sky & np.all([np.roll(sky, s, (0, 1)) for s in ((1, 0), (-1, 0), (0, 1), (0, -1))], axis=0)
    change = np.abs(clip.frames[0].astype(int) - clip.frames[-1])
    assert inner.mean() > 0.15
    assert change[inner].max() <= 1
    assert change[~sky].mean() > 8


@pytest.mark.parametrize("seed", range(8))
def test_spawned_paths_are_free_and_show_something(seed: int) -> None:
    world = World(seed)
    path = track(frames=33, yaw=(-1) ** seed * 48.0, forward=1.0)
    view = placed(world, path)
    assert world.free(view.c2w[:, :3, 3]).all()
    clip = world.render(view, 32, 32)
    assert clip.depth.min() > 0.2 * CLEARANCE
    bare = world.render(track(frames=1).transformed(_far_away()), 32, 32).depth[0]
    solid = np.array([(depth < 12) & (depth < bare - 0.02) for depth in clip.depth])
    assert solid.mean((1, 2)).min() > 0.02 and solid.mean((1, 2)).max() < 0.8
    assert clip.frames.std((1, 2)).max(1).min() > 15  # no view of one colour


def _far_away() -> np.ndarray:
    """A place from which only ground and sky are in view."""
    pose = np.eye(4)
    pose[:3, 3] = 0, -0.6, 60
    return pose


def test_free_knows_solids_and_ground() -> None:
    world = World(4)
    inside = np.array([[s.x, -0.5 * (s.low + s.high), s.z] for s in world.solids])
    assert not world.free(inside).any()
    assert not world.free(np.array([[50.0, 0.1, 50.0]])).any()
    assert world.free(np.array([[50.0, -0.5, 50.0], [0.0, -30.0, 0.0]])).all()


def test_clearance_agrees_with_the_pictures() -> None:
    """No ray meets a solid closer than `clearance` says."""
    world = World(9)
    rng = np.random.default_rng(0)
    for _ in range(20):
        pose = np.eye(4)
        pose[:3, 3] = [*rng.uniform(-3, 3, 2), 0]
        pose[:3, 3] = pose[0, 3], -0.5, pose[1, 3]
        if not world.free(pose[:3, 3]):
            continue
        depth = world.render(track(frames=1).transformed(pose), 24, 24).depth[0]
        rows, columns = (np.mgrid[:24, :24] + 0.5) / 24
        reach = np.sqrt(1 + ((columns - 0.5) / K[0]) ** 2 + ((rows - 0.5) / K[1]) ** 2) * depth
        assert reach.min() > world.clearance(pose[:3, 3]) - 1e-4


def test_screen_rectangles_lose_no_hits() -> None:
    """Drawing a solid only inside its rectangle gives the same depth as testing every ray of the frame."""
    world = World(10)
    view = placed(world, track(frames=6, yaw=160.0))
    grid = Grid(view.c2w, view.K, 40, 40, "cpu")
    fast, slow = (torch.full((grid.size,), torch.inf) for _ in range(2))
    for solid, window in grid.windows(world.solids):
        hit(solid, window, grid, fast)
    every = np.arange(40)[None].repeat(6, 0)
    for solid in world.solids:
        origin = (view.c2w[:, :3, 3] - [solid.x, 0, solid.z]) @ solid.axes.T
        hit(solid, grid.window(np.arange(6), every, every, origin, solid.axes), grid, slow)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


def test_captions_tell_scenes_apart_and_say_nothing_of_motion() -> None:
    captions = [World(seed).caption for seed in range(40)]
    assert len(set(captions)) > 35
    words = {word for caption in captions for word in caption.split()}
    assert len(words) < 80
    for caption in captions:
        assert len(caption.split()) <= 20
        assert not MOTION_WORDS.search(caption)
