"""Stage 2b, causal consistency distillation: neighbours on a PF-ODE trajectory agree on its end (paper eq. 2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from minwm.core.config import ConfigError
from minwm.core.flow import Latents, Times, euler, guide, interpolate, schedule, x0_from_velocity
from minwm.core.types import Clip, Condition
from minwm.nets.backbone import Backbone, Context, teacher_forced
from minwm.nets.chunks import Geometry
from minwm.nets.lora import copy_network, update_average
from minwm.recipes.base import ClipConfig, Loss, Recipe, check_probabilities
from minwm.recipes.ops import (
    Per,
    bernoulli,
    frame_mse,
    loss_mask,
    noise_like,
    random_indices,
    self_conditioned_context,
    teacher_context,
)
from minwm.store.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(ClipConfig):
    kind: ClassVar[str] = "consistency"
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    grid: int = 50
    """Steps of the discretised ODE."""
    shift: float = 5.0
    """Timestep shift of the discretised ODE."""
    guidance: float = 3.0
    """Guidance of the teacher's ODE step."""
    self_conditioning: float = 0.0
    """Probability, per batch, that the context of chunks is what the student streams itself, not the real clip."""
    target_decay: float = 0.99
    """EMA decay of the target network, from the first step on."""
    index: Per = "batch"
    """One pair of times for all clips of a micro-batch, as the release has it, or one for each: they differ only where
    these hold more than one clip."""
    reaches_zero: bool = True
    """The last pair of times ends at t = 0, the only one that says what a trajectory's end is; v0.1 left it out for
    Wan."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probabilities(self, "self_conditioning")
        if self.grid < (least := 1 if self.reaches_zero else 2):
            raise ConfigError(f"consistency.grid={self.grid}: at least {least} is needed")

    @property
    def teacher_forced(self) -> bool:
        return True

    def build(self, model: ModelConfig, networks: Mapping[str, Backbone]) -> "Consistency":
        return Consistency(self, model, networks)


def teacher_velocity(
    teacher: Backbone, context: Context, cond: Condition, x_t: Latents, t: Times, guidance: float, geometry: Geometry
) -> Latents:
    """Guided velocity of the autoregressive teacher: all chunks in one pass, given the real earlier ones."""
    if guidance == 1:
        return teacher_forced(teacher, context, x_t, t, cond, geometry)
    branches = Condition.stack(cond, cond.unconditional())
    latents, context_t, x_t, t = (torch.cat([y, y]) for y in (context.latents, context.t, x_t, t))
    v = teacher_forced(teacher, Context(latents, context_t), x_t, t, branches, geometry)
    v_cond, v_uncond = v.chunk(2)
    return guide(v_cond, v_uncond, guidance)


class Consistency(Recipe[Backbone]):
    """|| f(x_i, t_i) - sg f_target(x_{i+1}, t_{i+1}) ||^2, f(x, t) = x - t v, all given the real earlier chunks.

    x_{i+1} is one guided Euler step of the teacher from x_i; the last pair ends at t = 0, where f is the identity.
    """

    cfg: ConsistencyConfig

    def __init__(self, cfg: ConsistencyConfig, model: ModelConfig, networks: Mapping[str, Backbone]) -> None:
        super().__init__(cfg, model, networks)
        self.times = torch.tensor(schedule(cfg.grid, cfg.shift), dtype=torch.float64)
        self.target_step: int | None = None
        self.networks["target"] = copy_network(self.networks["student"]).requires_grad_(False).eval()

    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        student, teacher, target = (self.networks[role] for role in ("student", "teacher", "target"))
        if step != self.target_step:  # once per step, however many micro-batches it has
            update_average(target, student, self.cfg.target_decay)  # nothing before the student's first step
            self.target_step = step
        clip = self.cfg.sample_clip(clip, self.geometry, generator)
        t, t_next = self._sample_times(clip.latents, generator)
        eps = noise_like(clip.latents, generator)
        x_t = interpolate(clip.latents, eps, t.to(eps))
        if bernoulli(self.cfg.self_conditioning, generator):
            context = self_conditioned_context(student, clip, self.cfg.shift, self.geometry, generator)
        else:
            context = teacher_context(clip, self.geometry, generator)
        with torch.no_grad():
            v = teacher_velocity(teacher, context, clip.cond, x_t, t.to(x_t), self.cfg.guidance, self.geometry)
            x_next = euler(x_t, v, t, t_next)
            x0_target = self._consistency_function(target, context, clip.cond, x_next, t_next)
        x0 = self._consistency_function(student, context, clip.cond, x_t, t)
        total = frame_mse(x0, x0_target, loss_mask(clip))
        return Loss(total, "student", {"loss": total.detach()})

    def _sample_times(self, x: Latents, generator: torch.Generator) -> tuple[Times, Times]:
        """A random pair of neighbours on the grid, in float64: their difference is small."""
        pairs = self.cfg.grid if self.cfg.reaches_zero else self.cfg.grid - 1
        i = torch.tensor(random_indices(pairs, len(x), self.cfg.index, generator))
        t, t_next = (self.times[k][:, None].expand(x.shape[:2]) for k in (i, i + 1))
        return t, t_next

    def _consistency_function(self, net: Backbone, context: Context, cond: Condition, x: Latents, t: Times) -> Latents:
        """f(x, t): the end of the trajectory through x."""
        times = t.to(x)
        return x0_from_velocity(x, teacher_forced(net, context, x, times, cond, self.geometry), times)
