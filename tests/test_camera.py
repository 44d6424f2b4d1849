"""Rigid motions against independent facts, and what a CameraTrack promises."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from poses import pose_errors

from minwm.cameras.track import (
    CameraError,
    CameraTrack,
    from_quaternion,
    intrinsics,
    latent_cameras,
    look_at,
    quaternion,
    rigid,
    se3_exp,
    se3_inverse,
    se3_log,
    slerp,
    so3_exp,
    so3_log,
)
from minwm.core.media import resize_and_crop

K = intrinsics(60.0, 64, 64)


def random_poses(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rigid(so3_exp(rng.normal(size=(count, 3))), 3 * rng.normal(size=(count, 3)))


def track(frames: int = 9, seed: int = 0, fps: float = 16.0) -> CameraTrack:
    return CameraTrack(random_poses(frames, seed), K, fps)


# Angles from rounding noise to half a turn: each has broken some implementation of the logarithm.
ANGLES = [0.0, 1e-12, 1e-7, 1e-4, 1e-2, 1.0, 3.0, np.pi - 1e-4, np.pi - 1e-9]


@pytest.mark.parametrize("angle", ANGLES)
def test_log_undoes_exp_at_every_angle(angle: float) -> None:
    rng = np.random.default_rng(1)
    axis = rng.normal(size=(200, 3))
    axis /= np.linalg.norm(axis, axis=-1, keepdims=True)
    rotation = so3_exp(angle * axis)
    identity = np.tile(np.eye(3), (200, 1, 1))
    np.testing.assert_allclose(rotation.swapaxes(1, 2) @ rotation, identity, atol=1e-14)
    np.testing.assert_allclose(so3_log(rotation), angle * axis, atol=1e-12)

    twist = np.concatenate([rng.normal(size=(200, 3)), angle * axis], -1)
    np.testing.assert_allclose(se3_log(se3_exp(twist)), twist, atol=1e-10)


def test_exp_is_the_limit_of_many_small_steps() -> None:
    twist = np.array([0.5, -0.2, 1.0, 0.3, -1.2, 0.7])
    for count in (2, 64):
        np.testing.assert_allclose(np.linalg.matrix_power(se3_exp(twist / count), count), se3_exp(twist), atol=1e-12)
    small = twist / 2**20  # one Euler step of the body-frame velocity, applied 2**20 times
    v, w = small[:3], small[3:]
    step = np.eye(4)
    step[:3] = [[1, -w[2], w[1], v[0]], [w[2], 1, -w[0], v[1]], [-w[1], w[0], 1, v[2]]]
    np.testing.assert_allclose(np.linalg.matrix_power(step, 2**20), se3_exp(twist), atol=1e-5)


def test_half_turn_has_a_logarithm_of_length_pi() -> None:
    half = np.diag([-1.0, 1.0, -1.0])
    np.testing.assert_allclose(np.abs(so3_log(half)), [0, np.pi, 0], atol=1e-12)


def test_inverse_agrees_with_linear_algebra_and_carries_gradient() -> None:
    poses = random_poses(50)
    np.testing.assert_allclose(se3_inverse(poses), np.linalg.inv(poses), atol=1e-12)
    leaf = torch.from_numpy(poses).requires_grad_()
    inverse = se3_inverse(leaf)
    torch.testing.assert_close(inverse, torch.linalg.inv(leaf))
    inverse[..., :3, 3].sum().backward()
    assert leaf.grad is not None and leaf.grad[:, :3].abs().min() > 0


def test_quaternions_are_xyzw_and_round_trip() -> None:
    quarter_right = so3_exp(np.array([0.0, np.pi / 2, 0.0]))
    np.testing.assert_allclose(quaternion(quarter_right), [0, np.sqrt(0.5), 0, np.sqrt(0.5)], atol=1e-15)
    R = np.concatenate([random_poses(100)[:, :3, :3], np.diag([-1.0, -1.0, 1.0])[None]])
    np.testing.assert_allclose(from_quaternion(-3 * quaternion(R)), R, atol=1e-13)


def test_slerp_keeps_the_ends_and_a_constant_speed() -> None:
    a, b = random_poses(2, seed=3)[:, :3, :3]
    path = slerp(np.tile(a, (11, 1, 1)), np.tile(b, (11, 1, 1)), np.linspace(0, 1, 11))
    np.testing.assert_allclose(path[[0, -1]], [a, b], atol=1e-12)
    speeds = np.linalg.norm(so3_log(path[:-1].swapaxes(1, 2) @ path[1:]), axis=-1)
    np.testing.assert_allclose(speeds, speeds[0], atol=1e-12)


def test_look_at_puts_the_target_on_the_optical_axis_and_up_on_top() -> None:
    pose = look_at((1.0, -2.0, 3.0), (4.0, 1.0, -1.0))
    seen = se3_inverse(pose) @ np.array([[4.0, 1.0, -1.0, 1.0], [1.0, -3.0, 3.0, 1.0]]).T
    assert seen[2, 0] > 0 and np.abs(seen[:2, 0]).max() < 1e-12  # straight ahead
    assert seen[1, 1] < 0 and abs(seen[0, 1]) < 1e-12  # a point above the camera (y is down)
    CameraTrack(pose[None], K, 1.0)
    for target in ((1.0, -2.0, 3.0), (1.0, -9.0, 3.0)):
        with pytest.raises(CameraError, match="direction"):
            look_at((1.0, -2.0, 3.0), target)


def test_intrinsics_put_the_field_of_view_on_the_image_border() -> None:
    fx, fy, cx, cy = intrinsics(90.0, 1920, 1080)
    x = np.tan(np.radians(45.0))
    assert fx * x + cx == pytest.approx(1.0) and fx * -x + cx == pytest.approx(0.0)
    assert fx * 1920 == pytest.approx(fy * 1080) and cy == 0.5  # square pixels
    with pytest.raises(CameraError, match="fov"):
        intrinsics(180.0, 64, 64)


def test_anchored_and_relative_do_not_see_the_world_frame() -> None:
    path, world = track(), random_poses(1, seed=7)[0]
    there = path.transformed(world)
    np.testing.assert_allclose(there.relative(), path.relative(), atol=1e-12)
    np.testing.assert_allclose(there.relative_to_first().c2w, path.relative_to_first().c2w, atol=1e-12)
    assert np.array_equal(there.relative_to_first().c2w[0], np.eye(4))
    assert there.path_length() == pytest.approx(path.path_length())
    assert max(pose_errors(path, there)["trans"]) > 0.1  # absolute poses do differ

    rebuilt = [np.eye(4)]
    for step in path.relative():
        rebuilt.append(rebuilt[-1] @ step)
    np.testing.assert_allclose(rebuilt, path.relative_to_first().c2w, atol=1e-12)


def test_latent_poses_are_those_of_frames_0_4_8() -> None:
    path = track(frames=33)
    latent = path.at_latent_rate(4)
    assert len(latent) == 9 and latent.fps == 4.0
    for i in range(9):
        assert np.array_equal(latent.c2w[i], path.c2w[4 * i])
    with pytest.raises(CameraError, match=r"34 frames.*drop the last 1 or add 3"):
        track(frames=34).at_latent_rate(4)


def test_resampling_moves_the_centre_not_the_w2c_translation() -> None:
    """A pure turn far from the origin leaves the camera where it is; interpolating w2c would not."""
    turn = so3_exp(np.array([[0.0, 0.0, 0.0], [0.0, np.radians(30.0), 0.0]]))
    turning = CameraTrack(rigid(turn, np.array([[5.0, 0.0, 5.0]] * 2)), K, 1.0)
    fine = turning.resample(10.0)
    assert len(fine) == 11 and fine.fps == 10.0
    np.testing.assert_allclose(fine.c2w[:, :3, 3], [[5.0, 0.0, 5.0]] * 11, atol=1e-12)
    angle = pose_errors(fine, CameraTrack(fine.c2w[[0] * 11], K, 10.0))["rot_deg"]
    np.testing.assert_allclose(angle, np.arange(11) * 3.0, atol=1e-9)
    assert fine.path_length() == pytest.approx(0.0, abs=1e-12)
    back = fine.resample(1.0)
    np.testing.assert_allclose(back.c2w, turning.c2w, atol=1e-12)
    assert len(track(frames=1).resample(5.0)) == 1


def test_latent_cameras_keep_the_digits_of_a_far_origin() -> None:
    near = track(frames=9, seed=4)
    far = near.transformed(rigid(np.eye(3), np.array([1e6, 0.0, -1e6])))
    w2c, k = latent_cameras([near, far], stride=4)
    assert w2c.shape == (2, 3, 4, 4) and k.shape == (2, 3, 4) and w2c.dtype == k.dtype == torch.float32
    assert torch.equal(w2c[:, 0], torch.eye(4).expand(2, 4, 4))
    torch.testing.assert_close(w2c[0], w2c[1], atol=1e-6, rtol=0)
    point = near.c2w[8] @ [0.1, 0.2, 2.0, 1.0]  # seen by frame 8 at (0.1, 0.2, 2): so is it through its view
    seen = w2c[0, 2].double().numpy() @ se3_inverse(near.c2w[0]) @ point
    np.testing.assert_allclose(seen, [0.1, 0.2, 2.0, 1.0], atol=1e-5)
    with pytest.raises(CameraError, match="one length"):
        latent_cameras([near, near.slice(0, 5)], stride=4)


@pytest.mark.parametrize("size", [(160, 480), (480, 160), (200, 200)])
def test_a_cropped_picture_and_its_cropped_k_agree(size: tuple[int, int]) -> None:
    """A white spot is found where the camera of the picture's centre sees its point."""
    (height, width), view = size, (96, 128)
    picture, path = (
        np.zeros((height, width, 3), np.uint8),
        CameraTrack(np.eye(4)[None], np.array([1, 1, 0.47, 0.55]), 16),
    )
    point = np.array([0.05, -0.06])
    x, y = ((path.K[0, :2] * point + path.K[0, 2:]) * (width, height)).round().astype(int)
    picture[y - 4 : y + 4, x - 4 : x + 4] = 255
    rows, columns = np.nonzero(resize_and_crop(picture, *view)[..., 0] > 127)
    found = np.array([columns.mean() + 0.5, rows.mean() + 0.5]) / view[::-1]
    K = path.cropped(size, view).K[0]
    np.testing.assert_allclose(K[:2] * point + K[2:], found, atol=0.01)


def test_save_and_load_lose_nothing(tmp_path: Path) -> None:
    path = CameraTrack(random_poses(5), np.linspace(0.4, 0.6, 20).reshape(5, 4), 23.976, unit="metric")
    path.save(tmp_path / "camera.json")
    again = CameraTrack.load(tmp_path / "camera.json")
    assert np.array_equal(again.c2w, path.c2w) and np.array_equal(again.K, path.K)
    assert (again.fps, again.unit) == (23.976, "metric")
    assert [file.name for file in tmp_path.iterdir()] == ["camera.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("K"), "lacks K"),
        (lambda r: r.update(convention="c2w, OpenGL"), "CameraTrack.save"),
        (lambda r: r.update(schema=2), "CameraTrack.save"),
        (lambda r: r.update(fps="fast"), "fast"),
        (lambda r: r["c2w"].pop(), "K has shape"),
        (lambda r: r["c2w"][3][0].pop(), "camera.json"),
    ],
)
def test_a_foreign_or_damaged_file_is_refused(tmp_path: Path, change, message: str) -> None:
    file = tmp_path / "camera.json"
    track().save(file)
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    with pytest.raises(CameraError, match=message):
        CameraTrack.load(file)


@pytest.mark.parametrize("content", [None, b"", b"[1, 2]", b'{"schema": 1', b"\xff\xfe\x00"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CameraError, match=r"x\.json"):
        CameraTrack.load(tmp_path / "x.json")


def damaged(frame: int, damage: np.ndarray | float, where: tuple) -> np.ndarray:
    poses = random_poses(6)
    poses[(frame, *where)] = damage
    return poses


@pytest.mark.parametrize(
    ("poses", "message"),
    [
        (damaged(3, np.nan, (0, 3)), "frame 3.*finite"),
        (damaged(2, 0.5, (3, 0)), "frame 2.*bottom row"),
        (random_poses(6).swapaxes(1, 2), "frame 0.*transposed"),
        (random_poses(6) @ np.diag([1.0, -1.0, 1.0, 1.0]), "frame 0.*OpenGL"),
        (random_poses(6) @ np.diag([2.0, 2.0, 2.0, 1.0]), "frame 0.*orthonormal"),
        (random_poses(6).astype(np.float16), "orthonormal"),
        (random_poses(6)[:, :3], "shape"),
        (np.zeros((0, 4, 4)), "at least one"),
    ],
)
def test_broken_poses_are_refused_with_frame_and_reason(poses: np.ndarray, message: str) -> None:
    with pytest.raises(CameraError, match=message):
        CameraTrack(poses, K, 16.0)


def test_broken_intrinsics_rates_and_ranges_are_refused() -> None:
    poses = random_poses(6)
    for bad in (K * 64, [0.0, 1.0, 0.5, 0.5], [-1.0, 1.0, 0.5, 0.5], [np.nan, 1.0, 0.5, 0.5]):
        with pytest.raises(CameraError, match=r"frame 0: K.*width and height"):
            CameraTrack(poses, np.array(bad), 16.0)
    with pytest.raises(CameraError, match="K has shape"):
        CameraTrack(poses, np.ones((5, 4)), 16.0)
    for fps in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(CameraError, match="fps"):
            CameraTrack(poses, K, fps)
        with pytest.raises(CameraError, match="fps"):
            track().resample(fps)
    for start, stop in ((0, 10), (-1, 3), (4, 4)):
        with pytest.raises(CameraError, match="of a track of 9"):
            track().slice(start, stop)


def test_float32_poses_are_good_enough_and_a_track_owns_its_arrays() -> None:
    poses = random_poses(6).astype(np.float32)
    path = CameraTrack(poses, K, 16.0)
    assert path.c2w.dtype == np.float64 and path.K.shape == (6, 4)
    poses[:] = 0
    assert np.linalg.det(path.c2w[:, :3, :3]) == pytest.approx(1.0)
