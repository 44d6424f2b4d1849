"""Analytic ray casting of a few large solids, a patterned ground and a painted sky, in plain torch.

Solids are supersampled, each only inside its screen rectangle, for all frames of a chunk at once. Ground and sky are
filtered analytically, one ray per pixel. World axes are OpenCV axes (x right, y down, z forward), the ground is
y = 0; "height" is -y. A ray is `origin + t d` where d has camera z = 1, so t is the z-depth.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Colour = tuple[float, float, float]
RAYS_PER_CHUNK = 1 << 19
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

    @cached_property
    def axes(self) -> Float[np.ndarray, "3 3"]:
        """Rows: the local x, height and z axes in world coordinates."""
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[c, 0, -s], [0, -1, 0], [s, 0, c]])

    @cached_property
    def reach(self) -> tuple[float, float]:
        """Largest half sizes along the local x and z axes."""
        return max(self.base[0], self.top[0]), max(self.base[1], self.top[1])

    @cached_property
    def slope(self) -> tuple[float, float]:
        """Change of the half sizes per unit of height."""
        tall = self.high - self.low
        return (self.top[0] - self.base[0]) / tall, (self.top[1] - self.base[1]) / tall

    @cached_property
    def corners(self) -> Float[np.ndarray, "8 3"]:
        """World corners of the box around the solid."""
        a, b = self.reach
        local = np.array([[x, h, z] for x in (-a, a) for h in (self.low, self.high) for z in (-b, b)])
        return local @ self.axes + [self.x, 0, self.z]

    @cached_property
    def planes(self) -> tuple[Float[np.ndarray, "6 3"], Float[np.ndarray, "6"]]:
        """Unit outward normals and offsets of a block: inside means normal . (x, height, z) <= offset."""
        (sx, sz), (bx, bz) = self.slope, self.base
        normals = np.array([[-1, -sx, 0], [1, -sx, 0], [0, -sz, -1], [0, -sz, 1], [0, 1, 0], [0, -1, 0]])
        at_x, at_z = bx - sx * self.low, bz - sz * self.low
        size = np.linalg.norm(normals, axis=1)
        return normals / size[:, None], np.array([at_x, at_x, at_z, at_z, self.high, -self.low]) / size


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
    """Cell centres; rows: sine of the elevation from 0 to 1, columns: azimuth atan2(x, z) from -pi to pi."""


def pulse(x: Tensor, width: Tensor, fill: float) -> Tensor:
    """Share of the interval of `width` around x that lies in [k, k + fill] for whole k (box-filtered pulse)."""

    def area(y: Tensor) -> Tensor:
        whole = y.floor()
        return whole * fill + (y - whole).clamp_max(fill)

    half = 0.5 * width
    return (area(x + half) - area(x - half)) / width


def mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Blend colours 3 k (or 3 1) by shares k."""
    return a + (b - a) * share


def dot(a: Tensor, b: Tensor) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@dataclass(frozen=True)
class Hits:
    """Rays that met one surface; vectors are in the axes of that surface, `flat` indexes the grid's rays."""

    flat: Int[Tensor, "k"]
    t: Float[Tensor, "k"]
    point: Float[Tensor, "3 k"]
    d: Float[Tensor, "3 k"]


@dataclass(frozen=True)
class Window:
    """A rectangle of rays in each of some frames, and the rays there: d = across + down, in local axes."""

    origin: Float[np.ndarray, "m 3"]
    across: Float[Tensor, "3 m 1 w"]
    down: Float[Tensor, "3 m h 1"]
    flat: Int[Tensor, "m h w"]


class Grid:
    """The rays of n frames through the centres of height x width cells. K: n 4, normalised."""

    def __init__(self, c2w: np.ndarray, K: np.ndarray, height: int, width: int, device: str):
        self.c2w, self.K, self.height, self.width, self.device = c2w, K, height, width, device
        self.u = ((np.arange(width) + 0.5) / width - K[:, 2:3]) / K[:, 0:1]
        self.v = ((np.arange(height) + 0.5) / height - K[:, 3:4]) / K[:, 1:2]
        self.size = len(c2w) * height * width
        self.cell = 1 / (float(K[:, 0].mean()) * width)
        """Angular size of a cell near the image centre, radians."""

    def tensor(self, x: object) -> Tensor:
        return torch.as_tensor(np.asarray(x, np.float32), device=self.device)

    def colour(self, c: object) -> Float[Tensor, "3 1"]:
        return self.tensor(c)[:, None]

    def whole(self) -> Window:
        rows, columns = (np.tile(np.arange(k), (len(self.c2w), 1)) for k in (self.height, self.width))
        return self._window(np.arange(len(self.c2w)), rows, columns, self.c2w[:, :3, 3], np.eye(3))

    def windows(self, solids: Sequence[Solid]) -> Iterator[tuple[Solid, Window]]:
        """Rectangles around the solids, as large as the largest over the frames that see them; nearest first."""
        corners = np.stack([solid.corners for solid in solids])
        local = np.einsum("nji,snkj->snki", self.c2w[:, :3, :3], corners[:, None] - self.c2w[:, None, :3, 3])
        behind = local[..., 2] < NEAR
        cut, seen = behind.any(2), ~behind.all(2)
        spans = []
        for axis, cells in ((1, self.height), (0, self.width)):
            slope = local[..., axis] / np.maximum(local[..., 2], NEAR)
            at = (slope * self.K[:, axis, None] + self.K[:, 2 + axis, None]) * cells - 0.5
            first = np.where(cut, 0, np.floor(at.min(2))).clip(0, cells).astype(int)
            end = np.where(cut, cells, np.floor(at.max(2)) + 2).clip(0, cells).astype(int)
            seen &= end > first
            spans.append((first, end))
        (top, bottom), (left, right) = spans
        for i in np.argsort(local[..., 2].mean((1, 2))):
            frames = np.flatnonzero(seen[i])
            if len(frames):
                tall, wide = (bottom - top)[i, frames].max(), (right - left)[i, frames].max()
                rows = np.minimum(top[i, frames], self.height - tall)[:, None] + np.arange(tall)
                columns = np.minimum(left[i, frames], self.width - wide)[:, None] + np.arange(wide)
                axes = solids[i].axes
                origin = (self.c2w[frames, :3, 3] - [solids[i].x, 0, solids[i].z]) @ axes.T
                yield solids[i], self._window(frames, rows, columns, origin, axes)

    def _window(
        self, frames: np.ndarray, rows: np.ndarray, columns: np.ndarray, origin: np.ndarray, axes: np.ndarray
    ) -> Window:
        turn = (axes @ self.c2w[frames, :3, :3]).transpose(1, 0, 2)[..., None]
        u, v = np.take_along_axis(self.u[frames], columns, 1), np.take_along_axis(self.v[frames], rows, 1)
        across, down = self.tensor(turn[:, :, 0] * u + turn[:, :, 2]), self.tensor(turn[:, :, 1] * v)
        start = torch.as_tensor((frames[:, None] * self.height + rows) * self.width, device=self.device)
        flat = start[:, :, None] + torch.as_tensor(columns, device=self.device)[:, None, :]
        return Window(origin, across[:, :, None, :], down[:, :, :, None], flat)


Entry = tuple[Tensor, Tensor]
"""Which rays of a window (flattened) enter a solid, and at what t."""


def _enter_block(solid: Solid, window: Window, grid: Grid) -> Entry:
    normals, offsets = solid.planes
    turn = grid.tensor(normals)
    speed = torch.einsum("fk,kmhw->fmhw", turn, window.across) + torch.einsum("fk,kmhw->fmhw", turn, window.down)
    t = grid.tensor(offsets[:, None] - normals @ window.origin.T)[:, :, None, None] / speed
    enter = torch.where(speed < 0, t, -FAR).amax(0).flatten()
    leave = torch.where(speed > 0, t, FAR).amin(0).flatten()
    rays = ((enter < leave) & (enter > NEAR)).nonzero()[:, 0]
    return rays, enter[rays]


def _enter_round(solid: Solid, window: Window, grid: Grid) -> Entry:
    """Quadric a t^2 + 2 b t + c <= 0: a sphere, or a cone x^2 + z^2 = r(height)^2 between two heights."""
    dx, dh, dz = window.across + window.down
    ball = solid.kind == "ball"
    o = window.origin - [0, 0.5 * (solid.low + solid.high) if ball else 0, 0]
    radius = np.full(len(o), solid.base[0]) if ball else solid.base[0] + solid.slope[0] * (o[:, 1] - solid.low)
    lean = o[:, 1] if ball else -solid.slope[0] * radius
    c = o[:, 0] ** 2 + o[:, 2] ** 2 + (o[:, 1] ** 2 if ball else 0) - radius**2
    ox, oz, lean, c, height = grid.tensor([o[:, 0], o[:, 2], lean, c, window.origin[:, 1]])[:, :, None, None]
    a = (dx * dx + dz * dz + (1.0 if ball else -(solid.slope[0] ** 2)) * dh * dh).clamp_min(1e-6)
    b = ox * dx + oz * dz + lean * dh
    square = (b * b - a * c).flatten()
    rays = (square > 0).nonzero()[:, 0]
    a, b, dh = a.flatten()[rays], b.flatten()[rays], dh.flatten()[rays]
    height = height.expand_as(window.flat).flatten()[rays]
    root = square[rays].sqrt()
    t = (-b - root) / a
    if ball:  # a dome ends at the ground
        inside = (t > NEAR) & (height + t * dh >= 0)
    else:
        floor, lid = (solid.low - height) / dh, (solid.high - height) / dh
        t = torch.maximum(t, torch.minimum(floor, lid))
        inside = (t > NEAR) & (t < torch.minimum((root - b) / a, torch.maximum(floor, lid)))
    return rays[inside], t[inside]


def _hits(solid: Solid, window: Window, grid: Grid, depth: Tensor) -> Hits:
    """Hits in front of what `depth` holds, which they replace there."""
    rays, t = (_enter_block if solid.kind == "block" else _enter_round)(solid, window, grid)
    flat = window.flat.flatten()[rays]
    front = (t < depth[flat]).nonzero()[:, 0]
    rays, t, flat = rays[front], t[front], flat[front]
    depth[flat] = t
    d = (window.across + window.down).flatten(1).index_select(1, rays)
    origin = grid.tensor(window.origin.T)[:, :, None, None].expand(d.shape[0], *window.flat.shape)
    start = torch.stack([part.flatten()[rays] for part in origin])
    return Hits(flat, t, start + t * d, d)


def _surface(solid: Solid, grid: Grid, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit normal 3 k, position across the surface in [0, 1], and the length that [0, 1] stands for."""
    if solid.kind == "block":
        normals, offsets = (grid.tensor(x) for x in solid.planes)
        face = (normals @ p - offsets[:, None]).argmax(0)
        half = grid.tensor([solid.base[1]] * 2 + [solid.base[0]] * 4)[face]
        side = torch.where(face < 2, p[2], p[0])
        return normals.T.contiguous().index_select(1, face), side / (2 * half) + 0.5, 2 * half
    x, h, z = p
    radius = (x * x + z * z).sqrt().clamp_min(1e-4)
    if solid.kind == "ball":
        normal = torch.stack([x, h - 0.5 * (solid.low + solid.high), z]) / solid.base[0]
    else:
        normal = torch.stack([x / radius, torch.full_like(h, -solid.slope[0]), z / radius])
        normal = normal / float(np.hypot(1, solid.slope[0]))
        lid = (h > solid.high - 1e-3) & (solid.top[0] > 0)
        normal = torch.where(lid, grid.colour([0.0, 1, 0]), normal)
    return normal, torch.atan2(x, z) / (2 * np.pi) + 0.5, 2 * np.pi * radius


def _accent(solid: Solid, pattern: Pattern, hits: Hits, wide: Tensor, normal: Tensor, side: Tensor, size: Tensor) -> Tensor:
    """Share of the accent colour per hit, filtered by the footprint `wide` (world units)."""
    share = torch.ones_like(hits.t)
    if pattern.row_fill < 1:
        tall = solid.high - solid.low
        up = (hits.point[1] - solid.low) / tall * pattern.rows - 0.5 * (1 - pattern.row_fill)
        share = share * pulse(up, wide * (pattern.rows / tall), pattern.row_fill)
    if pattern.col_fill < 1:
        facing = dot(normal, hits.d).abs().clamp_min(0.15)
        across = side * pattern.cols - 0.5 * (1 - pattern.col_fill)
        share = share * pulse(across, wide / (facing * size) * pattern.cols, pattern.col_fill)
    return torch.where(normal[1].abs() > 0.98, 0.0, share)


def _haze(light: Light, grid: Grid, colour: Tensor, hits: Hits) -> Tensor:
    square = hits.t * hits.t * dot(hits.d, hits.d) / light.haze_distance**2
    return mix(colour, grid.colour(light.haze), 1 - torch.exp(-square))


def _solid_colour(solid: Solid, grid: Grid, hits: Hits, light: Light) -> Float[Tensor, "3 k"]:
    normal, side, size = _surface(solid, grid, hits.point)
    albedo, sun = grid.colour(solid.colour), grid.tensor(solid.axes @ light.sun)
    direct = (0.8 * dot(normal, sun) + 0.2).clamp_min(0)
    bounce = (0.78 + 0.2 * normal[1]) * (0.76 + 0.24 * (hits.point[1] / 0.5).clamp(0, 1))
    shade = grid.colour(light.ambient) * bounce + grid.colour(light.colour) * direct
    if solid.pattern is not None:
        wide = (1.2 * grid.cell) * hits.t
        accent = _accent(solid, solid.pattern, hits, wide, normal, side, size)
        albedo = mix(albedo, grid.colour(solid.accent), accent)
        shade = shade + light.glow * accent
    return _haze(light, grid, albedo * shade, hits)


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


def _ground_colour(ground: Ground, grid: Grid, hits: Hits, light: Light) -> Float[Tensor, "3 k"]:
    (x, _, z), (dx, dy, dz) = hits.point, hits.d
    c, s = float(np.cos(ground.yaw) / ground.cell), float(np.sin(ground.yaw) / ground.cell)
    wide = grid.cell * hits.t
    along = wide / dy
    gx, gz, gdx, gdz = c * x - s * z, s * x + c * z, c * dx - s * dz, s * dx + c * dz
    wx, wz = along * gdx.abs() + wide / ground.cell, along * gdz.abs() + wide / ground.cell
    share = _ground_pattern(ground, gx, gz, wx, wz)
    colour = mix(grid.colour(ground.colours[0]), grid.colour(ground.colours[1]), share)
    blur = wide + 0.5 * along
    edge = ((ground.radius - (x * x + z * z).sqrt()) / blur + 0.5).clamp(0, 1)
    colour = mix(grid.colour(ground.field), colour, edge)
    where = (torch.stack([x, z], 1) / SHADOW_REACH)[None, None]
    shadow = F.grid_sample(ground.shadow[None, None].to(grid.device), where, align_corners=False)[0, 0, 0]
    shadow = shadow * (1.2 - blur).clamp(0, 1)
    sun = max(float(-light.sun[1]), 0.0) * 0.8 + 0.2
    ambient = grid.colour(light.ambient)
    shade = mix(ambient * 0.98 + grid.colour(light.colour) * sun, ambient * 0.74, shadow)
    return _haze(light, grid, colour * shade, hits)


def _sky_colour(sky: Tensor, grid: Grid, d: Float[Tensor, "3 k"]) -> Float[Tensor, "3 k"]:
    shrink = max(1, 2 ** int(np.log2(grid.cell / (2 * np.pi / sky.shape[2]))))  # texels no finer than pixels
    sky = F.avg_pool2d(sky.to(grid.device), min(shrink, 8))
    columns = sky.shape[2]
    sky = torch.cat([sky[..., -1:], sky, sky[..., :1]], 2)
    x, y, z = d
    azimuth = torch.atan2(x, z) * (columns / (columns + 2) / np.pi)
    where = torch.stack([azimuth, -2 * y / dot(d, d).sqrt() - 1], 1)[None, None]
    return F.grid_sample(sky[None], where, padding_mode="border", align_corners=False)[0, :, 0]


def _background(scene: Scene, grid: Grid) -> tuple[Float[Tensor, "3 k"], Float[Tensor, "k"]]:
    """Colour and z-depth of ground and sky through every cell."""
    whole = grid.whole()
    d = (whole.across + whole.down).flatten(1)
    origin = grid.tensor(whole.origin.T)[:, :, None].expand(3, len(whole.origin), grid.height * grid.width).flatten(1)
    t = -origin[1] / d[1]
    below = (d[1] > 0) & (t < FAR)
    ground, sky = below.nonzero()[:, 0], (~below).nonzero()[:, 0]
    t, down = t[ground], d.index_select(1, ground)
    hits = Hits(ground, t, origin.index_select(1, ground) + t * down, down)
    colour = torch.empty_like(d).index_copy_(1, ground, _ground_colour(scene.ground, grid, hits, scene.light))
    colour.index_copy_(1, sky, _sky_colour(scene.sky, grid, d.index_select(1, sky)))
    return colour, torch.full_like(d[0], torch.inf).index_copy_(0, ground, t)


def _image(scene: Scene, coarse: Grid, fine: Grid, colour: Tensor) -> Tensor:
    """n h w 3 uint8: supersampled solids over the background `colour` 3 k."""
    depth = torch.full((fine.size,), torch.inf, device=fine.device)
    solids = torch.zeros(4, fine.size, device=fine.device)  # colour and coverage
    for solid, window in fine.windows(scene.solids):
        hits = _hits(solid, window, fine, depth)
        solids[:3].index_copy_(1, hits.flat, _solid_colour(solid, fine, hits, scene.light))
    solids[3] = depth < torch.inf
    solids = F.avg_pool2d(solids.view(4, -1, fine.height, fine.width), fine.height // coarse.height).view(4, -1)
    image = (solids[:3] + colour * (1 - solids[3])).clamp(0, 1) * 255 + 0.5
    return image.byte().view(3, -1, coarse.height, coarse.width).permute(1, 2, 3, 0).contiguous()


@torch.inference_mode()
def render(
    scene: Scene, c2w: np.ndarray, K: np.ndarray, height: int, width: int, supersample: int, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Frames n h w 3 uint8 and the exact z-depth of the pixel-centre rays n h w (inf: sky)."""
    images, depths = [], []
    step = max(1, RAYS_PER_CHUNK // (height * width * supersample**2))
    for part in (slice(a, a + step) for a in range(0, len(c2w), step)):
        coarse = Grid(c2w[part], K[part], height, width, device)
        fine = Grid(c2w[part], K[part], height * supersample, width * supersample, device)
        colour, depth = _background(scene, coarse)
        images.append(_image(scene, coarse, fine, colour).cpu())
        for solid, window in coarse.windows(scene.solids):
            _hits(solid, window, coarse, depth)
        depths.append(depth.view(-1, height, width).cpu())
    return torch.cat(images).numpy(), torch.cat(depths).numpy()
