"""Objects, built from solids, and their layout around the centre of a world."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from minwm.render.scenery import BARK, CHARCOAL, CREAM, LAMP, PAINTS
from minwm.render.solids import Colour, Pattern, Solid

MIN_GAP = 0.6
"""Least distance between two objects, world units: wide enough to walk through."""
NUMBERS = {2: "two", 3: "three", 4: "four"}
STRIPES = (Pattern(1, 0.34), Pattern(2, 0.5), Pattern(3, 0.5), Pattern(1, 1.0, 2, 0.5))
WINDOWS = (Pattern(3, 0.5, 2, 0.5), Pattern(4, 0.5, 2, 0.46), Pattern(3, 0.5, 1, 0.5))

Rng = np.random.Generator
Parts = list[Solid]


@dataclass(frozen=True)
class SceneObject:
    """One object: the index of its group, its position and radius on the ground, and its solids."""

    family: int
    x: float
    z: float
    radius: float
    solids: tuple[Solid, ...]


def _block(low: float, high: float, base: tuple[float, float], top: tuple[float, float], paint: Colour) -> Solid:
    return Solid("block", 0, 0, 0, low, high, base, top, paint, paint)


def _round(low: float, high: float, base: float, top: float, paint: Colour) -> Solid:
    return Solid("round", 0, 0, 0, low, high, (base, base), (top, top), paint, paint)


def _ball(middle: float, radius: float, paint: Colour) -> Solid:
    size = radius, radius
    return Solid("ball", 0, 0, 0, middle - radius, middle + radius, size, size, paint, paint)


def _one_of(rng: Rng, *options: Pattern) -> Pattern:
    return options[int(rng.integers(len(options)))]


def _tower(rng: Rng, paint: Colour, accent: Colour) -> Parts:
    a, h = rng.uniform(0.32, 0.44), rng.uniform(1.6, 2.3)
    body = replace(_block(0, h, (a, a), (a, a), paint), accent=accent, pattern=_one_of(rng, *WINDOWS))
    roof = CHARCOAL if accent == LAMP else accent
    return [body, _block(h, h + rng.uniform(0.3, 0.7), (1.22 * a, 1.22 * a), (0, 0), roof)]


def _box(rng: Rng, paint: Colour, accent: Colour) -> Parts:
    a, b, h = rng.uniform(0.3, 0.46), rng.uniform(0.3, 0.46), rng.uniform(0.5, 0.85)
    return [replace(_block(0, h, (a, b), (a, b), paint), accent=accent, pattern=_one_of(rng, *STRIPES))]


def _house(rng: Rng, paint: Colour, accent: Colour) -> Parts:
    a, b, h = rng.uniform(0.42, 0.55), rng.uniform(0.36, 0.46), rng.uniform(0.55, 0.7)
    window = LAMP if accent == LAMP else CHARCOAL
    walls = replace(_block(0, h, (a, b), (a, b), CREAM), accent=window, pattern=Pattern(1, 0.46, 2, 0.42))
    return [walls, _block(h, h + 0.5, (1.18 * a, 1.18 * b), (0.5 * a, 0), paint)]


def _column(rng: Rng, paint: Colour, accent: Colour) -> Parts:
    r, h = rng.uniform(0.2, 0.27), rng.uniform(1.2, 1.9)
    rows = Pattern(int(rng.integers(2, 4)), 0.5)
    return [
        replace(_round(0, h, r, r, paint), accent=accent, pattern=rows),
        _ball(h + 0.8 * r, 1.15 * r, paint),
    ]


def _turret(rng: Rng, paint: Colour, accent: Colour) -> Parts:
    r, h = rng.uniform(0.34, 0.44), rng.uniform(1.1, 1.6)
    rows = Pattern(int(rng.integers(1, 3)), 0.4)
    body = replace(_round(0, h, r, r, accent), accent=paint, pattern=rows)
    return [body, _round(h, h + rng.uniform(0.55, 0.8), 1.3 * r, 0, paint)]


def _gate(rng: Rng, paint: Colour, accent: Colour) -> Parts:
    half, h = rng.uniform(0.55, 0.7), rng.uniform(1.25, 1.5)
    posts = [replace(_block(0, h, (0.14, 0.14), (0.14, 0.14), paint), x=side * half) for side in (-1, 1)]
    return [*posts, _block(h, h + 0.26, (half + 0.3, 0.2), (half + 0.3, 0.2), accent)]


def _drum(rng: Rng, paint: Colour, accent: Colour) -> Parts:
    r, h = rng.uniform(0.38, 0.5), rng.uniform(0.45, 0.65)
    stripes = _one_of(rng, Pattern(1, 0.4), Pattern(1, 1, 4, 0.5))
    return [replace(_round(0, h, r, r, paint), accent=accent, pattern=stripes)]


def _sphere(rng: Rng, paint: Colour, accent: Colour) -> Parts:
    r = rng.uniform(0.38, 0.52)
    return [replace(_ball(r, r, paint), accent=accent, pattern=_one_of(rng, STRIPES[0], Pattern(1, 1, 3, 0.5)))]


def _dome(rng: Rng, paint: Colour, accent: Colour) -> Parts:
    return [replace(_ball(0.1, rng.uniform(0.55, 0.72), paint), accent=accent, pattern=Pattern(1, 1, 4, 0.5))]


def _cone(rng: Rng, paint: Colour, accent: Colour) -> Parts:
    cone = _round(0, rng.uniform(1.0, 1.4), rng.uniform(0.36, 0.46), 0, paint)
    return [replace(cone, accent=accent, pattern=Pattern(2, 0.45))]


def _pyramid(rng: Rng, paint: Colour, accent: Colour) -> Parts:
    a = rng.uniform(0.55, 0.7)
    pyramid = _block(0, rng.uniform(0.85, 1.2), (a, a), (0, 0), paint)
    return [replace(pyramid, accent=accent, pattern=Pattern(2, 0.5))]


def _tree(rng: Rng, paint: Colour, accent: Colour) -> Parts:
    trunk, r = rng.uniform(0.4, 0.6), rng.uniform(0.36, 0.48)
    if accent == CREAM:  # one crown shape per group
        return [_round(0, trunk, 0.09, 0.09, BARK), _round(0.7 * trunk, trunk + 2.2 * r, r, 0, paint)]
    return [_round(0, trunk + 0.1, 0.09, 0.08, BARK), _ball(trunk + 0.75 * r, r, paint)]


Builder = Callable[[Rng, Colour, Colour], Parts]
TALL: dict[str, Builder] = {"tower": _tower, "column": _column, "turret": _turret, "gate": _gate}
LOW: dict[str, Builder] = {
    "box": _box, "house": _house, "drum": _drum, "ball": _sphere, "dome": _dome, "cone": _cone,
    "pyramid": _pyramid,
}  # fmt: skip
BUILDERS: dict[str, Builder] = {**TALL, **LOW, "tree": _tree}


def article(word: str) -> str:
    """The indefinite article of a word."""
    return "an" if word[0] in "aeiou" else "a"


@dataclass(frozen=True)
class ObjectGroup:
    """Objects of one kind and colour."""

    kind: str
    paint: str
    accent: Colour
    count: int

    def words(self) -> str:
        """The group in words, for captions: `three red towers`."""
        plural = "boxes" if self.kind == "box" else self.kind + "s"
        name = self.kind if self.count == 1 else plural
        return f"{NUMBERS.get(self.count, article(self.paint))} {self.paint} {name}"

    def build(self, rng: Rng) -> Parts:
        return BUILDERS[self.kind](rng, PAINTS[self.paint], self.accent)


def draw_groups(rng: Rng, hidden: str, night: bool) -> tuple[ObjectGroup, ...]:
    """A tall landmark, two groups of low objects and a fourth, in four colours other than `hidden`."""
    paints = [str(paint) for paint in rng.permutation(list(PAINTS)) if paint != hidden][:4]
    tall, low = rng.permutation(list(TALL)), rng.permutation(list(LOW))
    last = "tree" if rng.random() < 0.6 else str(rng.choice([tall[1], low[2]]))
    if last == "tree" and hidden != "green" and "green" not in paints:
        paints[3] = "green"
    kinds = str(tall[0]), str(low[0]), str(low[1]), last
    counts = 1, int(rng.integers(2, 5)), int(rng.integers(3, 5)), int(rng.integers(3, 5))
    families = []
    for kind, paint, count in zip(kinds, paints, counts, strict=True):
        dark = rng.random() < 0.15 or paint == "white"
        families.append(ObjectGroup(kind, paint, LAMP if night else CHARCOAL if dark else CREAM, count))
    return tuple(families)


def _stand(family: int, parts: Parts, scale: float, x: float, z: float, yaw: float) -> SceneObject:
    """Scale and rotate parts that were built around the origin, and move them to (x, z)."""
    c, s = scale * np.cos(yaw), scale * np.sin(yaw)
    placed, radius = [], 0.0
    for p in parts:
        base, top = (p.base[0] * scale, p.base[1] * scale), (p.top[0] * scale, p.top[1] * scale)
        dx, dz = c * p.x + s * p.z, c * p.z - s * p.x
        low, high = p.low * scale, p.high * scale
        solid = replace(p, x=x + dx, z=z + dz, yaw=yaw, low=low, high=high, base=base, top=top)
        reach = float(np.hypot(*solid.reach)) if p.kind == "block" else solid.reach[0]
        radius = max(radius, float(np.hypot(dx, dz)) + reach)
        placed.append(solid)
    return SceneObject(family, x, z, radius, tuple(placed))


def lay_out(rng: Rng, families: tuple[ObjectGroup, ...]) -> tuple[SceneObject, ...]:
    """Objects in every direction around the centre, at least GAP apart, then a ring of larger ones."""
    queue = [i for i, family in enumerate(families) for _ in range(family.count)]
    queue = [queue[i] for i in rng.permutation(len(queue))]
    things: list[SceneObject] = []

    def place(family: int, angle: float, radius: float, scale: float) -> bool:
        parts, yaw = families[family].build(rng), rng.uniform(0, 2 * np.pi)
        new = _stand(family, parts, scale, radius * np.sin(angle), radius * np.cos(angle), yaw)
        free = all(np.hypot(t.x - new.x, t.z - new.z) > t.radius + new.radius + MIN_GAP for t in things)
        if free:
            things.append(new)
        return free

    for i, family in enumerate(queue):
        for _ in range(30):
            angle = 2 * np.pi * (i + rng.uniform(-0.4, 0.4)) / len(queue)
            radius = rng.uniform(1.3, 2.4) if i % 2 else rng.uniform(2.6, 4.2)
            if place(family, angle, radius, 1.0):
                break
    for i in range(7):
        angle = 2 * np.pi * (i + rng.uniform(-0.3, 0.3)) / 7
        place(int(rng.integers(len(families))), angle, rng.uniform(6.5, 8.5), rng.uniform(1.3, 1.7))
    return tuple(things)
