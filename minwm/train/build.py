"""The one training loop, for every stage: what happens in a step is what you read in `loop`."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from minwm.core.config import ConfigError, dumps, from_dict, loads, to_dict
from minwm.core.files import write_json, write_text
from minwm.core.metrics import read_metrics
from minwm.core.runtime import git_commit, pick_device, rank, versions, world_size
from minwm.data.clips import read_manifest
from minwm.data.dataset import RawDataset, ShardDataset, loader
from minwm.nets.backbone import Backbone
from minwm.nets.codec import Codec
from minwm.recipes.base import Recipe
from minwm.recipes.codec import CodecRecipe, CodecTraining
from minwm.recipes.consistency import Consistency, ConsistencyConfig
from minwm.recipes.diffusion import (
    AutoregressiveConfig,
    AutoregressiveDiffusion,
    BidirectionalConfig,
    BidirectionalDiffusion,
)
from minwm.recipes.dmd import Dmd, DmdConfig
from minwm.recipes.ode import Ode, OdeConfig
from minwm.store.card import write_card
from minwm.store.folder import load_codec, load_weights, save_codec, save_model
from minwm.store.layouts import FAMILIES
from minwm.train.config import Run, Summary
from minwm.train.loop import loop
from minwm.train.state import States

RECIPES: dict[type, type[Recipe]] = {
    BidirectionalConfig: BidirectionalDiffusion,
    AutoregressiveConfig: AutoregressiveDiffusion,
    OdeConfig: Ode,
    ConsistencyConfig: Consistency,
    DmdConfig: Dmd,
}
HELD_OUT = 24
"""Clips of the validation split on which the loss is watched."""
GRAPHS = 32
"""Most compiled forms of a block. Passes of a recipe differ in frames, in clips and in who gets gradients: up to a
dozen forms, where torch gives up after 8."""
NOTED = ("kind", "raw", "counts", "clips", "licences")
"""What a run notes of its data's manifest, for the model card."""


def train(run: Run, out: Path) -> Summary:
    """Run a stage to its end in `out`, resuming whatever is there; a finished run returns at once.

    Raises ConfigError if `out` holds a run with another config.
    """
    done = out / "summary.json"
    _claim(run, out)
    if done.exists():
        return loads(Summary, done.read_text())
    device = pick_device()
    if isinstance(run.recipe, CodecTraining):
        result = _train_codec(run, run.recipe, out, device)
    else:
        result = _train_network(run, out, device)
    losses = [line for line in read_metrics(out) if line["trains"] == "student"]
    name = next(name for name in losses[0] if name not in ("step", "trains"))
    tenth = max(1, len(losses) // 10)
    ends = [sum(line[name] for line in part) / tenth for part in (losses[:tenth], losses[-tenth:])]
    parameters = sum(p.numel() for p in result.parameters())
    summary = Summary(
        steps=run.steps, seconds=_seconds(out), first_loss=ends[0], last_loss=ends[1], parameters=parameters
    )
    write_text(done, dumps(summary))
    return summary


def _claim(run: Run, out: Path) -> None:
    """Write the run's config and what it starts from, or check that it is the one that `out` was started with."""
    path = out / "run.json"
    if path.exists() and (old := from_dict(Run, json.loads(path.read_text())["run"])) != run:
        changed = [key for key, value in vars(run).items() if vars(old)[key] != value]
        raise ConfigError(f"{out} holds a run with another {', '.join(changed)}; give another --out, or delete it")
    if not path.exists():
        maker = "minwm data render" if isinstance(run.recipe, CodecTraining) else "minwm data encode"
        manifest = read_manifest(Path(run.data), maker)
        about = {
            "commit": git_commit(),
            "versions": versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "data": {name: manifest[name] for name in NOTED if name in manifest},
        }
        write_json(path, {"run": to_dict(run), **about})


def _train_codec(run: Run, cfg: CodecTraining, out: Path, device: torch.device) -> nn.Module:
    torch.manual_seed(run.seed)  # fresh parameters are part of the run, too
    codec, data = run.model.codec.build(), RawDataset(Path(run.data), "train")
    if not isinstance(codec, Codec):
        raise ConfigError(f"{run.name}: model.codec is {type(codec).__name__}; only the small codec is trained here")
    if run.init.codec:
        codec.load_state_dict(load_codec(Path(run.init.codec)).state_dict())
    elif not States(out).latest():
        codec.fit(data.batch([i]) for i in range(min(cfg.fit_clips, len(data))))
    clips = loader(data, run.batch, run.seed, rank(), world_size())
    trained = loop(run, out, CodecRecipe(codec), clips, device)
    assert isinstance(trained, Codec)
    save_codec(out, trained.cpu())
    return trained


def _train_network(run: Run, out: Path, device: torch.device) -> nn.Module:
    if not run.init.codec:
        raise ConfigError(f"{run.name}: init.codec names the codec that made the latents; it goes with the model")
    codec = load_codec(Path(run.init.codec))
    recipe = build_recipe(run, partial(load_role, run, device))
    begins_with_image, null = run.model.geometry.first_chunk_frames == 1, run.model.negative_text()
    data = ShardDataset(Path(run.data), "train", image_start=begins_with_image, null=null, noise=run.pose_noise)
    clips = loader(data, run.batch, run.seed, rank(), world_size())
    batches = []
    if data.manifest["counts"].get("val") and not isinstance(run.recipe, DmdConfig):  # whose loss is no distance
        held_out = ShardDataset(Path(run.data), "val", image_start=begins_with_image, null=null)
        some = range(min(HELD_OUT, len(held_out)))
        batches = [held_out.batch(some[i : i + run.batch]) for i in some[:: run.batch]]
    trained = loop(run, out, recipe, clips, device, batches)
    save_model(out, replace(run.model, codec=codec.cfg), trained.cpu(), codec)
    write_card(out)
    return trained


def build_recipe(run: Run, fill: Callable[[str], Backbone]) -> Recipe:
    """The recipe of a run, with its roles filled by `fill`."""
    kind = RECIPES[type(run.recipe)]
    networks = {role: fill(role) for role in (*kind.trained, *kind.frozen)}
    for role in kind.trained:
        networks[role].checkpointing = run.checkpointing
    recipe = kind(run.recipe, networks, run.model.geometry)
    if run.compile:
        torch._dynamo.config.recompile_limit = GRAPHS
        for net in recipe.networks.values():
            net.compile_blocks()
    return recipe


def load_role(run: Run, device: torch.device, role: str) -> Backbone:
    """A network for a role: from its folder, or fresh (student only)."""
    source = {
        "student": run.init.student,
        "teacher": run.init.teacher,
        "critic": run.init.critic,
        "real": run.init.real,
    }[role]
    torch.manual_seed(run.seed)  # fresh parameters are part of the run, too
    net = run.model.network.build()
    if source is None:
        if role != "student":
            raise ConfigError(f"{run.name}: init.{role} names no model folder, and a {role} cannot start fresh")
        return net.to(device)
    new = FAMILIES[run.model.network.kind].CAMERA_PARAMETERS if role == "student" else ()
    load_weights(net, Path(source) / "model.safetensors", allow_missing=new)
    return net.to(device)


def _seconds(out: Path) -> float:
    """Seconds of training that the last state has seen, over all resumed parts."""
    states = States(out)
    return json.loads((states.folder / f"{states.latest():06d}" / "state.json").read_text())["seconds"]
