"""Collecting a teacher's ODE trajectories: its model folder and latent shards in, shards with trajectories out."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.core.config import ConfigError, to_dict
from minwm.core.files import locked_together
from minwm.core.runtime import generator, pick_device
from minwm.core.types import Clip
from minwm.data.encode import identity
from minwm.data.trajectories import collect_trajectories
from minwm.recipes.ode import OdeConfig
from minwm.store.model import Model, ModelConfig
from minwm.stream.solvers import FewStepSampler


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Which trajectories are collected, and how."""

    clips: int = 64
    """The first so many training clips."""
    guidance: float = OdeConfig.guidance
    """Guidance of the teacher along the trajectory."""
    ode_steps: int = OdeConfig.ode_steps
    """Euler steps of the teacher."""
    sampler: FewStepSampler = field(default_factory=FewStepSampler)
    """The student's, at whose times states are kept; on the command line with the teacher's shift unless it is set."""
    views: Path | None = None
    """Pictures of the clips' worlds that the teacher remembers (`ClipConfig.views`)."""
    batch: int = 16
    """Clips at once, and in a shard."""
    seed: int = 0
    """Of the noise that trajectories start from."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products and attention (autocast)."""

    def __post_init__(self) -> None:
        for name in ("clips", "ode_steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"trajectories.{name}={getattr(self, name)}: must be at least 1")


def collect(teacher: Model, latents: Path, out: Path, cfg: CollectConfig, student: ModelConfig | None = None) -> None:
    """Write the trajectories of a teacher along training clips to `out`, resuming whatever is there.

    The student's config is by default the teacher's with `cfg.sampler`. Raises ConfigError for a teacher that is not
    autoregressive or has another codec than the clips, DataError for clips of another kind or if `out` holds anything
    else, and UserError while another process writes there. Under torchrun every process collects its part.
    """
    if not teacher.config.sampler.causal:
        raise ConfigError("the teacher is a bidirectional model; trajectories are those of an autoregressive one")
    recipe = OdeConfig(guidance=cfg.guidance, ode_steps=cfg.ode_steps, views=cfg.views)
    model = replace(student or teacher.config, sampler=cfg.sampler)
    source, device = recipe.shards(latents, "train", model), pick_device()
    made, has = source.manifest["codec"]["hash"], identity(teacher.codec)["hash"]
    if made != has:
        raise ConfigError(
            f"{latents} was encoded by the codec {made}, the teacher has {has}; encode the clips with that"
        )
    net = teacher.net.to(device)

    def states(clip: Clip, number: int) -> Float[Tensor, "k b f c h w"]:
        noise = generator(cfg.seed, "collect", number, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16"):
            return recipe.collect_states(net, clip.to(device), model, noise)

    with locked_together(out):
        about = {"teacher": identity(teacher.net), **to_dict(cfg), "stream": to_dict(model.stream)}
        collect_trajectories(source, out, cfg.clips, states, about, batch=cfg.batch)
