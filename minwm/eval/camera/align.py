"""The camera that a video shows, by photometric alignment to a scene whose image and depth are known.

No network and no features: at the current estimate the true scene is rendered, each of its pixels is moved by a small
rigid motion into the frame, and the motion that makes the details agree is found by Gauss-Newton on SE(3): coarse to
fine, with Huber weights, gain and bias per frame, the render blurred as much as the frame is. Details are compared, not
colours: a generator's colours may be off over whole regions, and such errors, which need not move as surfaces do, would
pass for motion. The commanded camera is never used: each frame starts from the estimate of the one before, so a video
that stands still is measured as still. Only surfaces that the first frame shows take part, for what was hidden a
generator may invent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from minwm.cameras.track import CameraTrack, se3_exp, se3_inverse, se3_log
from minwm.render.base import Scene

Array = np.ndarray


@dataclass(frozen=True)
class AlignConfig:
    """Settings of the tracker. Colours are in [0, 1]."""

    huber: float = 0.03
    """Colour residual from which the cost grows linearly."""
    prior: float = 0.005
    """Strength of the pull to the previous estimate; 0 is none. Matters only where the image has no
    texture."""
    prior_trans: float = 0.15
    """Scale of that pull in world units (about one latent step)."""
    prior_rot_deg: float = 6.0
    search_deg: float = 6.0
    """Extra starting points that are turned this much left, right, up and down."""
    blurs: tuple[float, ...] = (0.0, 0.7, 1.1, 1.6, 2.4, 3.4)
    """Candidate blurs of the render in pixels; the one whose sharpness fits the frame is used."""
    detail: float = 0.1
    """Of frame and render, what a Gaussian blur of this share of the height takes away is compared; 0 is all."""
    min_valid: float = 0.08
    """Share of the pixels that must show surfaces seen in frame 0; with less the frame counts as lost."""
    min_correlation: float = 0.35
    """Correlation of the frame with the render at the estimate below which the frame counts as lost."""
    refinements: int = 2
    """Times the scene is rendered again at the estimate of a frame to improve it."""
    supersample: int = 2


@dataclass(frozen=True)
class TrackedCameras:
    """Estimated cameras of c clips with f latent frames. A lost frame keeps the pose of the frame before."""

    c2w: Float[Array, "c f 4 4"]
    valid: Float[Array, "c f"]
    """Share of the pixels that took part."""
    lost: Bool[Array, "c f"]


@dataclass(frozen=True)
class View:
    """The scene at a pose: `rgb` b 3 h w, `inverse` depth b h w (0 is the sky), `seen` b h w float 0/1."""

    rgb: Tensor
    inverse: Tensor
    seen: Tensor

    def at(self, size: tuple[int, int]) -> "View":
        if self.rgb.shape[-2:] == size:
            return self
        seen = F.adaptive_avg_pool2d(self.seen, size)
        return View(
            F.adaptive_avg_pool2d(self.rgb, size),
            F.adaptive_avg_pool2d(self.inverse, size),
            (seen > 0.6).float(),
        )

    def repeat(self, times: int) -> "View":
        """Each clip `times` times in a row."""
        return View(*(x.repeat_interleave(times, 0) for x in (self.rgb, self.inverse, self.seen)))


def track(
    scenes: Sequence[Scene],
    start: Float[Array, "c 4 4"],
    K: Float[Array, "c f 4"],
    frames: UInt8[Array, "c f h w 3"],
    config: AlignConfig,
) -> TrackedCameras:
    """The cameras of `frames` at the latent rate, from the known first pose `start` in scene coordinates."""
    count, length = frames.shape[:2]
    first = FirstView(scenes, start, K[:, 0], frames.shape[2:4], config)
    images = torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, 2).float() / 255
    c2w = np.repeat(start[:, None].astype(np.float64), length, 1)
    valid, lost = np.ones((count, length)), np.zeros((count, length), bool)
    view = first.view(start, K[:, 0])
    for i in range(1, length):
        before = c2w[:, i - 1]
        step = se3_inverse(c2w[:, max(i - 2, 0)]) @ before
        aligner = Aligner(images[:, i], torch.from_numpy(K[:, i]).float(), config)
        pose = before @ aligner.search(view, _starting_points(step, config))
        for _ in range(config.refinements):
            pose = pose @ aligner.refine(first.view(pose, K[:, i]), before=se3_inverse(pose) @ before)
        view = first.view(pose, K[:, i])
        correlation, share = aligner.agreement(view)
        valid[:, i] = share
        lost[:, i] = (share < config.min_valid) | (correlation < config.min_correlation)
        c2w[:, i] = np.where(lost[:, i, None, None], before, pose)
        if lost[:, i].any():
            view = first.view(c2w[:, i], K[:, i])
    return TrackedCameras(c2w, valid, lost)


class FirstView:
    """Renders the scenes at any pose and marks the pixels whose surface the first frame shows."""

    def __init__(
        self, scenes: Sequence[Scene], start: Array, K: Array, size: tuple[int, int], config: AlignConfig
    ) -> None:
        self.scenes, self.start, self.K, self.size, self.config = scenes, start, K, size, config
        _, inverse = self._render(start, K)
        # what frame 0 shows within a pixel: the range of depths in each 3x3 window, widened by 4%
        self.near = F.max_pool2d(inverse[:, None], 3, 1, 1) * 1.04 + 2e-3
        self.far = -F.max_pool2d(-inverse[:, None], 3, 1, 1) * 0.96 - 2e-3

    def view(self, pose: Float[Array, "c 4 4"], K: Float[Array, "c 4"]) -> View:
        rgb, inverse = self._render(pose, K)
        return View(rgb, inverse, self.seen(inverse, pose, K))

    def seen(self, inverse: Tensor, pose: Array, K: Array) -> Tensor:
        """1 where the surface at that inverse depth is visible in the first frame."""
        motion = torch.from_numpy(se3_inverse(self.start) @ pose).float()
        place, z = project(motion, rays(torch.from_numpy(K).float(), self.size), inverse.flatten(1))
        at = to_grid(place, torch.from_numpy(self.K).float())
        depth = (inverse.flatten(1) / z.clamp_min(1e-6)).view_as(inverse)
        grid = at.view(len(pose), *self.size, 2)
        near, far = (F.grid_sample(x, grid, "nearest", "zeros", False)[:, 0] for x in (self.near, self.far))
        inside = (at.abs() <= 1).all(-1) & (z > 1e-3)
        return (inside.view_as(depth) & (depth <= near) & (depth >= far)).float()

    def _render(self, pose: Array, K: Array) -> tuple[Tensor, Tensor]:
        shots = [
            scene.render(CameraTrack(_orthonormal(T)[None], k, fps=1.0), *self.size, self.config.supersample)
            for scene, T, k in zip(self.scenes, pose, K, strict=True)
        ]
        rgb = torch.from_numpy(np.stack([shot.frames[0] for shot in shots])).movedim(-1, 1).float() / 255
        depth = torch.from_numpy(np.stack([shot.depth[0] for shot in shots])).float()
        return rgb, 1 / depth.clamp_min(1e-3)


class Aligner:
    """Finds the motion D (pose = reference @ D) at which the scene looks like one frame per clip."""

    def __init__(self, image: Float[Tensor, "c 3 h w"], K: Float[Tensor, "c 4"], config: AlignConfig) -> None:
        self.K, self.config = K, config
        self.full = (image.shape[-2], image.shape[-1])
        self.image, self.sharpness = self._detail(image), gradient_energy(image).clamp_min(1e-9)

    def search(self, view: View, starts: Float[Array, "c k 4 4"]) -> Float[Array, "c 4 4"]:
        """From several starting points, coarse to fine; the best one of each clip."""
        count, k = starts.shape[:2]
        motion = torch.from_numpy(se3_inverse(starts)).float().flatten(0, 1)
        anchor = torch.eye(4).expand(count * k, 4, 4)
        view = self._as_blurred(view)
        cost = torch.zeros(count * k)
        for divisor, iterations in ((4, 8), (2, 6)):
            motion, cost = self._solve(view, motion, anchor, divisor, iterations, times=k)
        best = cost.view(count, k).argmin(1)
        motion = motion.view(count, k, 4, 4)[torch.arange(count), best]
        return se3_inverse(motion.double().numpy())

    def refine(self, view: View, *, before: Float[Array, "c 4 4"]) -> Float[Array, "c 4 4"]:
        """Small correction at half and full resolution; `before` is the previous estimate seen from here."""
        anchor = torch.from_numpy(se3_inverse(before)).float()
        view = self._as_blurred(view)
        motion = torch.eye(4).expand(len(before), 4, 4)
        for divisor, iterations in ((2, 3), (1, 4)):
            motion, _ = self._solve(view, motion, anchor, divisor, iterations, times=1)
        return se3_inverse(motion.double().numpy())

    def agreement(self, view: View) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """Correlation of frame and render over the seen pixels, and the share of those pixels."""
        view = self._as_blurred(view)
        weight = view.seen[:, None]
        total = weight.sum((2, 3), keepdim=True).clamp_min(1)
        a, b = (x - (x * weight).sum((2, 3), keepdim=True) / total for x in (self.image, view.rgb))
        joint = (a * b * weight).sum((1, 2, 3))
        energy = ((a * a * weight).sum((1, 2, 3)) * (b * b * weight).sum((1, 2, 3))).sqrt()
        return (joint / energy.clamp_min(1e-6)).numpy(), view.seen.mean((1, 2)).numpy()

    def _as_blurred(self, view: View) -> View:
        """Details of the view with the candidate blur whose gradient energy is nearest to that of the frame."""
        options = torch.stack([blurred(view.rgb, sigma) for sigma in self.config.blurs])
        have = gradient_energy(options.flatten(0, 1)).view(len(options), -1).clamp_min(1e-9)
        pick = (have / self.sharpness).log().abs().argmin(0)
        return View(self._detail(options[pick, torch.arange(len(pick))]), view.inverse, view.seen)

    def _detail(self, image: Float[Tensor, "c 3 h w"]) -> Float[Tensor, "c 3 h w"]:
        share = self.config.detail
        return image - blurred(image, share * image.shape[-2]) if share else image

    def _solve(
        self, view: View, motion: Tensor, anchor: Tensor, divisor: int, iterations: int, *, times: int
    ) -> tuple[Tensor, Tensor]:
        """Gauss-Newton at one resolution. `motion` takes reference coordinates to those of the frame.

        Returns the best motion met and its cost (Huber, mean over the pixels that stay inside the frame).
        """
        size = (self.full[0] // divisor, self.full[1] // divisor)
        view = view.at(size).repeat(times)
        level = blurred(F.adaptive_avg_pool2d(self.image, size), 0.6)
        texture = torch.cat([level, *gradients(level)], 1).repeat_interleave(times, 0)
        template = blurred(view.rgb, 0.6).flatten(2)
        K = self.K.repeat_interleave(times, 0)
        directions, inverse, mask = rays(K, size), view.inverse.flatten(1), view.seen.flatten(1)
        best, lowest = motion, torch.full((len(motion),), torch.inf)
        for i in range(iterations + 1):
            place, z = project(motion, directions, inverse)
            at = to_grid(place, K)
            sample = F.grid_sample(texture, at[:, None], "bilinear", "border", False)[:, :, 0]
            inside = mask * (at.abs() <= 1).all(-1) * (z > 1e-3)
            residual, gain = colour_fit(sample[:, :3], template, inside)
            zero = torch.zeros_like(residual)
            cost = F.huber_loss(residual, zero, reduction="none", delta=self.config.huber)
            cost = (cost * inside[:, None]).sum((1, 2)) / (3 * inside.sum(1)).clamp_min(1)
            cost = torch.where(inside.sum(1) > 0.4 * mask.sum(1), cost, torch.inf)
            better = cost < lowest
            best = torch.where(better[:, None, None], motion, best)
            lowest = torch.where(better, cost, lowest)
            if i == iterations:
                break
            weight = inside[:, None] / (residual.abs() / self.config.huber).clamp_min(1)
            flow = pixel_motion(place, inverse / z.clamp_min(1e-3), K, size)
            slopes = gain[:, None, None, None] * sample[:, 3:].unflatten(1, (2, 3))
            columns = torch.einsum("btcp,btkp->bkcp", slopes, flow)
            motion = self._update(motion, anchor, columns, residual, weight)
        return best, lowest

    def _update(self, motion: Tensor, anchor: Tensor, columns: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        rows = columns.flatten(2)  # b 6 (3 p)
        weighted = rows * weight.flatten(1)[:, None]
        hessian = weighted @ rows.transpose(1, 2)
        slope = (weighted @ residual.flatten(1)[..., None])[..., 0]
        pull, twist = self._prior(motion, anchor)
        hessian = hessian + torch.diag_embed(pull) + 1e-6 * torch.eye(6)
        step = -torch.linalg.solve(hessian, slope + pull * twist)
        step = step.clamp(-0.25, 0.25)
        return torch.from_numpy(se3_exp(step.double().numpy())).float() @ motion

    def _prior(self, motion: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        away = motion @ torch.from_numpy(se3_inverse(anchor.double().numpy())).float()
        twist = torch.from_numpy(se3_log(away.double().numpy())).float()
        scale = torch.tensor([self.config.prior_trans] * 3 + [np.radians(self.config.prior_rot_deg)] * 3)
        return (self.config.prior / scale**2).float().expand_as(twist), twist


def _starting_points(step: Float[Array, "c 4 4"], config: AlignConfig) -> Float[Array, "c k 4 4"]:
    """Motions to start from: none, as between the last two frames, and turns to the four sides."""
    angle = np.radians(config.search_deg)
    twists = np.zeros((5, 6))
    twists[1:, 3:5] = [[0, 1], [0, -1], [1, 0], [-1, 0]]
    fixed = np.broadcast_to(se3_exp(twists * angle), (len(step), len(twists), 4, 4))
    return np.concatenate([fixed, step[:, None]], 1)


def _orthonormal(T: Float[Array, "4 4"]) -> Float[Array, "4 4"]:
    """The nearest rigid motion: many small float32 corrections drift away from a rotation."""
    u, _, v = np.linalg.svd(T[:3, :3])
    clean = T.copy()
    clean[:3, :3] = u @ v
    return clean


def rays(K: Float[Tensor, "b 4"], size: tuple[int, int]) -> Float[Tensor, "b p 2"]:
    """x/z and y/z of every pixel centre, row by row."""
    y, x = torch.meshgrid(
        (torch.arange(size[0]) + 0.5) / size[0], (torch.arange(size[1]) + 0.5) / size[1], indexing="ij"
    )
    return (torch.stack([x, y], -1).flatten(0, 1) - K[:, None, 2:]) / K[:, None, :2]


def project(
    motion: Float[Tensor, "b 4 4"], directions: Float[Tensor, "b p 2"], inverse: Float[Tensor, "b p"]
) -> tuple[Float[Tensor, "b p 2"], Float[Tensor, "b p"]]:
    """Where moved points appear (x/z, y/z), and their z per unit of the old depth. Inverse depth 0 is the
    sky."""
    ray = torch.cat([directions, torch.ones_like(directions[..., :1])], -1)
    moved = ray @ motion[:, :3, :3].transpose(1, 2) + inverse[..., None] * motion[:, None, :3, 3]
    z = moved[..., 2]
    return moved[..., :2] / z.clamp_min(1e-3)[..., None], z


def to_grid(place: Float[Tensor, "b p 2"], K: Float[Tensor, "b 4"]) -> Float[Tensor, "b p 2"]:
    """Image plane to the coordinates of `grid_sample`: -1 and 1 are the borders of the image."""
    return 2 * (place * K[:, None, :2] + K[:, None, 2:]) - 1


def pixel_motion(
    place: Float[Tensor, "b p 2"],
    inverse: Float[Tensor, "b p"],
    K: Float[Tensor, "b 4"],
    size: tuple[int, int],
) -> Float[Tensor, "b 2 6 p"]:
    """Pixels (x, y) that a point moves per unit of each twist component (translation 3, rotation 3)."""
    x, y = place.unbind(-1)
    o = torch.zeros_like(x)
    along_x = torch.stack([inverse, o, -x * inverse, -x * y, 1 + x * x, -y], 1)
    along_y = torch.stack([o, inverse, -y * inverse, -1 - y * y, x * y, x], 1)
    focal = K[:, :2] * torch.tensor([size[1], size[0]])
    return torch.stack([along_x, along_y], 1) * focal[:, :, None, None]


def colour_fit(
    sample: Float[Tensor, "b 3 p"], template: Float[Tensor, "b 3 p"], mask: Float[Tensor, "b p"]
) -> tuple[Float[Tensor, "b 3 p"], Float[Tensor, " b"]]:
    """Residual after the best gain (one, within 0.7..1.4: a flat image must not explain all) and bias per
    colour."""
    weight = mask[:, None]
    total = weight.sum(2, keepdim=True).clamp_min(1)
    a, b = (x - (x * weight).sum(2, keepdim=True) / total for x in (sample, template))
    gain = (a * b * weight).sum((1, 2)) / (a * a * weight).sum((1, 2)).clamp_min(1e-6)
    gain = gain.clamp(0.7, 1.4)
    return (gain[:, None, None] * a - b) * weight, gain


def blurred(image: Float[Tensor, "b c h w"], sigma: float) -> Float[Tensor, "b c h w"]:
    """Gaussian blur, sigma in pixels."""
    if sigma <= 0:
        return image
    radius = int(np.ceil(2.5 * sigma))
    at = torch.arange(-radius, radius + 1) / sigma
    window = torch.exp(-0.5 * at**2)
    window = (window / window.sum()).expand(image.shape[1], 1, 1, -1)
    padded = F.pad(image, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, window, groups=image.shape[1]), window.mT, groups=image.shape[1])


def gradients(image: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Central differences along x and y, per pixel."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    along_x = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    along_y = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return along_x / 2, along_y / 2


def gradient_energy(image: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean squared gradient: how sharp an image is."""
    x, y = gradients(image)
    return (x * x + y * y).mean((1, 2, 3))
