"""Gaussians of a captured scene: posed pictures and points that they show, fitted by gradient descent.

The start is dense: pixels of all pictures, at depths taken from the points, so that no Gaussians have to be added later
(as in EDGS, Kotovenko et al. 2025). Some pictures are held out, and measure the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minwm.cameras.track import CameraTrack, se3_inverse
from minwm.core.config import ConfigError
from minwm.core.runtime import generator, progress
from minwm.render.gaussians import Y0, Gaussians, SplatError
from minwm.render.splats import View, draw

NEIGHBOURS = 4
"""Points nearest in the picture, whose median depth a pixel starts at."""
GAP = 1 / 6
"""Of the picture's width: a pixel whose nearest point is farther away starts far off, as sky would be."""
FAR = 3.0
"""That distance, in multiples of the 95th percentile of the depths of points."""
LEAST_POINTS = 32
"""Known points of a capture, below which depths cannot be told."""
CHUNK = 256
"""Points whose distances to all others are held at once."""


@dataclass(frozen=True, eq=False)
class Capture:
    """Posed pictures of a scene."""

    frames: UInt8[np.ndarray, "n h w 3"]
    track: CameraTrack
    """A camera for each picture, in world coordinates."""
    points: Float[np.ndarray, "m 3"]
    """Places on surfaces that the pictures show, in the same coordinates."""

    def __post_init__(self) -> None:
        if len(self.points) < LEAST_POINTS:
            raise SplatError(
                f"{len(self.points)} points are known of the scene, {LEAST_POINTS} are needed: the pictures show too "
                "little detail or too little parallax, or their cameras are wrong (minwm camera check)"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.frames.shape[1], self.frames.shape[2]

    def seen(self, i: int) -> Float[np.ndarray, "p 3"]:
        """Of the points in picture i, hidden or not: x and y in pixels, and z-depth."""
        return in_view(self.points, self.track, i, self.size)

    def view(self, i: int, device: torch.device | str) -> View:
        return view_of(self.track, i, self.size, device)

    def picture(self, i: int, device: torch.device | str) -> Float[Tensor, "h w 3"]:
        """Picture i, 0 to 1."""
        return torch.from_numpy(self.frames[i]).to(device).float() / 255


def in_view(
    points: Float[np.ndarray, "m 3"], track: CameraTrack, i: int, size: tuple[int, int]
) -> Float[np.ndarray, "p 3"]:
    """Pixels and z-depth of the points that are inside the picture of camera i, hidden or not."""
    height, width = size
    local = (points - track.c2w[i, :3, 3]) @ track.c2w[i, :3, :3]
    local = local[local[:, 2] > 0]
    xy = (local[:, :2] / local[:, 2:] * track.K[i, :2] + track.K[i, 2:]) * (width, height)
    inside = ((xy > 0) & (xy < (width, height))).all(1)
    return np.concatenate([xy, local[:, 2:]], 1)[inside]


def view_of(track: CameraTrack, i: int, size: tuple[int, int], device: torch.device | str = "cpu") -> View:
    """Camera i of a track, for pictures of this size (h, w)."""
    height, width = size
    w2c = torch.from_numpy(se3_inverse(track.c2w[i])).float().to(device)
    K = torch.from_numpy(track.K[i] * (width, height, width, height)).float().to(device)
    return View(w2c, K, height, width)


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How Gaussians are fitted."""

    gaussians: int = 12_000
    """Their number; a tenth of a picture's pixels per picture is plenty."""
    steps: int = 600
    """One picture each."""
    held_out: int = 8
    """Every so manieth picture is kept from fitting, and measures it."""
    position_lr: float = 0.05
    """Learning rate of positions, in distances to the nearest Gaussians."""
    scale_lr: float = 0.01
    """Of the logarithms of the scales."""
    rotation_lr: float = 0.005
    opacity_lr: float = 0.05
    """Of opacities before the sigmoid."""
    colour_lr: float = 0.01
    final: float = 0.1
    """Share of the learning rates that is left at the end."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gaussians < 100 or self.steps < 1 or self.held_out < 2:
            raise ConfigError("fit: gaussians from 100, steps from 1, held_out from 2")


def start(capture: Capture, chosen: list[int], cfg: FitConfig, device: torch.device | str = "cpu") -> Gaussians:
    """Pixels of the chosen pictures as Gaussians, each as large as its distance to its neighbours
    (found on `device`)."""
    rng, (height, width) = np.random.default_rng(cfg.seed), capture.size
    means, colours = [], []
    far = FAR * float(np.percentile(np.concatenate([capture.seen(i)[:, 2] for i in chosen]), 95))
    for i, count in zip(chosen, np.bincount(np.arange(cfg.gaussians) % len(chosen)), strict=False):
        row, column = rng.integers(0, height, count), rng.integers(0, width, count)
        pixel, seen = np.stack([column, row], 1) + 0.5, capture.seen(i)
        depth = np.full(count, far)
        if len(seen) >= NEIGHBOURS:
            away = np.linalg.norm(pixel[:, None] - seen[None, :, :2], axis=-1)
            nearest = np.argpartition(away, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
            known = np.take_along_axis(away, nearest, 1).min(1) < GAP * width
            depth = np.where(known, np.median(seen[nearest, 2], axis=1), far)
        K, c2w = capture.track.K[i], capture.track.c2w[i]
        rays = np.concatenate([(pixel / (width, height) - K[2:]) / K[:2], np.ones((count, 1))], 1)
        means.append((depth[:, None] * rays) @ c2w[:3, :3].T + c2w[:3, 3])
        colours.append(capture.frames[i, row, column] / 255)
    positions = torch.from_numpy(np.concatenate(means)).float()
    size = spacing(positions.to(device)).cpu().clamp(min=1e-6)
    count = len(positions)
    return Gaussians(
        means=positions,
        log_scales=size.log()[:, None].repeat(1, 3),
        rotations=torch.tensor([1.0, 0, 0, 0]).repeat(count, 1),
        opacities=torch.zeros(count),
        sh=(torch.from_numpy(np.concatenate(colours)).float()[:, None] - 0.5) / Y0,
    )


def spacing(points: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
    """Mean distance from each point to the three that are nearest to it."""
    parts = [torch.cdist(part, points).topk(4, largest=False).values[:, 1:].mean(1) for part in points.split(CHUNK)]
    return torch.cat(parts)


def held_out(capture: Capture, cfg: FitConfig) -> list[int]:
    """Indices of the pictures that are kept from fitting; SplatError if none would be, or all."""
    held = list(range(cfg.held_out // 2, len(capture.frames), cfg.held_out))
    if not held or len(held) == len(capture.frames):
        raise SplatError(f"{len(capture.frames)} pictures, of which each {cfg.held_out}th is held out: give more")
    return held


def fit(capture: Capture, cfg: FitConfig, device: torch.device | str = "cpu") -> Gaussians:
    """Gaussians that show the pictures which are not held out."""
    shown = sorted({*range(len(capture.frames))} - {*held_out(capture, cfg)})
    first = start(capture, shown, cfg, device).to(device)
    unit = first.log_scales[:, :1].exp()  # the spacing that `start` has measured
    offset = torch.zeros_like(first.means, requires_grad=True)
    others = [x.requires_grad_() for x in (first.log_scales, first.rotations, first.opacities, first.sh)]
    rates = (cfg.position_lr, cfg.scale_lr, cfg.rotation_lr, cfg.opacity_lr, cfg.colour_lr)
    groups = [{"params": [x], "lr": lr} for x, lr in zip((offset, *others), rates, strict=True)]
    optimizer = torch.optim.Adam(groups, eps=1e-15)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, cfg.final ** (1 / cfg.steps))
    draws = generator(cfg.seed, "splats")
    with progress(cfg.steps, "steps of Gaussians") as bar:
        for _ in range(cfg.steps):
            i = shown[int(torch.randint(len(shown), (), generator=draws))]
            drawn = draw(Gaussians(first.means + unit * offset, *others), capture.view(i, device))
            behind = torch.rand(3, generator=draws).to(device)  # so that every pixel is covered
            shown_colour = drawn.colour + (1 - drawn.alpha)[..., None] * behind
            optimizer.zero_grad()
            (shown_colour - capture.picture(i, device)).abs().mean().backward()
            optimizer.step()
            schedule.step()
            bar.advance()
    return Gaussians((first.means + unit * offset).detach(), *(x.detach() for x in others))


@torch.no_grad()
def psnr(scene: Gaussians, capture: Capture, chosen: Sequence[int]) -> float:
    """Mean over the chosen pictures, in dB."""
    device, found = scene.means.device, list[float]()
    for i in chosen:
        drawn = draw(scene, capture.view(i, device)).colour.clamp(0, 1)
        found.append(-10 * math.log10(float((drawn - capture.picture(i, device)).square().mean())))
    return float(np.mean(found))
