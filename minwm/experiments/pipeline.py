"""All stages of a pipeline, wired by themselves and resumable: run it again and it goes on where it was.

Under torchrun the processes share encoding, trajectories, training and evaluation; the first one does the rest.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from minwm.core.config import ConfigError, UserError, dumps, to_dict
from minwm.core.files import locked_together, read_config, write_text
from minwm.core.runtime import pick_device, rank, world_size
from minwm.data.encode import encode_clips
from minwm.data.rerender import render_worlds
from minwm.eval.run import Evaluation, Log, evaluate
from minwm.experiments.presets.base import Pipeline
from minwm.experiments.samples import sample_videos
from minwm.recipes.ode import OdeConfig
from minwm.store.folder import load_codec, load_model
from minwm.store.model import Model
from minwm.stream.solvers import FewStepSampler
from minwm.train.build import train
from minwm.train.collect import CollectConfig, collect
from minwm.train.config import Run, Summary
from minwm.train.doctor import examine
from minwm.train.parallel import LONG_WAIT, process_group


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What is kept of a part that is no training."""

    seconds: float
    """So that a resumed pipeline reports them all."""
    config: dict[str, Any] | None = None
    """What it was made with; None in older folders."""


def run_pipeline(pipeline: Pipeline, out: Path, log: Log, until: str | None = None, after_red: bool = False) -> None:
    """Make everything that `out` lacks, to the end or to the stage `until`; `log` gets a line per part.

    Raises UserError while another process makes a pipeline in `out`, and after a stage that will not become what it
    should (a red verdict of the doctor), unless it is to go on `after_red`. All processes of torchrun call it.
    """
    timeout = pipeline.stages[0].parallel.timeout
    with locked_together(out), process_group(timeout):
        part = PipelinePart(out, log if rank() == 0 else lambda _line: None)
        _run_parts(pipeline, out, part, until, after_red)


def _run_parts(pipeline: Pipeline, out: Path, part: "PipelinePart", until: str | None, after_red: bool) -> None:
    if (render := pipeline.render) is not None:
        part(
            "render",
            lambda: render_worlds(out / "raw", render, clips=pipeline.clips, workers=pipeline.workers),
            {"clips": pipeline.clips, **to_dict(render)},
        )
    if pipeline.codec:
        _train(pipeline.codec, out, part.log)
        if until == "codec":
            return
    start = pipeline.stages[0]
    codec = load_codec(Path(str(start.init.codec))).to(pick_device())
    part(
        "encode",
        lambda: encode_clips(out / "raw", out / "latents", codec, start.model.text, pick_device(), pipeline.encode),
        to_dict(pipeline.encode),
        shared=True,
    )
    for run in pipeline.stages:
        if run.recipe.needs_trajectories:
            about = to_dict(collection(run, pipeline.collect))
            part("collect", lambda run=run: collect_for(run, out, pipeline.collect), about, shared=True)
        _train(run, out, part.log)
        part(f"doctor-{run.name}", lambda run=run: stop_if_ill(out / run.name, part.log, after_red))
        if run.name == until:
            return
    about = {"evaluated": [*pipeline.evaluated], **to_dict(pipeline.evaluation)}
    part("evaluate", lambda: evaluate_stages(pipeline, out, part.log), about, shared=True)


def stop_if_ill(stage: Path, log: Log, after_red: bool = False) -> None:
    """UserError after a red verdict on a trained stage, unless it is to go on; `log` gets all verdicts."""
    verdicts = examine(stage)
    for verdict in verdicts:
        log(f"{stage.name}: {verdict.level}: {verdict.name}: {verdict.evidence}; {verdict.cure}")
    if any(verdict.level == "red" for verdict in verdicts) and not after_red:
        raise UserError(f"{stage} will not become what it should (red verdicts above); cure it, or give --after-red")


class PipelinePart:
    """Runs a part unless `out/parts/{name}.json` says that it is done; ConfigError if it was with another config.

    Of several processes the first one does it, or all if it is shared, and they wait for each other.
    """

    def __init__(self, out: Path, log: Log) -> None:
        self.folder, self.log = out / "parts", log
        self.group: Any = None
        if dist.is_initialized():  # who waits for a long part of another process waits longer than in training
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=LONG_WAIT))

    def wait(self) -> None:
        if self.group:
            dist.barrier(self.group)

    def __call__(
        self, name: str, work: Callable[[], object], config: dict[str, Any] | None = None, shared: bool = False
    ) -> None:
        done = self.folder / f"{name}.json"
        if done.exists():
            before = read_config(Timing, done).config or {}
            for key, value in (config or {}).items():
                if before.get(key, value) != value:
                    raise ConfigError(
                        f"{self.folder.parent} holds the part {name!r} with another {key}: {before[key]}, now {value}; "
                        "give another --out, or delete it"
                    )
            self.log(f"{name}: done before")
            return
        start = time.monotonic()
        if shared or rank() == 0:
            work()
        self.wait()
        seconds = time.monotonic() - start
        if rank() == 0:
            write_text(done, dumps(Timing(seconds=seconds, config=config)))
        self.wait()
        self.log(f"{name}: {seconds:.0f} s")


def part_seconds(out: Path, name: str) -> float:
    return read_config(Timing, out / "parts" / f"{name}.json").seconds


def _train(run: Run, out: Path, log: Log) -> Summary:
    done = out / run.name / "summary.json"
    if done.exists() and (steps := read_config(Summary, done).steps) != run.steps:  # `train` would make it longer
        raise ConfigError(
            f"{out / run.name} holds a finished stage of {steps} steps, not {run.steps}, and later parts came from "
            "it; give another --out, or delete these parts"
        )
    summary = train(run, out / run.name, sample_videos)
    speed = summary.steps / max(summary.seconds, 1e-9)
    log(
        f"{run.name}: {summary.steps} steps in {summary.seconds:.0f} s ({speed:.2f}/s), "
        f"loss {summary.first_loss:.4f} -> {summary.last_loss:.4f}"
    )
    return summary


def collection(run: Run, clips: int) -> CollectConfig:
    """Which trajectories a stage of ODE distillation trains on."""
    assert isinstance(run.recipe, OdeConfig)
    assert isinstance(run.model.sampler, FewStepSampler)
    return CollectConfig(
        clips=clips,
        guidance=run.recipe.guidance,
        ode_steps=run.recipe.ode_steps,
        sampler=run.model.sampler,
        views=run.recipe.views,
        batch=run.batch,
        seed=run.seed,
        precision=run.precision,
    )


def collect_for(run: Run, out: Path, clips: int) -> None:
    """ODE trajectories of the model that the stage starts from."""
    teacher = load_model(Path(str(run.init.student)))
    collect(teacher, out / "latents", out / "trajectories", collection(run, clips), run.model)


def evaluate_stages(pipeline: Pipeline, out: Path, log: Log) -> Evaluation:
    """Measure the stages and the baselines on the same held-out clips; finished rows are kept. Every process measures
    its part of them."""

    def load(name: str) -> Model:
        return load_model(out / name).ready()

    models = {name: partial(load, name) for name in pipeline.evaluated}
    return evaluate(models, pipeline.evaluation, out / "eval", log, part=(rank(), world_size()))


def evaluation(pipeline: Pipeline, out: Path) -> Evaluation:
    """What `evaluate_stages` has left."""
    config = pipeline.stage(pipeline.evaluated[-1]).model
    return Evaluation(out / "eval", pipeline.evaluated, config, pipeline.evaluation)
