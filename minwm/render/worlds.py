"""Procedural worlds: a few large coloured solids on a patterned plaza under a painted sky.

A seed determines time of day, ground, about a dozen objects in four groups, skyline and caption. Objects and ground
show rotation and translation of the camera, sky and skyline only rotation.
"""

import functools
from importlib.util import find_spec

import numpy as np
from jaxtyping import Bool, Float

from minwm.cameras.track import CameraTrack
from minwm.render import raycast
from minwm.render.base import Rendered
from minwm.render.raycast import Ground, Light, RaycastScene
from minwm.render.scenery import GROUNDS, SKYLINES, TIMES_OF_DAY, haze_colour, paint_shadow, paint_sky
from minwm.render.things import article, draw_groups, lay_out

CLEARANCE = 0.25
"""Least distance of a camera from anything, world units."""
HAZE_DISTANCE = 15.0
PLAZA_RADIUS = 6.0
MAX_SPAWN_CANDIDATES = 64
"""`World.spawn` takes the best view of this many free places."""
LIGHT_ELEVATION = 0.6
"""Least elevation of the light in radians; that of a low sun would leave the ground dark."""


class World:
    """The world of one seed, a `Scene`.

    >>> world = World(7)
    >>> placement = world.spawn(np.random.default_rng(0), track)
    >>> clip = world.render(track.transformed(placement), 64, 64)
    """

    def __init__(self, seed: int):
        rng = np.random.default_rng([seed, 0x3D])
        hour_name, ground_name, skyline, pattern = (
            str(rng.choice(list(names))) for names in (TIMES_OF_DAY, GROUNDS, SKYLINES, raycast.GROUND_PATTERNS)
        )
        hour, soil = TIMES_OF_DAY[hour_name], GROUNDS[ground_name]
        families = draw_groups(rng, soil.hides, hour.glow > 0)
        self.things = lay_out(rng, families)
        self.solids = tuple(solid for thing in self.things for solid in thing.solids)
        self.family = np.array([thing.family for thing in self.things])
        azimuth, elevation = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(*hour.elevation))
        sun = direction(azimuth, max(elevation, LIGHT_ELEVATION))
        light = Light(sun, hour.direct, hour.ambient, haze_colour(hour), HAZE_DISTANCE, hour.glow)
        cell, yaw = rng.uniform(1.3, 1.8), rng.uniform(0, np.pi)
        shadow = paint_shadow(self.solids, sun)
        ground = Ground(pattern, cell, yaw, (soil.first, soil.second), soil.field, PLAZA_RADIUS, shadow)
        self.scene = RaycastScene(
            self.solids, ground, light, paint_sky(rng, hour, skyline, direction(azimuth, elevation))
        )
        self.caption = (
            f"{families[0].words()} and {families[1].words()} on a {ground_name} {pattern} plaza "
            f"under {article(hour_name)} {hour_name} sky with {skyline}"
        )

    def clearance(self, points: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n"]:
        """Distance in world units from points to the nearest solid or the ground (0 inside)."""
        nearest = -points[..., 1]
        for solid in self.solids:
            local = (points - [solid.x, 0, solid.z]) @ solid.axes.T
            a, b = solid.reach
            above = np.maximum(local[..., 1] - solid.high, solid.low - local[..., 1])
            if solid.kind == "block":
                gaps = np.stack([np.abs(local[..., 0]) - a, np.abs(local[..., 2]) - b, above])
            else:
                gaps = np.stack([np.hypot(local[..., 0], local[..., 2]) - a, above])
            nearest = np.minimum(nearest, np.linalg.norm(gaps.clip(0), axis=0))
        return np.asarray(nearest.clip(0))

    def free(self, points: Float[np.ndarray, "*n 3"]) -> Bool[np.ndarray, "*n"]:
        """Whether a camera may be at these world points: CLEARANCE or more from solids and ground."""
        return np.asarray(self.clearance(points) >= CLEARANCE)

    def spawn(self, rng: np.random.Generator, track: CameraTrack, tries: int = 256) -> np.ndarray | None:
        """World pose (4x4) of the first frame such that the whole path is free and the views are good.

        `track` is anchored (first pose identity); its world version is `track.transformed(placement)`. None when no
        free path was found in `tries` random placements.
        """
        radius, angle = 3.8 * np.sqrt(rng.random(tries)), rng.uniform(0, 2 * np.pi, tries)
        eye, yaw = rng.uniform(0.5, 0.7, tries), rng.uniform(0, 2 * np.pi, tries)
        placements = np.tile(np.eye(4), (tries, 1, 1))
        placements[:, 0, 0], placements[:, 0, 2] = np.cos(yaw), np.sin(yaw)
        placements[:, 2, 0], placements[:, 2, 2] = -np.sin(yaw), np.cos(yaw)
        placements[:, :3, 3] = np.stack([radius * np.sin(angle), -eye, radius * np.cos(angle)], 1)
        few = np.linspace(0, len(track) - 1, 5).round().astype(int)
        poses = placements[:, None] @ track.c2w[few]
        likely = np.flatnonzero(self.free(poses[..., :3, 3]).all(1))[:MAX_SPAWN_CANDIDATES]
        for i in likely[np.argsort(-self._interest(poses[likely]), kind="stable")]:
            if self.free((placements[i] @ track.c2w)[:, :3, 3]).all():
                return placements[i]
        return None

    def _interest(self, poses: Float[np.ndarray, "k p 4 4"]) -> Float[np.ndarray, " k"]:
        """Score of a path by its least interesting view: objects and groups in view, less if one object fills it."""
        centres = np.array([[t.x, -0.4, t.z] for t in self.things])
        local = np.einsum("kpji,kpoj->kpoi", poses[..., :3, :3], centres - poses[..., None, :3, 3])
        side, depth = np.abs(local[..., 0]), local[..., 2]
        seen = (side < 0.7 * depth) & (depth > 0.9) & (depth < 4.5)
        families = np.stack([(seen & (self.family == i)).any(2) for i in range(self.family.max() + 1)])
        near = seen & (depth < 2.5)
        interest = np.minimum(seen.sum(2), 5) + 1.5 * families.sum(0) + near.any(2) + families[0]
        low = [solid for solid in self.solids if solid.low < 0.8]  # not the lintels, one sees through gates
        places = np.array([[solid.x, -0.4, solid.z] for solid in low])
        local = np.einsum("kpji,kpoj->kpoi", poses[..., :3, :3], places - poses[..., None, :3, 3])
        side, depth, size = np.abs(local[..., 0]), local[..., 2], np.array([max(s.reach) for s in low])
        filling = (depth > 0) & (np.hypot(side, depth) < 2.0 * size + 0.45) & (side < depth + size)
        return interest.min(1) - 5.0 * filling.any((1, 2))

    def render(
        self, track: CameraTrack, height: int, width: int, supersample: int = 2, device: str = "cpu"
    ) -> Rendered:
        """Frames and depth along a track given in world coordinates; any number of frames.

        On a CPU with numba installed the compiled ray caster draws them.
        """
        if device == "cpu" and has_numba():
            from minwm.render import fast

            return Rendered(*fast.render(self.scene, track.c2w, track.K, height, width, supersample))
        return Rendered(*raycast.render(self.scene, track.c2w, track.K, height, width, supersample, device))


@functools.cache
def has_numba() -> bool:
    return find_spec("numba") is not None


def direction(azimuth: float, elevation: float) -> Float[np.ndarray, "3"]:
    """Unit vector, world axes; angles in radians."""
    c = np.cos(elevation)
    return np.array([c * np.sin(azimuth), -np.sin(elevation), c * np.cos(azimuth)])
