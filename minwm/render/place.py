"""The place: one walled garden by the water, laid out by hand, that a small network can know by heart.

North are houses, east a castle wall, south the water, west a hedge: nothing is endless, and every direction
looks different. About 12 x 12 world units; x is east, z is north. The same at four hours of the day.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from minwm.cameras.track import CameraTrack, rigid, so3_exp
from minwm.render.base import Scenes
from minwm.render.raycast import Ground, Light, Patch, RaycastScene
from minwm.render.scenery import BARK, CREAM, LAMP, TimeOfDay, haze_colour, paint_shadow, paint_sky
from minwm.render.solids import Colour, Pattern, Solid
from minwm.render.worlds import World, direction

EYE = 0.6
"""Height of the eye over the ground, world units."""
TILT = 22.5
"""Degrees up and down of the pictures that do not look straight ahead."""
CLEARANCE = 0.45
"""Least distance of a camera from anything: nothing ever fills the view."""
TERRACOTTA, BRICK, SLATE, OCHRE = (0.80, 0.40, 0.26), (0.72, 0.30, 0.24), (0.27, 0.31, 0.40), (0.93, 0.70, 0.30)
AZURE, LEAF, HEDGE, STONE = (0.25, 0.48, 0.80), (0.36, 0.62, 0.28), (0.22, 0.47, 0.27), (0.86, 0.82, 0.74)
LAWN, PAVING, PATH = (0.47, 0.66, 0.32), (0.72, 0.62, 0.50), (0.88, 0.79, 0.62)
WHITE, GOLD, TEAL, GLASS = (0.95, 0.94, 0.90), (0.98, 0.76, 0.20), (0.12, 0.56, 0.56), (0.22, 0.28, 0.40)


@dataclass(frozen=True)
class Mood:
    """What an hour of the day does to the place."""

    hour: TimeOfDay
    azimuth: float
    """Of the sun or the moon, degrees from north to east."""
    haze: float
    """Distance at which haze hides most, world units."""
    water: Colour


HOURS: dict[str, Mood] = {
    "bright noon": Mood(
        TimeOfDay((0.16, 0.43, 0.86), (0.72, 0.87, 0.98), (1.0, 0.98, 0.88), (0.42, 0.47, 0.58),
             (0.66, 0.61, 0.48), (0.40, 0.53, 0.72), (1.0, 1.0, 1.0), (48, 48)),
        -145, 22, (0.16, 0.46, 0.70),
    ),
    "golden evening": Mood(
        TimeOfDay((0.34, 0.38, 0.66), (1.0, 0.68, 0.36), (1.0, 0.95, 0.70), (0.40, 0.36, 0.46),
             (0.84, 0.54, 0.22), (0.55, 0.34, 0.38), (1.0, 0.80, 0.56), (20, 20)),
        -70, 22, (0.90, 0.82, 1.0),
    ),
    "blue night": Mood(
        TimeOfDay((0.03, 0.05, 0.18), (0.17, 0.24, 0.48), (0.96, 0.97, 0.92), (0.26, 0.31, 0.52),
             (0.24, 0.28, 0.36), (0.08, 0.11, 0.26), (0.20, 0.27, 0.46), (26, 26), 5.0, 0.8),
        20, 22, (0.07, 0.13, 0.30),
    ),
    "misty morning": Mood(
        TimeOfDay((0.62, 0.72, 0.86), (0.98, 0.88, 0.84), (1.0, 0.97, 0.88), (0.50, 0.50, 0.56),
             (0.52, 0.42, 0.36), (0.70, 0.70, 0.80), (1.0, 0.95, 0.93), (24, 24)),
        100, 10, (0.58, 0.68, 0.76),
    ),
}  # fmt: skip
"""By the name that captions have."""


class Place(World):
    """The place at one of its hours, which go round with the seed; a `World` in all that is done with it."""

    def __init__(self, seed: int):
        self.hour = list(HOURS)[seed % len(HOURS)]
        mood, hour = HOURS[self.hour], HOURS[self.hour].hour
        sun = direction(np.radians(mood.azimuth), np.radians(hour.elevation[0]))
        self.solids = tuple(solids(LAMP if hour.glow else GLASS, mood.water))
        light = Light(sun, hour.direct, hour.ambient, haze_colour(hour), mood.haze, hour.glow)
        slope = 1 / np.tan(np.radians(hour.elevation[0]))
        shadow = paint_shadow(self.solids, sun, slope, 4.0)
        ground = Ground("checkered", 0.8, 0.4, (STONE, PAVING), LAWN, 2.3, shadow, patches(mood.water))
        sky = paint_sky(np.random.default_rng(12), hour, "mountains", sun)
        self.scene = RaycastScene(self.solids, ground, light, sky)
        self.caption = f"a walled garden by the water with a golden obelisk and a round tower at {self.hour}"

    def free(self, points: Float[np.ndarray, "*n 3"]) -> Bool[np.ndarray, "*n"]:
        return np.asarray(self.clearance(points) >= CLEARANCE)

    @cached_property
    def viewpoints(self) -> Float[np.ndarray, "n 4 4"]:
        """c2w of pictures that show all of the place: an eighth of a unit apart, in 64 directions, those between at
        every second; then from the same positions in 16 directions tilted up, and in 16 down."""
        x, z = (
            grid.flatten() for grid in np.meshgrid(np.arange(-5, 5.1, 0.125), np.arange(-4.4, 5, 0.125), indexing="ij")
        )
        free = self.free(np.stack([x, np.full(len(x), -EYE), z], 1))
        between = np.arange(free.sum()) % 2 / 2
        level = 5.625 * (np.arange(64) + between[:, None])
        tilted = 22.5 * (np.arange(16) + between[:, None]).repeat(2, 0).reshape(-1, 32)
        return np.concatenate(
            [
                pose(x[free, None], z[free, None], yaw, pitch).reshape(-1, 4, 4)
                for yaw, pitch in ((level, 0.0), (tilted, np.repeat([TILT, -TILT], 16)))
            ]
        )

    def spawn(self, rng: np.random.Generator, track: CameraTrack, tries: int = 512) -> np.ndarray | None:
        """World pose (4x4) of the first frame of an anchored track, anywhere, that keeps the whole path free."""
        x, z, yaw = rng.uniform(-5, 5, tries), rng.uniform(-4.4, 5, tries), rng.uniform(-np.pi, np.pi, tries)
        placements = np.tile(np.eye(4), (tries, 1, 1))
        placements[:, 0, 0], placements[:, 0, 2] = np.cos(yaw), np.sin(yaw)
        placements[:, 2, 0], placements[:, 2, 2] = -np.sin(yaw), np.cos(yaw)
        placements[:, :3, 3] = np.stack([x, np.full(tries, -EYE), z], 1)
        few = np.linspace(0, len(track) - 1, 9).round().astype(int)
        for i in np.flatnonzero(self.free((placements[:, None] @ track.c2w[few])[..., :3, 3]).all(1)):
            if self.free((placements[i] @ track.c2w)[:, :3, 3]).all():
                return placements[i]
        return None


Pair = tuple[float, float]
Number = float | np.ndarray


def block(x: float, z: float, size: Pair, heights: Pair, paint: Colour, top: Pair | None = None) -> Solid:
    """A box of these half sizes, or with `top` (half sizes there) a tapering one."""
    return Solid("block", x, z, 0, *heights, size, top or size, paint, paint)


def post(x: float, z: float, radius: float, heights: Pair, paint: Colour, top: float = -1) -> Solid:
    """A cylinder, or with `top` (radius there) a cone."""
    end = radius if top < 0 else top
    return Solid("round", x, z, 0, *heights, (radius, radius), (end, end), paint, paint)


def ball(x: float, z: float, radius: float, middle: float, paint: Colour) -> Solid:
    size = radius, radius
    return Solid("ball", x, z, 0, middle - radius, middle + radius, size, size, paint, paint)


def house(x: float, z: float, size: Pair, high: float, paint: Colour, roof: Colour, window: Colour) -> list[Solid]:
    """Walls with windows under a gable roof whose ridge runs along x."""
    windows = Pattern(max(1, round(high / 1.1)), 0.46, 2, 0.4)
    eaves = size[0] + 0.12, size[1] + 0.12
    return [
        replace(block(x, z, size, (0, high), paint), accent=window, pattern=windows),
        block(x, z, eaves, (high, high + 0.8), roof, top=(0.8 * size[0], 0.0)),
    ]


def solids(window: Colour, water: Colour) -> list[Solid]:
    """All that stands in the place; windows and water have the colour of the hour."""
    return [*_north(window), *_east(window), *_south(), *_west(), *_garden(water)]


def _north(window: Colour) -> list[Solid]:
    """A row of houses and the white bell tower at its end."""
    return [
        *house(-4.7, 6.1, (1.3, 0.9), 1.5, TERRACOTTA, SLATE, window),
        *house(-2.1, 6.3, (1.3, 0.9), 2.3, OCHRE, BRICK, window),
        *house(0.5, 6.1, (1.3, 0.9), 1.6, AZURE, CREAM, window),
        *house(3.1, 6.3, (1.3, 0.9), 2.0, CREAM, TERRACOTTA, window),
        replace(block(5.3, 6.0, (0.75, 0.75), (0, 3.6), WHITE), accent=window, pattern=Pattern(3, 0.3, 1, 0.4)),
        block(5.3, 6.0, (0.85, 0.85), (3.6, 4.9), TEAL, top=(0.0, 0.0)),
    ]


def _east(window: Colour) -> list[Solid]:
    """A brick wall with battlements, and the round tower."""
    wall = [block(6.0, 0.2, (0.3, 5.4), (0, 1.35), BRICK)]
    teeth = [block(6.0, -4.6 + 1.2 * i, (0.3, 0.3), (1.35, 1.65), BRICK) for i in range(9)]
    body = replace(post(5.4, -1.2, 1.0, (0, 2.7), STONE), accent=window, pattern=Pattern(2, 0.26, 8, 0.3))
    return [*wall, *teeth, body, post(5.4, -1.2, 1.25, (2.7, 4.1), AZURE, 0.0)]


def _south() -> list[Solid]:
    """A white balustrade; beyond the water a boat, the lighthouse and a dark bank."""
    tower = replace(post(2.6, -9.4, 0.6, (0, 3.4), WHITE, 0.42), accent=BRICK, pattern=Pattern(3, 0.5))
    return [
        block(0, -4.75, (6.3, 0.12), (0, 0.34), WHITE),
        *(block(-6 + 2.4 * i, -4.75, (0.17, 0.17), (0, 0.52), WHITE) for i in range(6)),
        block(-2.3, -7.2, (0.7, 0.28), (0, 0.22), BARK, top=(0.85, 0.36)),
        block(-2.3, -7.2, (0.6, 0.03), (0.3, 1.7), WHITE, top=(0.05, 0.02)),
        tower,
        post(2.6, -9.4, 0.4, (3.4, 3.75), LAMP),
        post(2.6, -9.4, 0.52, (3.75, 4.2), BRICK, 0.0),
        block(0, -10.6, (12, 0.6), (0, 0.9), HEDGE),
        *(ball(-7.5 + 2.6 * i, -10.6, 0.9, 0.9, HEDGE) for i in range(7)),
    ]


def _west() -> list[Solid]:
    """A clipped hedge with a white gate before it and poplars behind."""
    return [
        block(-6.0, 0.2, (0.4, 5.4), (0, 1.2), HEDGE),
        *(post(-7.0, z, 0.55, (0.2, high), LEAF, 0.0) for z, high in ((-3.6, 3.0), (-1.8, 3.6), (3.4, 3.3))),
        *(block(-5.35, z, (0.16, 0.16), (0, 1.5), WHITE) for z in (0.1, 1.5)),
        block(-5.35, 0.8, (0.22, 1.0), (1.5, 1.8), WHITE),
    ]


def _garden(water: Colour) -> list[Solid]:
    """What stands inside: obelisk, pond, pavilion, tree, clipped bushes."""
    pavilion = 2.9, -2.6
    corners = [(pavilion[0] + a, pavilion[1] + b) for a in (-0.62, 0.62) for b in (-0.62, 0.62)]
    return [
        block(0.2, 0.6, (0.5, 0.5), (0, 0.3), STONE),
        block(0.2, 0.6, (0.28, 0.28), (0.3, 2.3), GOLD, top=(0.16, 0.16)),
        block(0.2, 0.6, (0.16, 0.16), (2.3, 2.6), GOLD, top=(0.0, 0.0)),
        post(-3.0, -2.3, 1.15, (0, 0.16), WHITE),
        post(-3.0, -2.3, 1.0, (0, 0.17), water),
        post(-3.0, -2.3, 0.16, (0, 0.62), WHITE),
        ball(-3.0, -2.3, 0.26, 0.72, WHITE),
        *(post(x, z, 0.1, (0, 1.15), WHITE) for x, z in corners),
        post(*pavilion, 1.05, (1.15, 1.3), WHITE),
        post(*pavilion, 0.95, (1.3, 2.0), TEAL, 0.08),
        post(3.3, 3.1, 0.17, (0, 1.0), BARK),
        ball(3.3, 3.1, 0.95, 1.65, LEAF),
        *(ball(x, z, 0.34, 0.3, LEAF) for x, z in ((-4.6, 3.9), (-3.4, 4.3), (-4.3, 2.7))),
        post(-2.2, 2.7, 0.36, (0, 1.5), TERRACOTTA, 0.0),
    ]


def patches(water: Colour) -> tuple[Patch, ...]:
    """What is painted on the ground over the lawn: two paths, flower beds, the water."""
    return (
        Patch(-3.8, 0.8, (2.0, 0.5), PATH),
        Patch(3.6, 0.6, (1.9, 0.5), PATH),
        Patch(0.4, 3.9, (0.5, 1.5), PATH),
        Patch(0.0, -3.0, (0.5, 1.6), PATH),
        Patch(-4.1, 3.6, (1.1, 1.2), TERRACOTTA),
        Patch(0, -7.4, (30, 2.5), water),
    )


def pose(x: Number, z: Number, yaw: Number, pitch: Number = 0.0) -> Float[np.ndarray, "*n 4 4"]:
    """c2w of an eye at x, z that looks `yaw` degrees from north to east and `pitch` degrees up; of arrays, of many."""
    x, z, yaw, pitch = np.broadcast_arrays(x, z, yaw, pitch)
    zero = np.zeros(x.shape)
    turned, up = so3_exp(np.radians([np.stack([zero, yaw, zero], -1), np.stack([pitch, zero, zero], -1)]))
    return rigid(turned @ up, np.stack([x, zero - EYE, z], -1))


SCENES: dict[str, Scenes] = {"worlds": World, "place": Place}
"""What can be rendered from a seed alone, by the names that configs use."""
SceneKind = Literal["worlds", "place"]
