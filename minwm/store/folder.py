"""Models on disk. Everything is JSON and safetensors, and appears whole or not at all.

DIR/model.json, model.safetensors      what sampling needs (DIR may be a run directory)
DIR/state/000400/                      what resuming needs: networks, optimisers, EMA, place in the data
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minwm.core.config import dumps, lookup
from minwm.core.files import new_folder, read_config, read_json, write_text
from minwm.core.weights import (
    ROLES,
    CheckpointError,
    describe_mismatches,
    load_safetensors,
    load_tensors,
    mismatches,
    read_weights,
    write_safetensors,
)
from minwm.families.base import Origin, Published
from minwm.nets.codec import TinyDecoder
from minwm.nets.taehv import TAEHV
from minwm.store.adapter import Adapter
from minwm.store.layouts import (
    AnyCodec,
    AnyCodecConfig,
    NetworkConfig,
    describe,
    origin,
    published_origin,
    rename_codec,
)
from minwm.store.model import Model, ModelConfig

FILES = ("model.json", "model.safetensors", "codec.safetensors")
"""What a model folder is made of; a run directory holds more, which stays at home."""
ORIGIN = "origin.json"
"""Beside converted weights: where they were published, and under which licence (`families.base.Origin`)."""


def save_model(folder: Path, config: ModelConfig, net: nn.Module, codec: nn.Module) -> None:
    """Write a folder that `load_model` reads. The config is written last: without it the folder is no model."""
    write_safetensors(folder / "codec.safetensors", codec.state_dict())
    write_safetensors(folder / "model.safetensors", net.state_dict())
    write_text(folder / "model.json", dumps(config))


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
    return read_config(ModelConfig, path)


def save_published(target: Path, config: ModelConfig, published: Published, codec: Path) -> None:
    """Write a model folder from a published transformer and a published codec.

    `config` gives everything but the network, whose architecture is the file's own; its codec may be another than
    what `codec` holds (`read_codec`). Raises CheckpointError if anything does not fit; then nothing is written.
    """
    file = published.weights.path
    if problems := published.mismatches():
        raise CheckpointError(f"{file} is no whole network: {describe_mismatches(problems)}")
    network = run_as(published, config.network)
    codec_config, tensors = read_codec(codec, config)
    if codec_config.channels != network.channels:
        raise CheckpointError(
            f"{codec} has latents of {codec_config.channels} channels, {file} of {network.channels}: they do not "
            "belong together"
        )
    with new_folder(target) as folder:
        write_safetensors(folder / "codec.safetensors", tensors)
        write_safetensors(folder / "model.safetensors", published.tensors)
        if source := published_origin(published):
            write_text(folder / ORIGIN, dumps(source))
        write_text(folder / "model.json", dumps(replace(config, network=network, codec=codec_config)))


def save_merged(target: Path, source: Path, adapter: Adapter) -> None:
    """Write a model folder with the weights of another one and a LoRA added; ConfigError if that is of another base."""
    model, known = load_model(source), weights_origin(source)
    model.net.load_state_dict(adapter.merge_into(model.net.state_dict()))
    with new_folder(target) as folder:
        if known:
            write_text(folder / ORIGIN, dumps(known))
        save_model(folder, model.config, model.net, model.codec)


def run_as(published: Published, network: NetworkConfig) -> NetworkConfig:
    """The config of a published network with what files do not say of it, as in `network`."""
    if network.kind != published.config.kind:
        raise CheckpointError(
            f"{published.weights.path} is of the family {published.config.kind}, the preset of {network.kind}; give "
            "another preset"
        )
    return replace(published.config, **{name: vars(network)[name] for name in network.unpublished})


def weights_origin(folder: Path) -> Origin | None:
    """Where the weights were published that a model was trained from, from student to student; None if nowhere.

    Of a folder without records it is what its sizes say. Whoever makes data with a model asks for its licence here.
    """
    seen = set[Path]()  # students may form a circle
    while folder not in seen and (record := folder / "run.json").exists():
        seen.add(folder)
        folder = Path(read_json(record)["run"]["init"]["student"] or folder)
    if folder in seen or not (folder / "model.json").exists():
        return None
    path = folder / ORIGIN
    return read_config(Origin, path) if path.exists() else origin(load_config(folder).network)


def read_codec(path: Path, model: ModelConfig) -> tuple[AnyCodecConfig, dict[str, Tensor]]:
    """Config and tensors, by our names, of a published codec: a tiny TAEHV by its file's name, else the model's own.

    Raises CheckpointError if the tensors are not those of that config.
    """
    config = TAEHV.get(path.stem, model.codec)
    saved = read_weights(path, usual=("vae", *ROLES)).tensors
    tensors = rename_codec(config, saved)
    with torch.device("meta"):
        codec = config.build()
    if problems := mismatches(codec, tensors):
        raise CheckpointError(
            f"{path}, {describe(saved)}, does not fit {type(codec).__name__}: {describe_mismatches(problems)}"
        )
    return config, tensors


def tiny_decoder(model: Model, name: str, random: bool = False) -> Model:
    """The model with the decoder of a tiny codec: a published file, or of random weights by its name, as `taew2_1`."""
    if random:
        tiny = lookup(TAEHV, name, "tiny codec").build()
    else:
        config, tensors = read_codec(Path(name), model.config)
        tiny = config.build()
        load_tensors(tiny, tensors, Path(name))
    return replace(model, codec=TinyDecoder(model.codec, tiny.eval().requires_grad_(False)))


def save_codec(folder: Path, codec: AnyCodec) -> None:
    write_safetensors(folder / "codec.safetensors", codec.state_dict())
    write_text(folder / "codec.json", dumps(codec.cfg))


def load_codec(folder: Path) -> AnyCodec:
    """The codec of a codec folder or of a model folder."""
    path = folder / "codec.json"
    if path.exists():
        codec = read_config(AnyCodecConfig, path).build()
    elif (folder / "model.json").exists():
        codec = load_config(folder).codec.build()
    else:
        raise CheckpointError(f"{folder} holds no codec (neither codec.json nor model.json)")
    load_weights(codec, folder / "codec.safetensors")
    return codec.eval().requires_grad_(False)


def load_weights(net: nn.Module, path: Path, allow_missing: tuple[str, ...] = ()) -> list[str]:
    """Load strictly; parameters whose name ends in one of `allow_missing` may be missing, and are listed.

    Those keep their initialisation: this is how a zero-initialised camera branch joins a model without one.
    """
    return load_tensors(net, load_safetensors(path), path, allow_missing)
