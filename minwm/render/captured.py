"""A captured scene as Gaussians: where a camera may go, and what it sees from there that the pictures showed."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from minwm.cameras.track import CameraTrack
from minwm.render.base import Rendered
from minwm.render.gaussians import Gaussians
from minwm.render.splat_fit import in_view, view_of
from minwm.render.splats import Drawn, draw

CLEARANCE = 0.1
"""Least distance of a camera from the points that are known, world units."""
SPAWNS = 64
"""Cameras of the capture from which a path is tried."""
CELL = 8
"""Pixels: side of the cells in which drawn depths are compared with those of known points."""
NEARER = 0.5
"""A cell shows a floater if it is drawn at less than this share of the depth of its nearest point."""


@dataclass(frozen=True, eq=False)
class CapturedScene:
    """A `Scene` of Gaussians."""

    gaussians: Gaussians
    cameras: Float[np.ndarray, "n 4 4"]
    """Camera-to-world poses from which it was seen."""
    points: Float[np.ndarray, "m 3"]
    """Places on its surfaces."""
    reach: float
    """World units that a camera may be away from all of `cameras`."""
    caption: str

    def free(self, points: Float[np.ndarray, "*n 3"]) -> Bool[np.ndarray, "*n"]:
        """Whether a camera may be there: clear of the known points, and within reach of where it was seen from."""
        free = np.asarray(_nearest(points, self.cameras[:, :3, 3]) <= self.reach)
        free[free] = _nearest(points[free], self.points) >= CLEARANCE
        return free

    def spawn(self, rng: np.random.Generator, track: CameraTrack) -> Float[np.ndarray, "4 4"] | None:
        """One of the poses from which it was seen, such that the whole path is free."""
        for i in rng.permutation(len(self.cameras))[:SPAWNS]:
            if self.free((self.cameras[i] @ track.c2w)[:, :3, 3]).all():
                return self.cameras[i]
        return None

    @torch.no_grad()
    def views(self, track: CameraTrack, height: int, width: int) -> Iterator[Drawn]:
        """What each camera of a track sees."""
        for i in range(len(track)):
            yield draw(self.gaussians, view_of(track, i, (height, width), self.gaussians.means.device))

    def render(self, track: CameraTrack, height: int, width: int, supersample: int = 2) -> Rendered:
        """Frames, area-averaged, and depth at the pixel centres; inf where less than half of a pixel is covered."""
        fine = self.views(track, height * supersample, width * supersample)
        frames = [drawn.frame(supersample) for drawn in fine]
        plain = self.views(track, height, width)
        depths = [drawn.surface().cpu().numpy() for drawn in plain]
        return Rendered(np.stack(frames), np.stack(depths))

    def floaters(self, drawn: Drawn, track: CameraTrack, i: int) -> float:
        """Share of the cells with known points in which something is drawn far in front of all of them."""
        height, width = drawn.alpha.shape
        rows, columns = -(-height // CELL), -(-width // CELL)
        seen = in_view(self.points, track, i, (height, width))
        cell = (seen[:, 1] // CELL).astype(int) * columns + (seen[:, 0] // CELL).astype(int)
        nearest = np.full(rows * columns, np.inf)
        np.minimum.at(nearest, cell, seen[:, 2])
        known = np.flatnonzero(np.isfinite(nearest))
        padded = np.full((rows * CELL, columns * CELL), np.nan)
        padded[:height, :width] = drawn.surface().cpu().numpy()
        shown = np.nanmedian(
            padded.reshape(rows, CELL, columns, CELL).transpose(0, 2, 1, 3).reshape(-1, CELL**2)[known], 1
        )
        return float((shown < NEARER * nearest[known]).mean()) if len(known) else 0.0


def _nearest(points: Float[np.ndarray, "*n 3"], others: Float[np.ndarray, "m 3"]) -> Float[np.ndarray, "*n"]:
    """Distance from each point to the nearest of the others."""
    flat = torch.from_numpy(points.reshape(-1, 3))
    return torch.cdist(flat, torch.from_numpy(others)).min(1).values.numpy().reshape(points.shape[:-1])
