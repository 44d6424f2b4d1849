"""The verb that says what fits on a GPU, what would help, and what many of them would do."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import arg

from minwm.cli.base import Fields, Json, command, parse_fields, write_numbers
from minwm.core.config import UserError, override, to_dict

if TYPE_CHECKING:
    from minwm.bench.memory import Plan
    from minwm.bench.scaling import Cluster
    from minwm.train.config import Run

Preset = Annotated[str, arg(metavar="PIPELINE[/STAGE]", help="demo: a line for each stage; demo/dmd: all about one")]


@command("plan")
def plan(
    preset: Preset,
    gpu_memory: Annotated[float, arg(metavar="GIB", help="of the GPU: 24 for a card sold with 24 GB")] = 24.0,
    gpus: Annotated[int | None, arg(metavar="N", help="train on 1, 2, 4, ... N of them: memory and time")] = None,
    tflops: Annotated[float, arg(metavar="T", help="with --gpus: of one, by its data sheet")] = 989.0,
    mfu: Annotated[float, arg(metavar="PART", help="with --gpus: part of these that a pass reaches, assumed")] = 0.4,
    node_gbytes: Annotated[float, arg(metavar="GB/S", help="with --gpus: sent by one to others of 8")] = 450.0,
    network_gbytes: Annotated[float, arg(metavar="GB/S", help="with --gpus: sent by one to other nodes")] = 50.0,
    json: Json = None,
    fields: Fields = (),
) -> None:
    """Say by arithmetic what training and playing need of a GPU, whether it fits, and what would help.

    Any field of the stage can be set: --precision bfloat16 --optim.optimizer adamw8bit.
    """
    from minwm.bench.memory import GIB, reserve, size
    from minwm.experiments import presets

    if not 0 < gpu_memory < math.inf:
        raise UserError(f"--gpu-memory {gpu_memory:g}: give the GiB of a GPU, such as 24")
    budget = int(gpu_memory * GIB)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    changes = parse_fields(fields)
    if "/" in preset:
        runs = [override(presets.stage(preset, Path("runs")), changes)]
    else:
        pipeline = presets.pipeline(preset, Path("runs"))
        runs = [override(run, changes) for run in (pipeline.codec, *pipeline.stages) if run]
    left = f"{size(reserve(budget))} are left to CUDA and to gaps between tensors"
    if gpus is not None:
        from minwm.bench.scaling import Cluster

        cluster = Cluster(tflops=tflops, mfu=mfu, node_gbytes=node_gbytes, network_gbytes=network_gbytes)
        values = _scale(console, runs, gpus, cluster, budget)
    elif "/" in preset:
        run = runs[0]
        console.print(f"{gpu_memory:g} GiB, of which {left}")
        values = {run.name: {kind: _explain(console, preset, kind, run, budget) for kind in _kinds(run)}}
    else:
        values = _overview(console, preset, runs, budget)
        console.print(
            f"of {gpu_memory:g} GiB {left}\n--preset {preset}/STAGE says what takes so much, and what would help"
        )
    write_numbers({"gpu_memory_gib": gpu_memory, "stages": values}, json)


def _scale(console: Console, runs: list["Run"], gpus: int, cluster: "Cluster", budget: int) -> dict[str, Any]:
    """A table for each stage of the network: a line for 1, 2, 4, ... GPUs."""
    from minwm.bench.memory import reserve, size
    from minwm.bench.scaling import scale

    if gpus < 1:
        raise UserError(f"--gpus {gpus}: give how many there are at most, such as 8")
    runs = [run for run in runs if run.recipe.trains_backbone]
    if not runs:
        raise UserError("--gpus is of stages that train the network; name one, or leave it out")
    rates = f"{cluster.node_gbytes:g} GB/s within {cluster.node} GPUs, {cluster.network_gbytes:g} beyond"
    console.print(f"{cluster.tflops:g} TFLOP/s, of which {100 * cluster.mfu:g}% are reached; {rates}; sent by each GPU")
    values: dict[str, Any] = {}
    for run in runs:
        table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim", title=run.name, title_justify="left")
        for title in (
            "GPUs",
            "a clip on",
            "memory of each",
            "",
            "step of",
            "weights",
            "copies",
            "attention",
            "seconds",
            "GPU-hours",
        ):
            table.add_column(title, no_wrap=True)
        values[run.name] = []
        for count in (2**k for k in range(gpus.bit_length()) if 2**k <= gpus):
            found = scale(run, count, cluster)
            room = budget - reserve(budget) - found.bytes
            fits = "[green]fits[/]" if room >= 0 else f"[red]{size(-room)} too much[/]"
            cells = [str(count), str(found.sequence), size(found.bytes), fits]
            hours = "{:.4g} to {:.4g}".format(*found.gpu_hours)
            for role, step in found.steps.items():
                sent = [size(int(x)) if x else "" for x in (step.shard, step.copy, step.sequence)]
                table.add_row(*cells, role, *sent, "{:.3g} to {:.3g}".format(*step.seconds), hours)
                cells, hours = [""] * len(cells), ""
            values[run.name].append(to_dict(found) | {"fits": room >= 0})
        console.print(table)
    return values


def _kinds(run: "Run") -> tuple[str, ...]:
    return ("training", "playing") if run.recipe.trains_backbone else ("training",)


def _question(kind: str, run: "Run") -> tuple[Any, tuple[Any, ...], Any]:
    """How to plan a stage, on what, and what could be changed."""
    from minwm.bench.advice import PLAYING, TRAINING
    from minwm.bench.memory import plan_inference, plan_training

    return (plan_training, (run,), TRAINING) if kind == "training" else (plan_inference, (run.model,), PLAYING)


def _overview(console: Console, preset: str, runs: list["Run"], budget: int) -> dict[str, dict[str, Any]]:
    """A line for each stage."""
    from minwm.bench.memory import size
    from minwm.core.runtime import progress

    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for title in ("stage", "recipe", "training", "", "playing", ""):
        table.add_column(title, no_wrap=True)
    values: dict[str, dict[str, Any]] = {}
    with progress(len(runs), f"plan {preset}") as bar:
        for run in runs:
            cells, values[run.name] = [run.name, run.recipe.kind], {}
            for kind in _kinds(run):
                make, subject, _ = _question(kind, run)
                made = make(*subject)
                cells += [size(made.total), _verdict(made, budget)]
                values[run.name][kind] = _values(made, budget)
            table.add_row(*cells)
            bar.advance(1, run.name)
    console.print(table)
    return values


def _explain(console: Console, preset: str, kind: str, run: "Run", budget: int) -> dict[str, Any]:
    """A plan line by line; and what would help, if it does not fit."""
    from minwm.bench.advice import advise
    from minwm.bench.memory import size
    from minwm.core.runtime import progress

    make, subject, options = _question(kind, run)
    made = make(*subject)
    console.print(f"\n[bold]{kind} {preset}[/] needs {size(made.total)}: {_verdict(made, budget)}")
    console.print(_lines(made))
    if made.fits(budget):
        return _values(made, budget)
    with progress(len(options), "what would help") as bar:
        advice = advise(make, subject, options, bar.advance)
    for change in advice.changes:
        console.print(f"  saves {size(change.saves):>9}   {change.what}")
    console.print(f"  with all of that which goes together {size(advice.plan.total)}: {_verdict(advice.plan, budget)}")
    shards = advice.plan.shards(budget)
    if kind == "training" and shards and shards > 1 and not advice.plan.host:
        console.print(f"  {shards} GPUs could hold it if they shared what is there all the time (docs/train.md)")
    changes = {"changes": [to_dict(change) for change in advice.changes], "changed": _values(advice.plan, budget)}
    return _values(made, budget) | changes


def _lines(made: "Plan") -> Table:
    from minwm.bench.memory import size

    table = Table(box=None, padding=(0, 3, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(style="dim")
    groups = {"all the time": made.held, "in turn, of which the largest counts": made.turns, "on the CPU": made.host}
    for title, items in groups.items():
        if not items:
            continue
        table.add_row(f"[dim]{title}[/]")
        for item in items:
            table.add_row(f"  {item.name}", size(item.bytes), item.why)
    return table


def _verdict(made: "Plan", budget: int) -> str:
    from minwm.bench.memory import size

    spare = made.spare(budget)
    return f"[green]fits, {size(spare)} to spare[/]" if spare >= 0 else f"[red]{size(-spare)} too much[/]"


def _values(made: "Plan", budget: int) -> dict[str, Any]:
    return to_dict(made) | {"total": made.total, "spare": made.spare(budget), "fits": made.fits(budget)}
