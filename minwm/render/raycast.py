"""Ray casting: solids over a patterned ground and a sky image, in plain torch.

Solids are supersampled, each inside its screen rectangle, for many frames at once. Ground and sky are filtered
analytically with one ray per pixel.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from minwm.render.solids import FAR, Colour, Grid, Hits, Pattern, Solid, dot, hit

RAYS_PER_CHUNK = 1 << 19
GROUND_PATTERNS = ("checkered", "striped", "ringed", "dotted", "tiled")
SHADOW_REACH = 10.0
"""Half the side of the square of ground that the shadow map covers, world units."""


@dataclass(frozen=True)
class Patch:
    """A rectangle of one colour on the ground, along the world's axes."""

    x: float
    z: float
    size: tuple[float, float]
    """Half sizes along x and z."""
    colour: Colour


@dataclass(frozen=True)
class Ground:
    """The plane y = 0: a patterned disc (the plaza) in a field of one colour."""

    pattern: str
    """One of GROUND_PATTERNS."""
    cell: float
    """Size of a pattern cell, world units."""
    yaw: float
    """Rotation of the pattern, radians."""
    colours: tuple[Colour, Colour]
    field: Colour
    """Colour outside the plaza."""
    radius: float
    """Radius of the plaza, world units."""
    shadow: Float[Tensor, "size size"]
    """0 lit, 1 fully shaded; rows are z, columns x."""
    patches: tuple[Patch, ...] = ()
    """Painted over the field and the plaza, the last on top."""


@dataclass(frozen=True)
class Light:
    """Sun, ambient light and haze."""

    sun: Float[np.ndarray, "3"]
    """Unit vector towards the sun, world axes."""
    colour: Colour
    ambient: Colour
    haze: Colour
    haze_distance: float
    glow: float
    """Emission of accents (windows, bands)."""


@dataclass(frozen=True)
class RaycastScene:
    """All that rays can hit."""

    solids: tuple[Solid, ...]
    ground: Ground
    light: Light
    sky: Float[Tensor, "3 rows columns"]
    """Panorama; rows: sine of the elevation from 0 to 1, columns: azimuth atan2(x, z) from -pi to pi."""


def pulse(x: Tensor, width: Tensor, fill: float) -> Tensor:
    """Box-filtered pulse wave: the share of the interval of `width` around x inside [k, k + fill], k whole."""

    def area(y: Tensor) -> Tensor:
        whole = y.floor()
        return whole * fill + (y - whole).clamp_max(fill)

    half = 0.5 * width
    return (area(x + half) - area(x - half)) / width


def mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Blend colours 3 k (or 3 1) by shares k."""
    return a + (b - a) * share


def _surface(solid: Solid, grid: Grid, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit normal 3 k, position across the surface in [0, 1], and the length that [0, 1] stands for."""
    if solid.kind == "block":
        normals, offsets = (grid.tensor(x) for x in solid.planes)
        face = (normals @ p - offsets[:, None]).argmax(0)
        half = grid.tensor([solid.base[1]] * 2 + [solid.base[0]] * 4)[face]
        side = torch.where(face < 2, p[2], p[0])
        shading = normals.T * grid.tensor([1, 1, 1, 1, 1, 0])  # thin eaves seen from below would be black
        return shading.index_select(1, face), side / (2 * half) + 0.5, 2 * half
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


def _accent(
    solid: Solid, pattern: Pattern, hits: Hits, wide: Tensor, normal: Tensor, side: Tensor, size: Tensor
) -> Tensor:
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
        return pulse(radius + 0.25, (wx * x.abs() + wz * z.abs()) / radius, 0.5)
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
    for patch in ground.patches:
        inside = torch.minimum(patch.size[0] - (x - patch.x).abs(), patch.size[1] - (z - patch.z).abs())
        colour = mix(colour, grid.colour(patch.colour), (inside / blur + 0.5).clamp(0, 1))
    where = (torch.stack([x, z], 1) / SHADOW_REACH)[None, None]
    shadow = ground.shadow[None, None].to(grid.device)
    shadow = functional.grid_sample(shadow, where, align_corners=False)[0, 0, 0] * (1.2 - blur).clamp(0, 1)
    sun = max(float(-light.sun[1]), 0.0) * 0.8 + 0.2
    ambient = grid.colour(light.ambient)
    shade = mix(ambient * 0.98 + grid.colour(light.colour) * sun, ambient * 0.74, shadow)
    return _haze(light, grid, colour * shade, hits)


def _sky_colour(sky: Tensor, grid: Grid, d: Float[Tensor, "3 k"]) -> Float[Tensor, "3 k"]:
    shrink = max(1, 2 ** int(np.log2(grid.cell / (2 * np.pi / sky.shape[2]))))  # texels no finer than pixels
    sky = functional.avg_pool2d(sky.to(grid.device), min(shrink, 8))
    columns = sky.shape[2]
    sky = torch.cat([sky[..., -1:], sky, sky[..., :1]], 2)
    x, y, z = d
    azimuth = torch.atan2(x, z) * (columns / (columns + 2) / np.pi)
    where = torch.stack([azimuth, -2 * y / dot(d, d).sqrt() - 1], 1)[None, None]
    return functional.grid_sample(sky[None], where, padding_mode="border", align_corners=False)[0, :, 0]


def _background(scene: RaycastScene, grid: Grid) -> tuple[Float[Tensor, "3 k"], Float[Tensor, " k"]]:
    """Colour and z-depth of ground and sky through every cell."""
    whole = grid.whole()
    d = (whole.across + whole.down).flatten(1)
    origin = grid.tensor(whole.origin.T)[:, :, None, None].expand(3, *whole.flat.shape).flatten(1)
    t = -origin[1] / d[1]
    below = (d[1] > 0) & (t < FAR)
    ground, sky = below.nonzero()[:, 0], (~below).nonzero()[:, 0]
    t, down = t[ground], d.index_select(1, ground)
    hits = Hits(ground, t, origin.index_select(1, ground) + t * down, down)
    colour = torch.empty_like(d).index_copy_(1, ground, _ground_colour(scene.ground, grid, hits, scene.light))
    colour.index_copy_(1, sky, _sky_colour(scene.sky, grid, d.index_select(1, sky)))
    return colour, torch.full_like(d[0], torch.inf).index_copy_(0, ground, t)


def _image(scene: RaycastScene, coarse: Grid, fine: Grid, colour: Tensor) -> Tensor:
    """n h w 3 uint8: supersampled solids over the background `colour` 3 k."""
    depth = torch.full((fine.size,), torch.inf, device=fine.device)
    solids = torch.zeros(4, fine.size, device=fine.device)  # colour and coverage
    for solid, window in fine.windows(scene.solids):
        hits = hit(solid, window, fine, depth)
        solids[:3].index_copy_(1, hits.flat, _solid_colour(solid, fine, hits, scene.light))
    solids[3] = depth < torch.inf
    supersample = fine.height // coarse.height
    solids = functional.avg_pool2d(solids.view(4, -1, fine.height, fine.width), supersample).view(4, -1)
    image = (solids[:3] + colour * (1 - solids[3])).clamp(0, 1) * 255 + 0.5
    return image.byte().view(3, -1, coarse.height, coarse.width).permute(1, 2, 3, 0).contiguous()


@torch.inference_mode()
def render(
    scene: RaycastScene, c2w: np.ndarray, K: np.ndarray, height: int, width: int, supersample: int, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Frames n h w 3 uint8, and z-depth n h w of the rays through pixel centres (inf: sky)."""
    images, depths = [], []
    step = max(1, RAYS_PER_CHUNK // (height * width * supersample**2))
    for part in (slice(a, a + step) for a in range(0, len(c2w), step)):
        coarse = Grid(c2w[part], K[part], height, width, device)
        fine = Grid(c2w[part], K[part], height * supersample, width * supersample, device)
        colour, depth = _background(scene, coarse)
        images.append(_image(scene, coarse, fine, colour).cpu())
        for solid, window in coarse.windows(scene.solids):
            hit(solid, window, coarse, depth)
        depths.append(depth.view(-1, height, width).cpu())
    return torch.cat(images).numpy(), torch.cat(depths).numpy()
