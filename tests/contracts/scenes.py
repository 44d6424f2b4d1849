"""Scenes: those of the package, and the smallest one there can be."""

import numpy as np
import torch
from jaxtyping import Bool, Float

from minwm.cameras.track import CameraTrack
from minwm.render.base import Rendered, Scenes
from minwm.render.captured import CapturedScene
from minwm.render.gaussians import Gaussians
from minwm.render.place import Place
from minwm.render.worlds import World


class Wall:
    """A painted wall at z = 4, seen from before it: nothing but what `Scene` asks for."""

    def __init__(self, seed: int) -> None:
        self.caption, self.phase = "a painted wall", float(seed)

    def free(self, points: Float[np.ndarray, "*n 3"]) -> Bool[np.ndarray, "*n"]:
        return points[..., 2] < 3.5

    def spawn(self, rng: np.random.Generator, track: CameraTrack) -> Float[np.ndarray, "4 4"] | None:
        origin = np.eye(4)
        origin[0, 3] = rng.uniform(-1, 1)
        return origin if self.free((origin @ track.c2w)[:, :3, 3]).all() else None

    def render(self, track: CameraTrack, height: int, width: int, supersample: int = 2) -> Rendered:
        y, x = np.mgrid[:height, :width] + 0.5
        frames, depths = [], []
        for pose, (fx, fy, cx, cy) in zip(track.c2w, track.K, strict=True):
            local = np.stack([(x / width - cx) / fx, (y / height - cy) / fy, np.ones_like(x)], -1)
            rays = local @ pose[:3, :3].T
            depth = (4 - pose[2, 3]) / np.where(rays[..., 2] > 1e-3, rays[..., 2], np.nan)
            at = pose[:2, 3] + depth[..., None] * rays[..., :2]
            waves = [np.sin(f * at[..., 0] + g * at[..., 1] + self.phase) for f, g in ((5, 2), (3, -4), (-2, 7))]
            hit = np.isfinite(depth)[..., None]
            frames.append(np.where(hit, 128 + 100 * np.nan_to_num(np.stack(waves, -1)), 128).astype(np.uint8))
            depths.append(np.where(np.isfinite(depth), depth, np.inf).astype(np.float32))
        return Rendered(np.stack(frames), np.stack(depths))


def cloud(seed: int) -> CapturedScene:
    """Coloured Gaussians in front of where they were seen from."""
    draws = torch.Generator().manual_seed(seed)
    means = torch.rand(200, 3, generator=draws) * 4 + torch.tensor([-2.0, -2, 2])
    sizes, turns = torch.full((200, 3), -1.0), torch.randn(200, 4, generator=draws)
    colours = torch.randn(200, 1, 3, generator=draws)
    gaussians = Gaussians(means, sizes, turns, torch.full((200,), 3.0), colours)
    return CapturedScene(gaussians, np.eye(4)[None], means.double().numpy(), 1.0, "a cloud of spots")


SCENES: dict[str, Scenes] = {"world": World, "place": Place, "wall": Wall, "captured": cloud}
