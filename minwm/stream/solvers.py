"""Samplers: solvers of the probability-flow ODE, and the times of a few-step student."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.core.flow import Latents, euler, interpolate, schedule
from minwm.nets.chunks import Geometry

Velocity = Callable[[Latents, float, float], Latents]
"""v(x_t, t, t_end) of all frames at one time t, guidance included. Networks of mean velocities give that until t_end:
where a step of Euler's method ends, and t itself in other solvers."""
Noise = Float[Tensor, "k b f c h w"]
"""Standard normal samples: the start, one for each re-noising, and one for the cache update's context noise."""

SomeSampler = TypeVar("SomeSampler", bound="_SamplerBase")


@dataclass(frozen=True, kw_only=True)
class _SamplerBase:
    """What all samplers share."""

    causal: ClassVar[bool] = True
    """Chunk by chunk, each given the past in a cache; otherwise all frames of a clip at once."""
    steps: int = 4
    shift: float = 5.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"sampler.steps={self.steps}: at least 1 is needed")

    def with_steps(self: SomeSampler, steps: int) -> SomeSampler:
        """The same with another number of steps."""
        return replace(self, steps=steps)

    def at_chunk(self: SomeSampler, chunk: int) -> SomeSampler:
        """The sampler of a chunk, counted from the start of the stream."""
        return self

    @property
    def most_steps(self) -> int:
        """Of any chunk."""
        return self.steps

    @property
    def distinct_times(self) -> int:
        """Times at which the network is asked, over all chunks."""
        return self.steps

    def step_at_chunk(self, step: int, chunk: int) -> int:
        """The step of a chunk that stands for `step` of `most_steps`, in proportion: a student is trained at the same
        step of all chunks, and at all steps of each."""
        return step * self.at_chunk(chunk).steps // self.most_steps

    def num_noise_samples(self, geometry: Geometry) -> int:
        """Samples of noise that a clip, or a chunk with its cache update, takes."""
        return 1 + (self.causal and geometry.context_noise > 0 and not geometry.merged_refresh)


@dataclass(frozen=True, kw_only=True)
class _MultistepSampler(_SamplerBase):
    """A numerical solution of the ODE, under guidance."""

    kind: ClassVar[str]
    steps: int = 50
    guidance: float = 3.0
    """uncond + guidance (cond - uncond); 1 means no guidance and half of the passes."""
    solver: Literal["unipc", "euler"] = "unipc"
    rounded: bool = False
    """Compatibility, with Euler: noise, and latents after every step, are rounded to bfloat16, as HY-WorldPlay and
    minWM's HunyuanVideo keep them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounded and self.solver != "euler":
            raise ConfigError(f"sampler.rounded=true is for sampler.solver=euler, not {self.solver}")

    @property
    def passes(self) -> int:
        """Network passes for one chunk (or one clip, if not causal); both branches of guidance count."""
        return self.steps * (1 if self.guidance == 1 else 2)

    @property
    def times(self) -> list[float]:
        """Only a few-step sampler has times that a student is trained at."""
        raise ConfigError(f"a few-step student needs model.sampler.kind=few_step, not {self.kind}")

    def sample(self, velocity: Velocity, noise: Noise) -> Latents:
        """x_0 of a clip or chunk, from the first sample of noise."""
        if self.solver == "unipc":
            return unipc(velocity, noise[0], self.steps, self.shift)
        return solve_euler(velocity, noise[0], self.steps, self.shift, self.rounded)


@dataclass(frozen=True, kw_only=True)
class BidirectionalSampler(_MultistepSampler):
    """All frames at once, every frame seeing every other."""

    kind: ClassVar[str] = "bidirectional"
    causal: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSampler(_MultistepSampler):
    """Chunk by chunk, each solved in full given the clean past."""

    kind: ClassVar[str] = "autoregressive"


@dataclass(frozen=True, kw_only=True)
class FewStepSampler(_SamplerBase):
    """Chunk by chunk in a few passes: predict x_0, re-noise it to the next time, predict again."""

    kind: ClassVar[str] = "few_step"
    guidance: ClassVar[float] = 1.0
    timesteps: tuple[float, ...] | None = None
    """Time of each of the `steps` passes over a chunk, falling; None: a uniform grid, shifted, which the teacher's ODE
    has too (4 steps, shift 5: 1, .9375, .8333, .625)."""
    first_timesteps: tuple[float, ...] | None = None
    """The same for the first chunk, which has no past to go by: 4 where others take 1 or 2 (Causal-Forcing++). None:
    those of the others, which 4 steps are enough for. A first chunk that is the image alone has no use for it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("timesteps", "first_timesteps"):
            times = getattr(self, name)
            if times is not None and not (times and times[0] <= 1 and all(a > b for a, b in pairwise((*times, 0.0)))):
                raise ConfigError(
                    f"sampler.{name}={','.join(map(str, times))}: give times that fall, from 1 at most to above 0, "
                    "such as 1,0.9375,0.8333,0.625 (those of other projects, over 1000)"
                )
        if self.timesteps is not None and len(self.timesteps) != self.steps:
            n = len(self.timesteps)
            raise ConfigError(f"sampler.timesteps has {n}, but sampler.steps={self.steps}; set sampler.steps={n}")

    def with_steps(self, steps: int) -> "FewStepSampler":
        """On the shifted grid, the first chunk as the others."""
        return replace(self, steps=steps, timesteps=None, first_timesteps=None)

    def at_chunk(self, chunk: int) -> "FewStepSampler":
        if chunk or self.first_timesteps is None:
            return self
        first = self.first_timesteps
        return replace(self, steps=len(first), timesteps=first, first_timesteps=None)

    @property
    def most_steps(self) -> int:
        return max(self.steps, self.at_chunk(0).steps)

    @property
    def distinct_times(self) -> int:
        return len({*self.times, *self.at_chunk(0).times})

    @property
    def passes(self) -> int:
        return self.steps

    @property
    def times(self) -> list[float]:
        """Time of each pass, but for those of a first chunk that has its own."""
        return schedule(self.steps, self.shift)[:-1] if self.timesteps is None else list(self.timesteps)

    def num_noise_samples(self, geometry: Geometry) -> int:
        return super().num_noise_samples(geometry) + self.most_steps - 1

    def sample(self, velocity: Velocity, noise: Noise) -> Latents:
        """x_0 of a chunk in passes at `times`; a sample of noise for every step."""
        return [*few_step_predictions(velocity, noise, self.times)][-1]


Sampler = BidirectionalSampler | AutoregressiveSampler | FewStepSampler


def few_step_predictions(velocity: Velocity, noise: Noise, times: list[float]) -> Iterator[Latents]:
    """The x_0 that each step predicts; no gradient flows from one step into the next."""
    x = noise[0]
    for step, t in enumerate(times):
        x0 = x - t * velocity(x, t, t)
        yield x0
        if step + 1 < len(times):
            x = interpolate(x0.detach(), noise[step + 1], x.new_full(x.shape[:2], times[step + 1]))


def solve_euler(velocity: Velocity, x: Latents, steps: int, shift: float, rounded: bool = False) -> Latents:
    """Euler's method; the latents of every step may be rounded to bfloat16."""
    x = x.bfloat16().to(x) if rounded else x
    for t, t_next in pairwise(schedule(steps, shift)):
        x = euler(x, velocity(x, t, t_next), t, t_next)
        x = x.bfloat16().to(x) if rounded else x
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
        t = float(times[step])
        x0 = x - t * velocity(x, t, t)
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
