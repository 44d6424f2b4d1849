"""Procedural worlds: a few large coloured solids on a patterned plaza under a painted sky.

One integer seed gives one world: palette, ground, 10 or so objects in four families, skyline, caption. Near objects
and the ground move under translation, the sky and the skyline only under rotation.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float

from minwm.core.camera import CameraTrack
from minwm.render import raycast
from minwm.render.raycast import Colour, Ground, Light, Pattern, Scene, Solid
from minwm.render.scenery import BARK, CHARCOAL, CREAM, GROUNDS, HOURS, LAMP, PAINTS, SKYLINES, haze_colour, paint_shadow, paint_sky

CLEARANCE = 0.25
NUMBERS = {2: "two", 3: "three", 4: "four"}

BANDS = (Pattern(1, 0.34), Pattern(2, 0.5), Pattern(3, 0.5), Pattern(1, 1.0, 2, 0.5))
WINDOWS = (Pattern(3, 0.5, 2, 0.5), Pattern(4, 0.5, 2, 0.46), Pattern(3, 0.5, 1, 0.5))


@dataclass(frozen=True)
class Thing:
    """One object: what it is called, where it stands, and the solids it is made of."""

    kind: str
    x: float
    z: float
    radius: float
    height: float
    solids: tuple[Solid, ...]


Draw = np.random.Generator
Parts = list[Solid]


def _block(low: float, high: float, base: tuple[float, float], top: tuple[float, float], paint: Colour) -> Solid:
    return Solid("block", 0, 0, 0, low, high, base, top, paint, paint)


def _round(low: float, high: float, base: float, top: float, paint: Colour) -> Solid:
    return Solid("round", 0, 0, 0, low, high, (base, base), (top, top), paint, paint)


def _ball(middle: float, radius: float, paint: Colour) -> Solid:
    return Solid("ball", 0, 0, 0, middle - radius, middle + radius, (radius,) * 2, (radius,) * 2, paint, paint)


def _choose(rng: Draw, options: tuple) -> Pattern:
    return options[int(rng.integers(len(options)))]


def _tower(rng: Draw, paint: Colour, accent: Colour) -> Parts:
    a, h = rng.uniform(0.32, 0.44), rng.uniform(1.6, 2.3)
    body = replace(_block(0, h, (a, a), (a, a), paint), accent=accent, pattern=_choose(rng, WINDOWS))
    roof = a * 1.22
    return [body, _block(h, h + rng.uniform(0.3, 0.7), (roof, roof), (0, 0), accent if accent != LAMP else CHARCOAL)]


def _box(rng: Draw, paint: Colour, accent: Colour) -> Parts:
    a, b, h = rng.uniform(0.3, 0.46), rng.uniform(0.3, 0.46), rng.uniform(0.5, 0.85)
    return [replace(_block(0, h, (a, b), (a, b), paint), accent=accent, pattern=_choose(rng, BANDS))]


def _house(rng: Draw, paint: Colour, accent: Colour) -> Parts:
    a, b, h = rng.uniform(0.42, 0.55), rng.uniform(0.36, 0.46), rng.uniform(0.55, 0.7)
    body = replace(_block(0, h, (a, b), (a, b), CREAM), accent=LAMP if accent == LAMP else CHARCOAL, pattern=Pattern(1, 0.46, 2, 0.42))
    return [body, _block(h, h + 0.5, (a * 1.18, b * 1.18), (a * 0.5, 0), paint)]


def _column(rng: Draw, paint: Colour, accent: Colour) -> Parts:
    r, h = rng.uniform(0.2, 0.27), rng.uniform(1.2, 1.9)
    shaft = replace(_round(0, h, r, r, paint), accent=accent, pattern=Pattern(int(rng.integers(2, 4)), 0.5))
    return [shaft, _ball(h + 0.8 * r, 1.15 * r, paint)]


def _turret(rng: Draw, paint: Colour, accent: Colour) -> Parts:
    r, h = rng.uniform(0.34, 0.44), rng.uniform(1.1, 1.6)
    body = replace(_round(0, h, r, r, CREAM), accent=paint, pattern=Pattern(int(rng.integers(1, 3)), 0.4))
    return [body, _round(h, h + rng.uniform(0.55, 0.8), r * 1.3, 0, paint)]


def _drum(rng: Draw, paint: Colour, accent: Colour) -> Parts:
    r, h = rng.uniform(0.38, 0.5), rng.uniform(0.45, 0.65)
    return [replace(_round(0, h, r, r, paint), accent=accent, pattern=_choose(rng, (Pattern(1, 0.4), Pattern(1, 1, 4, 0.5))))]


def _sphere(rng: Draw, paint: Colour, accent: Colour) -> Parts:
    r = rng.uniform(0.38, 0.52)
    return [replace(_ball(r, r, paint), accent=accent, pattern=_choose(rng, (Pattern(1, 0.26), Pattern(1, 1, 3, 0.5))))]


def _dome(rng: Draw, paint: Colour, accent: Colour) -> Parts:
    r = rng.uniform(0.55, 0.72)
    return [replace(_ball(0.1, r, paint), accent=accent, pattern=Pattern(1, 1, 4, 0.5))]


def _cone(rng: Draw, paint: Colour, accent: Colour) -> Parts:
    cone = _round(0, rng.uniform(1.0, 1.4), rng.uniform(0.36, 0.46), 0, paint)
    return [replace(cone, accent=accent, pattern=Pattern(2, 0.45))]


def _pyramid(rng: Draw, paint: Colour, accent: Colour) -> Parts:
    a = rng.uniform(0.55, 0.7)
    return [replace(_block(0, rng.uniform(0.85, 1.2), (a, a), (0, 0), paint), accent=accent, pattern=Pattern(2, 0.5))]


def _tree(rng: Draw, paint: Colour, accent: Colour) -> Parts:
    trunk, r = rng.uniform(0.4, 0.6), rng.uniform(0.36, 0.48)
    if accent == CREAM:  # one crown shape per family
        return [_round(0, trunk, 0.09, 0.09, BARK), _round(0.7 * trunk, trunk + 2.2 * r, r, 0, paint)]
    return [_round(0, trunk + 0.1, 0.09, 0.08, BARK), _ball(trunk + 0.75 * r, r, paint)]


def _gate(rng: Draw, paint: Colour, accent: Colour) -> Parts:
    half, h = rng.uniform(0.55, 0.7), rng.uniform(1.25, 1.5)
    posts = [replace(_block(0, h, (0.14, 0.14), (0.14, 0.14), paint), x=side * half) for side in (-1, 1)]
    return [*posts, _block(h, h + 0.26, (half + 0.3, 0.2), (half + 0.3, 0.2), accent)]


Builder = Callable[[Draw, Colour, Colour], Parts]
TALL: dict[str, Builder] = {"tower": _tower, "column": _column, "turret": _turret, "gate": _gate}
LOW: dict[str, Builder] = {"box": _box, "house": _house, "drum": _drum, "ball": _sphere, "dome": _dome,
                           "cone": _cone, "pyramid": _pyramid}  # fmt: skip
PLURAL = {"box": "boxes"}


def _stand(kind: str, parts: Parts, x: float, z: float, yaw: float) -> Thing:
    """Move parts built around the origin to their place."""
    c, s = np.cos(yaw), np.sin(yaw)
    placed = tuple(replace(p, x=x + c * p.x + s * p.z, z=z - s * p.x + c * p.z, yaw=yaw) for p in parts)
    radius = max(float(np.hypot(p.x, p.z)) + (float(np.hypot(*p.reach)) if p.kind == "block" else p.base[0]) for p in parts)
    return Thing(kind, x, z, radius, max(p.high for p in parts), placed)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


@dataclass(frozen=True)
class Family:
    """Objects of one kind and colour."""

    kind: str
    paint: str
    accent: Colour
    count: int

    def words(self) -> str:
        name = self.kind if self.count == 1 else PLURAL.get(self.kind, self.kind + "s")
        return f"{NUMBERS.get(self.count) or _article(self.paint)} {self.paint} {name}"

    def build(self, rng: Draw) -> Parts:
        return BUILDERS[self.kind](rng, PAINTS[self.paint], self.accent)


BUILDERS: dict[str, Builder] = {**TALL, **LOW, "tree": _tree}


def _families(rng: Draw, ground: str, glow: float) -> tuple[Family, ...]:
    """A tall landmark, two low families, one more of any kind; all of different colours."""
    banned = {"snowy": {"white"}, "grassy": {"green"}, "marble": {"white"}, "mossy": {"green"}, "brick": {"red"},
              "sandy": {"yellow"}, "lilac": {"purple"}}.get(ground, set())  # fmt: skip
    paints = [str(p) for p in rng.permutation([p for p in PAINTS if p not in banned])]
    tall, low = rng.permutation(list(TALL)), rng.permutation(list(LOW))
    last = "tree" if rng.random() < 0.6 else str(rng.choice([tall[1], low[2]]))
    if last == "tree" and ground not in ("grassy", "mossy"):
        paints = [p for p in paints if p != "green"][:3] + ["green"]
    kinds = (str(tall[0]), str(low[0]), str(low[1]), last)
    counts = (1, int(rng.integers(2, 5)), int(rng.integers(3, 5)), int(rng.integers(3, 5)))
    accents = [LAMP if glow else (CREAM, CHARCOAL)[int(rng.random() < 0.25)] for _ in kinds]
    accents = [CHARCOAL if paint == "white" and accent == CREAM else accent for paint, accent in zip(paints, accents)]
    return tuple(Family(*parts) for parts in zip(kinds, paints, accents, counts))


def _layout(rng: Draw, families: tuple[Family, ...]) -> tuple[Thing, ...]:
    """Objects in every direction around the centre, at least a walkable gap apart, then a ring of larger ones."""
    queue = [family for family in families for _ in range(family.count)]
    queue = [queue[i] for i in rng.permutation(len(queue))]
    things: list[Thing] = []

    def place(family: Family, angle: float, radius: float, scale: float) -> bool:
        x, z = radius * np.sin(angle), radius * np.cos(angle)
        parts = [_scaled(part, scale) for part in family.build(rng)]
        thing = _stand(family.kind, parts, x, z, rng.uniform(0, 2 * np.pi))
        free = all(np.hypot(t.x - x, t.z - z) > t.radius + thing.radius + 0.6 for t in things)
        if free:
            things.append(thing)
        return free

    for i, family in enumerate(queue):
        for _ in range(30):
            angle = 2 * np.pi * (i + rng.uniform(-0.4, 0.4)) / len(queue)
            if place(family, angle, rng.uniform(1.3, 2.4) if i % 2 else rng.uniform(2.6, 4.2), 1.0):
                break
    for i in range(7):
        family = families[int(rng.integers(len(families)))]
        place(family, 2 * np.pi * (i + rng.uniform(-0.3, 0.3)) / 7, rng.uniform(6.5, 8.5), rng.uniform(1.3, 1.7))
    return tuple(things)


def _scaled(p: Solid, s: float) -> Solid:
    base, top = (p.base[0] * s, p.base[1] * s), (p.top[0] * s, p.top[1] * s)
    return replace(p, x=p.x * s, z=p.z * s, low=p.low * s, high=p.high * s, base=base, top=top)


@dataclass(frozen=True)
class Rendered:
    frames: np.ndarray
    """n h w 3 uint8."""
    depth: np.ndarray
    """n h w float32 z-depth of the pixel centres, inf where the sky is."""


class World:
    """The world of one seed.

    >>> world = World(7)
    >>> placement = world.spawn(np.random.default_rng(0), track)
    >>> clip = world.render(track.moved(placement), 64, 64)
    """

    def __init__(self, seed: int):
        rng = np.random.default_rng([seed, 0x3D])
        hour_name, ground_name, skyline = (str(rng.choice(list(names))) for names in (HOURS, GROUNDS, SKYLINES))
        hour = HOURS[hour_name]
        families = _families(rng, ground_name, hour.glow)
        self.things = _layout(rng, families)
        self.solids = tuple(solid for thing in self.things for solid in thing.solids)
        sun = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(*hour.elevation))
        light = Light(_direction(sun[0], max(sun[1], 0.6)), hour.direct, hour.ambient, haze_colour(hour), 15.0, hour.glow)
        first, second, field = GROUNDS[ground_name]
        pattern = rng.choice(["checkered", "striped", "ringed", "dotted", "tiled"])
        ground = Ground(pattern, rng.uniform(1.3, 1.8), rng.uniform(0, np.pi), (first, second), field, 6.0,
                        paint_shadow(self.solids, light.sun))  # fmt: skip
        self.scene = Scene(self.solids, ground, light, paint_sky(rng, hour, skyline, _direction(*sun)))
        self.caption = (f"{families[0].words()} and {families[1].words()} on a {ground_name} {pattern} plaza "
                        f"under {_article(hour_name)} {hour_name} sky with {skyline}")  # fmt: skip

    def clearance(self, points: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n"]:
        """Distance in world units from points to the nearest solid or the ground (0 inside; never too large)."""
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
        return nearest.clip(0)

    def free(self, points: Float[np.ndarray, "*n 3"]) -> Bool[np.ndarray, "*n"]:
        """Whether a camera may be at these world points: at least CLEARANCE from everything."""
        return self.clearance(points) >= CLEARANCE

    def spawn(self, rng: np.random.Generator, track: CameraTrack, tries: int = 256) -> np.ndarray | None:
        """Placement (4x4 world pose of the track's first frame) with a free path and good views, None if none is free.

        `track` is anchored (first pose identity); its world version is `track.moved(placement)`.
        """
        radius, angle = 3.8 * np.sqrt(rng.random(tries)), rng.uniform(0, 2 * np.pi, tries)
        eye, yaw = rng.uniform(0.5, 0.7, tries), rng.uniform(0, 2 * np.pi, tries)
        placements = np.zeros((tries, 4, 4))
        c, s, one = np.cos(yaw), np.sin(yaw), np.ones(tries)
        placements[:, 0, 0], placements[:, 0, 2], placements[:, 2, 0], placements[:, 2, 2] = c, s, -s, c
        placements[:, 1, 1] = placements[:, 3, 3] = one
        placements[:, :3, 3] = np.stack([radius * np.sin(angle), -eye, radius * np.cos(angle)], 1)
        free = np.array([self.free(path).all() for path in (placements[:, None] @ track.c2w)[..., :3, 3]])
        if not free.any():
            return None
        checks = track.c2w[np.linspace(0, len(track) - 1, 5).round().astype(int)]
        score = np.where(free, self._interest(placements[:, None] @ checks), -np.inf)
        good = np.flatnonzero(score >= 2)
        return placements[good[0] if len(good) else int(score.argmax())]

    def _interest(self, poses: Float[np.ndarray, "k p 4 4"]) -> Float[np.ndarray, "k"]:
        """Objects in view at 0.8-5 units in the least interesting pose, less when one of them fills the view."""
        centres = np.array([[t.x, -0.4, t.z] for t in self.things])
        radius = np.array([t.radius for t in self.things])
        local = np.einsum("kpji,kpoj->kpoi", poses[..., :3, :3], centres - poses[..., None, :3, 3])
        side, depth = np.abs(local[..., 0]), local[..., 2]
        seen = (side < 0.7 * depth + 0.5 * radius) & (depth > 0.8) & (depth < 5.0)
        filling = (depth > 0) & (np.hypot(side, depth) < 1.9 * radius + 0.2) & (side < depth + radius)
        first_counts_double = seen[:, 0].sum(1) - 1
        return np.minimum(seen.sum(2).min(1), first_counts_double) - 4.0 * filling.any((1, 2))

    def render(
        self, track: CameraTrack, height: int, width: int, supersample: int = 2, device: str = "cpu"
    ) -> Rendered:
        """Frames and depth along a track given in world coordinates; any number of frames."""
        return Rendered(*raycast.render(self.scene, track.c2w, track.K, height, width, supersample, device))


def _direction(azimuth: float, elevation: float) -> Float[np.ndarray, "3"]:
    c = np.cos(elevation)
    return np.array([c * np.sin(azimuth), -np.sin(elevation), c * np.cos(azimuth)])
