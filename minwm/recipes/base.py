"""The contract of a training stage.

A config (`RecipeConfig`) says what can be said before there are networks: roles, data, an example batch. It builds its
recipe (`Recipe`), which holds the networks and computes the loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minwm.control.action import with_action_labels
from minwm.core.config import ConfigError
from minwm.core.runtime import generator as make_generator
from minwm.core.types import Clip, Condition, Views
from minwm.data.dataset import BatchSource, ShardDataset, Split
from minwm.data.noise import PoseNoise
from minwm.data.views import draw_views, read_views
from minwm.nets.backbone import Backbone
from minwm.nets.chunks import StreamConfig
from minwm.recipes.ops import random_part, sample_start, with_views
from minwm.store.card import write_card
from minwm.store.folder import load_codec, save_model
from minwm.store.model import AnyCodec, ModelConfig

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Loss:
    """The loss of one batch."""

    total: Float[Tensor, ""]
    trains: str
    """The role whose optimiser steps."""
    logs: dict[str, Float[Tensor, ""]]
    """Values for the log, without gradient; the loop reads them from the device once per step."""


@dataclass(frozen=True, kw_only=True)
class RecipeConfig(ABC):
    """Hyper-parameters of a training stage, and what the loop, the pipeline and the memory plan need to know of it."""

    kind: ClassVar[str]
    """Its name in configs and on the command line."""
    trained: ClassVar[tuple[str, ...]] = ("student",)
    """Roles with an optimiser; roles are fields of `Init`."""
    frozen: ClassVar[tuple[str, ...]] = ()
    """Roles that never change and are not saved with the run."""
    trains_backbone: ClassVar[bool] = True
    """False for a codec: it has no blocks to checkpoint or compile, no FLOPs in closed form, and makes no videos."""
    self_rollout: ClassVar[bool] = False
    """The student generates its own training clips, through the KV cache of a stream."""
    needs_trajectories: ClassVar[bool] = False
    """Its clips carry states of a teacher's ODE, which `collect_states` computes before the stage."""
    validates: ClassVar[bool] = True
    """The loss is a distance, so its value on clips that are never trained on means something."""
    weights_file: ClassVar[str] = "model.safetensors"
    """The file in the folder of a role that holds its network."""
    data_command: ClassVar[str] = "minwm data encode"
    """What makes the data folder that it reads, for errors."""

    @property
    def teacher_forced(self) -> bool:
        """Networks see the clean clip and the noisy one in one sequence, twice as long."""
        return False

    @property
    def turn(self) -> tuple[str, ...]:
        """The roles that successive steps train; step i trains turn[i % len(turn)]."""
        return self.trained

    @abstractmethod
    def build(self, model: ModelConfig, networks: Mapping[str, Any]) -> "Recipe[Any]":
        """The recipe for a model, with a network in every role."""

    def check(self, model: ModelConfig) -> None:  # noqa: B027  (few stages have anything to check)
        """Raise ConfigError if the stage cannot train this model."""

    def network(self, model: ModelConfig) -> nn.Module:
        """A fresh network for any role."""
        return model.network.build()

    def dataset(self, path: Path, split: Split, model: ModelConfig, noise: PoseNoise | None = None) -> BatchSource[Any]:
        """What batches are drawn from: latent shards. `noise` adds errors to their cameras."""
        return self.shards(path, split, model, noise)

    def shards(self, path: Path, split: Split, model: ModelConfig, noise: PoseNoise | None = None) -> ShardDataset:
        """Latent shards of the model's clips; DataError for others."""
        null, spec, views = self.null_text(model), model.clip_spec, self.known_views(model)
        return ShardDataset(path, split, image_start=model.image_start, null=null, noise=noise, spec=spec, views=views)

    def known_views(self, model: ModelConfig) -> Mapping[str, Views] | None:
        """Of the worlds of training clips, by world."""
        return None

    def null_text(self, model: ModelConfig) -> Float[Tensor, "l d"] | None:
        """Text states of the unconditional branch, here that of a teacher's guidance; None: zeros."""
        return model.negative_text()

    def clip_latents(self, model: ModelConfig) -> int:
        """Latents of each clip that a step takes."""
        return model.latents

    def example_batch(self, model: ModelConfig, batch: int) -> Any:
        """A batch of noise, with the shapes that the dataset gives."""
        return random_clip(model, batch, model.latents)

    def describe_clip(self, model: ModelConfig) -> str:
        """Size of one training clip in words, for the memory plan."""
        both = ", clean and noisy" if self.teacher_forced else ""
        return f"{self.clip_latents(model)} latents x {model.geometry.tokens:,} tokens{both}"

    def collect_states(
        self, teacher: Backbone, clip: Clip, model: ModelConfig, generator: torch.Generator
    ) -> Float[Tensor, "k b f c h w"]:
        """`Clip.trajectory` of a clip, for stages that need it."""
        raise ConfigError(f"recipe {self.kind!r} needs no trajectories")

    def save(self, out: Path, model: ModelConfig, student: Any, codec: AnyCodec | None) -> None:
        """Write the trained student as a model folder, with the codec of its latents and a model card."""
        assert codec is not None  # the loop is not entered without
        latents = model.latents if model.sampler.causal else self.clip_latents(model)  # a stream has no length
        save_model(out, replace(model, codec=codec.cfg, latents=latents), student, codec)
        write_card(out)


@dataclass(frozen=True, kw_only=True)
class ClipConfig(RecipeConfig):
    """Fields of stages that take any part of a clip, which starts with nothing, an image, or a video that is given."""

    latents: int = 0
    """Latents of a random part of each clip that a step takes, for many quick steps at first; 0: the whole clip. The
    first latent of a part from the middle stands for as many frames as the others; in streams with a sink it is any
    before these, as the sink is later on."""
    latents_apart: int = 1
    """Most latents from one of a part to the next, drawn per batch. Neighbours are mostly copies of each other; far
    views teach what is where, which a network needs that shall know one place."""
    views: Path | None = None
    """Latent shards, the first latents of which are pictures of the clips' worlds from known poses; or of the place
    the folder of the codec, with which they are drawn when they are needed. Clips then go on from the
    `stream.retrieved` of them that are nearest, as streams do that remember them."""
    image_start: float = 1.0
    """Probability, per batch, that the first latent is given clean; otherwise it is generated too."""
    video_start: float = 0.0
    """Probability, per batch, that a random number of the first chunks is given clean. Autoregressive models go on from
    a video without it, as every chunk is trained after real ones; bidirectional ones, and scores, have to learn it."""

    def __post_init__(self) -> None:
        check_probabilities(self, "image_start", "video_start")
        if self.latents_apart < 1 or (self.latents_apart > 1 and not self.latents):
            raise ConfigError(
                f"{self.kind}.latents_apart={self.latents_apart}: give at least 1, and 1 for whole clips (latents=0)"
            )

    def check(self, model: ModelConfig) -> None:
        if self.views and not model.stream.retrieved:
            raise ConfigError(f"{self.kind}.views={self.views}: set model.stream.retrieved, how many a chunk sees")
        lead, chunk = model.stream.first_chunk_frames, model.stream.chunk
        step = chunk if self.teacher_forced or self.self_rollout else 1
        fits = range(lead + chunk, model.latents + 1, step)
        if self.latents and self.latents not in fits:
            raise ConfigError(f"{self.kind}.latents={self.latents}: give 0, or one of {', '.join(map(str, fits))}")
        if self.latents and model.image_start and "image_states" in model.text.shapes:
            raise ConfigError(
                f"{self.kind}.latents={self.latents}: a part of a clip starts with another frame than the one whose "
                "states its shard holds; give 0, for whole clips"
            )
        if self.video_start and len(model.stream.chunks(self.clip_latents(model))) < 2:
            raise ConfigError(
                f"{self.kind}.video_start={self.video_start}: a clip of {self.clip_latents(model)} latents is a single "
                "chunk, after which nothing is left to generate; give 0, or longer clips"
            )

    def clip_latents(self, model: ModelConfig) -> int:
        return (self.latents or model.latents) + (model.stream.retrieved if self.views else 0)

    def known_views(self, model: ModelConfig) -> Mapping[str, Views] | None:
        if not self.views:
            return None
        drawn = model.scenes == "place" and not (self.views / "manifest.json").exists()
        return draw_views(load_codec(self.views), model.clip_spec) if drawn else read_views(self.views, model.clip_spec)

    def example_batch(self, model: ModelConfig, batch: int) -> Clip:
        clip, seen = super().example_batch(model, batch), model.stream.retrieved
        if not self.views:
            return clip
        latents = dict(enumerate(clip.latents[:1, 0].expand(seen, -1, -1, -1)))
        known = Views.of(latents, torch.eye(4).repeat(seen, 1, 1), torch.ones(seen, 4))
        return replace(clip, views=(known,) * batch)

    def sample_part(self, clip: Clip, stream: StreamConfig, generator: torch.Generator, more: int = 0) -> Clip:
        """A random part of the clip, or all of it; with so many latents more, as far as the clip is long."""
        if not self.latents:
            return clip
        frames = min(self.latents + more, clip.latents.shape[1])
        return random_part(clip, frames, generator, self.latents_apart, sink=stream.sink > 0)

    def sample_clip(self, clip: Clip, stream: StreamConfig, generator: torch.Generator) -> Clip:
        """A random part of the clip, or all of it, with what is given of it."""
        clip = self.sample_part(clip, stream, generator)
        if clip.views:
            return with_views(clip, stream.retrieved, generator)
        return sample_start(clip, self.image_start, self.video_start, stream, generator)


class Recipe(ABC, Generic[Network]):
    """Networks by role, and the loss that trains them. It owns no optimiser, so the loop stays visible."""

    seed = 0
    """Of the run."""

    def __init__(self, cfg: Any, model: ModelConfig, networks: Mapping[str, Network]) -> None:
        roles = {*cfg.trained, *cfg.frozen}
        if set(networks) != roles:
            raise ConfigError(f"recipe {cfg.kind!r} needs the roles {sorted(roles)}, not {sorted(networks)}")
        self.cfg, self.geometry, self.sampler, self.networks = cfg, model.geometry, model.sampler, dict(networks)
        for role in cfg.frozen:
            self.networks[role].requires_grad_(False).eval()

    @property
    def stateful(self) -> dict[str, Network]:
        """Networks that training changes, and a checkpoint must hold."""
        return {role: net for role, net in self.networks.items() if role not in self.cfg.frozen}

    def fit(self, data: BatchSource[Any]) -> None:
        """Set what has a closed form, from the training data, before the first step of a student that starts fresh."""

    @abstractmethod
    def loss(self, clip: Any, step: int, generator: torch.Generator) -> Loss:
        """The loss of one micro-batch. Random draws come from `generator`, but those that all micro-batches of a step
        share from `step_generator`: other processes may have the others."""

    def step_generator(self, step: int) -> torch.Generator:
        return make_generator(self.seed, "step", step)


def random_clip(model: ModelConfig, batch: int, latents: int) -> Clip:
    """Noise with the shapes of training clips; all cameras are equal."""
    x = torch.randn(model.latent_shape(batch, latents))
    states = {name: torch.randn(batch, *shape) for name, shape in model.text.shapes.items()}
    w2c, K = torch.eye(4).repeat(batch, latents, 1, 1), torch.full((batch, latents, 4), 0.5)
    cond = with_action_labels(Condition(**states, w2c=w2c, K=K, first_latents=x[:, :1]))
    return Clip(x, cond if model.image_start else cond.without_image())


def check_probabilities(cfg: RecipeConfig, *names: str) -> None:
    """Raise ConfigError unless those fields lie between 0 and 1."""
    for name in names:
        if not 0 <= getattr(cfg, name) <= 1:
            raise ConfigError(f"{cfg.kind}.{name}={getattr(cfg, name)}: a probability lies between 0 and 1")
