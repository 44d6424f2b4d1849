"""Models and training states on disk. Everything is JSON and safetensors, and appears whole or not at all.

DIR/model.json, model.safetensors      what sampling needs (DIR may be a run directory)
DIR/state/000400/                      what resuming needs: networks, optimisers, EMA, RNG, place in the data
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from minwm.core.config import choose, dumps, loads
from minwm.core.media import atomic
from minwm.core.runtime import pick_device
from minwm.core.trajectory import Motion
from minwm.core.weights import (
    CheckpointError,
    describe,
    fill,
    mismatches,
    new_folder,
    read_weights,
    write_safetensors,
)
from minwm.formats import Published
from minwm.nets.attention import Geometry
from minwm.nets.backbone import Backbone
from minwm.nets.codec import Codec, CodecConfig, TinyDecoder
from minwm.nets.taehv import TAEHV, Taehv, TaehvConfig
from minwm.nets.text import WordText
from minwm.nets.umt5 import Umt5Text
from minwm.nets.wan import WanConfig
from minwm.nets.wan_vae import WanVae, WanVaeConfig, diffusers_names
from minwm.sampling import Sampler

Prompts = list[str] | Float[Tensor, "b l d"]
"""As text, or encoded already."""
AnyCodecConfig = CodecConfig | WanVaeConfig | TaehvConfig
AnyCodec = Codec | WanVae | Taehv
SQUARE_70 = (0.5 / math.tan(math.radians(35)), 0.5 / math.tan(math.radians(35)))
"""Focal lengths of square pictures, 70 degrees wide."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All that turns noise, a prompt and a trajectory into video, except the weights."""

    network: WanConfig
    sampler: Sampler
    codec: AnyCodecConfig
    motion: Motion
    """Speeds and frame rate: a key means the same motion for every model trained on them."""
    text: WordText | Umt5Text = field(default_factory=WordText)
    negative: str | None = None
    """Prompt of the unconditional branch of guidance; None: states of zeros."""
    latents: int = 9
    """Latent frames per training clip."""
    height: int = 64
    width: int = 64
    focal: tuple[float, float] = SQUARE_70
    """fx / width and fy / height of the training cameras."""
    chunk: int = 2
    first: int = 1
    sink: int = 1
    window: int = 8
    roll: bool = False
    """Sinks follow the window in time (`Geometry.roll`): for streams much longer than training clips."""
    context_noise: float = 0.0
    """Time at which a stream keeps finished chunks (`Geometry.context_noise`)."""
    merged_refresh: bool = False
    """Finished chunks get no pass of their own (`Geometry.merged_refresh`)."""

    @property
    def geometry(self) -> Geometry:
        tokens = (self.height // self.scale // self.network.patch) * (self.width // self.scale // self.network.patch)
        return Geometry(
            tokens=tokens,
            chunk=self.chunk,
            first=self.first,
            sink=self.sink,
            window=self.window,
            roll=self.roll,
            context_noise=self.context_noise,
            merged_refresh=self.merged_refresh,
        )

    @property
    def intrinsics(self) -> Float[np.ndarray, "4"]:
        return np.array([*self.focal, 0.5, 0.5])

    @property
    def scale(self) -> int:
        return self.codec.scale

    def read(self, prompts: Prompts) -> dict[str, Tensor]:
        """Text states of prompts, and of the negative prompt if there is one: parts of a `Condition`."""
        if not isinstance(prompts, Tensor):
            known = [*prompts] if self.negative is None else [*prompts, self.negative]
            prompts = self.text.encode(known)[: len(prompts)]  # all at once: a large encoder is loaded once
        return (
            {"text": prompts} if (null := self.null()) is None else {"text": prompts, "null": null.expand_as(prompts)}
        )

    def null(self) -> Float[Tensor, "l d"] | None:
        """Text states of the negative prompt."""
        return None if self.negative is None else self.text.encode([self.negative])[0]

    def latent_shape(self, batch: int, latents: int | None = None) -> tuple[int, int, int, int, int]:
        frames = latents or self.latents
        return batch, frames, self.network.channels, self.height // self.scale, self.width // self.scale


@dataclass(frozen=True)
class Model:
    """A network with what it needs around it."""

    config: ModelConfig
    net: Backbone
    codec: AnyCodec | TinyDecoder

    def ready(self) -> "Model":
        """The model on this machine's device, in place; on a GPU in bfloat16, which is what its kernels are for."""
        device = pick_device()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        for part in (self.net, self.codec):
            part.to(device, dtype)
        return self


def save_model(folder: Path, config: ModelConfig, net: nn.Module, codec: nn.Module) -> None:
    """Write a folder that `load_model` reads. The config is written last: without it the folder is no model."""
    write_safetensors(folder / "codec.safetensors", codec.state_dict())
    write_safetensors(folder / "model.safetensors", net.state_dict())
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


def adopt(source: Published, config: ModelConfig, codec: Path, target: Path) -> list[str]:
    """Make a model folder of a published transformer and codec; returns sentences about what was chosen.

    `config` says all but the network, which is the file's own; its codec may be another than what `codec` holds
    (`read_codec`). Raises CheckpointError if anything does not fit; then nothing is written.
    """
    if problems := source.mismatches():
        raise CheckpointError(f"{source.weights.path} is no whole network: {describe(problems)}")
    if source.action:
        raise CheckpointError(
            f"{source.weights.path} has {len(source.action)} trained parameters of discrete actions, for which no "
            "network here has a place; --drop-action leaves them out, and changes what it does"
        )
    network = replace(source.config, rounded=config.network.rounded)  # the file does not know how it was run
    codec_config, tensors = read_codec(codec, config.codec)
    if codec_config.channels != source.config.channels:
        raise CheckpointError(
            f"{codec} has latents of {codec_config.channels} channels, {source.weights.path} of "
            f"{source.config.channels}: they do not belong together"
        )
    with new_folder(target) as folder:
        write_safetensors(folder / "codec.safetensors", tensors)
        write_safetensors(folder / "model.safetensors", source.tensors)
        _write_text(folder / "model.json", dumps(replace(config, network=network, codec=codec_config)))
    return list(source.notes)


def read_codec(path: Path, expected: AnyCodecConfig) -> tuple[AnyCodecConfig, dict[str, Tensor]]:
    """Config and tensors, by our names, of a published codec: a Wan VAE in either naming, or a tiny TAEHV."""
    tensors = read_weights(path).tensors
    config = TAEHV.get(path.stem, expected)
    if isinstance(config, WanVaeConfig) and "quant_conv.weight" in tensors:
        names = {theirs: ours for ours, theirs in diffusers_names(config).items()}
        tensors = {names.get(name, name): value for name, value in tensors.items()}
    with torch.device("meta"):
        skeleton = config.build()
    if problems := mismatches(skeleton, tensors):
        raise CheckpointError(f"{path} does not fit {type(skeleton).__name__}: {describe(problems)}")
    return config, tensors


def tiny_decoder(model: Model, name: str, random: bool = False) -> Model:
    """The model with the decoder of a tiny codec: a published file, or of random weights by its name, as `taew2_1`."""
    if random:
        tiny = TAEHV[choose(name, TAEHV, "tiny codec")].build()
    else:
        config, tensors = read_codec(Path(name), model.config.codec)
        tiny = config.build()
        fill(tiny, tensors, Path(name))
    return replace(model, codec=TinyDecoder(model.codec, tiny.eval().requires_grad_(False)))


def save_codec(folder: Path, codec: AnyCodec) -> None:
    write_safetensors(folder / "codec.safetensors", codec.state_dict())
    _write_text(folder / "codec.json", dumps(codec.cfg))


def load_codec(folder: Path) -> AnyCodec:
    """The codec of a codec folder or of a model folder."""
    path = folder / "codec.json"
    if path.exists():
        codec = loads(AnyCodecConfig, path.read_text()).build()
    elif (folder / "model.json").exists():
        codec = load_config(folder).codec.build()
    else:
        raise CheckpointError(f"{folder} holds no codec (neither codec.json nor model.json)")
    load_weights(codec, folder / "codec.safetensors")
    return codec.eval().requires_grad_(False)


def load_weights(net: nn.Module, path: Path, may_be_new: tuple[str, ...] = ()) -> list[str]:
    """Load strictly; parameters whose name ends in one of `may_be_new` may be missing, and are listed.

    Those keep their initialisation: this is how a zero-initialised camera branch joins a model without one.
    """
    return fill(net, _load(path), path, may_be_new)


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
                write_safetensors(partial / f"{role}.safetensors", net.state_dict())
            for role, optimizer in optimizers.items():
                write_safetensors(partial / f"optimizer-{role}.safetensors", dict(_flat_optimizer(optimizer)))
            write_safetensors(partial / "random.safetensors", {"generator": generator.get_state()})
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
