"""What numba compiles for `fast`: rays of one frame, one by one, by the maths of `raycast` and `solids`.

Vectors are tuples: they live in registers. Tables hold a solid a row (`fast.table`).
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit

from minwm.render.raycast import SHADOW_REACH
from minwm.render.solids import FAR, NEAR

Array = np.ndarray
Vector = tuple[float, float, float]
View = tuple[Vector, Vector, Vector, Vector]
"""Eye and the camera's axes (right, down, ahead), in the coordinates of a solid."""
Span = tuple[int, int, int, int]
"""First row, end of rows, first column, end of columns."""
Rays = tuple[Array, Array]
"""Slopes of the columns and of the rows of an image."""

BLOCK, BALL = 0.0, 2.0
KIND, PLACE, SIZE, NORMALS, OFFSETS, PAINT, PATTERN = 0, 1, 5, 12, 30, 36, 42
"""Columns of a table of solids: one array, since compiled functions pay for every array that they are given."""


class Around(NamedTuple):
    """Light, ground and sky."""

    light: Array
    """14: sun, colour, ambient, haze, haze distance, glow."""
    pattern: int
    ground: Array
    """13: cosine and sine of the yaw over the cell, cell, radius, colours (2 x 3), field."""
    patches: Array
    """k 7: x, z, half sizes, colour."""
    shadow: Array
    sky: Array
    """rows 3*columns, averaged to texels no finer than pixels."""


def compiled(function: Callable) -> Callable:
    """Compiled when first called, and kept on disk; without what checks arguments in tests."""
    return njit(cache=True, error_model="numpy", forceinline=True)(inspect.unwrap(function))


@compiled
def pulse(x: float, width: float, fill: float) -> float:
    high, low = x + 0.5 * width, x - 0.5 * width
    a, b = np.floor(high), np.floor(low)
    return (a * fill + min(high - a, fill) - b * fill - min(low - b, fill)) / width


@compiled
def clip01(x: float) -> float:
    return min(max(x, 0.0), 1.0)


@compiled
def dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@compiled
def along(origin: Vector, t: float, d: Vector) -> Vector:
    return origin[0] + t * d[0], origin[1] + t * d[1], origin[2] + t * d[2]


@compiled
def blend(a: Vector, b: Vector, share: float) -> Vector:
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share


@compiled
def triple(x: Array, start: int) -> Vector:
    return x[start], x[start + 1], x[start + 2]


@compiled
def entry(x: Array, i: int, start: int) -> Vector:
    """The same of row i: a view of the row would cost more than all that is done with it."""
    return x[i, start], x[i, start + 1], x[i, start + 2]


@compiled
def local(table: Array, i: int, v: Vector) -> Vector:
    """The vector v, world axes, in the axes of solid i."""
    c, s = table[i, PLACE + 2], table[i, PLACE + 3]
    return c * v[0] - s * v[2], -v[1], s * v[0] + c * v[2]


@compiled
def axis(c2w: Array, k: int) -> Vector:
    return c2w[0, k], c2w[1, k], c2w[2, k]


@compiled
def camera(table: Array, i: int, c2w: Array) -> View:
    """Eye, and the camera's axes, in the coordinates of a solid."""
    x, y, z = axis(c2w, 3)
    axes = local(table, i, axis(c2w, 0)), local(table, i, axis(c2w, 1)), local(table, i, axis(c2w, 2))
    return local(table, i, (x - table[i, PLACE], y, z - table[i, PLACE + 1])), axes[0], axes[1], axes[2]


@compiled
def enter_block(table: Array, i: int, view: View, span: Span, u: Array, v: Array, ts: Array) -> None:
    """Writes t at which the rays of a window enter, or inf. 1/t of a face is linear in u and v."""
    eye, right, down, ahead = view
    top, bottom, left, right_end = span
    slopes, outside = np.empty((6, 3)), np.empty(6, np.bool_)
    for face in range(6):
        n = entry(table, i, NORMALS + 3 * face)
        gap = table[i, OFFSETS + face] - dot(n, eye)
        outside[face] = gap < 0
        gap = 1e-6 if abs(gap) < 1e-6 else gap
        slopes[face] = dot(n, right) / gap, dot(n, down) / gap, dot(n, ahead) / gap
    enter, leave = np.empty(right_end - left), np.empty(right_end - left)
    for row in range(top, bottom):
        enter[:], leave[:] = math.inf, 0.0
        for face in range(6):
            slope, start = slopes[face, 0], slopes[face, 1] * v[row] + slopes[face, 2]
            if outside[face]:
                for k in range(len(enter)):
                    enter[k] = min(enter[k], slope * u[left + k] + start)
            else:
                for k in range(len(enter)):
                    leave[k] = max(leave[k], slope * u[left + k] + start)
        for k in range(len(enter)):
            ts[row, left + k] = 1 / enter[k] if leave[k] < enter[k] < math.inf else math.inf


@compiled
def enter_round(table: Array, i: int, view: View, span: Span, u: Array, v: Array, ts: Array) -> None:
    """The same for solids of revolution; a dome ends at the ground."""
    eye, right, down, ahead = view
    ball, low, high, base = table[i, KIND] == BALL, table[i, SIZE], table[i, SIZE + 1], table[i, SIZE + 2]
    slope = 0.0 if ball else table[i, SIZE + 5]
    radius, height = base + slope * (eye[1] - low), eye[1] - 0.5 * (low + high)
    lean, bend = (height, 1.0) if ball else (-slope * radius, -slope * slope)
    c = eye[0] * eye[0] + eye[2] * eye[2] - radius * radius + (height * height if ball else 0.0)
    for row in range(span[0], span[1]):
        start = along(ahead, v[row], down)
        for column in range(span[2], span[3]):
            d = along(start, u[column], right)
            a = max(d[0] * d[0] + d[2] * d[2] + bend * d[1] * d[1], 1e-6)
            b = eye[0] * d[0] + eye[2] * d[2] + lean * d[1]
            square = b * b - a * c
            found = math.inf
            if square > 0:
                root = math.sqrt(square)
                t = (-b - root) / a
                if ball:
                    found = t if t > NEAR and eye[1] + t * d[1] >= 0 else math.inf
                else:
                    floor, lid = (low - eye[1]) / d[1], (high - eye[1]) / d[1]
                    t = max(t, min(floor, lid))
                    found = t if t > NEAR and t < min((root - b) / a, max(floor, lid)) else math.inf
            ts[row, column] = found


@compiled
def trace(
    table: Array,
    spans: Array,
    order: Array,
    c2w: Array,
    u: Array,
    v: Array,
    depth: Array,
    found: Array,
) -> None:
    """Nearest t and solid of every ray of one frame; spans: s 4 of this frame."""
    ts = np.empty_like(depth)
    for i in order:
        span = spans[i, 0], spans[i, 1], spans[i, 2], spans[i, 3]
        if span[1] <= span[0] or span[3] <= span[2]:
            continue
        view = camera(table, i, c2w)
        if table[i, KIND] == BLOCK:
            enter_block(table, i, view, span, u, v, ts)
        else:
            enter_round(table, i, view, span, u, v, ts)
        for row in range(span[0], span[1]):
            for column in range(span[2], span[3]):
                if ts[row, column] < depth[row, column]:
                    depth[row, column] = ts[row, column]
                    found[row, column] = i


@compiled
def surface(table: Array, i: int, p: Vector) -> tuple[Vector, float, float]:
    """Unit normal, where across the surface, and the length of all of it."""
    if table[i, KIND] == BLOCK:
        face, most = 0, -math.inf
        for k in range(6):
            out = dot(entry(table, i, NORMALS + 3 * k), p) - table[i, OFFSETS + k]
            if out > most:
                face, most = k, out
        n = entry(table, i, NORMALS + 3 * face)
        half = table[i, SIZE + 3] if face < 2 else table[i, SIZE + 2]
        # eaves seen from below must not go black
        return (n[0], n[1] if face < 5 else 0.0, n[2]), (p[2] if face < 2 else p[0]) / (2 * half) + 0.5, 2 * half
    radius = max(math.sqrt(p[0] * p[0] + p[2] * p[2]), 1e-4)
    if table[i, KIND] == BALL:
        normal = (
            p[0] / table[i, SIZE + 2],
            (p[1] - 0.5 * (table[i, SIZE] + table[i, SIZE + 1])) / table[i, SIZE + 2],
            p[2] / table[i, SIZE + 2],
        )
    elif p[1] > table[i, SIZE + 1] - 1e-3 and table[i, SIZE + 4] > 0:
        normal = 0.0, 1.0, 0.0
    else:
        long = math.sqrt(1 + table[i, SIZE + 5] * table[i, SIZE + 5])
        normal = p[0] / radius / long, -table[i, SIZE + 5] / long, p[2] / radius / long
    return normal, math.atan2(p[0], p[2]) / (2 * math.pi) + 0.5, 2 * math.pi * radius


@compiled
def accent(
    table: Array,
    i: int,
    t: float,
    height: float,
    facing: float,
    normal: Vector,
    side: float,
    long: float,
    cell: float,
) -> float:
    """Share of the accent colour."""
    if table[i, PATTERN] == 0 or abs(normal[1]) > 0.98:
        return 0.0
    share, wide = 1.0, 1.2 * cell * t
    rows, row_fill, cols = entry(table, i, PATTERN + 1)
    col_fill = table[i, PATTERN + 4]
    if row_fill < 1:
        low, high = table[i, SIZE], table[i, SIZE + 1]
        share *= pulse(
            (height - low) / (high - low) * rows - 0.5 * (1 - row_fill), wide * rows / (high - low), row_fill
        )
    if col_fill < 1:
        share *= pulse(side * cols - 0.5 * (1 - col_fill), wide / (max(facing, 0.15) * long) * cols, col_fill)
    return share


@compiled
def haze(light: Array, colour: Vector, t: float, d: Vector) -> Vector:
    return blend(colour, triple(light, 9), 1 - math.exp(-t * t * dot(d, d) / (light[12] * light[12])))


@compiled
def solid_colour(table: Array, i: int, light: Array, view: View, u: float, v: float, t: float, cell: float) -> Vector:
    eye, right, down, ahead = view
    d = along(along(ahead, v, down), u, right)
    p = along(eye, t, d)
    sun = local(table, i, triple(light, 0))
    normal, side, long = surface(table, i, p)
    direct = max(0.8 * dot(normal, sun) + 0.2, 0.0)
    bounce = (0.78 + 0.2 * normal[1]) * (0.76 + 0.24 * clip01(p[1] / 0.5))
    share = accent(table, i, t, p[1], abs(dot(normal, d)), normal, side, long, cell)
    r, g, b = blend(entry(table, i, PAINT), entry(table, i, PAINT + 3), share)
    glow = light[13] * share
    colour = (
        r * (light[6] * bounce + light[3] * direct + glow),
        g * (light[7] * bounce + light[4] * direct + glow),
        b * (light[8] * bounce + light[5] * direct + glow),
    )
    return haze(light, colour, t, d)


@compiled
def ground_share(pattern: int, x: float, z: float, wx: float, wz: float) -> float:
    """Share of the second ground colour, as `raycast._ground_pattern`; patterns by their place in its list."""
    if pattern == 1:
        return pulse(x, wx, 0.5)
    if pattern == 0:
        return 0.5 - 0.5 * (2 * pulse(x, wx, 0.5) - 1) * (2 * pulse(z, wz, 0.5) - 1)
    if pattern == 4:
        return pulse(x, wx, 0.78) * pulse(z, wz, 0.78)
    if pattern == 2:
        radius = max(math.sqrt(x * x + z * z), 1e-3)
        return pulse(radius + 0.25, (wx * abs(x) + wz * abs(z)) / radius, 0.5)
    width = 0.5 * (wx + wz)
    dx, dz = x - round(x), z - round(z)
    blurred = clip01(width - 0.5)
    return clip01((0.34 - math.sqrt(dx * dx + dz * dz)) / width + 0.5) * (1 - blurred) + 0.36 * blurred


@compiled
def shadow_at(shadow: Array, x: float, z: float) -> float:
    """Bilinear, zero outside."""
    size = len(shadow)
    column, row = ((x / SHADOW_REACH + 1) * size - 1) / 2, ((z / SHADOW_REACH + 1) * size - 1) / 2
    left, top = np.floor(column), np.floor(row)
    total = 0.0
    for r in (top, top + 1):
        for c in (left, left + 1):
            if 0 <= r < size and 0 <= c < size:
                total += shadow[int(r), int(c)] * (1 - abs(row - r)) * (1 - abs(column - c))
    return total


@compiled
def ground_colour(around: Around, eye: Vector, way: Vector, t: float, cell: float) -> Vector:
    ground, light = around.ground, around.light
    c, s, size, radius = ground[0], ground[1], ground[2], ground[3]
    x, z = eye[0] + t * way[0], eye[2] + t * way[2]
    wide = cell * t
    flat = wide / way[1]
    gx, gz, gdx, gdz = c * x - s * z, s * x + c * z, c * way[0] - s * way[2], s * way[0] + c * way[2]
    wx, wz = flat * abs(gdx) + wide / size, flat * abs(gdz) + wide / size
    share = ground_share(around.pattern, gx, gz, wx, wz)
    blur = wide + 0.5 * flat
    edge = clip01((radius - math.sqrt(x * x + z * z)) / blur + 0.5)
    colour = blend(triple(ground, 10), blend(triple(ground, 4), triple(ground, 7), share), edge)
    patches = around.patches
    for i in range(len(patches)):
        inside = min(patches[i, 2] - abs(x - patches[i, 0]), patches[i, 3] - abs(z - patches[i, 1]))
        colour = blend(colour, entry(patches, i, 4), clip01(inside / blur + 0.5))
    shadow = shadow_at(around.shadow, x, z) * clip01(1.2 - blur)
    sun = max(-light[1], 0.0) * 0.8 + 0.2
    ambient, direct = triple(light, 6), triple(light, 3)
    lit = along((ambient[0] * 0.98, ambient[1] * 0.98, ambient[2] * 0.98), sun, direct)
    shade = blend(lit, (ambient[0] * 0.74, ambient[1] * 0.74, ambient[2] * 0.74), shadow)
    return haze(light, (colour[0] * shade[0], colour[1] * shade[1], colour[2] * shade[2]), t, way)


@compiled
def sky_colour(sky: Array, way: Vector) -> Vector:
    rows, columns = sky.shape[0], sky.shape[1] // 3
    column = (math.atan2(way[0], way[2]) / math.pi + 1) * columns / 2 - 0.5
    row = min(max(-way[1] / math.sqrt(dot(way, way)) * rows - 0.5, 0.0), rows - 1.0)
    left, top = int(np.floor(column)), int(row)
    a, b, below, right = column - left, row - top, min(top + 1, rows - 1), (left + 1) % columns
    left, right = 3 * (left % columns), 3 * right
    upper = blend(entry(sky, top, left), entry(sky, top, right), a)
    return blend(upper, blend(entry(sky, below, left), entry(sky, below, right), a), b)


@compiled
def picture(
    table: Array,
    around: Around,
    c2w: Array,
    rays: Rays,
    fine_rays: Rays,
    cell: float,
    fine_cell: float,
    depth: Array,
    fine_depth: Array,
    fine_found: Array,
    image: Array,
) -> None:
    """One frame of colours, h w 3, and its z-depth: `depth` holds that of the solids and gets that of the ground."""
    (u, v), (fine_u, fine_v) = rays, fine_rays
    times = len(fine_v) // len(v)
    views = [camera(table, i, c2w) for i in range(len(table))]
    eye, right, down, ahead = axis(c2w, 3), axis(c2w, 0), axis(c2w, 1), axis(c2w, 2)
    for row in range(len(v)):
        start = along(ahead, v[row], down)
        for column in range(len(u)):
            red, green, blue, hits = 0.0, 0.0, 0.0, 0
            for r in range(times * row, times * (row + 1)):
                for k in range(times * column, times * (column + 1)):
                    i = fine_found[r, k]
                    if i >= 0:
                        x, y, z = solid_colour(
                            table, i, around.light, views[i], fine_u[k], fine_v[r], fine_depth[r, k], fine_cell
                        )
                        red, green, blue, hits = red + x, green + y, blue + z, hits + 1
            way = along(start, u[column], right)
            t = -eye[1] / way[1]
            below = way[1] > 0 and t < FAR
            if below:
                depth[row, column] = min(depth[row, column], t)
            if hits < times * times:
                x, y, z = ground_colour(around, eye, way, t, cell) if below else sky_colour(around.sky, way)
                left = times * times - hits
                red, green, blue = red + left * x, green + left * y, blue + left * z
            image[row, column, 0], image[row, column, 1], image[row, column, 2] = red, green, blue
