"""Pictures of 3D Gaussians: by gsplat on a GPU where it is installed, else in plain torch, differentiable in both.

The maths is that of gsplat (Ye et al. 2024) and of the paper (Kerbl et al. 2023): covariances are projected by the
Jacobian of the projection at the mean, 0.3 pixels^2 are added to them, and colours are blended front to back.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import avg_pool2d

from minwm.core.media import to_frames
from minwm.core.runtime import require
from minwm.render.gaussians import Gaussians

NEAR = 0.01
"""World units: z-depth below which Gaussians are not drawn."""
LOW_PASS = 0.3
"""Pixels squared that are added to the variances on the screen."""
LEAST, MOST = 1 / 255, 0.999
"""Alphas below are left out, and above are cut to it."""
BEYOND = 0.3
"""Share of the half picture beyond its edges within which the Jacobian is taken."""
TILE = 16
"""Pixels: side of the squares that are blended one by one."""


@dataclass(frozen=True, eq=False)
class View:
    """A pinhole camera."""

    w2c: Float[Tensor, "4 4"]
    """World-to-camera, OpenCV axes."""
    K: Float[Tensor, "4"]
    """fx, fy, cx, cy in pixels."""
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a view shows."""

    colour: Float[Tensor, "h w 3"]
    """0 to 1, over black."""
    alpha: Float[Tensor, "h w"]
    """How much of each pixel is covered."""
    depth: Float[Tensor, "h w"]
    """z-depth, the mean over what is seen; 0 where nothing is."""

    def surface(self) -> Float[Tensor, "h w"]:
        """z-depth; inf where less than half of a pixel is covered."""
        return self.depth.where(self.alpha >= 0.5, torch.inf)

    def frame(self, supersample: int = 1) -> UInt8[np.ndarray, "H W 3"]:
        """The picture, area-averaged over squares of pixels."""
        pixels = avg_pool2d(self.colour.permute(2, 0, 1).clamp(0, 1), supersample)
        return to_frames(2 * pixels - 1)


@dataclass(frozen=True, eq=False)
class Projected:
    """Gaussians on the screen, near ones first."""

    xy: Float[Tensor, "m 2"]
    """Pixels from the upper left corner of the picture."""
    precision: Float[Tensor, "m 3"]
    """xx, xy and yy of the inverse covariance."""
    radius: Float[Tensor, "m 2"]
    """Pixels from the mean, across and down, beyond which alpha is below LEAST."""
    opacity: Float[Tensor, " m"]
    features: Float[Tensor, "m 4"]
    """Colour and z-depth."""


def draw(scene: Gaussians, view: View) -> Drawn:
    """One view; on a GPU by gsplat if it is installed."""
    if scene.means.is_cuda and find_spec("gsplat"):
        return _draw_gsplat(scene, view)
    return blend(project(scene, view), view)


def _draw_gsplat(scene: Gaussians, view: View) -> Drawn:
    fx, fy, cx, cy = view.K.tolist()
    K = scene.means.new_tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    (features,), (alpha,), _ = require("gsplat", "splat").rasterization(
        means=scene.means, quats=scene.rotations, scales=scene.log_scales.exp(), opacities=scene.opacities.sigmoid(),
        colors=scene.colours(_eye(view))[None], viewmats=view.w2c[None], Ks=K[None], width=view.width,
        height=view.height, near_plane=NEAR, eps2d=LOW_PASS, render_mode="RGB+ED", packed=False,
    )  # fmt: skip
    return Drawn(features[..., :3], alpha[..., 0], features[..., 3])


def _eye(view: View) -> Float[Tensor, "3"]:
    return -view.w2c[:3, :3].mT @ view.w2c[:3, 3]


def project(scene: Gaussians, view: View) -> Projected:
    """The Gaussians that may touch the picture."""
    R, fx, fy, cx, cy = view.w2c[:3, :3], *view.K.unbind()
    local = scene.means @ R.mT + view.w2c[:3, 3]
    front = (local[:, 2] > NEAR).nonzero()[:, 0]
    local, opacity = local[front], scene.opacities.sigmoid()[front]
    x, y, z = local.unbind(-1)
    middle = torch.stack([fx * x / z + cx, fy * y / z + cy], -1)

    def within(slope: Tensor, focal: Tensor, centre: Tensor, pixels: int) -> Tensor:
        margin = BEYOND * 0.5 * pixels / focal
        return slope.clamp(-centre / focal - margin, (pixels - centre) / focal + margin)

    u, v = within(x / z, fx, cx, view.width), within(y / z, fy, cy, view.height)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * u / z, zero, fy / z, -fy * v / z], -1).unflatten(-1, (2, 3)) @ R
    covariance = jacobian @ scene.covariances()[front] @ jacobian.mT
    a, b, c = covariance[:, 0, 0] + LOW_PASS, covariance[:, 0, 1], covariance[:, 1, 1] + LOW_PASS
    determinant = a * c - b * b
    with torch.no_grad():
        reach = (2 * (opacity / LEAST).clamp(min=1).log()).sqrt()
        radius = reach[:, None] * torch.stack([a, c], -1).sqrt()
        size = middle.new_tensor([view.width, view.height])
        seen = ((middle + radius > 0) & (middle - radius < size)).all(-1) & (opacity >= LEAST)
        kept = seen.nonzero()[:, 0]
        kept = kept[z[kept].argsort(stable=True)]
    precision = torch.stack([c, -b, a], -1) / determinant[:, None]
    features = torch.cat([scene.colours(_eye(view))[front], z[:, None]], -1)
    return Projected(middle[kept], precision[kept], radius[kept], opacity[kept], features[kept])


def blend(gaussians: Projected, view: View) -> Drawn:
    """Front-to-back compositing, exact within each tile: the sum of w_i = alpha_i prod_{j<i} (1 - alpha_j)."""
    rows = []
    low, high = gaussians.xy - gaussians.radius, gaussians.xy + gaussians.radius
    for top in range(0, view.height, TILE):
        bottom, tiles = min(top + TILE, view.height), []
        across = (high[:, 1] > top) & (low[:, 1] < bottom)
        for left in range(0, view.width, TILE):
            right = min(left + TILE, view.width)
            touching = (across & (high[:, 0] > left) & (low[:, 0] < right)).nonzero()[:, 0]
            tiles.append(_blend_tile(gaussians, touching, (top, bottom, left, right)))
        rows.append(torch.cat(tiles, 1))
    features = torch.cat(rows)
    alpha = features[..., 4]
    return Drawn(features[..., :3], alpha, features[..., 3] / alpha.clamp(min=1e-10))


def _blend_tile(gaussians: Projected, chosen: Tensor, edges: tuple[int, int, int, int]) -> Float[Tensor, "h w 5"]:
    """Sums of w_i times colour, z-depth and 1 of the chosen Gaussians at the pixel centres of a tile."""
    top, bottom, left, right = edges
    xy, features = gaussians.xy[chosen], gaussians.features[chosen]
    dy = torch.arange(top, bottom, device=xy.device, dtype=xy.dtype)[:, None] + 0.5 - xy[:, 1]
    dx = torch.arange(left, right, device=xy.device, dtype=xy.dtype)[:, None] + 0.5 - xy[:, 0]
    xx, cross, yy = gaussians.precision[chosen].unbind(-1)
    exponent = (yy * dy * dy)[:, None] + (xx * dx * dx)[None] + 2 * cross * dy[:, None] * dx[None]
    alpha = (gaussians.opacity[chosen] * (-0.5 * exponent).exp()).clamp(max=MOST)
    alpha = alpha.where(alpha >= LEAST, 0.0)
    before = torch.cat([torch.ones_like(alpha[..., :1]), (1 - alpha).cumprod(-1)[..., :-1]], -1)
    return (alpha * before) @ torch.cat([features, torch.ones_like(features[:, :1])], -1)
