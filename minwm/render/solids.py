"""Convex solids, camera rays and their intersections, in plain torch.

World axes are OpenCV axes (x right, y down, z forward), the ground is y = 0; "height" is -y. A ray is
`origin + t d` where d has camera z = 1, so t is the z-depth.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Colour = tuple[float, float, float]
NEAR, FAR = 0.02, 80.0


@dataclass(frozen=True)
class Pattern:
    """Accent-coloured rectangles in a grid of `rows` by `cols` cells; the fills are their share of a cell."""

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


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot product along the first axis, of length 3."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def take(x: Tensor, flat: Int[Tensor, " k"]) -> Tensor:
    """Elements of the flattened x; several times faster than x.flatten()[flat]."""
    return x.flatten().index_select(0, flat)


@dataclass(frozen=True)
class Hits:
    """Rays that hit one surface; `flat` indexes the rays of the grid, vectors are in the surface's axes."""

    flat: Int[Tensor, " k"]
    t: Float[Tensor, " k"]
    point: Float[Tensor, "3 k"]
    d: Float[Tensor, "3 k"]


@dataclass(frozen=True)
class Window:
    """A rectangle of rays in each of m frames, with directions across + down in local axes."""

    origin: Float[np.ndarray, "m 3"]
    across: Float[Tensor, "3 m 1 w"]
    down: Float[Tensor, "3 m h 1"]
    flat: Int[Tensor, "m h w"]


Spans = Int[np.ndarray, "s n 4"]
"""First row, end of rows, first column, end of columns of every solid in every frame; empty where it is not seen."""


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
        """x as float32 on the device of the grid."""
        return torch.as_tensor(np.asarray(x, np.float32), device=self.device)

    def colour(self, c: object) -> Float[Tensor, "3 1"]:
        return self.tensor(c)[:, None]

    def whole(self) -> Window:
        """All rays, in world axes."""
        rows, columns = (np.tile(np.arange(k), (len(self.c2w), 1)) for k in (self.height, self.width))
        return self.window(np.arange(len(self.c2w)), rows, columns, self.c2w[:, :3, 3], np.eye(3))

    def spans(self, solids: Sequence[Solid]) -> tuple[Spans, Int[np.ndarray, " s"]]:
        """Rectangles around the solids, and the solids' order from near to far."""
        corners = np.stack([solid.corners for solid in solids])
        local = np.einsum("nji,snkj->snki", self.c2w[:, :3, :3], corners[:, None] - self.c2w[:, None, :3, 3])
        behind = local[..., 2] < NEAR
        cut, seen = behind.any(2, keepdims=True), ~behind.all(2)
        ends = []
        for axis, cells in ((1, self.height), (0, self.width)):
            slope = local[..., axis] / np.maximum(local[..., 2], NEAR)
            edge = np.where(cut, local[..., axis] / NEAR, slope)  # bounds where edges cross the near plane
            low, high = np.minimum(slope, edge).min(2), np.maximum(slope, edge).max(2)
            focal, centre = self.K[:, axis] * cells, self.K[:, 2 + axis] * cells - 0.5
            ends.append(np.floor(low * focal + centre).clip(0, cells).astype(int))
            ends.append((np.floor(high * focal + centre) + 2).clip(0, cells).astype(int))
        spans = np.stack(ends, -1)
        spans[~seen] = 0
        return spans, np.argsort(local[..., 2].mean((1, 2)))

    def windows(self, solids: Sequence[Solid]) -> Iterator[tuple[Solid, Window]]:
        """The solids in view, nearest first, each with the rectangle around it (one size in all frames)."""
        spans, order = self.spans(solids)
        top, bottom, left, right = spans.transpose(2, 0, 1)
        for i in order:
            frames = np.flatnonzero((bottom > top)[i] & (right > left)[i])
            if len(frames):
                tall, wide = (bottom - top)[i, frames].max(), (right - left)[i, frames].max()
                rows = np.minimum(top[i, frames], self.height - tall)[:, None] + np.arange(tall)
                columns = np.minimum(left[i, frames], self.width - wide)[:, None] + np.arange(wide)
                axes = solids[i].axes
                origin = (self.c2w[frames, :3, 3] - [solids[i].x, 0, solids[i].z]) @ axes.T
                yield solids[i], self.window(frames, rows, columns, origin, axes)

    def window(
        self, frames: np.ndarray, rows: np.ndarray, columns: np.ndarray, origin: np.ndarray, axes: np.ndarray
    ) -> Window:
        turn = (axes @ self.c2w[frames, :3, :3]).transpose(1, 0, 2)[..., None]
        u, v = np.take_along_axis(self.u[frames], columns, 1), np.take_along_axis(self.v[frames], rows, 1)
        across, down = self.tensor(turn[:, :, 0] * u + turn[:, :, 2]), self.tensor(turn[:, :, 1] * v)
        start = torch.as_tensor((frames[:, None] * self.height + rows) * self.width, device=self.device)
        flat = start[:, :, None] + torch.as_tensor(columns, device=self.device)[:, None, :]
        return Window(origin, across[:, :, None, :], down[:, :, :, None], flat)


RayEntries = tuple[Tensor, Tensor]
"""Indices of the rays of a window (flattened) that enter a solid, and t at the entry."""


def _enter_block(solid: Solid, window: Window, grid: Grid) -> RayEntries:
    """Clip by six planes; 1/t = speed / gap. Rays enter by the last plane faced, leave by the first other."""
    normals, offsets = solid.planes
    gap = offsets[:, None] - normals @ window.origin.T  # f m; negative: the camera is on the outer side
    near = grid.tensor(np.where(np.abs(gap) < 1e-6, 1e-6, gap))[:, :, None, None]
    turn = grid.tensor(normals)
    across, down = (torch.einsum("fk,kmhw->fmhw", turn, part) / near for part in (window.across, window.down))
    enter = torch.full_like(window.flat, torch.inf, dtype=torch.float32)
    leave = torch.zeros_like(enter)
    for face in range(len(normals)):
        outside = gap[face] < 0
        if outside.any():
            keep = grid.tensor(np.where(outside, 0, np.inf))[:, None, None]
            enter = torch.minimum(enter, across[face] + (down[face] + keep))
        if not outside.all():
            keep = grid.tensor(np.where(outside, -np.inf, 0))[:, None, None]
            leave = torch.maximum(leave, across[face] + (down[face] + keep))
    rays = (enter > leave).flatten().nonzero()[:, 0]
    return rays, 1 / take(enter, rays)


def _enter_round(solid: Solid, window: Window, grid: Grid) -> RayEntries:
    """Quadric a t^2 + 2 b t + c <= 0: a sphere, or a cone x^2 + z^2 = r(height)^2 between two heights."""
    dx, dh, dz = window.across + window.down
    ball = solid.kind == "ball"
    o = window.origin - [0, 0.5 * (solid.low + solid.high) if ball else 0, 0]
    radius = solid.base[0] + (0 if ball else solid.slope[0]) * (o[:, 1] - solid.low)
    lean = o[:, 1] if ball else -solid.slope[0] * radius
    c = o[:, 0] ** 2 + o[:, 2] ** 2 + (o[:, 1] ** 2 if ball else 0) - radius**2
    ox, oz, lean, c, height = grid.tensor([o[:, 0], o[:, 2], lean, c, window.origin[:, 1]])[:, :, None, None]
    a = (dx * dx + dz * dz + (1.0 if ball else -(solid.slope[0] ** 2)) * dh * dh).clamp_min(1e-6)
    b = ox * dx + oz * dz + lean * dh
    square = b * b - a * c
    rays = (square > 0).flatten().nonzero()[:, 0]
    a, b, dh, root = take(a, rays), take(b, rays), take(dh, rays), take(square, rays).sqrt()
    height = take(height.expand_as(window.flat), rays)
    t = (-b - root) / a
    if ball:  # a dome ends at the ground
        inside = (t > NEAR) & (height + t * dh >= 0)
    else:
        floor, lid = (solid.low - height) / dh, (solid.high - height) / dh
        t = torch.maximum(t, torch.minimum(floor, lid))
        inside = (t > NEAR) & (t < torch.minimum((root - b) / a, torch.maximum(floor, lid)))
    inside = inside.nonzero()[:, 0]
    return take(rays, inside), take(t, inside)


def hit(solid: Solid, window: Window, grid: Grid, depth: Tensor) -> Hits:
    """Hits nearer than `depth`, which is updated with theirs."""
    rays, t = (_enter_block if solid.kind == "block" else _enter_round)(solid, window, grid)
    flat = take(window.flat, rays)
    front = (t < take(depth, flat)).nonzero()[:, 0]
    rays, t, flat = take(rays, front), take(t, front), take(flat, front)
    depth.index_copy_(0, flat, t)
    d = (window.across + window.down).flatten(1).index_select(1, rays)
    frame = take(torch.arange(len(window.origin), device=t.device)[:, None, None].expand_as(window.flat), rays)
    return Hits(flat, t, grid.tensor(window.origin.T).index_select(1, frame) + t * d, d)
