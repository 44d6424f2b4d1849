"""What a training stage is: roles (networks), and a loss that says which role it trains."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import ConfigError
from minwm.core.flow import Latents, Times, interpolate, per_frame, shift, x0_from_velocity
from minwm.core.types import Clip, Condition
from minwm.nets.attention import Geometry
from minwm.nets.backbone import Backbone, Context, teacher_forced


@dataclass(frozen=True)
class Loss:
    total: Float[Tensor, ""]
    trains: str
    """The role whose optimiser steps."""
    logs: dict[str, float]


class Recipe(ABC):
    """One training stage. It holds its networks by role and owns no optimiser, so the loop stays visible."""

    trained: ClassVar[tuple[str, ...]] = ("student",)
    """Roles with an optimiser."""
    frozen: ClassVar[tuple[str, ...]] = ()
    """Roles that never change and are not saved with the run."""

    def __init__(self, cfg: Any, networks: Mapping[str, Backbone], geometry: Geometry) -> None:
        wanted = {*self.trained, *self.frozen}
        if set(networks) != wanted:
            raise ConfigError(f"{type(self).__name__} needs the roles {sorted(wanted)}, not {sorted(networks)}")
        self.cfg, self.networks, self.geometry = cfg, dict(networks), geometry
        for role in self.frozen:
            self.networks[role].requires_grad_(False).eval()

    @property
    def stateful(self) -> dict[str, Backbone]:
        """Networks that training changes, and a checkpoint must hold."""
        return {role: net for role, net in self.networks.items() if role not in self.frozen}

    @abstractmethod
    def loss(self, clip: Clip, step: int, generator: torch.Generator) -> Loss:
        """The loss of one batch; every random draw comes from `generator`."""


def drop_text(cond: Condition, rate: float, generator: torch.Generator) -> Condition:
    """Take prompts away, clip by clip, so that guidance has an unconditional branch."""
    keep = (_uniform(len(cond.text), generator) >= rate).to(cond.text.device)
    return replace(cond, text=torch.where(keep[:, None, None], cond.text, cond.unconditional().text))


def sample_image_start(clip: Clip, chance: float, generator: torch.Generator) -> Clip:
    """The clip with its first frame given, by chance; else that frame is generated too."""
    given = torch.rand((), generator=generator, device=generator.device) < chance
    return clip if given else replace(clip, cond=replace(clip.cond, first_latent=None))


def loss_mask(clip: Clip) -> Float[Tensor, "b f"]:
    """1 for frames that are generated, 0 for a first frame that is given."""
    mask = clip.latents.new_ones(clip.latents.shape[:2])
    if clip.cond.first_latent is not None:
        mask[:, 0] = 0
    return mask


def keep_first_clean(x: Latents, t: Times, cond: Condition) -> tuple[Latents, Times]:
    """Put the clean first latent, at t = 0, in front of a noisy clip."""
    if cond.first_latent is None:
        return x, t
    return torch.cat([cond.first_latent.to(x), x[:, 1:]], 1), torch.cat([torch.zeros_like(t[:, :1]), t[:, 1:]], 1)


def teacher_context(clip: Clip, level: float | Times, generator: torch.Generator) -> Context:
    """The clip as a stream keeps it, at noise `level`; a given first frame is kept as it is."""
    t = loss_mask(clip) * level
    return Context(interpolate(clip.latents, noise_like(clip.latents, generator), t), t)


@torch.no_grad()
def self_conditioned_context(
    net: Backbone, clip: Clip, past: Context, s: float, geometry: Geometry, generator: torch.Generator
) -> Context:
    """The past as the network tells it: its prediction of every chunk from that chunk at a random time, shifted by s.

    A stream lives on what it made itself. A network that has seen such a past beside the true future leads back from
    its errors, where one that has seen the truth alone takes them for the truth.
    """
    t = uniform_times(len(clip.latents), s, clip.latents, generator)[:, None].expand(clip.latents.shape[:2])
    x = interpolate(clip.latents, noise_like(clip.latents, generator), t)
    told = x0_from_velocity(x, teacher_forced(net, past, x, t, clip.cond, geometry), t)
    told = torch.where(per_frame(loss_mask(clip)) > 0, told, clip.latents)
    return Context(interpolate(told, noise_like(told, generator), past.t), past.t)


def frame_mse(a: Latents, b: Latents, weight: Float[Tensor, "b f"]) -> Float[Tensor, ""]:
    """Squared error, averaged within frames and then over frames with weight."""
    return ((a.float() - b.float()).square().mean(dim=(2, 3, 4)) * weight).sum() / (weight > 0).sum().clamp_min(1)


def noise_like(x: Latents, generator: torch.Generator) -> Latents:
    return torch.randn(x.shape, generator=generator, device=generator.device).to(x)


def uniform_times(count: int, s: float, like: Tensor, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Shifted uniform times, one per clip."""
    return shift(_uniform(count, generator), s).to(like)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device)


def random_index(count: int, generator: torch.Generator) -> int:
    """A uniform integer below count."""
    return int(torch.randint(count, (), generator=generator, device=generator.device))
