"""A training run from its config to a model folder: data, networks, the loop, and what is saved."""

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minwm.core.config import ConfigError, UserError, dumps, from_dict, to_dict
from minwm.core.files import locked, read_config, read_json, write_json, write_text
from minwm.core.metrics import read_metrics
from minwm.core.runtime import git_commit, pick_device, rank, versions
from minwm.data.clips import read_manifest
from minwm.data.dataset import loader
from minwm.data.encode import identity
from minwm.recipes.base import Recipe
from minwm.store.folder import load_codec, load_weights
from minwm.store.layouts import FAMILIES, AnyCodec
from minwm.train.config import Run, Summary
from minwm.train.loop import loop
from minwm.train.parallel import Parallel, process_group, whole
from minwm.train.state import States

VALIDATION_CLIPS = 24
"""Clips of the validation split on which the loss is logged."""
COMPILED_FORMS = 32
"""Most compiled forms of a block. Passes of a recipe differ in frames, in clips and in who gets gradients: up to a
dozen forms, where torch gives up after 8."""
NO_RESULT = ("parallel", "keep")
"""Fields of a run that its result does not depend on: they may change while it goes on."""
MANIFEST_FIELDS = ("kind", "raw", "counts", "clips", "licences")
"""What `run.json` keeps of the data's manifest, for the model card."""


def train(run: Run, out: Path) -> Summary:
    """Run a stage to its end in `out`, resuming whatever is there; a finished run returns at once.

    Raises ConfigError if `out` holds a run with another config, DataError if the data are not those of the model, and
    UserError while another process trains in `out`. All processes of torchrun call it.
    """
    with locked(out) if rank() == 0 else nullcontext(), process_group(run.parallel.timeout):
        if rank() == 0:
            _remove_leftovers(out)
        return _train(run, out)


def _remove_leftovers(out: Path) -> None:
    """Remove what a killed process was writing, or removing."""
    for left in (*out.glob(".*.tmp"), *States(out).folder.glob(".*.tmp")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _train(run: Run, out: Path) -> Summary:
    done, states = out / "summary.json", States(out)
    _check_same(run, out)
    if done.exists() and (summary := read_config(Summary, done)).steps == run.steps:
        return summary
    if run.recipe.trains_backbone and not run.init.codec:
        raise ConfigError(f"{run.name}: init.codec names the codec that made the latents; it goes with the model")
    if run.init.codec and not run.recipe.trains_backbone:
        raise ConfigError(f"{run.name}: a codec continues from init.student; init.codec goes with a model")
    codec = load_codec(Path(run.init.codec)) if run.init.codec else None
    data = run.recipe.dataset(Path(run.data), "train", run.model, run.pose_noise)
    if codec:
        _check_codec(run, codec)
    parallel = Parallel(run.parallel, pick_device())
    parallel.barrier()  # or some would find what others have written meanwhile
    if rank() == 0:
        _write_record(run, out)
    recipe = build_recipe(run, partial(load_role, run, parallel.build_device))
    if not run.init.student and not states.latest():
        recipe.fit(data)
    clips = loader(data, run.batch, run.seed, parallel.data_rank, parallel.data_ranks)
    student = whole_network(run, loop(run, out, recipe, clips, parallel, validation_batches(run)))
    if rank() == 0:
        run.recipe.save(out, run.model, student, codec)
        write_text(done, dumps(_summary(run, out, sum(p.numel() for p in student.parameters()))))
    parallel.barrier()
    return read_config(Summary, done)


def whole_network(run: Run, net: nn.Module) -> nn.Module:
    """The network on the CPU of the first process, of which all processes may have a part."""
    tensors = {}
    for name, x in net.state_dict().items():
        part = whole(x)
        if rank() == 0:
            tensors[name] = part.cpu()
    with torch.device("meta"):
        found = run.recipe.network(run.model)
    if rank() == 0:
        found.load_state_dict(tensors, assign=True)
    return found


def build_recipe(run: Run, load: Callable[[str], nn.Module]) -> Recipe[Any]:
    """The recipe of a run; `load` makes the network of a role."""
    networks: dict[str, Any] = {role: load(role) for role in (*run.recipe.trained, *run.recipe.frozen)}
    if run.checkpointing:
        for role in run.recipe.trained:
            networks[role].checkpointing = run.checkpointing
    recipe = run.recipe.build(run.model, networks)
    recipe.seed = run.seed
    if run.compile:
        compile_networks(recipe)
    return recipe


def compile_networks(recipe: Recipe[Any]) -> None:
    """Compile the blocks of all networks, frozen ones too, in place."""
    torch._dynamo.config.recompile_limit = COMPILED_FORMS
    for net in recipe.networks.values():
        net.compile_blocks()


def load_role(run: Run, device: torch.device, role: str) -> nn.Module:
    """The network of a role, from the folder that `init` names; fresh if it names none (student only)."""
    source = getattr(run.init, role)
    if source is None and role != "student":
        raise ConfigError(f"{run.name}: init.{role} names no model folder, and a {role} cannot start fresh")
    torch.manual_seed(run.seed)  # fresh parameters are part of the run, too
    net = run.recipe.network(run.model)
    if source is not None:
        family = FAMILIES[run.model.network.kind]
        new = (*family.CAMERA_PARAMETERS, *family.ACTION_PARAMETERS) if role == "student" else ()
        load_weights(net, Path(source) / run.recipe.weights_file, allow_missing=new)
    return net.to(device)


def validation_batches(run: Run) -> list[Any]:
    """The first clips of the validation split, if there is one and the recipe validates."""
    if not run.recipe.validates or not _manifest(run)["counts"].get("val"):
        return []
    data = run.recipe.dataset(Path(run.data), "val", run.model)
    indices = range(min(VALIDATION_CLIPS, len(data)))
    return [data.batch(indices[i : i + run.batch]) for i in indices[:: run.batch]]


def _manifest(run: Run) -> dict[str, Any]:
    return read_manifest(Path(run.data), run.recipe.data_command)


def _check_codec(run: Run, codec: AnyCodec) -> None:
    """Raise ConfigError unless `codec` made the latents: it is saved as the codec of the model."""
    made, given = _manifest(run)["codec"], identity(codec)
    if given["hash"] != made["hash"]:
        raise ConfigError(
            f"{run.data} was encoded by {made['id']} {made['hash']}, init.codec={run.init.codec} is {given['id']} "
            f"{given['hash']}; encode the clips again with it, or name the other one"
        )


def _check_same(run: Run, out: Path) -> None:
    """Raise ConfigError if `out` was started with another config. More steps than before lengthen the run."""
    if not (path := out / "run.json").exists():
        return
    try:
        old = from_dict(Run, read_json(path, {"run": dict})["run"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; give another --out, or delete {out}") from error
    changed = [key for key, value in vars(run).items() if vars(old)[key] != value and key not in NO_RESULT]
    if changed == ["steps"]:
        if run.steps > old.steps:
            return
        raise ConfigError(f"{out} holds a run of {old.steps} steps, not {run.steps}: it can only be made longer")
    if changed:
        raise ConfigError(f"{out} holds a run with another {', '.join(changed)}; give another --out, or delete it")


def _write_record(run: Run, out: Path) -> None:
    """Write `run.json`: the config and what the run starts from. Of a run that goes on only `steps` may be new."""
    path = out / "run.json"
    manifest = _manifest(run)
    about = {
        "commit": git_commit(),
        "versions": versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "data": {name: manifest[name] for name in MANIFEST_FIELDS if name in manifest},
    }
    write_json(path, {**(read_json(path) if path.exists() else about), "run": to_dict(run)})


def _summary(run: Run, out: Path, parameters: int) -> Summary:
    """The summary of a run whose last state is written."""
    steps = [line for line in read_metrics(out) if line["trains"] == "student"]
    loss = next((name for line in steps for name in line if name not in ("step", "trains")), "loss")
    lines = [line for line in steps if loss in line]
    if not lines:
        raise UserError(f"{out}/metrics.jsonl has lost the losses of this run; delete the folder and train again")
    tenth = max(1, len(lines) // 10)
    first, last = (sum(line[loss] for line in part) / tenth for part in (lines[:tenth], lines[-tenth:]))
    seconds = States(out).extra(run.steps)["seconds"]
    return Summary(steps=run.steps, seconds=seconds, first_loss=first, last_loss=last, parameters=parameters)
