"""Rays as they are in space, from cameras placed by hand."""

import torch

from minwm.cameras.track import look_at, se3_inverse
from minwm.control.plucker import Rays


def test_rays_of_a_camera_at_the_origin_have_no_moment() -> None:
    rays = Rays.from_cameras(torch.eye(4)[None, None], torch.tensor([0.5, 0.5, 0.5, 0.5])[None, None]).plucker(3, 5)
    d, moment = rays[0, 0].split(3)
    assert moment.abs().max() == 0
    torch.testing.assert_close(d[:, 1, 2], torch.tensor([0.0, 0.0, 1.0]))
    assert d[0, 1, 4] > 0 and d[1, 2, 2] > 0, "x to the right, y down"
    torch.testing.assert_close(d.norm(dim=0), torch.ones(3, 5))
    torch.testing.assert_close(d[0, 1, 4] / d[2, 1, 4], torch.tensor(0.4 / 0.5))  # (x - cx) / fx at x = 0.9


def test_the_same_line_seen_from_two_places_is_the_same_ray() -> None:
    """Two cameras that look along one line from different points of it."""
    K = torch.tensor([0.7, 0.9, 0.5, 0.5])
    eyes, target = ((1.0, -0.5, 0.0), (1.4, -0.8, 1.0)), (1.8, -1.1, 2.0)
    poses = torch.stack([torch.from_numpy(se3_inverse(look_at(eye, target))) for eye in eyes])[None]
    rays = Rays.from_cameras(poses, K.expand(1, 2, 4)).plucker(5, 5)
    middle = rays[0, :, :, 2, 2]
    torch.testing.assert_close(middle[0], middle[1])
    assert (rays[0, 0, :, 0, 0] - rays[0, 1, :, 0, 0]).abs().max() > 0.01
    d, moment = middle[0].split(3)
    torch.testing.assert_close(torch.linalg.cross(torch.tensor(eyes[0]), d), moment)


def test_patches_hold_the_rays_of_their_pixels() -> None:
    rays = Rays.from_cameras(torch.eye(4)[None, None], torch.tensor([0.5, 0.5, 0.5, 0.5])[None, None])
    patches, whole = rays.patches(2, 3, 2), rays.plucker(4, 6)
    assert patches.shape == (1, 1, 6, 24)
    torch.testing.assert_close(patches[0, 0, 4].view(6, 2, 2), whole[0, 0, :, 2:4, 2:4])
