"""The pictures of `raycast`, compiled by numba: the same maths, ray by ray instead of solid by solid.

`World.render` uses it on a CPU where numba is installed; `tests/test_fast_render.py` holds the two equal.
Scenes become plain arrays first, since compiled code knows no classes.
"""

import numpy as np
from jaxtyping import Float

from minwm.render.fast_kernels import BALL, BLOCK, Around, picture, trace
from minwm.render.raycast import GROUND_PATTERNS, Light, RaycastScene
from minwm.render.solids import Grid, Solid

KINDS = {"block": BLOCK, "round": 1.0, "ball": BALL}


def table(solids: tuple[Solid, ...]) -> Float[np.ndarray, "s 47"]:
    """Kind; x, z, cosine and sine of the yaw; low, high, base (2), first half of top, slope (2); normals and offsets
    of six planes; colour, accent; whether there is a pattern, its rows, row_fill, cols, col_fill."""

    def row(solid: Solid) -> list[float]:
        normals, offsets = solid.planes
        turn = solid.x, solid.z, np.cos(solid.yaw), np.sin(solid.yaw)
        size = solid.low, solid.high, *solid.base, solid.top[0], *solid.slope
        pattern = solid.pattern
        cells = (1, pattern.rows, pattern.row_fill, pattern.cols, pattern.col_fill) if pattern else (0, 1, 1, 1, 1)
        paint = *solid.colour, *solid.accent
        return [KINDS[solid.kind], *turn, *size, *normals.ravel(), *offsets, *paint, *cells]

    return np.array([row(solid) for solid in solids])


def surroundings(scene: RaycastScene, cell: float) -> Around:
    """Of a scene seen in cells of this angular size, radians."""
    light, ground = scene.light, scene.ground
    turn = np.cos(ground.yaw) / ground.cell, np.sin(ground.yaw) / ground.cell
    painted = [[p.x, p.z, *p.size, *p.colour] for p in ground.patches]
    columns = scene.sky.shape[2]
    shrink = min(max(1, 2 ** int(np.log2(cell / (2 * np.pi / columns)))), 8)
    sky = scene.sky.numpy().reshape(3, -1, shrink, columns // shrink, shrink).mean((2, 4))
    return Around(
        numbers(light),
        GROUND_PATTERNS.index(ground.pattern),
        np.array([*turn, ground.cell, ground.radius, *ground.colours[0], *ground.colours[1], *ground.field]),
        np.array(painted, np.float64).reshape(-1, 7),
        ground.shadow.numpy(),
        np.ascontiguousarray(sky.transpose(1, 2, 0)).reshape(sky.shape[1], -1),
    )


def numbers(light: Light) -> np.ndarray:
    parts = *light.sun, *light.colour, *light.ambient, *light.haze, light.haze_distance, light.glow
    return np.array(parts, np.float64)


def render(
    scene: RaycastScene, c2w: np.ndarray, K: np.ndarray, height: int, width: int, supersample: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `raycast.render`, on the CPU."""
    grids = [Grid(c2w, K, height * k, width * k, "cpu") for k in (1, supersample)]
    things, around = table(scene.solids), surroundings(scene, grids[0].cell)
    (spans, order), (fine_spans, _) = (grid.spans(scene.solids) for grid in grids)
    coarse, fine = grids
    images, depths = np.zeros((len(c2w), height, width, 3)), np.full((len(c2w), height, width), np.inf)
    for n in range(len(c2w)):
        depth, found = depths[n], np.full((height, width), -1)
        trace(things, spans[:, n], order, c2w[n], coarse.u[n], coarse.v[n], depth, found)
        fine_depth, fine_found = np.full((fine.height, fine.width), np.inf), np.full((fine.height, fine.width), -1)
        trace(things, fine_spans[:, n], order, c2w[n], fine.u[n], fine.v[n], fine_depth, fine_found)
        rays, fine_rays = (coarse.u[n], coarse.v[n]), (fine.u[n], fine.v[n])
        cells = coarse.cell, fine.cell
        picture(things, around, c2w[n], rays, fine_rays, *cells, depth, fine_depth, fine_found, images[n])
    return ((images / supersample**2).clip(0, 1) * 255 + 0.5).astype(np.uint8), depths.astype(np.float32)
