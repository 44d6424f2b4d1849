"""Rectified flow, the one noise convention: x_t = (1 - t) x_0 + t eps and v = eps - x_0, with t in [0, 1] per frame."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "b f c h w"]
FirstLatent = Float[Tensor, "b 1 c h w"]
FirstLatents = Float[Tensor, "b g c h w"]
Times = Float[Tensor, "b f"]


def per_frame(t: Times) -> Float[Tensor, "b f 1 1 1"]:
    """Timesteps with axes that broadcast over channels, rows and columns."""
    return t[:, :, None, None, None]


def interpolate(x0: Latents, eps: Latents, t: Times) -> Latents:
    """x_t = (1 - t) x_0 + t eps."""
    return (1 - per_frame(t)) * x0 + per_frame(t) * eps


def with_first(x: Float[Tensor, "*k b f c h w"], first: FirstLatents | None) -> Float[Tensor, "..."]:
    """x with the given first latents in their place, or as it is without any."""
    if first is None:
        return x
    shape = (*x.shape[:-4], *first.shape[-4:])
    return torch.cat([first.to(x).expand(shape), x[..., first.shape[-4] :, :, :, :]], dim=-4)


def velocity(x0: Latents, eps: Latents) -> Latents:
    """What networks predict: v = dx_t / dt = eps - x_0."""
    return eps - x0


def x0_from_velocity(x_t: Latents, v: Latents, t: Times) -> Latents:
    """The clean latents that a predicted velocity implies: x_t - t v."""
    return x_t - per_frame(t) * v


def euler(x_t: Latents, v: Latents, t: float | Times, t_next: float | Times) -> Latents:
    """One Euler step of the ODE from t to t_next; given per frame, these are float64 until they are subtracted."""
    dt = t_next - t
    return x_t + (per_frame(dt).to(x_t) if isinstance(dt, Tensor) else dt) * v


def shift(t: Tensor, s: float) -> Tensor:
    """Timestep shift towards noise: s t / (1 + (s - 1) t), the identity for s = 1."""
    return s * t / (1 + (s - 1) * t)


def schedule(steps: int, s: float) -> list[float]:
    """`steps + 1` timesteps from 1 to 0: a uniform grid, shifted by s. (4 steps, s = 5: 1, .9375, .8333, .625, 0.)"""
    return shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), s).tolist()


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: uncond + scale (cond - uncond); scale 1 is no guidance."""
    return uncond + scale * (cond - uncond)


def bell_weight(t: Times, s: float) -> Times:
    """Wan's loss weight exp(-2 (t - 1/2)^2) minus its minimum, with mean 1 over its 1000 shifted timesteps."""
    grid = _bell(shift(1 - torch.arange(1000, dtype=torch.float64) / 1000, s))
    return _bell(t) / float(grid.mean())


def _bell(t: Tensor) -> Tensor:
    return torch.exp(-2 * (t - 0.5) ** 2) - math.exp(-0.5)
