"""Analytic ray casting of a few large solids, a patterned ground and a painted sky, in plain torch.

Every solid is drawn only inside its screen rectangle, for all frames of a chunk at once. World axes are OpenCV
axes (x right, y down, z forward), the ground is y = 0; inside this file "height" is -y. A ray is `origin + t d`
where d has camera z = 1, so t is the z-depth.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Colour = tuple[float, float, float]
RAYS_PER_CHUNK = 1 << 18
NEAR, FAR = 0.02, 80.0
SHADOW_REACH = 10.0
"""The baked shadow map covers the square |x|, |z| < 10."""


@dataclass(frozen=True)
class Pattern:
    """Accent-coloured cells: `rows` by `cols` of them, each filling a share of its cell (1 = all of it)."""

    rows: int = 1
    row_fill: float = 1.0
    cols: int = 1
    col_fill: float = 1.0


@dataclass(frozen=True)
class Solid:
    """A convex solid of revolution or four-sided frustum, between heights `low` and `high`."""

    kind: Literal["block", "round", "ball"]
    x: float
    z: float
    yaw: float
    low: float
    high: float
    base: tuple[float, float]
    """Half sizes at `low`; round and ball use the first."""
    top: tuple[float, float]
    """Half sizes at `high`; zero makes a cone or a pyramid."""
    colour: Colour
    accent: Colour
    pattern: Pattern | None = None

    def axes(self) -> Float[np.ndarray, "3 3"]:
        """Rows: the local x, height and z axes in world coordinates."""
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[c, 0, -s], [0, -1, 0], [s, 0, c]])

    def reach(self) -> tuple[float, float]:
        return max(self.base[0], self.top[0]), max(self.base[1], self.top[1])


@dataclass(frozen=True)
class Ground:
    pattern: Literal["checkered", "striped", "ringed", "dotted", "tiled"]
    cell: float
    yaw: float
    colours: tuple[Colour, Colour]
    field: Colour
    """Colour outside the plaza."""
    radius: float
    shadow: Float[Tensor, "size size"]
    """0 lit, 1 fully shaded; rows are z, columns x."""


@dataclass(frozen=True)
class Light:
    sun: Float[np.ndarray, "3"]
    """Unit vector towards the sun, world axes."""
    colour: Colour
    ambient: Colour
    haze: Colour
    haze_distance: float
    glow: float
    """How much accents (windows, bands) shine by themselves."""


@dataclass(frozen=True)
class Scene:
    solids: tuple[Solid, ...]
    ground: Ground
    light: Light
    sky: Float[Tensor, "3 rows columns"]
    """Rows: sine of the elevation from 0 to 1. Columns: azimuth atan2(x, z) from -pi to pi."""


def pulse(x: Tensor, width: Tensor, fill: float) -> Tensor:
    """Share of the interval of `width` around x that lies in [k, k + fill] for whole k (box-filtered pulse)."""

    def area(y: Tensor) -> Tensor:
        whole = y.floor()
        return whole * fill + (y - whole).clamp_max(fill)

    half = 0.5 * width
    return (area(x + half) - area(x - half)) / width


def mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    return a + (b - a) * share[:, None]


@dataclass(frozen=True)
class Hits:
    """Rays that met one surface. Vectors are in the axes that the surface uses."""

    flat: Int[Tensor, "k"]
    t: Float[Tensor, "k"]
    point: Float[Tensor, "k 3"]
    d: Float[Tensor, "k 3"]


class Frames:
    """Buffers and rays of some frames.

    c2w: n 4 4, K: n 4 normalised; `pixel` is the angular size of an output pixel, used to filter patterns.
    """

    def __init__(self, c2w: np.ndarray, K: np.ndarray, height: int, width: int, pixel: float, device: str):
        self.n, self.height, self.width, self.pixel = len(c2w), height, width, pixel
        self.c2w, self.device = c2w, device
        self.u = ((np.arange(width) + 0.5) / width - K[:, 2:3]) / K[:, 0:1]
        self.v = ((np.arange(height) + 0.5) / height - K[:, 3:4]) / K[:, 1:2]
        size = self.n * height * width
        self.depth = torch.full((size,), float("inf"), device=device)
        self.colour = torch.zeros(size, 3, device=device)

    def tensor(self, x: object) -> Tensor:
        return torch.as_tensor(np.asarray(x, np.float32), device=self.device)

    def window(self, solid: Solid) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Frames that may see the solid, and equal-sized rectangles around it: rows m h, columns m w."""
        a, b = solid.reach()
        corners = np.array([[x, h, z] for x in (-a, a) for h in (solid.low, solid.high) for z in (-b, b)])
        world = corners @ solid.axes() + [solid.x, 0, solid.z]
        local = np.einsum("nki,npk->npi", self.c2w[:, :3, :3], world - self.c2w[:, None, :3, 3])
        behind = local[..., 2] < NEAR
        depth = np.maximum(local[..., 2], NEAR)
        spans = []
        for axis, grid in ((0, self.u), (1, self.v)):
            slope = local[..., axis] / depth
            low, high = slope.min(1, keepdims=True), slope.max(1, keepdims=True)
            cut = behind.any(1, keepdims=True)
            first = np.where(cut, 0, (grid < low).sum(1, keepdims=True) - 1)
            last = np.where(cut, grid.shape[1], (grid <= high).sum(1, keepdims=True) + 1)
            spans.append((first[:, 0].clip(0), last[:, 0].clip(0, grid.shape[1])))
        (left, right), (top, bottom) = spans
        seen = np.flatnonzero(~behind.all(1) & (right > left + 1) & (bottom > top + 1))
        if not len(seen):
            return None
        tall, wide = (bottom - top)[seen].max(), (right - left)[seen].max()
        rows = np.minimum(top[seen], self.height - tall)[:, None] + np.arange(tall)
        columns = np.minimum(left[seen], self.width - wide)[:, None] + np.arange(wide)
        return seen, rows, columns

    def rays(self, frames: np.ndarray, rows: np.ndarray, columns: np.ndarray, axes: np.ndarray) -> tuple[Tensor, Tensor]:
        """Ray directions split into a part per column (m 3 w) and a part per row (m 3 h), in the given axes."""
        turn = axes @ self.c2w[frames, :3, :3]
        across = turn[:, :, 0:1] * np.take_along_axis(self.u[frames], columns, 1)[:, None] + turn[:, :, 2:3]
        down = turn[:, :, 1:2] * np.take_along_axis(self.v[frames], rows, 1)[:, None]
        return self.tensor(across), self.tensor(down)

    def flat(self, frames: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[Tensor, Tensor]:
        """Buffer index = part per row (m h) + part per column (m w)."""
        down = (frames[:, None] * self.height + rows) * self.width
        return torch.as_tensor(down, device=self.device), torch.as_tensor(columns, device=self.device)


def _block_planes(solid: Solid) -> tuple[np.ndarray, np.ndarray]:
    """Outward normals (6 3) and offsets (6): inside means normal . (x, height, z) <= offset."""
    tall = solid.high - solid.low
    sides = []
    for axis in (0, 2):
        half = axis // 2
        slope = (solid.top[half] - solid.base[half]) / tall
        for sign in (-1.0, 1.0):
            normal = np.array([0.0, -slope, 0.0])
            normal[axis] = sign
            sides.append((normal, solid.base[half] - slope * solid.low))
    sides += [(np.array([0.0, 1, 0]), solid.high), (np.array([0.0, -1, 0]), -solid.low)]
    size = [np.linalg.norm(normal) for normal, _ in sides]
    return np.stack([n / s for (n, _), s in zip(sides, size)]), np.array([c / s for (_, c), s in zip(sides, size)])


def _split(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return part[:, 0], part[:, 1], part[:, 2]


def _enter_block(solid: Solid, view: Frames, origin: np.ndarray, across: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    normals, offsets = _block_planes(solid)
    g = view.tensor(normals)
    speed = torch.einsum("fk,mkw->fmw", g, across)[:, :, None, :] + torch.einsum("fk,mkh->fmh", g, down)[..., None]
    t = view.tensor(offsets[:, None] - normals @ origin.T)[:, :, None, None] / speed
    enter = torch.where(speed < 0, t, -FAR).amax(0)
    leave = torch.where(speed > 0, t, FAR).amin(0)
    return enter, leave


def _enter_round(solid: Solid, view: Frames, origin: np.ndarray, across: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    dx, dh, dz = ((a[:, None, :] + b[:, :, None]) for a, b in zip(_split(across), _split(down)))
    ball = solid.kind == "ball"
    slope = 0.0 if ball else (solid.top[0] - solid.base[0]) / (solid.high - solid.low)
    middle = 0.5 * (solid.low + solid.high)
    o = origin - [0, middle, 0] if ball else origin
    radius = np.full(len(o), solid.base[0]) if ball else solid.base[0] + slope * (o[:, 1] - solid.low)
    squash = 1.0 if ball else -slope * slope
    a = (dx * dx + dz * dz + squash * dh * dh).clamp_min(1e-6)
    ox, oh, oz = (view.tensor(o[:, i])[:, None, None] for i in range(3))
    lean = oh if ball else view.tensor(-slope * radius)[:, None, None]
    b = ox * dx + oz * dz + lean * dh
    rest = o[:, 0] ** 2 + o[:, 2] ** 2 + (o[:, 1] ** 2 if ball else 0) - radius**2
    root = (b * b - a * view.tensor(rest)[:, None, None]).sqrt()  # NaN where the ray misses: compares false
    enter, leave = (-b - root) / a, (root - b) / a
    bounds = (0.0, 1e3) if ball else (solid.low, solid.high)
    h = view.tensor(origin[:, 1])[:, None, None]
    first, second = (bounds[0] - h) / dh, (bounds[1] - h) / dh
    if ball:  # a dome is cut by the ground from outside only
        return torch.where(h + enter * dh >= 0, enter, FAR), leave
    return torch.maximum(enter, torch.minimum(first, second)), torch.minimum(leave, torch.maximum(first, second))


def _hits(view: Frames, solid: Solid) -> Hits | None:
    """Visible hits of one solid so far; updates the depth buffer."""
    window = view.window(solid)
    if window is None:
        return None
    frames, rows, columns = window
    axes = solid.axes()
    across, down = view.rays(frames, rows, columns, axes)
    origin = (view.c2w[frames, :3, 3] - [solid.x, 0, solid.z]) @ axes.T
    meet = _enter_block if solid.kind == "block" else _enter_round
    enter, leave = meet(solid, view, origin, across, down)
    m, r, c = ((enter < leave) & (enter > NEAR)).nonzero(as_tuple=True)
    row_flat, column_flat = view.flat(frames, rows, columns)
    flat, t = row_flat[m, r] + column_flat[m, c], enter[m, r, c]
    front = (t < view.depth[flat]).nonzero()[:, 0]
    flat, t, m, r, c = flat[front], t[front], m[front], r[front], c[front]
    view.depth[flat] = t
    d = across.transpose(1, 2)[m, c] + down.transpose(1, 2)[m, r]
    return Hits(flat, t, view.tensor(origin)[m] + t[:, None] * d, d)


def _normals(solid: Solid, view: Frames, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit normal k 3, position across the surface in [0, 1], and its size in units per [0, 1]."""
    if solid.kind == "block":
        normals, offsets = _block_planes(solid)
        g = view.tensor(normals)
        face = (p @ g.T - view.tensor(offsets)).argmax(1)
        half = view.tensor([solid.base[1]] * 2 + [solid.base[0]] * 4)[face]
        side = torch.where(face < 2, p[:, 2], p[:, 0])
        return g[face], side / (2 * half) + 0.5, 2 * half
    x, h, z = p.unbind(1)
    radius = (x * x + z * z).sqrt().clamp_min(1e-4)
    if solid.kind == "ball":
        normal = torch.stack([x, h - 0.5 * (solid.low + solid.high), z], 1) / solid.base[0]
    else:
        slope = (solid.top[0] - solid.base[0]) / (solid.high - solid.low)
        normal = torch.stack([x / radius, torch.full_like(h, -slope), z / radius], 1) / np.hypot(1, slope)
        lid = (h > solid.high - 1e-3) & (solid.top[0] > 0)
        normal = torch.where(lid[:, None], view.tensor([0.0, 1, 0]), normal)
    return normal, torch.atan2(x, z) / (2 * np.pi) + 0.5, 2 * np.pi * radius


def _accent(solid: Solid, view: Frames, hits: Hits, normal: Tensor, side: Tensor, size: Tensor) -> Tensor:
    """Share of the accent colour per hit, filtered by the pixel footprint."""
    pattern = solid.pattern
    if pattern is None:
        return torch.zeros_like(hits.t)
    facing = (normal * hits.d).sum(1).abs().clamp_min(0.15)
    wide = (view.pixel * hits.t).clamp_min(1e-4)
    tall = solid.high - solid.low
    share = torch.ones_like(hits.t)
    if pattern.row_fill < 1:
        up = (hits.point[:, 1] - solid.low) / tall * pattern.rows - 0.5 * (1 - pattern.row_fill)
        share = share * pulse(up, wide * pattern.rows / tall, pattern.row_fill)
    if pattern.col_fill < 1:
        across = side * pattern.cols - 0.5 * (1 - pattern.col_fill)
        share = share * pulse(across, wide / facing * pattern.cols / size, pattern.col_fill)
    return torch.where(normal[:, 1].abs() > 0.98, 0.0, share)


def _haze(light: Light, view: Frames, colour: Tensor, hits: Hits) -> Tensor:
    distance = hits.t * (hits.d * hits.d).sum(1).sqrt() / light.haze_distance
    return mix(colour, view.tensor(light.haze), 1 - torch.exp(-distance * distance))


def _paint_solid(solid: Solid, view: Frames, hits: Hits, light: Light) -> None:
    normal, side, size = _normals(solid, view, hits.point)
    accent = _accent(solid, view, hits, normal, side, size)
    albedo = mix(view.tensor(solid.colour), view.tensor(solid.accent), accent)
    sun = normal @ view.tensor(solid.axes() @ light.sun)
    direct = (0.8 * sun + 0.2).clamp_min(0)
    bounce = (0.72 + 0.22 * normal[:, 1]) * (0.7 + 0.3 * (hits.point[:, 1] / 0.5).clamp(0, 1))
    shade = bounce[:, None] * view.tensor(light.ambient) + direct[:, None] * view.tensor(light.colour)
    colour = albedo * (shade + light.glow * accent[:, None])
    view.colour[hits.flat] = _haze(light, view, colour, hits)


def _ground_hits(view: Frames) -> Hits:
    every, rows, columns = np.arange(view.n), *(np.tile(np.arange(k), (view.n, 1)) for k in (view.height, view.width))
    across, down = view.rays(every, rows, columns, np.eye(3))
    dy = across[:, 1][:, None, :] + down[:, 1][:, :, None]
    height = view.tensor(-view.c2w[:, 1, 3])[:, None, None]
    t = torch.where(dy > 0, height / dy, FAR).flatten()
    flat = ((t < FAR) & view.depth.isinf()).nonzero()[:, 0]
    t = t[flat]
    view.depth[flat] = t
    m, r, c = _unflatten(view, flat)
    d = across.transpose(1, 2)[m, c] + down.transpose(1, 2)[m, r]
    return Hits(flat, t, view.tensor(view.c2w[:, :3, 3])[m] + t[:, None] * d, d)


def _unflatten(view: Frames, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row = flat // view.width
    return row // view.height, row % view.height, flat % view.width


def _ground_pattern(ground: Ground, x: Tensor, z: Tensor, wx: Tensor, wz: Tensor) -> Tensor:
    """Share of the second ground colour. x, z and footprints wx, wz in cells."""
    if ground.pattern == "striped":
        return pulse(x, wx, 0.5)
    if ground.pattern == "checkered":
        return 0.5 - 0.5 * (2 * pulse(x, wx, 0.5) - 1) * (2 * pulse(z, wz, 0.5) - 1)
    if ground.pattern == "tiled":
        return pulse(x, wx, 0.78) * pulse(z, wz, 0.78)
    radius = (x * x + z * z).sqrt().clamp_min(1e-3)
    if ground.pattern == "ringed":
        return pulse(radius, (wx * x.abs() + wz * z.abs()) / radius, 0.5)
    width = 0.5 * (wx + wz)
    inside = (0.34 - ((x - x.round()) ** 2 + (z - z.round()) ** 2).sqrt()) / width + 0.5
    blurred = (width - 0.5).clamp(0, 1)
    return inside.clamp(0, 1) * (1 - blurred) + 0.36 * blurred


def _paint_ground(ground: Ground, view: Frames, hits: Hits, light: Light) -> None:
    (x, _, z), (dx, dy, dz) = hits.point.unbind(1), hits.d.unbind(1)
    c, s = np.cos(ground.yaw) / ground.cell, np.sin(ground.yaw) / ground.cell
    wide = view.pixel * hits.t
    along = wide / dy
    gx, gz, gdx, gdz = c * x - s * z, s * x + c * z, c * dx - s * dz, s * dx + c * dz
    wx, wz = along * gdx.abs() + wide / ground.cell, along * gdz.abs() + wide / ground.cell
    share = _ground_pattern(ground, gx, gz, wx, wz)
    colour = mix(view.tensor(ground.colours[0]), view.tensor(ground.colours[1]), share)
    blur = wide + 0.5 * along
    edge = ((ground.radius - (x * x + z * z).sqrt()) / blur + 0.5).clamp(0, 1)
    colour = mix(view.tensor(ground.field), colour, edge)
    where = (torch.stack([x, z], 1) / SHADOW_REACH)[None, None]
    shadow = F.grid_sample(ground.shadow[None, None].to(view.device), where, align_corners=False)[0, 0, 0]
    shadow = shadow * (1.2 - blur).clamp(0, 1)
    sun = max(float(-light.sun[1]), 0.0) * 0.8 + 0.2
    lit = view.tensor(light.ambient) * 0.94 + view.tensor(light.colour) * sun
    shade = mix(lit, view.tensor(light.ambient) * 0.62, shadow)
    view.colour[hits.flat] = _haze(light, view, colour * shade, hits)


def _paint_sky(view: Frames, sky: Tensor) -> None:
    flat = view.depth.isinf().nonzero()[:, 0]
    m, r, c = _unflatten(view, flat)
    every, rows, columns = np.arange(view.n), *(np.tile(np.arange(k), (view.n, 1)) for k in (view.height, view.width))
    across, down = view.rays(every, rows, columns, np.eye(3))
    d = across.transpose(1, 2)[m, c] + down.transpose(1, 2)[m, r]
    x, y, z = d.unbind(1)
    sine = -y / (x * x + y * y + z * z).sqrt()
    where = torch.stack([torch.atan2(x, z) / np.pi, 2 * sine - 1], 1)[None, None]
    view.colour[flat] = F.grid_sample(sky[None].to(view.device), where, padding_mode="border", align_corners=True)[0, :, 0].T


def _draw(scene: Scene, view: Frames, paint: bool) -> None:
    eye = view.c2w[:, :3, 3].mean(0)
    for solid in sorted(scene.solids, key=lambda s: float(np.hypot(s.x - eye[0], s.z - eye[2]))):
        hits = _hits(view, solid)
        if paint and hits is not None:
            _paint_solid(solid, view, hits, scene.light)
    hits = _ground_hits(view)
    if paint:
        _paint_ground(scene.ground, view, hits, scene.light)
        _paint_sky(view, scene.sky)


def _chunks(frames: int, rays: int) -> Iterator[slice]:
    step = max(1, RAYS_PER_CHUNK // rays)
    return (slice(a, a + step) for a in range(0, frames, step))


@torch.inference_mode()
def render(
    scene: Scene, c2w: np.ndarray, K: np.ndarray, height: int, width: int, supersample: int, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Frames n h w 3 uint8 (average of supersample^2 rays) and exact z-depth of the pixel-centre rays n h w."""
    images, depths = [], []
    for part in _chunks(len(c2w), height * width * supersample**2):
        pixel = 0.8 / (float(K[part, 0].mean()) * width)
        fine = Frames(c2w[part], K[part], height * supersample, width * supersample, pixel, device)
        _draw(scene, fine, paint=True)
        image = fine.colour.view(fine.n, height, supersample, width, supersample, 3).mean((2, 4))
        images.append((image.clamp(0, 1) * 255 + 0.5).byte().cpu())
        centre = Frames(c2w[part], K[part], height, width, pixel, device)
        _draw(scene, centre, paint=False)
        depths.append(centre.depth.view(-1, height, width).cpu())
    return torch.cat(images).numpy(), torch.cat(depths).numpy()
