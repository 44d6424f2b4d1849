"""The report of a pipeline: gathers what the stages left on disk. Every number and picture is read, none is typed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from minwm.core.files import read_config
from minwm.core.metrics import read_metrics
from minwm.core.runtime import git_commit, versions
from minwm.eval.cases import BASELINES
from minwm.eval.report.charts import COLOURS, Series, duration, line_chart, number, smooth
from minwm.eval.report.gallery import examples, gallery
from minwm.eval.report.page import Section, caveats, commands, facts_list, write_page
from minwm.eval.report.sections import evaluation_sections, tiles
from minwm.eval.run import Evaluation
from minwm.experiments.pipeline import part_seconds
from minwm.experiments.presets.base import Pipeline
from minwm.train.config import Run, Summary

WHAT = {
    "codec": "frames to latents: 4x in time, 8x in space",
    "foundation": "text-to-video, bidirectional",
    "camera": "phase 1: follow cameras with PRoPE",
    "ar": "stage 1: autoregressive by teacher forcing",
    "ode": "stage 2a: causal ODE regression",
    "consistency": "stage 2b: causal consistency distillation",
    "dmd": "stage 3: asymmetric DMD on self-rollouts",
}
SHIPPED = "shipped checkpoint"


@dataclass(frozen=True)
class Stage:
    """A part of the pipeline; those that train have steps and curves."""

    name: str
    what: str
    """What it does, in a few words."""
    seconds: float
    steps: int = 0
    init_from: str = "random"
    losses: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Curves by name, one value per logged step; the first is the stage's main loss."""
    held_out: Sequence[tuple[int, float]] = ()
    """(step, loss) on clips that are not trained on."""
    passes_per_chunk: int | None = None
    """Network passes that one generated chunk costs with this model; None where it does not generate chunks."""


def report(pipeline: Pipeline, out: Path, result: Evaluation) -> Path:
    """Write `out/report.html`."""
    config, stages, about = result.config, _stages(pipeline, out), versions()
    facts = {
        "Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "Commit": git_commit() or "not a checkout",
        "Processor": about.get("gpu", about["cpu"]), "Python": about["python"], "PyTorch": about["torch"],
        "Network": f"{_summary(out, pipeline.stages[-1]).parameters / 1e6:.2f} M parameters",
        "Video": f"{config.height}x{config.width}, {config.motion.fps:g} fps, {config.latents} latents",
    }  # fmt: skip
    shown = [name for name in (BASELINES[0], *result.models) if name in result.rows]
    return write_page(
        out / "report.html",
        f"minwm {pipeline.name}",
        "From clips to a world model that follows the camera: every stage of the recipe, trained and measured in this "
        "run on scenes that it had not seen.",
        facts,
        [(duration(sum(stage.seconds for stage in stages)), "whole run"), *tiles(result.rows)],
        [
            Section("pipeline", "Pipeline", _cards(stages)),
            gallery(examples(result, shown), config.motion.fps),
            *evaluation_sections(result.rows),
            Section("training", "Training", _training(stages)),
            commands(_commands(pipeline, out)),
            caveats(_caveats(stages)),
        ],
    )


def _stages(pipeline: Pipeline, out: Path) -> list[Stage]:
    def part(name: str, what: str) -> Stage:
        return Stage(name, what, part_seconds(out, name))

    stages = [part("render", f"{pipeline.clips} clips with exact cameras")] if pipeline.render else []
    stages += [_stage(pipeline.codec, out)] if pipeline.codec else []
    stages.append(part("encode", "clips to latents"))
    for run in pipeline.stages:
        if run.recipe.needs_trajectories:
            stages.append(part("collect", f"ODE trajectories of {pipeline.collect} clips"))
        stages.append(_stage(run, out))
    return [*stages, part("evaluate", "generate and measure")]


def _stage(run: Run, out: Path) -> Stage:
    summary, lines, sampler = _summary(out, run), read_metrics(out / run.name), run.model.sampler
    names = [name for name in ("loss", "dmd", "critic") if any(name in line for line in lines)]
    blind = run.recipe.trains_backbone and run.model.network.camera == "none"
    generates = run.name not in ("codec", "foundation") and sampler.causal
    return Stage(
        run.name,
        WHAT.get(run.name, run.recipe.kind) + ", no camera" * blind,
        summary.seconds,
        summary.steps,
        _origin(run.init.student, out),
        {name: [line[name] for line in lines if name in line] for name in names},
        [(line["step"], line["val"]) for line in lines if "val" in line],
        sampler.passes if generates else None,
    )


def _origin(source: str | None, out: Path) -> str:
    """What a stage continued from, in words."""
    if source is None:
        return "random"
    path = Path(source)
    return path.name if path.parent == out else f"{SHIPPED} {path.name}"


def _summary(out: Path, run: Run) -> Summary:
    return read_config(Summary, out / run.name / "summary.json")


def _cards(stages: Sequence[Stage]) -> str:
    total = max(sum(stage.seconds for stage in stages), 1e-9)
    cards = []
    for i, stage in enumerate(stages):
        facts = {"time": duration(stage.seconds)}
        if stage.steps:
            speed = f"{number(stage.steps / max(stage.seconds, 1e-9))} steps/s"
            facts |= {"init": stage.init_from, "steps": number(stage.steps), "speed": speed}
        for name, values in [*stage.losses.items()][:1]:
            curve = smooth(values)
            facts[name] = f"{number(curve[0])} → {number(curve[-1])}"
        if stage.passes_per_chunk is not None:
            facts["passes per chunk"] = str(stage.passes_per_chunk)
        cards.append(
            f'<li class="k{i % COLOURS}"><h3>{escape(stage.name)}</h3><p>{escape(stage.what)}</p>'
            f"<dl>{facts_list(facts)}</dl></li>"
        )
    share = "".join(
        f'<i class="f{i % COLOURS}" style="flex:{stage.seconds / total:.4f}" '
        f'title="{escape(stage.name)}: {duration(stage.seconds)}"></i>'
        for i, stage in enumerate(stages)
    )
    shares = f'<div class="share">{share}</div><p class="hint">Share of the time.</p>'
    return f'<ol class="stages">{"".join(cards)}</ol>{shares}'


def _training(stages: Sequence[Stage]) -> str:
    figures = []
    for i, stage in enumerate(stages):
        for name, values in stage.losses.items():
            steps = range(len(values))
            curves = [Series(name, steps, values, i, faint=True), Series(name, steps, smooth(values), i)]
            if stage.held_out and name == "loss":
                at, held_out = zip(*stage.held_out, strict=True)
                curves.append(Series("on other clips", at, held_out, i + 1))
            chart = line_chart(curves, x_label="step", y_label=f"{stage.name}: {name}", width=340, height=200)
            figures.append(f"<figure><figcaption>{escape(stage.name)}: {escape(name)}</figcaption>{chart}</figure>")
    return f'<div class="curves">{"".join(figures)}</div>' if figures else ""


def _commands(pipeline: Pipeline, out: Path) -> dict[str, str]:
    last = out / pipeline.evaluated[-1]
    return {
        "the whole run again; finished parts are kept": pipeline.command(out),
        "your own trajectory, in a world of your choice, with the keys drawn in": (
            f'minwm generate --model {last} --world 5042 --trajectory "w*4,l*4" --keys --out my.mp4'
        ),
        "measure one model alone": f"minwm eval --model {last} --json eval.json",
        "its latency and speed": f"minwm bench --model {last} --json bench.json",
        "one stage with another setting, in a folder of its own": (
            f"minwm train {pipeline.name}/dmd --recipe.guidance 2.0 --root {out} --out runs/my-dmd"
        ),
    }


def _caveats(stages: Sequence[Stage]) -> list[str]:
    shipped = [stage.name for stage in stages if stage.init_from.startswith(SHIPPED)]
    notes = [
        "Camera scores are measured on generated pixels, by aligning them to the known scene, and only where the "
        "first frame saw it; what a model invents elsewhere does not count.",
        "Latency is that of this machine, batch 1; the clock is that of the paper's table 1 (network only).",
    ]
    if shipped:
        start = (
            f"To fit the time, {', '.join(shipped)} continued from checkpoints shipped with minwm; "
            "minwm/assets/demo/README.md says how they were made. Every other stage started from one before it."
        )
        notes.insert(0, start)
    return notes
