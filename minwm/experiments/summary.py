"""The report of a pipeline: gathers what the stages left on disk. Every number and picture is read, none is typed."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from minwm.cameras.trajectory import parse
from minwm.core.config import loads
from minwm.core.metrics import read_metrics
from minwm.core.runtime import git_commit, versions
from minwm.eval.cases import ANCHORS, HeldOut
from minwm.eval.report.pipeline import Command, Example, Latency, ReportData, Stage, Video, write_report
from minwm.eval.run import Evaluated
from minwm.experiments.pipeline import part_seconds
from minwm.experiments.presets.base import Pipeline
from minwm.train.config import Run, Summary

WHAT = {
    "codec": "frames to latents: 4x in time, 8x in space",
    "foundation": "text-to-video, bidirectional, no camera",
    "camera": "phase 1: follow cameras with PRoPE",
    "ar": "stage 1: autoregressive by teacher forcing",
    "ode": "stage 2a: causal ODE regression",
    "consistency": "stage 2b: causal consistency distillation",
    "dmd": "stage 3: asymmetric DMD on self-rollouts",
}

SHIPPED = "shipped checkpoint"


def report(pipeline: Pipeline, out: Path, rows: Mapping[str, Evaluated]) -> Path:
    """Write `out/report.html`."""
    config = pipeline.stages[-1].model
    models = {name: rows[name] for name in pipeline.evaluation.stages}
    stages = _stages(pipeline, out)
    about = versions()
    facts = {
        "Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "Commit": git_commit() or "not a checkout",
        "Processor": about.get("gpu", about["cpu"]), "Python": about["python"], "PyTorch": about["torch"],
        "Network": f"{_summary(out, pipeline.stages[-1]).parameters / 1e6:.2f} M parameters",
        "Video": f"{config.height}x{config.width}, {config.motion.fps:g} fps, {config.latents} latents",
    }  # fmt: skip
    return write_report(
        out / "report.html",
        ReportData(
            title=f"minwm {pipeline.name}",
            sentence=(
                "From rendered clips to a world model that follows the camera: every stage of the recipe, trained "
                "and measured in this run on worlds it had not seen."
            ),
            facts=facts,
            seconds=sum(stage.seconds for stage in stages),
            fps=config.motion.fps,
            stages=stages,
            examples=_examples(pipeline, out),
            latency=[_latency(name, row, pipeline) for name, row in models.items() if row.bench],
            following={name: row.follow for name, row in models.items()},
            anchors={name: rows[name].follow for name in ANCHORS},
            confusion={name: row.confusion for name, row in models.items() if row.confusion},
            quality={name: row.quality for name, row in rows.items()},
            quality_anchors=ANCHORS,
            commands=_commands(pipeline, out),
            caveats=_caveats(stages),
        ),
    )


def _stages(pipeline: Pipeline, out: Path) -> list[Stage]:
    def part(name: str, what: str) -> Stage:
        return Stage(name, what, None, 0, part_seconds(out, name))

    stages = [part("render", f"{pipeline.clips} clips with exact cameras")] if pipeline.render else []
    stages += [_stage(pipeline.codec, out)] if pipeline.codec else []
    stages.append(part("encode", "clips to latents"))
    for run in pipeline.stages:
        if run.recipe.needs_trajectories:
            stages.append(part("collect", f"ODE trajectories of {pipeline.collect} clips"))
        stages.append(_stage(run, out))
    return [*stages, part("evaluate", "generate and measure")]


def _stage(run: Run, out: Path) -> Stage:
    summary, lines = _summary(out, run), read_metrics(out / run.name)
    names = [name for name in ("loss", "dmd", "critic") if any(name in line for line in lines)]
    generates = run.name not in ("codec", "foundation") and run.model.sampler.causal
    return Stage(
        run.name,
        WHAT.get(run.name, run.recipe.kind),
        _origin(run.init.student, out),
        summary.steps,
        summary.seconds,
        {name: [line[name] for line in lines if name in line] for name in names},
        passes_per_chunk=run.model.sampler.passes if generates else None,
        held_out=[(line["step"], line["val"]) for line in lines if "val" in line],
    )


def _origin(source: str | None, out: Path) -> str | None:
    """What a stage continued from, in words."""
    if source is None:
        return None
    path = Path(source)
    return path.name if path.parent == out else f"{SHIPPED} {path.name}"


def _summary(out: Path, run: Run) -> Summary:
    return loads(Summary, (out / run.name / "summary.json").read_text())


def _latency(name: str, row: Evaluated, pipeline: Pipeline) -> Latency:
    bench, sampler = row.bench, pipeline.stage(name).model.sampler
    assert bench is not None
    return Latency(
        name, sampler.passes, bench.first_chunk.median_ms, bench.chunk.median_ms, bench.chunk.p90_ms, bench.fps
    )


def _examples(pipeline: Pipeline, out: Path) -> list[Example]:
    plan = pipeline.evaluation
    held = HeldOut.labels(pipeline.stages[-1].model, plan.clips)
    names = {"truth": "ground truth"} | {name: name for name in plan.stages}
    videos = {label: load_file(out / "eval" / f"{file}.safetensors")["frames"] for file, label in names.items()}
    return [
        Example(
            caption,
            trajectory,
            parse(trajectory).keys_per_frame(),
            [Video(label, np.ascontiguousarray(frames[i])) for label, frames in videos.items()],
        )
        for i, (trajectory, caption) in enumerate(held[: plan.examples])
    ]


def _commands(pipeline: Pipeline, out: Path) -> list[Command]:
    last = out / pipeline.evaluation.stages[-1]
    return [
        Command("the whole run again; finished parts are kept", f"minwm pipeline {pipeline.name} --out {out}"),
        Command(
            "your own trajectory, in a world of your choice, with the keys drawn in",
            f'minwm generate --model {last} --world 5042 --trajectory "w*4,l*4" --keys --out my.mp4',
        ),
        Command("measure one model alone", f"minwm eval --model {last} --json eval.json"),
        Command("its latency and speed", f"minwm bench --model {last} --json bench.json"),
        Command(
            "one stage with another setting, in a folder of its own",
            f"minwm train {pipeline.name}/dmd --recipe.guidance 2.0 --root {out} --out runs/my-dmd",
        ),
    ]


def _caveats(stages: Sequence[Stage]) -> list[str]:
    shipped = [stage.name for stage in stages if (stage.init_from or "").startswith(SHIPPED)]
    notes = [
        "Camera scores are measured on generated pixels, by aligning them to the known world, and only where the "
        "first frame saw it; what a model invents elsewhere is not judged.",
        "Latency is that of this machine, batch 1, float32; the clock is that of the paper's table 1 (network only).",
    ]
    if shipped:
        start = (
            f"To fit the time, {', '.join(shipped)} continued from checkpoints shipped with minwm; "
            "minwm/assets/demo/README.md says how they were made. Every other stage started from one before it."
        )
        notes.insert(0, start)
    return notes
