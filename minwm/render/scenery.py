"""Surroundings of the objects: colours, times of day, the sky panorama and the shadow map of the ground."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minwm.render.raycast import SHADOW_REACH
from minwm.render.solids import Colour, Solid

SKY_ROWS, SKY_COLUMNS = 192, 1024
SHADOW_SIZE = 400

PAINTS: dict[str, Colour] = {
    "red": (0.86, 0.22, 0.18), "orange": (0.95, 0.52, 0.14), "yellow": (0.97, 0.80, 0.22),
    "green": (0.30, 0.64, 0.30), "teal": (0.13, 0.62, 0.60), "blue": (0.20, 0.42, 0.84),
    "purple": (0.54, 0.32, 0.74), "pink": (0.95, 0.52, 0.66), "white": (0.93, 0.92, 0.88),
}  # fmt: skip
CREAM, CHARCOAL, BARK, LAMP = (0.96, 0.93, 0.84), (0.30, 0.31, 0.37), (0.45, 0.31, 0.22), (1.0, 0.86, 0.5)


@dataclass(frozen=True)
class GroundColours:
    """Two pattern colours and the colour of the field."""

    first: Colour
    second: Colour
    field: Colour
    hides: str = ""
    """The paint that would not stand out on them."""


GROUNDS: dict[str, GroundColours] = {
    "sandy": GroundColours((0.90, 0.78, 0.56), (0.74, 0.58, 0.38), (0.86, 0.75, 0.52), "yellow"),
    "stone": GroundColours((0.76, 0.76, 0.76), (0.52, 0.54, 0.58), (0.56, 0.66, 0.44)),
    "grassy": GroundColours((0.56, 0.74, 0.38), (0.38, 0.58, 0.30), (0.44, 0.62, 0.34), "green"),
    "brick": GroundColours((0.82, 0.52, 0.40), (0.62, 0.34, 0.28), (0.60, 0.62, 0.40), "red"),
    "marble": GroundColours((0.92, 0.92, 0.90), (0.46, 0.52, 0.62), (0.66, 0.70, 0.62), "white"),
    "mossy": GroundColours((0.70, 0.74, 0.60), (0.36, 0.50, 0.46), (0.40, 0.54, 0.40), "green"),
    "lilac": GroundColours((0.82, 0.76, 0.88), (0.58, 0.50, 0.70), (0.60, 0.62, 0.56), "purple"),
    "snowy": GroundColours((0.94, 0.96, 0.99), (0.70, 0.78, 0.88), (0.88, 0.91, 0.95), "white"),
}


@dataclass(frozen=True)
class TimeOfDay:
    """Sky and light of one time of day."""

    zenith: Colour
    horizon: Colour
    sun: Colour
    ambient: Colour
    direct: Colour
    ridge: Colour
    cloud: Colour
    elevation: tuple[float, float]
    """Range of the sun's elevation in degrees."""
    disc: float = 4.5
    """Radius of the sun or moon in degrees; 0 hides it."""
    glow: float = 0.0


TIMES_OF_DAY: dict[str, TimeOfDay] = {
    "blue day": TimeOfDay((0.20, 0.47, 0.88), (0.76, 0.89, 0.98), (1.0, 0.97, 0.85), (0.62, 0.65, 0.71),
                     (0.48, 0.45, 0.38), (0.40, 0.52, 0.70), (0.98, 0.99, 1.0), (24, 36)),
    "pink dusk": TimeOfDay((0.38, 0.33, 0.66), (1.0, 0.72, 0.68), (1.0, 0.90, 0.72), (0.62, 0.54, 0.66),
                      (0.48, 0.36, 0.28), (0.46, 0.34, 0.56), (1.0, 0.82, 0.78), (11, 20)),
    "orange sunset": TimeOfDay((0.34, 0.44, 0.66), (1.0, 0.74, 0.42), (1.0, 0.94, 0.68), (0.60, 0.54, 0.56),
                          (0.56, 0.40, 0.20), (0.56, 0.34, 0.34), (1.0, 0.84, 0.60), (10, 18)),
    "dark night": TimeOfDay((0.05, 0.08, 0.24), (0.24, 0.31, 0.54), (0.95, 0.96, 0.90), (0.42, 0.47, 0.68),
                       (0.26, 0.28, 0.32), (0.10, 0.13, 0.29), (0.28, 0.34, 0.55), (18, 30), 5.0, 0.45),
    "golden dawn": TimeOfDay((0.36, 0.64, 0.80), (1.0, 0.90, 0.66), (1.0, 0.97, 0.80), (0.63, 0.62, 0.62),
                        (0.48, 0.41, 0.27), (0.46, 0.58, 0.62), (1.0, 0.96, 0.86), (12, 22)),
    "grey cloudy": TimeOfDay((0.50, 0.57, 0.65), (0.82, 0.86, 0.89), (1.0, 1.0, 1.0), (0.72, 0.74, 0.77),
                        (0.28, 0.27, 0.25), (0.46, 0.53, 0.59), (0.93, 0.94, 0.95), (40, 50), 0.0),
    "green evening": TimeOfDay((0.10, 0.36, 0.44), (0.72, 0.90, 0.72), (1.0, 0.98, 0.80), (0.56, 0.64, 0.60),
                          (0.44, 0.42, 0.30), (0.16, 0.40, 0.42), (0.84, 0.96, 0.82), (12, 24)),
}  # fmt: skip


Azimuth = Float[np.ndarray, "columns"]


def _apart(azimuth: Azimuth, centre: float) -> Azimuth:
    """Absolute angle to `centre`, the short way round."""
    return np.abs((azimuth - centre + np.pi) % (2 * np.pi) - np.pi)


def _mountains(rng: np.random.Generator, azimuth: Azimuth, tall: float) -> Azimuth:
    ridge = np.full_like(azimuth, 0.25 * tall)
    for i in range(9):
        centre = 2 * np.pi * (i + rng.uniform(-0.4, 0.4)) / 9
        peak, slope = tall * rng.uniform(0.55, 1.0), rng.uniform(0.35, 0.6)
        ridge = np.maximum(ridge, peak - slope * _apart(azimuth, centre))
    return ridge


def _hills(rng: np.random.Generator, azimuth: Azimuth, tall: float) -> Azimuth:
    waves = [np.sin(k * azimuth + rng.uniform(0, 2 * np.pi)) / k for k in (3, 5, 8)]
    return 0.5 * tall * (1 + np.sum(waves, 0) / 0.66 * 0.7)


def _city(rng: np.random.Generator, azimuth: Azimuth, tall: float) -> Azimuth:
    skyline = np.full_like(azimuth, 0.12 * tall)
    for i in range(26):
        half, centre = rng.uniform(0.035, 0.09), 2 * np.pi * (i + rng.uniform(-0.4, 0.4)) / 26
        block = tall * rng.uniform(0.3, 1.0) * np.clip((half - _apart(azimuth, centre)) / 0.008 + 0.5, 0, 1)
        skyline = np.maximum(skyline, block)
    return skyline


def _forest(rng: np.random.Generator, azimuth: Azimuth, tall: float) -> Azimuth:
    crowns = np.full_like(azimuth, 0.3 * tall)
    for i in range(30):
        half, centre = rng.uniform(0.10, 0.18), 2 * np.pi * (i + rng.uniform(-0.4, 0.4)) / 30
        dome = np.sqrt(np.clip(1 - (_apart(azimuth, centre) / half) ** 2, 0, None))
        crowns = np.maximum(crowns, tall * rng.uniform(0.5, 1.0) * dome)
    return crowns


Skyline = Callable[[np.random.Generator, Azimuth, float], Azimuth]
SKYLINES: dict[str, tuple[Skyline, float]] = {
    "mountains": (_mountains, 0.30),
    "hills": (_hills, 0.19),
    "a city": (_city, 0.24),
    "a forest": (_forest, 0.17),
}
"""Skylines: the outline and its height (sine of the elevation)."""


def _clouds(rng: np.random.Generator, azimuth: Azimuth, sine: np.ndarray, count: int) -> np.ndarray:
    """Cloud cover in [0, 1], rows columns: groups of blobs, each a product of two Gaussians."""
    across, up = [], []
    for i in range(count):
        centre, level = 2 * np.pi * (i + rng.uniform(-0.3, 0.3)) / count, rng.uniform(0.26, 0.56)
        size = rng.uniform(0.10, 0.17)
        for _ in range(4):
            apart = _apart(azimuth, centre + rng.uniform(-1.6, 1.6) * size) / (size * rng.uniform(0.7, 1.3))
            across.append(np.exp(-apart * apart))
            rise = (sine - level - rng.uniform(-0.015, 0.045)) / rng.uniform(0.032, 0.055)
            up.append(np.exp(-rise * rise))
    cover = np.stack(up, 1).astype(np.float32) @ np.stack(across).astype(np.float32)
    cover = np.clip((cover - 0.25) / 0.6, 0, 1)
    return cover * cover * (3 - 2 * cover)


def haze_colour(hour: TimeOfDay) -> Colour:
    """Colour of the haze, to which far ground and the foot of the skyline fade."""
    r, g, b = 0.86 * np.array(hour.horizon) + 0.14 * np.array(hour.ridge)
    return float(r), float(g), float(b)


def _over(picture: np.ndarray, colour: np.ndarray, share: np.ndarray) -> None:
    """Blend a colour (3 1 1 or 3 rows columns) over the picture (3 rows columns), in place."""
    picture += (colour - picture) * share


def paint_sky(
    rng: np.random.Generator, hour: TimeOfDay, skyline: str, sun: Float[np.ndarray, "3"]
) -> Float[Tensor, "3 rows columns"]:
    """Panorama for `RaycastScene.sky`; `sun` is the unit vector towards the disc, world axes."""
    azimuth = ((np.arange(SKY_COLUMNS, dtype=np.float32) + 0.5) / SKY_COLUMNS * 2 - 1) * np.float32(np.pi)
    sine = (np.arange(SKY_ROWS, dtype=np.float32)[:, None] + 0.5) / SKY_ROWS
    zenith, horizon, disc, cloud, ridge, haze = (
        np.array(colour, np.float32)[:, None, None]
        for colour in (hour.zenith, hour.horizon, hour.sun, hour.cloud, hour.ridge, haze_colour(hour))
    )
    share = (1 - np.exp(-3.0 * sine)) / (1 - np.exp(np.float32(-3.0)))
    sky = np.repeat(horizon + (zenith - horizon) * share, SKY_COLUMNS, axis=2)
    if hour.disc:
        x, y, z = sun.astype(np.float32)
        towards = np.sqrt(1 - sine * sine) * (np.sin(azimuth) * x + np.cos(azimuth) * z) - sine * y
        squared = np.float32(2 * np.degrees(1) ** 2) * (1 - towards).clip(0)  # degrees^2, exact near the disc
        _over(sky, disc, 0.55 * np.exp(squared * np.float32(-1 / (3.2 * hour.disc) ** 2)))
        _over(sky, disc, np.clip((hour.disc - np.sqrt(squared)) / 0.7 + 0.5, 0, 1))
    _over(sky, cloud, 0.85 * _clouds(rng, azimuth, sine[:, 0], int(rng.integers(5, 9))))
    outline, tall = SKYLINES[skyline]
    low = int(1.1 * tall * SKY_ROWS) + 2
    for scale, fade in ((1.0, 0.34), (0.5, 0.0)):
        top = outline(rng, azimuth, tall * scale).astype(np.float32)
        foot = np.clip(1 - sine[:low] / (0.6 * top), 0, 1)
        colour = ridge + (haze - ridge) * (fade + (1 - fade) * 0.8 * foot)
        _over(sky[:, :low], colour, np.clip((top - sine[:low]) * (SKY_ROWS / 1.4) + 0.5, 0, 1))
    return torch.from_numpy(np.ascontiguousarray(sky, dtype=np.float32))


def paint_shadow(
    solids: tuple[Solid, ...], sun: Float[np.ndarray, "3"], slope: float = 0.75, longest: float = 1.1
) -> Float[Tensor, "size size"]:
    """Shadow map: cast shadows and contact shadows, both soft.

    A cast shadow is the solid's outline swept away from the sun by `slope` times its height, at most by `longest`.
    """
    step = 2 * SHADOW_REACH / SHADOW_SIZE
    grid = (np.arange(SHADOW_SIZE, dtype=np.float32) + 0.5) * step - SHADOW_REACH
    shadow = np.zeros((SHADOW_SIZE, SHADOW_SIZE), np.float32)
    away = -np.array([sun[0], sun[2]]) / max(float(np.hypot(sun[0], sun[2])), 1e-6)
    for solid in solids:
        sweep = away * min(slope * solid.high, longest)
        reach = float(np.hypot(*solid.reach)) + float(np.hypot(*sweep)) + 0.4
        x = slice(*np.searchsorted(grid, [solid.x - reach, solid.x + reach]))
        z = slice(*np.searchsorted(grid, [solid.z - reach, solid.z + reach]))
        px, pz = grid[None, x] - solid.x, grid[z, None] - solid.z
        start = max(solid.low, 0.0) / solid.high
        along = np.clip((px * sweep[0] + pz * sweep[1]) / float(sweep @ sweep), start, 1)
        distance = _outside(solid, px - along * sweep[0], pz - along * sweep[1], along)
        cast = np.clip(0.5 - distance / 0.24, 0, 1)
        contact = np.clip(1 - _outside(solid, px, pz, np.zeros_like(along)) / 0.3, 0, 1) * (solid.low <= 0)
        both = np.maximum(cast * cast * (3 - 2 * cast), 0.6 * contact * contact)
        shadow[z, x] = np.maximum(shadow[z, x], both)
    return torch.from_numpy(shadow)


def _outside(solid: Solid, px: np.ndarray, pz: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Distance from the solid's outline at relative height `along` (negative inside)."""
    size = [(1 - along) * solid.base[i] + along * solid.top[i] for i in (0, 1)]
    if solid.kind != "block":
        return np.hypot(px, pz) - size[0]
    axes = solid.axes
    x, z = axes[0, 0] * px + axes[0, 2] * pz, axes[2, 0] * px + axes[2, 2] * pz
    return np.maximum(np.abs(x) - size[0], np.abs(z) - size[1])
