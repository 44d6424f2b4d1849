"""Models and training states on disk. Everything is JSON and safetensors, and appears whole or not at all.

DIR/model.json, model.safetensors      what sampling needs (DIR may be a run directory)
DIR/state/000400/                      what resuming needs: networks, optimisers, EMA, RNG, place in the data
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minwm.core.camera import intrinsics
from minwm.core.config import UserError, dumps, loads
from minwm.core.media import atomic
from minwm.core.trajectory import Motion
from minwm.nets.attention import Geometry
from minwm.nets.backbone import Backbone
from minwm.nets.codec import Codec, CodecConfig
from minwm.nets.text import WordText
from minwm.nets.wan import WanConfig
from minwm.sampling import Sampler


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another architecture."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All that turns noise, a prompt and a trajectory into video, except the weights."""

    network: WanConfig
    sampler: Sampler
    codec: CodecConfig
    motion: Motion
    """Speeds and frame rate: a key means the same motion for every model trained on them."""
    text: WordText = field(default_factory=WordText)
    latents: int = 9
    """Latent frames per training clip."""
    height: int = 64
    width: int = 64
    fov: float = 70.0
    """Horizontal field of view of the training cameras, in degrees."""
    chunk: int = 2
    first: int = 1
    sink: int = 1
    window: int = 8

    @property
    def geometry(self) -> Geometry:
        tokens = (self.height // self.scale // self.network.patch) * (self.width // self.scale // self.network.patch)
        return Geometry(tokens=tokens, chunk=self.chunk, first=self.first, sink=self.sink, window=self.window)

    @property
    def intrinsics(self) -> Float[np.ndarray, "4"]:
        return intrinsics(self.fov, self.width, self.height)

    @property
    def scale(self) -> int:
        return Codec.scale

    def latent_shape(self, batch: int, latents: int | None = None) -> tuple[int, int, int, int, int]:
        frames = latents or self.latents
        return batch, frames, self.network.channels, self.height // self.scale, self.width // self.scale


@dataclass(frozen=True)
class Model:
    """A network with what it needs around it."""

    config: ModelConfig
    net: Backbone
    codec: Codec


def save_model(folder: Path, config: ModelConfig, net: nn.Module, codec: nn.Module) -> None:
    """Write a folder that `load_model` reads. The config is written last: without it the folder is no model."""
    _save(folder / "codec.safetensors", codec.state_dict())
    _save(folder / "model.safetensors", net.state_dict())
    _write_text(folder / "model.json", dumps(config))


def load_model(folder: Path) -> Model:
    config = load_config(folder)
    net, codec = config.network.build(), config.codec.build()
    load_weights(net, folder / "model.safetensors")
    load_weights(codec, folder / "codec.safetensors")
    return Model(config, net.eval().requires_grad_(False), codec.eval().requires_grad_(False))


def load_config(folder: Path) -> ModelConfig:
    path = folder / "model.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder} holds no model (no model.json); name a folder that training or the pipeline made"
        )
    return loads(ModelConfig, path.read_text())


def save_codec(folder: Path, codec: Codec) -> None:
    _save(folder / "codec.safetensors", codec.state_dict())
    _write_text(folder / "codec.json", dumps(codec.cfg))


def load_codec(folder: Path) -> Codec:
    path = folder / "codec.json"
    if not path.exists():
        raise CheckpointError(f"{folder} holds no codec (no codec.json)")
    codec = loads(CodecConfig, path.read_text()).build()
    load_weights(codec, folder / "codec.safetensors")
    return codec.eval().requires_grad_(False)


def load_weights(net: nn.Module, path: Path, may_be_new: tuple[str, ...] = ()) -> list[str]:
    """Load strictly; parameters whose name ends in one of `may_be_new` may be missing, and are listed.

    Those keep their initialisation: this is how a zero-initialised camera branch joins a model without one.
    """
    found, wanted = _load(path), net.state_dict()
    unknown = sorted(set(found) - set(wanted))
    missing = sorted(set(wanted) - set(found))
    new = [key for key in missing if key.endswith(may_be_new)] if may_be_new else []
    wrong = [
        f"{key} is {tuple(found[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in found
        if key in wanted and found[key].shape != wanted[key].shape
    ]
    lost = [key for key in missing if key not in new]
    if unknown or lost or wrong:
        parts = [("unexpected", unknown), ("missing", lost), ("of another shape", wrong)]
        problems = "; ".join(f"{len(keys)} {name}: {', '.join(keys[:3])}" for name, keys in parts if keys)
        raise CheckpointError(f"{path} is of another architecture than {type(net).__name__}: {problems}")
    net.load_state_dict(found, strict=False)
    return new


class States:
    """The training states of a run: complete folders `state/{step}`, of which the newest counts."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "state"

    def latest(self) -> int | None:
        """Steps done in the newest state."""
        steps = [int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdigit()]
        return max(steps, default=None)

    def save(
        self,
        step: int,
        networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        generator: torch.Generator,
        extra: Mapping[str, Any],
    ) -> None:
        """Write the state after `step` steps beside the others, rename it into place, then remove the older ones."""
        target, partial = self.folder / f"{step:06d}", self.folder / f".{step:06d}.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            for role, net in networks.items():
                _save(partial / f"{role}.safetensors", net.state_dict())
            for role, optimizer in optimizers.items():
                _save(partial / f"optimizer-{role}.safetensors", dict(_flat_optimizer(optimizer)))
            _save(partial / "random.safetensors", {"generator": generator.get_state()})
            _write_text(partial / "state.json", json.dumps({"step": step, **extra}))
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in self.folder.glob("[0-9]*"):
            if old != target:
                shutil.rmtree(old)

    def load(
        self,
        step: int,
        networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        generator: torch.Generator,
    ) -> dict[str, Any]:
        """Put everything back; returns `extra`."""
        folder = self.folder / f"{step:06d}"
        for role, net in networks.items():
            load_weights(net, folder / f"{role}.safetensors")
        for role, optimizer in optimizers.items():
            _restore_optimizer(optimizer, _load(folder / f"optimizer-{role}.safetensors"))
        generator.set_state(_load(folder / "random.safetensors")["generator"])
        return json.loads((folder / "state.json").read_text())


def _flat_optimizer(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            yield f"{index}.{name}", value


def _restore_optimizer(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with atomic(path) as temporary:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary)


def _load(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it, or make it again") from error


def _write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text)
