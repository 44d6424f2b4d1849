"""Stage 3, asymmetric distribution matching: causal student, bidirectional scores, the student's own rollouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minwm.control.action import with_action_labels
from minwm.core.config import ConfigError
from minwm.core.flow import Latents, Times, guide, interpolate, shift, velocity, x0_from_velocity
from minwm.core.types import Clip, Condition, Views
from minwm.nets.backbone import Backbone, keep_first_clean
from minwm.recipes.base import ClipConfig, Loss, Recipe, check_probabilities
from minwm.recipes.ops import (
    bernoulli,
    frame_mse,
    loss_mask,
    noise_like,
    random_index,
    random_indices,
    uniform_times,
    with_views,
)
from minwm.store.model import ModelConfig
from minwm.stream.rollout import RolloutOutput, sample_noise, self_rollout
from minwm.stream.solvers import Noise


@dataclass(frozen=True, kw_only=True)
class DmdConfig(ClipConfig):
    """The student's times, and the shift of the times at which scores are compared, are those of `model.sampler`."""

    kind: ClassVar[str] = "dmd"
    trained: ClassVar[tuple[str, ...]] = ("student", "critic")
    frozen: ClassVar[tuple[str, ...]] = ("real",)
    self_rollout: ClassVar[bool] = True
    validates: ClassVar[bool] = False
    guidance: float = 3.0
    """Guidance of the real score; the critic has none."""
    static_cameras: float = 0.0
    """Probability, per batch, that cameras do not move: users stand still often, training clips hardly ever do."""
    long_rollouts: float = 0.0
    """Probability, per batch, that the rollout is longer than the clip and only its end is scored, without an image
    start: against drift in long streams."""
    max_prefix_chunks: int = 32
    """Chunks, at most, before the part of a long rollout that is scored."""
    critic_updates: int = 4
    """Critic updates after every student update."""
    exit_step: Literal["batch", "clip", "step", "last"] = "batch"
    """The denoising step of a rollout that has the gradient: a random one for all clips of a micro-batch, for each
    clip, or for all micro-batches of a training step, as in the release; or always the last one. The more of them an
    update has, the less it varies; a batch in one piece needs the fewest passes."""
    context: RolloutOutput = "final"
    """What chunks of a rollout are given of earlier ones: they are fully denoised, which is what a stream has (HY), or
    predicted at the exit step, where denoising then ends (Wan): a third fewer passes."""
    critic_data: RolloutOutput = "final"
    """What the critic learns from: the student's videos as they are seen, or predicted at a random exit step, as the
    release has it, which is also where scores are compared."""
    t_min: float = 0.02
    """Least time at which scores are compared."""
    t_max: float = 0.98
    """The largest."""
    score_times: Literal["all", "exit"] = "all"
    """Scores are compared at times of the whole range (Wan), or between the time of the exit step and that of the next
    (HY): the noise that the student has removed there. All: coarse errors are seen at every step."""
    regression: float = 0.0
    """Weight of the squared error to the clip's own latents, where the rollout goes along it: for data in which cameras
    and what the stream sees leave nothing open, as views of one place (DMD's regression loss has the teacher's pairs).
    0: no real video enters."""
    normaliser: Literal["clip", "batch"] = "clip"
    """The DMD gradient is divided by the distance to the real score's prediction, of each clip (Wan) or averaged over
    the batch (HY). Clip: no clip outweighs another."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probabilities(self, "static_cameras", "long_rollouts")
        for name in ("max_prefix_chunks", "critic_updates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"dmd.{name}={getattr(self, name)}: must be at least 1")
        if self.regression < 0:
            raise ConfigError(f"dmd.regression={self.regression}: a weight must be at least 0")
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ConfigError(f"dmd: times [{self.t_min}, {self.t_max}] are not an interval inside [0, 1]")
        if self.score_times == "exit" and self.critic_data == "final":
            raise ConfigError("dmd.score_times=exit: final videos have no exit step; set dmd.critic_data=exit")

    @property
    def turn(self) -> tuple[str, ...]:
        return ("student", *["critic"] * self.critic_updates)

    def build(self, model: ModelConfig, networks: Mapping[str, Backbone]) -> "Dmd":
        return Dmd(self, model, networks)

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        _ = model.sampler.times  # an error if it is no few-step sampler


def dmd_gradient(
    x0: Latents, x0_real: Latents, x0_fake: Latents, mask: Float[Tensor, "b f"], per_batch: bool = False
) -> Latents:
    """Gradient of KL(student || data) with respect to the student's x0, normalised per clip (DMD; paper eq. 3).

    `mask` is 1 for frames that the student generated: a given frame has no gradient and no part in the norm. With
    `per_batch` the norms of all clips are averaged.
    """
    generated = mask[:, :, None, None, None].expand_as(x0)
    distance = ((x0 - x0_real).abs() * generated).sum(dim=(1, 2, 3, 4)) / generated.sum(dim=(1, 2, 3, 4))
    distance = distance.mean().expand_as(distance) if per_batch else distance
    return (x0_fake - x0_real) * generated / distance.clamp_min(1e-6)[:, None, None, None, None]


def surrogate_loss(x0: Latents, gradient: Latents) -> Float[Tensor, ""]:
    """A scalar whose gradient with respect to x0 is gradient / x0.numel()."""
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


def standing_still(cond: Condition, frames: int) -> Int[Tensor, " f"]:
    """The latents of a clip that a stream of `frames` latents is at if its camera stays at the first, or at the last of
    those that are given."""
    return torch.arange(frames).clamp_max(max(cond.given, 1) - 1)


def back_and_forth(latents: int, frames: int) -> Int[Tensor, " f"]:
    """The latents of a clip that a stream of `frames` latents is at: along it, at its end back again, and so on."""
    end = latents - 1
    i = torch.arange(frames) % max(2 * end, 1)
    return torch.minimum(i, 2 * end - i)


class SelfRollout(NamedTuple):
    """What of the student's own video is scored."""

    clip: Clip
    x0: Latents
    """Predicted at each clip's exit step, with gradient."""
    truth: Latents
    """What the training clip has there."""
    known: Bool[Tensor, " f"]
    """Where that is so: not where the camera went back, or stood still."""


class Dmd(Recipe[Backbone]):
    """Roles: student (causal, few steps), critic (bidirectional, learns the student's distribution online), and
    real (bidirectional, frozen, guided). Cameras, prompt and first frame condition all of them; no real video enters
    but by `regression`.
    """

    cfg: DmdConfig

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        if clip.views:  # which the student's stream retrieves itself
            more = self.cfg.max_prefix_chunks * self.geometry.chunk if self.cfg.long_rollouts else 0
            clip = self.cfg.sample_part(clip, self.geometry, generator, more)
            clip = replace(clip, cond=clip.cond.without_image())
        else:
            clip = self.cfg.sample_clip(clip, self.geometry, generator)
        role = self.cfg.turn[step % len(self.cfg.turn)]
        return {"student": self.student_loss, "critic": self.critic_loss}[role](clip, step, generator)

    def student_loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        """Equation 3 on the x_0 that the student predicts at a random step of its rollout."""
        exits = self._exit_steps(len(clip.latents), step, generator)
        rollout, x0, truth, known = self._rollout(clip, exits, generator)
        mask = loss_mask(rollout)
        with torch.no_grad():
            x_t, t = self._noised(x0, rollout.cond, exits, generator)
            x0_real = self._predict_x0(self.networks["real"], x_t, t, rollout.cond, self.cfg.guidance)
            x0_fake = self._predict_x0(self.networks["critic"], x_t, t, rollout.cond, 1.0)
            gradient = dmd_gradient(x0, x0_real, x0_fake, mask, self.cfg.normaliser == "batch")
        total = surrogate_loss(x0, gradient)
        parts = {"dmd": total.detach(), "gap": (x0_fake - x0_real).abs().mean()}
        if self.cfg.regression:
            error = frame_mse(x0, truth, mask * known.to(mask))
            total, parts["regression"] = total + self.cfg.regression * error, error.detach()
        return Loss(total, "student", parts)

    def critic_loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        """Flow matching on the student's current videos."""
        final, clips = self.cfg.critic_data == "final", len(clip.latents)
        exits = [None] * clips if final else self._exit_steps(clips, step, generator)
        with torch.no_grad():
            rollout, x0, *_ = self._rollout(clip, exits, generator)
        eps = noise_like(x0, generator)
        t = self._times(x0, exits, generator)
        x_t, t = keep_first_clean(interpolate(x0, eps, t), t, rollout.cond.first_latents)
        total = frame_mse(self.networks["critic"](x_t, t, rollout.cond), velocity(x0, eps), loss_mask(rollout))
        return Loss(total, "critic", {"critic": total.detach()})

    def _exit_steps(self, clips: int, step: int, generator: torch.Generator) -> list[int]:
        """The exit step of every clip of a micro-batch."""
        count = self.sampler.most_steps
        match self.cfg.exit_step:
            case "last":
                return [count - 1] * clips
            case "step":
                return [random_index(count, self.step_generator(step))] * clips
            case per:
                return random_indices(count, clips, per, generator)

    def _rollout(self, clip: Clip, exits: Sequence[int | None], generator: torch.Generator) -> SelfRollout:
        """The student's own clip along the cameras of this one (self-rollout).

        In a long rollout only the end is scored. The first of its chunks has no gradient: the codec's first latent is
        a single frame, which is how the scores see the first latent of any clip, and this one is not. With views the
        first latents are these, and the rest is the student's, which sees views chosen anew for every chunk.
        """
        b, length, *shape = clip.latents.shape
        frames = self.cfg.latents or length
        long = self.cfg.long_rollouts and bernoulli(self.cfg.long_rollouts, generator)
        prefix_chunks = 1 + random_index(self.cfg.max_prefix_chunks, generator) if long else 0
        prefix = prefix_chunks * self.geometry.chunk
        still = clip.cond.w2c is not None and bernoulli(self.cfg.static_cameras, generator)
        path = standing_still(clip.cond, prefix + frames) if still else back_and_forth(length, prefix + frames)
        cond = with_action_labels(clip.cond.at(path))
        known = path.diff(prepend=torch.tensor([-1])) > 0
        samples = self.sampler.num_noise_samples(self.geometry)
        noise = sample_noise((b, prefix + frames, *shape), samples, clip.latents, generator)
        without_grad = prefix_chunks + 1 if long and not clip.views else prefix_chunks
        x, x0 = self._rollout_by_exit(noise, cond, exits, without_grad, clip.views)
        if long:
            cond = with_action_labels(cond.frames(prefix, prefix + frames))
        rollout = Clip(x[:, prefix:], cond, views=clip.views)
        x0, truth, known = x0[:, prefix:], clip.latents[:, path[prefix:]], known[prefix:]
        if clip.views:
            rollout = with_views(rollout, self.geometry.retrieved, generator)
            given = rollout.latents[:, : rollout.cond.given]
            x0, truth = torch.cat([given, x0], dim=1), torch.cat([given, truth], dim=1)
            known = torch.cat([torch.zeros(given.shape[1], dtype=torch.bool), known])
        return SelfRollout(rollout, x0, truth, known)

    def _rollout_by_exit(
        self,
        noise: Noise,
        cond: Condition,
        exits: Sequence[int | None],
        without_grad: int,
        views: Sequence[Views] = (),
    ) -> tuple[Latents, Latents]:
        """`self_rollout` of a batch; clips with the same exit step go together."""
        groups = {exit_step: [i for i, other in enumerate(exits) if other == exit_step] for exit_step in exits}
        parts = [
            self_rollout(
                self.networks["student"], noise[:, clips], cond.clips(clips), self.geometry, self.sampler, exit_step,
                without_grad, self.cfg.context, [views[i] for i in clips] if views else (),
            )
            for exit_step, clips in groups.items()
        ]  # fmt: skip
        places = [i for clips in groups.values() for i in clips]
        order = sorted(range(len(places)), key=places.__getitem__)
        x, x0 = (torch.cat(clips)[order] for clips in zip(*parts, strict=True))
        return x, x0

    def _times(self, x: Latents, exits: Sequence[int | None], generator: torch.Generator) -> Times:
        """One time per clip, for all frames."""
        exit_times = self.cfg.score_times == "exit"
        between = self._exit_interval(exits, generator.device) if exit_times else (0.0, 1.0)
        t = uniform_times(len(x), self.sampler.shift, x, generator, between).clamp(self.cfg.t_min, self.cfg.t_max)
        return t[:, None].expand(x.shape[:2])

    def _exit_interval(self, exits: Sequence[int | None], device: torch.device) -> tuple[Tensor, Tensor]:
        """Times from that of the step after the exit step to its own, before they are shifted."""
        sampler = self.sampler.at_chunk(1)
        unshifted = shift(torch.tensor([*sampler.times, 0.0], device=device), 1 / sampler.shift)
        steps = torch.tensor([self.sampler.step_at_chunk(step, 1) for step in exits if step is not None])
        return unshifted[steps + 1], unshifted[steps]

    def _noised(
        self, x0: Latents, cond: Condition, exits: Sequence[int | None], generator: torch.Generator
    ) -> tuple[Latents, Times]:
        t = self._times(x0, exits, generator)
        return keep_first_clean(interpolate(x0, noise_like(x0, generator), t), t, cond.first_latents)

    @staticmethod
    def _predict_x0(net: Backbone, x_t: Latents, t: Times, cond: Condition, guidance: float) -> Latents:
        v = net(x_t, t, cond)
        if guidance != 1:
            v = guide(v, net(x_t, t, cond.unconditional()), guidance)
        return x0_from_velocity(x_t, v, t)
