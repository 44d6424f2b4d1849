"""Stage 3, asymmetric distribution matching: causal student, bidirectional scores, the student's own rollouts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.core.flow import Latents, Times, guide, interpolate, velocity, x0_from_velocity
from minwm.core.types import Clip, Condition
from minwm.nets.backbone import Backbone, keep_first_clean
from minwm.recipes.base import Loss, Recipe, RecipeConfig, check_probabilities
from minwm.recipes.ops import (
    bernoulli,
    frame_mse,
    loss_mask,
    noise_like,
    random_index,
    sample_image_start,
    uniform_times,
)
from minwm.store.model import ModelConfig
from minwm.stream.rollout import sample_noise, self_rollout


@dataclass(frozen=True, kw_only=True)
class DmdConfig(RecipeConfig):
    """The student's times, and the shift of the times at which scores are compared, are those of `model.sampler`."""

    kind: ClassVar[str] = "dmd"
    trained: ClassVar[tuple[str, ...]] = ("student", "critic")
    frozen: ClassVar[tuple[str, ...]] = ("real",)
    self_rollout: ClassVar[bool] = True
    validates: ClassVar[bool] = False
    guidance: float = 3.0
    """Guidance of the real score; the critic has none."""
    image_start: float = 1.0
    """Probability, per batch, that the first latent is given."""
    static_cameras: float = 0.0
    """Probability, per batch, that cameras do not move: users stand still often, training clips hardly ever do."""
    long_rollouts: float = 0.0
    """Probability, per batch, that the rollout is longer than the clip and only its end is scored, without an image
    start: against drift in long streams."""
    max_prefix_chunks: int = 32
    """Chunks, at most, before the part of a long rollout that is scored."""
    critic_updates: int = 4
    """Critic updates after every student update."""
    t_min: float = 0.02
    t_max: float = 0.98

    def __post_init__(self) -> None:
        check_probabilities(self, "image_start", "static_cameras", "long_rollouts")
        for name in ("max_prefix_chunks", "critic_updates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"dmd.{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ConfigError(f"dmd: times [{self.t_min}, {self.t_max}] are not an interval inside [0, 1]")

    @property
    def turn(self) -> tuple[str, ...]:
        return ("student", *["critic"] * self.critic_updates)

    def build(self, model: ModelConfig, networks: Mapping[str, Backbone]) -> "Dmd":
        return Dmd(self, model, networks)

    def check(self, model: ModelConfig) -> None:
        _ = model.sampler.times  # an error if it is no few-step sampler


def dmd_gradient(x0: Latents, x0_real: Latents, x0_fake: Latents, mask: Float[Tensor, "b f"]) -> Latents:
    """Gradient of KL(student || data) with respect to the student's x0, normalised per clip (DMD; paper eq. 3).

    `mask` is 1 for frames that the student generated: a given frame has no gradient and no part in the norm.
    """
    generated = mask[:, :, None, None, None].expand_as(x0)
    distance = ((x0 - x0_real).abs() * generated).sum(dim=(1, 2, 3, 4)) / generated.sum(dim=(1, 2, 3, 4))
    return (x0_fake - x0_real) * generated / distance.clamp_min(1e-6)[:, None, None, None, None]


def surrogate_loss(x0: Latents, gradient: Latents) -> Float[Tensor, ""]:
    """A scalar whose gradient with respect to x0 is gradient / x0.numel()."""
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


def with_static_cameras(clip: Clip, probability: float, generator: torch.Generator) -> Clip:
    """With that probability, the clip with all cameras where the first one is: DMD never looks at its frames."""
    cond = clip.cond
    if not probability or cond.w2c is None or not bernoulli(probability, generator):
        return clip
    return replace(clip, cond=replace(cond, w2c=cond.w2c[:, :1].expand_as(cond.w2c)))


def back_and_forth(cond: Condition, frames: int) -> Condition:
    """The cameras of a clip for a stream of `frames` latents: to the end of the path, back again, and so on."""
    if cond.w2c is None or cond.K is None:
        return cond
    end = cond.w2c.shape[1] - 1
    i = torch.arange(frames, device=cond.w2c.device) % max(2 * end, 1)
    i = torch.minimum(i, 2 * end - i)
    return replace(cond, w2c=cond.w2c[:, i], K=cond.K[:, i])


class Dmd(Recipe[Backbone]):
    """Roles: student (causal, few steps), critic (bidirectional, learns the student's distribution online), and
    real (bidirectional, frozen, guided). Cameras, prompt and first frame condition all of them; no real video enters.
    """

    cfg: DmdConfig

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        clip = with_static_cameras(clip, self.cfg.static_cameras, generator)
        clip = sample_image_start(clip, self.cfg.image_start, generator)
        role = self.cfg.turn[step % len(self.cfg.turn)]
        return {"student": self.student_loss, "critic": self.critic_loss}[role](clip, generator)

    def student_loss(self, clip: Clip, generator: torch.Generator) -> Loss:
        """Equation 3 on the x_0 that the student predicts at a random step of its rollout."""
        exit_step = random_index(len(self.sampler.times), generator)
        rollout, x0 = self._rollout(clip, exit_step, generator)
        with torch.no_grad():
            x_t, t = self._noised(x0, rollout.cond, generator)
            x0_real = self._predict_x0(self.networks["real"], x_t, t, rollout.cond, self.cfg.guidance)
            x0_fake = self._predict_x0(self.networks["critic"], x_t, t, rollout.cond, 1.0)
            gradient = dmd_gradient(x0, x0_real, x0_fake, loss_mask(rollout))
        total = surrogate_loss(x0, gradient)
        return Loss(total, "student", {"dmd": total.detach(), "gap": (x0_fake - x0_real).abs().mean()})

    def critic_loss(self, clip: Clip, generator: torch.Generator) -> Loss:
        """Flow matching on the student's current videos."""
        with torch.no_grad():
            rollout, _ = self._rollout(clip, None, generator)
        x0, eps = rollout.latents, noise_like(rollout.latents, generator)
        t = self._times(x0, generator)
        x_t, t = keep_first_clean(interpolate(x0, eps, t), t, rollout.cond)
        total = frame_mse(self.networks["critic"](x_t, t, rollout.cond), velocity(x0, eps), loss_mask(rollout))
        return Loss(total, "critic", {"critic": total.detach()})

    def _rollout(self, clip: Clip, exit_step: int | None, generator: torch.Generator) -> tuple[Clip, Latents]:
        """The student's own clip, and its x_0 predicted at `exit_step` with gradient (self-rollout, Self-Forcing).

        In a long rollout only the end is scored. The first of its chunks has no gradient: the codec's first latent is
        a single frame, which is how the scores see the first latent of any clip, and this one is not.
        """
        b, frames, *shape = clip.latents.shape
        long = self.cfg.long_rollouts and bernoulli(self.cfg.long_rollouts, generator)
        prefix_chunks = 1 + random_index(self.cfg.max_prefix_chunks, generator) if long else 0
        prefix = prefix_chunks * self.geometry.chunk
        cond = back_and_forth(clip.cond, prefix + frames)
        samples = self.sampler.num_noise_samples(self.geometry)
        noise = sample_noise((b, prefix + frames, *shape), samples, clip.latents, generator)
        without_grad = prefix_chunks + 1 if long else 0
        student, times = self.networks["student"], self.sampler.times
        x, x0 = self_rollout(student, noise, cond, self.geometry, times, exit_step, without_grad)
        scored = cond.frames(prefix, prefix + frames)
        return Clip(x[:, prefix:], replace(scored, first_latent=None) if long else scored), x0[:, prefix:]

    def _times(self, x: Latents, generator: torch.Generator) -> Times:
        """One time per clip, for all frames."""
        t = uniform_times(len(x), self.sampler.shift, x, generator).clamp(self.cfg.t_min, self.cfg.t_max)
        return t[:, None].expand(x.shape[:2])

    def _noised(self, x0: Latents, cond: Condition, generator: torch.Generator) -> tuple[Latents, Times]:
        t = self._times(x0, generator)
        return keep_first_clean(interpolate(x0, noise_like(x0, generator), t), t, cond)

    @staticmethod
    def _predict_x0(net: Backbone, x_t: Latents, t: Times, cond: Condition, guidance: float) -> Latents:
        v = net(x_t, t, cond)
        if guidance != 1:
            v = guide(v, net(x_t, t, cond.unconditional()), guidance)
        return x0_from_velocity(x_t, v, t)
