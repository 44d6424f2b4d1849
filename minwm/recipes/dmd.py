"""Stage 3, asymmetric distribution matching: causal student, bidirectional scores, the student's own rollouts."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.core.flow import Latents, Times, guide, interpolate, schedule, velocity, x0_from_velocity
from minwm.core.types import Clip, Condition
from minwm.nets.backbone import Backbone
from minwm.recipes.base import (
    Loss,
    Recipe,
    frame_mse,
    keep_first_clean,
    loss_mask,
    noise_like,
    random_index,
    sample_image_start,
    uniform_times,
)
from minwm.stream.rollout import sample_noise, self_rollout
from minwm.stream.solvers import FewStepSampler


@dataclass(frozen=True, kw_only=True)
class DmdConfig:
    kind: ClassVar[str] = "dmd"
    steps: int = 4
    shift: float = 5.0
    """Of the student's times and of the times at which scores are compared."""
    guidance: float = 3.0
    """Guidance of the real score; the critic has none."""
    image_start: float = 1.0
    """Chance, per batch, that the first latent is given."""
    static_cameras: float = 0.0
    """Chance, per batch, that the cameras stand still: players do so often, training clips hardly ever."""
    late_clips: float = 0.0
    """Chance, per batch, that the scored clip comes from deep in a stream, with nothing given: a student drifts where
    scores never look."""
    max_late_chunks: int = 32
    """Chunks, at most, before such a clip."""
    critic_updates: int = 4
    """Critic updates after every student update."""
    t_min: float = 0.02
    t_max: float = 0.98

    def __post_init__(self) -> None:
        for name in ("image_start", "static_cameras", "late_clips"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"dmd.{name}={getattr(self, name)}: a probability lies between 0 and 1")
        if self.max_late_chunks < 1:
            raise ConfigError(f"dmd.max_late_chunks={self.max_late_chunks}: must be at least 1")
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ConfigError(f"dmd: times [{self.t_min}, {self.t_max}] are not an interval inside [0, 1]")


def dmd_gradient(x0: Latents, real: Latents, fake: Latents, frames: Float[Tensor, "b f"]) -> Latents:
    """Descent direction of KL(student || data) at the student's x0, normalised per clip (DMD; paper eq. 3).

    `frames` marks those that the student generated; a given frame gets no gradient and no say in the norm.
    """
    mask = frames[:, :, None, None, None]
    size = ((x0 - real).abs() * mask).sum(dim=(1, 2, 3, 4)) / (mask.expand_as(x0).sum(dim=(1, 2, 3, 4)))
    return (fake - real) * mask / size.clamp_min(1e-6)[:, None, None, None, None]


def surrogate_loss(x0: Latents, step: Latents) -> Float[Tensor, ""]:
    """A scalar whose gradient with respect to x0 is step / x0.numel()."""
    return 0.5 * (x0 - (x0 - step).detach()).square().mean()


def with_static_cameras(clip: Clip, chance: float, generator: torch.Generator) -> Clip:
    """By chance, with all cameras where the first one is: any path will do, for no real video is looked at."""
    cond = clip.cond
    if not chance or cond.w2c is None or not _chance(chance, generator):
        return clip
    return replace(clip, cond=replace(cond, w2c=cond.w2c[:, :1].expand_as(cond.w2c)))


def back_and_forth(cond: Condition, frames: int) -> Condition:
    """The cameras of a clip for a stream of `frames` latents: to the end of the path, back again, and so on."""
    if cond.w2c is None or cond.K is None:
        return cond
    end = cond.w2c.shape[1] - 1
    way = torch.arange(frames, device=cond.w2c.device) % max(2 * end, 1)
    at = torch.minimum(way, 2 * end - way)
    return replace(cond, w2c=cond.w2c[:, at], K=cond.K[:, at])


class Dmd(Recipe):
    """Roles: student (causal, few steps), critic (bidirectional, learns the student's distribution online), and
    real (bidirectional, frozen, guided). Cameras, prompt and first frame condition all of them; no real video enters.
    """

    trained: ClassVar[tuple[str, ...]] = ("student", "critic")
    frozen: ClassVar[tuple[str, ...]] = ("real",)

    cfg: DmdConfig

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        turn = self.student_loss if step % (1 + self.cfg.critic_updates) == 0 else self.critic_loss
        clip = with_static_cameras(clip, self.cfg.static_cameras, generator)
        return turn(sample_image_start(clip, self.cfg.image_start, generator), generator)

    def student_loss(self, clip: Clip, generator: torch.Generator) -> Loss:
        own, x0 = self._rollout(clip, random_index(self.cfg.steps, generator), generator)
        with torch.no_grad():
            x, t = self._noised(x0, own.cond, generator)
            real = self._x0(self.networks["real"], x, t, own.cond, self.cfg.guidance)
            fake = self._x0(self.networks["critic"], x, t, own.cond, 1.0)
            step = dmd_gradient(x0, real, fake, loss_mask(own))
        total = surrogate_loss(x0, step)
        return Loss(total, "student", {"dmd": float(total.detach()), "gap": float((fake - real).abs().mean())})

    def critic_loss(self, clip: Clip, generator: torch.Generator) -> Loss:
        """Flow matching on the student's current videos."""
        with torch.no_grad():
            own, _ = self._rollout(clip, None, generator)
        x0, eps = own.latents, noise_like(own.latents, generator)
        level = self._times(x0, generator)
        x, t = keep_first_clean(interpolate(x0, eps, level), level, own.cond)
        total = frame_mse(self.networks["critic"](x, t, own.cond), velocity(x0, eps), loss_mask(own))
        return Loss(total, "critic", {"critic": float(total.detach())})

    def _rollout(self, clip: Clip, exit_step: int | None, generator: torch.Generator) -> tuple[Clip, Latents]:
        """The student's own clip, with its cameras; and the latents to be scored.

        A late clip begins in a chunk without gradient: scores take the first latent of a clip for a single frame,
        which that one is not.
        """
        b, frames, *shape = clip.latents.shape
        late = (
            1 + random_index(self.cfg.max_late_chunks, generator)
            if self.cfg.late_clips and _chance(self.cfg.late_clips, generator)
            else 0
        )
        before = late * self.geometry.chunk
        cond = back_and_forth(clip.cond, before + frames)
        draws = FewStepSampler(steps=self.cfg.steps).num_noise_samples(self.geometry)
        noise = sample_noise((b, before + frames, *shape), draws, clip.latents, generator)
        times = schedule(self.cfg.steps, self.cfg.shift)[:-1]
        student, ungraded = self.networks["student"], late + 1 if late else 0
        x, x0 = self_rollout(student, noise, cond, self.geometry, times, exit_step, ungraded)
        shown = cond.frames(before, before + frames)
        return Clip(x[:, before:], replace(shown, first_latent=None) if late else shown), x0[:, before:]

    def _times(self, x: Latents, generator: torch.Generator) -> Times:
        """One time per clip, for all frames."""
        t = uniform_times(len(x), self.cfg.shift, x, generator).clamp(self.cfg.t_min, self.cfg.t_max)
        return t[:, None].expand(x.shape[:2])

    def _noised(self, x0: Latents, cond: Condition, generator: torch.Generator) -> tuple[Latents, Times]:
        level = self._times(x0, generator)
        return keep_first_clean(interpolate(x0, noise_like(x0, generator), level), level, cond)

    @staticmethod
    def _x0(net: Backbone, x: Latents, t: Times, cond: Condition, guidance: float) -> Latents:
        v = net(x, t, cond)
        if guidance != 1:
            v = guide(v, net(x, t, cond.unconditional()), guidance)
        return x0_from_velocity(x, v, t)


def _chance(chance: float, generator: torch.Generator) -> bool:
    return bool(torch.rand((), generator=generator, device=generator.device) < chance)
