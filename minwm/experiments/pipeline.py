"""All stages of a pipeline, wired by themselves and resumable: run it again and it goes on where it was."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file
from torch import Tensor

from minwm.bench.stream import bench_model
from minwm.core.config import dumps, loads
from minwm.core.files import atomic, write_text
from minwm.core.runtime import generator, pick_device
from minwm.core.types import Clip
from minwm.data.dataset import ShardDataset
from minwm.data.encode import encode_clips
from minwm.data.rerender import render_worlds
from minwm.data.trajectories import collect_trajectories
from minwm.eval.cases import ANCHORS, HeldOut, Videos, counterfactual, measure
from minwm.eval.run import Evaluated, headline
from minwm.experiments.presets.base import Evaluation, Pipeline
from minwm.store.folder import load_codec, load_model
from minwm.store.model import ModelConfig
from minwm.train.build import train
from minwm.train.config import Run, Summary
from minwm.train.loop import autocast

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a part that is no training; kept, so that a resumed pipeline reports them all."""

    seconds: float


def run_pipeline(pipeline: Pipeline, out: Path, say: Say, until: str | None = None) -> None:
    """Make everything that `out` lacks, to the end or to the stage `until`; `say` gets a line per part."""
    part = PipelinePart(out, say)
    if (render := pipeline.render) is not None:
        part("render", lambda: render_worlds(out / "raw", render, clips=pipeline.clips, workers=pipeline.workers))
    if pipeline.codec:
        _train(pipeline.codec, out, say)
        if until == "codec":
            return
    start = pipeline.stages[0]
    codec = load_codec(Path(str(start.init.codec))).to(pick_device())
    part(
        "encode",
        lambda: encode_clips(out / "raw", out / "latents", codec, start.model.text, pick_device(), pipeline.encode),
    )
    for run in pipeline.stages:
        if run.recipe.needs_trajectories:
            part("collect", lambda run=run: collect_for(run, out, pipeline.collect))
        _train(run, out, say)
        if run.name == until:
            return
    part("evaluate", lambda: evaluate(pipeline, out, say))


class PipelinePart:
    """Runs a part unless `out/parts/{name}.json` says that it is done."""

    def __init__(self, out: Path, say: Say) -> None:
        self.folder, self.say = out / "parts", say

    def __call__(self, name: str, work: Callable[[], object]) -> None:
        done = self.folder / f"{name}.json"
        if done.exists():
            self.say(f"{name}: done before")
            return
        start = time.monotonic()
        work()
        seconds = time.monotonic() - start
        write_text(done, dumps(Timing(seconds=seconds)))
        self.say(f"{name}: {seconds:.0f} s")


def part_seconds(out: Path, name: str) -> float:
    return loads(Timing, (out / "parts" / f"{name}.json").read_text()).seconds


def _train(run: Run, out: Path, say: Say) -> Summary:
    summary = train(run, out / run.name)
    speed = summary.steps / max(summary.seconds, 1e-9)
    say(
        f"{run.name}: {summary.steps} steps in {summary.seconds:.0f} s ({speed:.2f}/s), "
        f"loss {summary.first_loss:.4f} -> {summary.last_loss:.4f}"
    )
    return summary


def collect_for(run: Run, out: Path, clips: int) -> None:
    """ODE trajectories of the model that the stage starts from."""
    device = pick_device()
    teacher = load_model(Path(str(run.init.student))).net.to(device)

    def states(clip: Clip, number: int) -> Float[Tensor, "k b f c h w"]:
        noise = generator(run.seed, "collect", number, device=device)
        with autocast(run, device):
            return run.recipe.collect_states(teacher, clip.to(device), run.model, noise)

    source, sampler = ShardDataset(out / "latents", "train", null=run.model.negative_text()), run.model.sampler
    student = {"steps": sampler.steps, "shift": sampler.shift}
    about = {"teacher": run.init.student, "seed": run.seed, **student, **asdict(run.recipe)}
    collect_trajectories(source, out / "trajectories", clips, states, about, batch=run.batch)


# ---------------------------------------------------------------------------------------------- evaluation


def evaluate(pipeline: Pipeline, out: Path, say: Say) -> None:
    """Measure the stages of the evaluation and the anchors on the same held-out clips; finished rows are kept."""
    plan, folder = pipeline.evaluation, out / "eval"
    last = load_model(out / plan.stages[-1]).ready()
    held = HeldOut.of(last.config, plan.clips)
    _save_videos(folder / "truth.safetensors", held.truth)
    for name, anchor in held.anchors(last.codec).items():
        _keep(folder, name, lambda anchor=anchor: _anchor(last.config, held, anchor), say)
    for name in plan.stages:
        _keep(folder, name, lambda name=name: _evaluate_stage(plan, out, name, held), say)


def load_rows(pipeline: Pipeline, out: Path) -> dict[str, Evaluated]:
    """What `evaluate` found, stages first."""
    names = [*pipeline.evaluation.stages, *ANCHORS]
    return {name: loads(Evaluated, (out / "eval" / f"{name}.json").read_text()) for name in names}


def _keep(rows: Path, name: str, make: Callable[[], Evaluated], say: Say) -> None:
    path = rows / f"{name}.json"
    if path.exists():
        return
    start, result = time.monotonic(), make()
    write_text(path, dumps(result))
    say(f"evaluated {name}: {headline(result)} ({time.monotonic() - start:.0f} s)")


def _anchor(config: ModelConfig, held: HeldOut, videos: Videos) -> Evaluated:
    measured = measure(config, held, videos)
    return Evaluated(follow=measured.follow, quality=measured.quality)


def _evaluate_stage(plan: Evaluation, out: Path, name: str, held: HeldOut) -> Evaluated:
    model = load_model(out / name).ready()
    videos = held.generate(model, plan.seed)
    _save_videos(out / "eval" / f"{name}.safetensors", videos)
    measured, table = measure(model.config, held, videos), None
    if name in plan.counterfactual:
        _, _, table = counterfactual(model, plan.seed)
    bench = bench_model(model, repeats=plan.bench_repeats)
    return Evaluated(follow=measured.follow, quality=measured.quality, confusion=table, bench=bench)


def _save_videos(path: Path, videos: Videos) -> None:
    with atomic(path) as temporary:
        save_file({"frames": np.ascontiguousarray(videos)}, temporary)
