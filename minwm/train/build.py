"""A training run from its config to a model folder: data, networks, the loop, and what is saved."""

import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minwm.core.config import ConfigError, UserError, dumps, from_dict, to_dict
from minwm.core.files import locked_together, read_config, read_json, write_json, write_text
from minwm.core.metrics import read_metrics
from minwm.core.runtime import git_commit, pick_device, rank, versions
from minwm.data.clips import read_manifest
from minwm.data.dataset import loader
from minwm.data.encode import identity
from minwm.data.remote import data_folder
from minwm.store.adapter import Adapter, save_adapter
from minwm.store.folder import load_codec
from minwm.store.layouts import AnyCodec
from minwm.store.model import Model
from minwm.train.config import Run, Summary
from minwm.train.loop import loop
from minwm.train.parallel import Parallel, process_group, whole
from minwm.train.roles import ADAPTER, adapt_role, base_folder, build_recipe, load_role, saved_weights
from minwm.train.state import States

VALIDATION_CLIPS = 24
"""Clips of the validation split on which the loss is logged."""
NO_RESULT = ("parallel", "keep", "tensorboard", "tracker", "sample_every", "samples", "price", "peak_tflops")
"""Fields of a run that its result does not depend on: they may change while it goes on."""
MANIFEST_FIELDS = ("kind", "raw", "counts", "clips", "licences")
"""What `run.json` keeps of the data's manifest, for the model card."""


SampleVideos = Callable[[Run, Model, Path], Mapping[str, float]]
"""Makes videos of a model in training in a folder; their scores by name (experiments/samples.py)."""


def train(run: Run, out: Path, videos: SampleVideos | None = None) -> Summary:
    """Run a stage to its end in `out`, resuming whatever is there; a finished run returns at once.

    `videos` is called every `run.sample_every` steps.

    Raises ConfigError if `out` holds a run with another config, DataError if the data are not those of the model, and
    UserError while another process trains in `out`. All processes of torchrun call it.
    """
    with locked_together(out), process_group(run.parallel.timeout, run.parallel.cpu_offload):
        if rank() == 0:
            _remove_leftovers(out)
        return _train(run, out, videos)


def _remove_leftovers(out: Path) -> None:
    """Remove what a killed process was writing, or removing."""
    for left in (*out.glob(".*.tmp"), *(out / "state").glob(".*.tmp")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _train(run: Run, out: Path, videos: SampleVideos | None) -> Summary:
    done, states = out / "summary.json", States(out, address=run.states)
    _check_same(run, out)
    if done.exists() and (summary := read_config(Summary, done)).steps == run.steps:
        return summary
    if run.recipe.trains_backbone and not run.init.codec:
        raise ConfigError(f"{run.name}: init.codec names the codec that made the latents; it goes with the model")
    if run.init.codec and not run.recipe.trains_backbone:
        raise ConfigError(f"{run.name}: a codec continues from init.student; init.codec goes with a model")
    codec = load_codec(Path(run.init.codec)) if run.init.codec else None
    data = run.recipe.dataset(data_folder(run.data), "train", run.model, run.pose_noise)
    if codec:
        _check_codec(run, codec)
    parallel = Parallel(run.parallel, pick_device())
    parallel.barrier()  # or some would find what others have written meanwhile
    if rank() == 0:
        _write_record(run, out)
    recipe = build_recipe(run, partial(load_role, run, parallel.build_device), partial(adapt_role, run))
    if not run.init.student and not states.latest():
        recipe.fit(data)
    clips = loader(data, run.batch, run.seed, parallel.data_rank, parallel.data_ranks)
    weights = partial(saved_weights, run)
    sample = partial(_sample, run, out, codec, parallel, videos) if codec and videos and run.sample_every else None
    trained = whole_tensors(loop(run, out, recipe, clips, parallel, validation_batches(run), weights, sample))
    if rank() == 0:
        student = _student(run, trained, out / ADAPTER)
        run.recipe.save(out, run.model, student, codec)
        write_text(done, dumps(_summary(run, out, sum(p.numel() for p in student.parameters()))))
    parallel.barrier()
    return read_config(Summary, done)


def whole_tensors(net: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network, of which all processes may have a part, on the CPU of the first; empty elsewhere."""
    tensors = {}
    for name, x in net.state_dict().items():
        part = whole(x)
        if rank() == 0:
            tensors[name] = part.cpu()
    return tensors


def _network_of(run: Run, tensors: Mapping[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        net = run.recipe.network(run.model)
    net.load_state_dict(tensors, assign=True)
    return net


def _sample(
    run: Run, out: Path, codec: AnyCodec, parallel: Parallel, videos: SampleVideos, net: nn.Module, step: int
) -> Mapping[str, float]:
    """Scores of the videos that the first process makes with `net`, while the others wait. What goes wrong there is a
    warning: training goes on, from the same random state."""
    trained, scores = whole_tensors(net), dict[str, float]()
    if rank() == 0:
        devices = [parallel.device] if parallel.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                student: Any = _student(run, trained).to(parallel.device).eval()
                model = Model(replace(run.model, codec=codec.cfg), student, codec.to(parallel.device))
                scores = dict(videos(run, model, out / "samples" / f"{step:06d}"))
        except (UserError, ArithmeticError, ImportError, OSError, RuntimeError, ValueError) as error:
            warnings.warn(f"{run.name}: no sample videos after step {step}: {error}", stacklevel=2)
    parallel.barrier()
    return scores


def _student(run: Run, trained: dict[str, Tensor], adapter_folder: Path | None = None) -> nn.Module:
    """The trained network; with LoRA the base with what was trained, which is also saved by itself in PEFT's layout."""
    if run.lora is None:
        return _network_of(run, trained)
    base = base_folder(run)
    net = load_role(run, torch.device("cpu"), "base")
    config = replace(run.lora, targets=tuple(run.lora.target_names(net)))
    adapter = Adapter(config, str(base), trained)
    net.load_state_dict(adapter.merge_into(net.state_dict()))
    if adapter_folder is not None:
        save_adapter(adapter_folder, adapter)
    return net


def validation_batches(run: Run) -> list[Any]:
    """The first clips of the validation split, if there is one and the recipe validates."""
    if not run.recipe.validates or not _manifest(run)["counts"].get("val"):
        return []
    data = run.recipe.dataset(data_folder(run.data), "val", run.model)
    indices = range(min(VALIDATION_CLIPS, len(data)))
    return [data.batch(indices[i : i + run.batch]) for i in indices[:: run.batch]]


def _manifest(run: Run) -> dict[str, Any]:
    return read_manifest(data_folder(run.data), run.recipe.data_command)


def _check_codec(run: Run, codec: AnyCodec) -> None:
    """Raise ConfigError unless `codec` made the latents: it is saved as the codec of the model."""
    made, given = _manifest(run)["codec"], identity(codec)
    if given["hash"] != made["hash"]:
        raise ConfigError(
            f"{run.data} was encoded by {made['id']} {made['hash']}, init.codec={run.init.codec} is {given['id']} "
            f"{given['hash']}; encode the clips again with it, or name the other one"
        )


def _check_same(run: Run, out: Path) -> None:
    """Raise ConfigError if `out`, or what is at `run.states`, was started with another config.

    More steps than before lengthen the run.
    """
    records = dict[tuple[str, str], dict[str, Any]]()
    if (path := out / "run.json").exists():
        records["--out", str(out)] = read_json(path, {"run": dict})["run"]
    if run.states and (step := (states := States(out, address=run.states)).latest()):
        records["--states", run.states] = states.extra(step)["run"]
    for (option, place), record in records.items():
        try:
            old = from_dict(Run, record)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}; give another {option}, or delete it") from error
        changed = [key for key, value in vars(run).items() if vars(old)[key] != value and key not in NO_RESULT]
        if changed == ["steps"] and run.steps < old.steps:
            raise ConfigError(f"{place} holds a run of {old.steps} steps, not {run.steps}: it can only be made longer")
        if changed not in ([], ["steps"]):
            others = ", ".join(changed)
            raise ConfigError(f"{place} holds a run with another {others}; give another {option}, or delete it")


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
    extra = States(out, address=run.states).extra(run.steps)
    seconds, hours = extra["seconds"], extra.get("gpu_hours")
    return Summary(
        steps=run.steps, seconds=seconds, gpu_hours=hours, first_loss=first, last_loss=last, parameters=parameters
    )
