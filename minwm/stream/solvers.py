"""Samplers: solvers of the probability-flow ODE, and the times of a few-step student."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.core.flow import Latents, euler, schedule

Velocity = Callable[[Latents, float], Latents]
Noise = Float[Tensor, "k b f c h w"]
"""One Gaussian draw per network pass that needs one: the start, each re-noising, and the context's noise."""


@dataclass(frozen=True, kw_only=True)
class Multistep:
    """A guided ODE solution."""

    steps: int = 50
    guidance: float = 3.0
    """uncond + guidance (cond - uncond); 1 means no guidance and half of the passes."""
    shift: float = 5.0
    solver: Literal["unipc", "euler"] = "unipc"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"sampler.steps={self.steps}: at least 1 is needed")

    @property
    def passes(self) -> int:
        """Network evaluations for one chunk; both branches of guidance count."""
        return self.steps * (1 if self.guidance == 1 else 2)

    def solve(self, velocity: Velocity, noise: Latents) -> Latents:
        return {"unipc": unipc, "euler": solve_euler}[self.solver](velocity, noise, self.steps, self.shift)


@dataclass(frozen=True, kw_only=True)
class BidirectionalSampler(Multistep):
    """All frames at once, every frame seeing every other."""

    kind: ClassVar[str] = "bidirectional"


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSampler(Multistep):
    """Chunk by chunk, each solved in full given the clean past."""

    kind: ClassVar[str] = "autoregressive"


@dataclass(frozen=True, kw_only=True)
class FewStepSampler:
    """Chunk by chunk in a few passes: predict x_0, re-noise it to the next time, predict again."""

    kind: ClassVar[str] = "few_step"
    steps: int = 4
    shift: float = 5.0
    guidance: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"sampler.steps={self.steps}: at least 1 is needed")

    @property
    def passes(self) -> int:
        return self.steps

    @property
    def times(self) -> list[float]:
        """Times at which the network is asked (4 steps, shift 5: 1, .9375, .8333, .625)."""
        return schedule(self.steps, self.shift)[:-1]


Sampler = BidirectionalSampler | AutoregressiveSampler | FewStepSampler


def solve_euler(velocity: Velocity, x: Latents, steps: int, shift: float) -> Latents:
    for t, t_next in pairwise(schedule(steps, shift)):
        x = euler(x, velocity(x, t), t, t_next)
    return x


def unipc(velocity: Velocity, x: Latents, steps: int, shift: float) -> Latents:
    """UniPC of order 2 (B(h) = e^h - 1, x_0-prediction; Zhao et al. 2023) for x_t = (1 - t) x_0 + t eps.

    Every evaluation first corrects the sample that it was made at, then predicts the next one. The grid starts at
    shift(0.999), as in Wan: at t = 1 the log signal-to-noise ratio would be infinite.
    """
    grid = 0.999 * torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = shift * grid / (1 + (shift - 1) * grid)
    snr = torch.log1p(-times) - torch.log(times)  # lambda, +inf at the end
    history: list[tuple[int, Latents]] = []  # (step, predicted x_0), newest last

    def advance(x: Latents, step: int, new: Latents | None, order: int) -> Latents:
        """x at `step + 1` from x at `step`; with `new`, the x_0 predicted there, this is the corrector."""
        t, t_next = float(times[step]), float(times[step + 1])
        h = snr[step + 1] - snr[step]
        past = [(float((snr[i] - snr[step]) / h), m) for i, m in history if i < step][-1:] if order == 2 else []
        m0 = dict(history)[step]
        phi = torch.expm1(-h)
        out = t_next / t * x - (1 - t_next) * float(phi) * m0
        weights = _unipc_weights(h, [r for r, _ in past], new is not None)
        slopes = [(m - m0) / r for r, m in past] + ([new - m0] if new is not None else [])
        for weight, slope in zip(weights, slopes, strict=True):
            out = out - (1 - t_next) * float(phi) * weight * slope
        return out

    before, order = x, 1
    for step in range(steps):
        x0 = x - float(times[step]) * velocity(x, float(times[step]))
        if step:
            x = advance(before, step - 1, x0, order)
        history = [*history[-1:], (step, x0)]
        before, order = x, min(2, step + 1, steps - step)
        x = advance(x, step, None, order)
    return x


def _unipc_weights(h: Tensor, ratios: list[float], corrector: bool) -> list[float]:
    """Weights of the slopes that make the update exact to its order."""
    if not corrector:
        return [0.5] * len(ratios)
    if not ratios:
        return [0.5]
    hh, phi, factorial, rhs = -h, torch.expm1(-h), 1.0, []
    term = phi / hh - 1
    for i in (1, 2):
        rhs.append(term * factorial / phi)
        factorial *= i + 1
        term = term / hh - 1 / factorial
    matrix = torch.tensor([[1.0, 1.0], [ratios[0], 1.0]], dtype=torch.float64)
    return torch.linalg.solve(matrix, torch.stack(rhs)).tolist()
