"""Verbs that train models, and measure what they cost."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from minwm.cli.base import (
    PLAIN,
    Count,
    Decoder,
    Engine,
    Fields,
    Flag,
    Json,
    ModelFolder,
    Show,
    Steps,
    command,
    echo,
    numbers,
    open_model,
    parse_fields,
    print_fields,
    write_numbers,
)
from minwm.core.config import UserError, dumps, lookup, override, to_dict

if TYPE_CHECKING:
    from minwm.store.model import Model, ModelConfig


def list_pipelines(_words: list[str]) -> None:
    """Print every pipeline with a line about it."""
    from minwm.experiments.presets import PIPELINES

    for name, make in PIPELINES.items():
        echo(f"  {name:<15} {(make.__doc__ or '').partition(chr(10))[0]}")


def list_fields(words: list[str]) -> None:
    """Print the fields of the stage that is named first, or else every pipeline."""
    from minwm.experiments import presets

    stage = next(iter(words), "")
    if "/" not in stage:
        echo("--FIELD VALUE sets any field of a stage; PIPELINE/STAGE --help lists them. Pipelines:")
        return list_pipelines(words)
    return print_fields(presets.stage(stage, Path("runs") / stage.partition("/")[0]), f"train {stage}")


def list_pipeline_fields(words: list[str]) -> None:
    """Print the fields of the pipeline that is named first, and its stages; or else every pipeline."""
    from minwm.experiments import presets

    if not words or words[0].startswith("-"):
        echo("--PART.FIELD VALUE sets any field of a stage or of another part; NAME --help lists them. Pipelines:")
        return list_pipelines(words)
    plan = presets.pipeline(words[0], Path("runs") / words[0])
    print_fields(replace(plan, codec=None, stages=()).settings(), f"pipeline {plan.name}")
    echo("Stages, whose fields are set as --STAGE.FIELD VALUE, and what lists these:")
    for run in (*([plan.codec] if plan.codec else []), *plan.stages):
        echo(f"  {run.name:<15} minwm train {plan.name}/{run.name} --help")
    return None


@command("pipeline", details=list_pipeline_fields, resumable=True)
def pipeline(
    name: Annotated[Positional[str], arg(metavar="NAME", help="one of those below")],
    out: Annotated[Path | None, arg(metavar="DIR", help="folder of everything; runs/NAME if not given")] = None,
    until: Annotated[str | None, arg(metavar="STAGE", help="stop after this stage")] = None,
    after_red: Annotated[Flag, arg(help="go on after a stage with a red verdict (minwm doctor)")] = False,
    json: Json = None,
    show: Show = False,
    fields: Fields = (),
) -> None:
    """Run all stages, each from the one before; then measure, and write the report.

    Any field of any part can be set: --camera.steps 500 --dmd.recipe.guidance 2 --render.clips_per_world 2
    """
    from minwm.core.runtime import rank
    from minwm.experiments import presets
    from minwm.experiments.pipeline import evaluation, run_pipeline
    from minwm.experiments.summary import report

    out = out or Path("runs") / name
    plan = presets.pipeline(name, out).override(parse_fields(fields))
    if show:
        return echo(dumps(plan.settings()))
    if until:
        plan.stage(until)
    run_pipeline(plan, out, echo, until, after_red)
    if not until and rank() == 0:
        result = evaluation(plan, out)
        write_numbers({name: to_dict(row) for name, row in result.rows.items()}, json)
        echo(f"report: {report(plan, out, result)}")
    return None


@command("train", details=list_fields, resumable=True)
def train(
    stage: Annotated[Positional[str], arg(metavar="PIPELINE/STAGE")],
    out: Annotated[Path | None, arg(metavar="DIR", help="folder of the run; ROOT/STAGE if not given")] = None,
    root: Annotated[
        Path | None,
        arg(metavar="DIR", help="folder with data and earlier stages; runs/PIPELINE if not given"),
    ] = None,
    json: Json = None,
    resume: Annotated[Flag, arg(help="insist that there is a run to continue; continuing is the default")] = False,
    show: Show = False,
    fields: Fields = (),
) -> None:
    """Train one stage, such as demo/camera; an interrupted run is continued."""
    from minwm.experiments import presets
    from minwm.experiments.samples import sample_videos
    from minwm.train.build import train as run_training

    root = root or Path("runs") / stage.partition("/")[0]
    run = override(presets.stage(stage, root), parse_fields(fields))
    if show:
        return echo(dumps(run))
    out = out or root / run.name
    if resume and not (out / "run.json").exists():
        raise UserError(f"--resume: {out} holds no run; leave it out to start one")
    echo(f"{stage}: {run.recipe.kind}, {run.steps} steps of {run.batch * run.accumulate} clips -> {out}")
    return numbers(asdict(run_training(run, out, sample_videos)), json)


@command("doctor")
def doctor(
    run: Annotated[Positional[Path], arg(metavar="RUN", help="folder of a stage, trained or training")],
    json: Json = None,
) -> None:
    """Say what ails a training run, and the cure; an error if it will not become what it should."""
    from minwm.train.doctor import examine

    verdicts = examine(run)
    write_numbers({"verdicts": [asdict(verdict) for verdict in verdicts]}, json)
    for verdict in verdicts:
        echo(f"{verdict.level}: {verdict.name}: {verdict.evidence}; {verdict.cure}")
    if any(verdict.level == "red" for verdict in verdicts):
        raise UserError(f"{run} will not become what it should (red verdicts above)")
    echo(f"{run}: {'nothing that must stop it' if verdicts else 'nothing wrong'}")


@command("ablate", resumable=True)
def ablate(
    name: Annotated[Positional[str], arg(metavar="NAME", help="poses, steps, batch, camera, distill or sampling")],
    out: Annotated[Path, arg(metavar="DIR", help="folder of all ablations; they share their clips")] = Path(
        "runs/ablate"
    ),
    json: Json = None,
    svg: Annotated[Path | None, arg(metavar="FILE.svg", help="the drawing")] = None,
) -> None:
    """Run one of the paper's ablations, small enough for a CPU, and draw it; an interrupted one is continued."""
    from minwm.core.files import write_text
    from minwm.experiments.ablate import draw, run_ablation
    from minwm.experiments.ablations import ablation

    plan = ablation(name, out)
    about = {"question": plan.question, "varies": plan.varies, "small": plan.small, "planned": len(plan.arms)}
    for results in run_ablation(plan, out, echo):
        write_numbers({"ablation": plan.name, **about, "arms": [to_dict(result) for result in results]}, json)
        if svg:
            write_text(svg, draw(plan, results))


@command("bench")
def bench(
    model: ModelFolder | None = None,
    preset: Annotated[str | None, arg(metavar="NAME", help="a pipeline, PIPELINE/STAGE, or self-forcing")] = None,
    random_weights: Annotated[Flag, arg(help="as fast as trained ones")] = False,
    json: Json = None,
    repeats: Count = 5,
    chunks: Annotated[int, arg(metavar="N", help="steady chunks that are measured")] = 20,
    engine: Engine = PLAIN,
    decoder: Decoder = None,
    steps: Steps = None,
    merged_refresh: Annotated[Flag, arg(help="finished chunks get no pass of their own")] = False,
    window: Annotated[int | None, arg(metavar="N", help="chunks kept besides the sinks")] = None,
    latency: Annotated[
        float | None, arg(metavar="MS", help="fail if the 90th percentile of action_to_pixel is above")
    ] = None,
    plot: Annotated[Path | None, arg(metavar="FILE.svg", help="draw the stages and their bounds")] = None,
    compare: Annotated[tuple[Path, Path] | None, arg(metavar="A.json B.json", help="only compare two results")] = None,
    reference: Annotated[Path | None, arg(metavar="DIR", help="measure minWM's own inference in this checkout")] = None,
    fields: Fields = (),
) -> None:
    """Measure latency and frames per second, and how near they are to what the machine can do.

    With --preset any field of the model can be set: --network.layers 2 --stream.chunk 2.
    """
    from minwm.bench import report
    from minwm.bench.stream import bench_model, random_model
    from minwm.core.files import read_json, write_text
    from minwm.store.folder import tiny_decoder

    if reference:
        if not preset or model or random_weights or fields or compare or plot or latency is not None:
            raise UserError(f"--reference {reference}: give besides only --preset NAME and --json")
        return _bench_reference(reference, preset, json)
    if compare:
        return echo("\n".join(report.compare(*(read_json(path) for path in compare))))
    if model and not (preset or random_weights or fields):
        loaded = open_model(model)
    elif preset and random_weights and not model:
        loaded = random_model(override(_preset(preset), parse_fields(fields)))
    else:
        raise UserError("give --model DIR, or --preset NAME with --random-weights, or --compare A.json B.json")
    cfg = loaded.config
    stream = cfg.stream
    stream = replace(stream, window=window or stream.window, merged_refresh=merged_refresh or stream.merged_refresh)
    cfg = replace(cfg, stream=stream)
    loaded = with_steps(replace(loaded, config=cfg), steps)
    if decoder:
        loaded = tiny_decoder(loaded, decoder, random_weights)
    loaded.ready()
    if random_weights and engine.fp8 != "none":
        echo("random weights say nothing about what FP8 does to a picture: this trial is no evidence")
    result = bench_model(loaded, engine.config(), repeats, chunks, roofline=True)
    if plot:
        write_text(plot, report.plot(result))
    numbers(to_dict(result), json)
    return None if latency is None else report.check_latency(result, latency)


def _bench_reference(folder: Path, preset: str, json: Path | None) -> None:
    from minwm.bench.reference import SCRIPTS, run_reference

    numbers(to_dict(run_reference(folder, lookup(SCRIPTS, preset, "model of minWM"))), json)


def with_steps(model: "Model", steps: int | None) -> "Model":
    """The model with another number of denoising passes, at the times that its sampler has for so many."""
    if steps is None:
        return model
    return replace(model, config=replace(model.config, sampler=model.config.sampler.with_steps(steps)))


@command("bench-train", details=list_fields)
def bench_train(
    preset: Annotated[Positional[str], arg(metavar="PIPELINE[/STAGE]", help="a stage, or all of a pipeline")],
    steps: Annotated[int, arg(metavar="N", help="steps that are timed, at least")] = 10,
    warmup: Annotated[int, arg(metavar="N", help="steps before them, at least")] = 3,
    peak: Annotated[float | None, arg(metavar="TFLOPS", help="of a data sheet: the MFU of that too")] = None,
    json: Json = None,
    fields: Fields = (),
) -> None:
    """Measure the step time of training, with random weights and clips, and how near it is to what the machine can do.

    Any field of the run can be set: --batch 2 --checkpointing attention --compile true --precision bfloat16. Under
    torchrun the processes share the clips of a step; the numbers, but for clips and tokens, are of the first one.
    """
    from minwm.bench.training import headline, measure_steps
    from minwm.core.runtime import rank
    from minwm.experiments import presets
    from minwm.train.parallel import LONG_WAIT, process_group

    pipeline, slash, _ = preset.partition("/")
    runs = [presets.stage(preset, Path())] if slash else presets.pipeline(pipeline, Path()).stages
    measured = {}
    with process_group(LONG_WAIT):
        for run in runs:
            measured[run.name] = measure_steps(override(run, parse_fields(fields)), steps, warmup, peak)
            if not rank():
                echo("\n".join(headline(f"{pipeline}/{run.name}", measured[run.name])))
    if not rank():
        write_numbers({"stages": {name: to_dict(found) for name, found in measured.items()}}, json)


def _preset(name: str) -> "ModelConfig":
    """The model of a stage, or of the last stage of a pipeline; or one that is only measured."""
    from minwm.experiments import presets

    if name in presets.MODELS:
        return presets.MODELS[name]()
    pipeline, slash, _ = name.partition("/")
    stage = name if slash else f"{name}/{presets.pipeline(pipeline, Path()).stages[-1].name}"
    return presets.stage(stage, Path()).model


def inspect_model(folder: Path, json: Path | None) -> None:
    """Show what is in a model folder: sizes, sampler, geometry, speeds of its keys."""
    from minwm.store.folder import load_model

    model = load_model(folder)
    cfg, geometry = model.config, model.config.geometry
    per_latent = cfg.motion.stride / cfg.motion.fps
    sizes = {
        "parameters": sum(p.numel() for p in model.net.parameters()),
        "codec_parameters": sum(p.numel() for p in model.codec.parameters()),
        "passes": cfg.sampler.passes,
        "clip_frames": cfg.motion.stride * (cfg.latents - 1) + 1,
        "tokens_per_latent": geometry.tokens,
        "cache_rows": geometry.rows,
        "units_per_latent": cfg.motion.move * per_latent,
        "degrees_per_latent": cfg.motion.turn * per_latent,
    }
    numbers(sizes | to_dict(cfg), json)
