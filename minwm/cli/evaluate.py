"""The verb that measures models."""

from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from minwm.cli.base import (
    Fields,
    Flag,
    Json,
    command,
    command_line,
    echo,
    open_model,
    parse_fields,
    print_fields,
    write_numbers,
)
from minwm.core.config import UserError, lookup, override, to_dict


def list_eval_fields(_words: list[str]) -> None:
    from minwm.eval.run import EvalConfig

    print_fields(EvalConfig(), "eval")


@command("eval", details=list_eval_fields, resumable="out")
def evaluate(
    model: Annotated[list[Path], UseAppendAction, arg(metavar="DIR|USER/NAME", help="may be given several times")] = [],  # noqa: B006  (never changed)
    json: Json = None,
    html: Annotated[Path | None, arg(metavar="FILE.html", help="a page with clips side by side")] = None,
    sheet: Annotated[Path | None, arg(metavar="PNG", help="draw the last model's best and worst clips here")] = None,
    quick: Annotated[Flag, arg(help="every measurement, on so few clips that they mean little")] = False,
    out: Annotated[Path | None, arg(metavar="DIR", help="keep rows and videos here; finished ones stay")] = None,
    suite: Annotated[Flag, arg(help="along the fixed suite, in scenes that need not be known")] = False,
    prompts: Annotated[Path | None, arg(metavar="FILE.txt", help="of the suite: one prompt per line")] = None,
    images: Annotated[Path | None, arg(metavar="DIR", help="of the suite: first frames, with NAME.txt")] = None,
    trajectories: Annotated[Path | None, arg(metavar="FILE.txt", help="in place of the suite's paths")] = None,
    videos: Annotated[Path | None, arg(metavar="DIR", help="score mp4 files with pose files NAME.json")] = None,
    metrics: Annotated[tuple[str, ...] | None, arg(metavar="NAME", help="of the suite and of videos; all")] = None,
    fields: Fields = (),
) -> None:
    """Measure camera following, quality, memory, drift and speed in rendered scenes that no stage has seen; or, with
    --suite (or --prompts, --images, --trajectories) or --videos, in any scene, from pixels alone."""
    anywhere = suite or prompts or images or trajectories
    if videos and (model or anywhere):
        raise UserError("--videos DIR is scored as it is; leave out the models and what is made with them")
    if not videos and not model:
        raise UserError("give --model DIR, or --videos DIR")
    if not (videos or anywhere):
        return _in_rendered_scenes(model, json, html, sheet, quick, out, fields)
    if html or sheet or quick or fields:
        raise UserError("--html, --sheet, --quick and sizes are for rendered scenes; leave them out")
    return _in_any_scene(model, json, out, prompts, images, trajectories, videos, metrics)


def _in_any_scene(
    models: list[Path],
    json: Path | None,
    out: Path | None,
    prompts: Path | None,
    images: Path | None,
    trajectories: Path | None,
    videos: Path | None,
    metrics: tuple[str, ...] | None,
) -> None:
    """Score a folder of videos, or those of models along the suite."""
    from tempfile import TemporaryDirectory

    from minwm.eval.metrics import METRICS, measure
    from minwm.eval.source import folder_source
    from minwm.eval.suite import model_source, read_lines, requests

    for metric in metrics or ():
        lookup(METRICS, metric, "metric")  # before any work
    results = {}
    with TemporaryDirectory() as temporary:
        for name, path in {str(videos): videos}.items() if videos else _names(models).items():
            if videos:
                source = folder_source(videos)
            else:
                loaded, folder = open_model(path), (out or Path(temporary)) / name.strip("/")
                routes, texts = (read_lines(file) if file else None for file in (trajectories, prompts))
                wanted = requests(loaded.config, folder, routes, texts, images)
                source = model_source(loaded, wanted, folder, str(path))
            results[name] = measure(source, metrics, partial(_say, name))
            for metric, scores in results[name].scores.items():
                for quantity, score in scores.items():
                    if not set(quantity) & set("[@"):
                        mean = score.mean
                        _say(name, f"{metric}: {quantity} {mean.value:.3g} ({mean.low:.3g} to {mean.high:.3g})")
    write_numbers({"videos": {name: to_dict(result) for name, result in results.items()}}, json)


def _say(name: str, line: str) -> None:
    echo(f"{name}: {line}")


def _in_rendered_scenes(
    model: list[Path],
    json: Path | None,
    html: Path | None,
    sheet: Path | None,
    quick: bool,
    out: Path | None,
    fields: tuple[str, ...],
) -> None:
    """Measure models and baselines in scenes that are known."""
    from tempfile import TemporaryDirectory

    from minwm.core.media import write_image
    from minwm.core.runtime import git_commit, versions
    from minwm.eval.cases import HELD_OUT
    from minwm.eval.report.evaluation import write_evaluation
    from minwm.eval.report.gallery import best_and_worst
    from minwm.eval.run import QUICK, EvalConfig
    from minwm.eval.run import evaluate as evaluate_models
    from minwm.eval.targets import targets

    cfg = override(QUICK if quick else EvalConfig(), parse_fields(fields))
    names = _names(model)
    with TemporaryDirectory() as temporary:
        models = {name: partial(open_model, path) for name, path in names.items()}
        result = evaluate_models(models, cfg, out or Path(temporary), echo)
        rows = {name: result.rows[name] for name in names}
        teacher = next((row for row in rows.values() if row.bench and row.bench.sampler == "autoregressive"), None)
        scenes = result.config.scenes
        aims = {name: targets(row, scenes, None if row is teacher else teacher) for name, row in rows.items()}
        for name, found in aims.items():
            for aim in found:
                echo(f"{name}: {aim.name}: {aim.value:.3g} ({'met' if aim.met else 'missed'}: {aim.aim})")
        plan = {"eval": to_dict(cfg), "held_out": HELD_OUT, "models": {name: str(path) for name, path in names.items()}}
        seconds = {name: row.eval_seconds for name, row in result.rows.items()}
        listed = {name: [{**to_dict(aim), "met": aim.met} for aim in found] for name, found in aims.items()}
        every = {name: to_dict(row) for name, row in result.rows.items()}
        write_numbers({"plan": plan, "seconds": seconds, "targets": listed, "rows": every}, json)
        if sheet:
            write_image(sheet, best_and_worst(result, [*names][-1]))
        if html:
            about = versions()
            facts = {"Commit": git_commit() or "not a checkout", "Processor": about.get("gpu", about["cpu"]),
                     "PyTorch": about["torch"], "Clips": str(cfg.clips)}  # fmt: skip
            echo(f"page: {write_evaluation(html, result, aims, facts, command_line())}")


def _names(models: list[Path]) -> dict[str, Path]:
    """Short names by which the models go: as much of their paths as tells them apart."""
    depth = 1
    while len({Path(*path.parts[-depth:]) for path in models}) < len(models):
        depth += 1
        if depth > max(len(path.parts) for path in models):
            raise UserError("--model: the same folder is given twice")
    return {str(Path(*path.parts[-depth:])): path for path in models}
