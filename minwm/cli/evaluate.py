"""The verb that measures models."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
    refuse_existing,
    write_numbers,
)
from minwm.core.config import UserError, lookup, override, to_dict

if TYPE_CHECKING:
    from minwm.eval.metrics import Scores
    from minwm.eval.recorded import Recordings
    from minwm.eval.source import VideoSource
    from minwm.eval.witness import Witness
    from minwm.store.model import Model


def list_eval_fields(_words: list[str]) -> None:
    from minwm.eval.run import EvalConfig

    print_fields(EvalConfig(), "eval")


@dataclass(frozen=True, kw_only=True)
class AnyScene:
    """What is scored where scenes need not be known."""

    suite: Annotated[Flag, arg(help="along the fixed suite, in scenes that need not be known")] = False
    prompts: Annotated[Path | None, arg(metavar="FILE.txt", help="of the suite: one prompt per line")] = None
    images: Annotated[Path | None, arg(metavar="DIR", help="of the suite: first frames, with NAME.txt")] = None
    trajectories: Annotated[Path | None, arg(metavar="FILE.txt", help="in place of the suite's paths")] = None
    videos: Annotated[Path | None, arg(metavar="DIR", help="score mp4 files with pose files NAME.json")] = None
    data: Annotated[Path | None, arg(metavar="DIR", help="against recorded clips: raw ones, or latent shards")] = None
    split: Annotated[Literal["val", "train"], arg(help="of --data")] = "val"
    limit: Annotated[int | None, arg(metavar="N", help="of --data: so many clips, spread over the split")] = None
    metrics: Annotated[tuple[str, ...] | None, arg(metavar="NAME", help="in any scene; all if not given")] = None
    weights: Annotated[tuple[str, ...], arg(metavar="METRIC=FILE", help="TorchScript files of lpips, ...")] = ()
    estimator: Annotated[
        tuple[str, ...], arg(metavar="klt|colmap", help="what recovers cameras from pixels; a second is set beside it")
    ] = ("klt",)
    wbench: Annotated[Path | None, arg(metavar="REPORT.json", help="of --videos: WBench's report of navigation")] = None

    @property
    def along_suite(self) -> bool:
        return bool(self.suite or self.prompts or self.images or self.trajectories)

    @property
    def asked(self) -> bool:
        """Whether this was asked for, in place of rendered scenes."""
        return bool(self.along_suite or self.videos or self.data)

    def check(self, models: Sequence[Path]) -> None:
        """UserError for what cannot be asked for at once, before any work."""
        from minwm.cameras.formats.colmap import load_pycolmap
        from minwm.eval.camera.estimators import ESTIMATORS
        from minwm.eval.metrics import METRICS, RECOVERED
        from minwm.session.batch import TURNS

        if self.videos and (models or self.along_suite or self.data):
            raise UserError("--videos DIR is scored as it is; leave out the models and what is made with them")
        if self.data and self.along_suite:
            raise UserError("--data DIR has prompts, first frames and cameras; leave out those of the suite")
        if self.asked and not self.data and (self.limit is not None or self.split != "val"):
            raise UserError("--split and --limit are of --data; add --data DIR, or leave them out")
        if self.wbench:
            if not self.videos:
                raise UserError("--wbench REPORT.json is of videos of WBench's cases; give --videos DIR")
            if not (self.videos / TURNS).exists():
                raise UserError(
                    f"--wbench: {self.videos} has no {TURNS}; make it with minwm generate --list of its cases"
                )
            if self.metrics is not None and "published" not in self.metrics:
                raise UserError("--wbench: its scores are those of published; add it to --metrics, or leave that out")
            refuse_existing(self.wbench, ".json", "wbench")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: give at least 1")
        for name in self.estimator:
            lookup(ESTIMATORS, name, "estimator")
        if not 1 <= len(self.estimator) == len({*self.estimator}) <= 2:
            raise UserError(f"--estimator {' '.join(self.estimator)}: give one, or two that differ")
        if "colmap" in self.estimator:
            load_pycolmap()
        for metric in self.metrics or ():
            lookup(METRICS, metric, "metric")
        if len(self.estimator) == 2 and self.metrics is not None and not {*RECOVERED}.intersection(self.metrics):
            raise UserError(f"--estimator: two are compared by their {' or '.join(RECOVERED)}; add it to --metrics")
        for metric, file in self.files.items():
            if not lookup(METRICS, metric, "metric").network:
                raise UserError(f"--weights {metric}={file}: {metric} takes none")
            if not file.is_file():
                raise UserError(f"--weights {metric}={file}: there is no such file")

    @property
    def files(self) -> dict[str, Path]:
        """Weights by metric."""
        if wrong := [text for text in self.weights if "=" not in text]:
            raise UserError(f"--weights {wrong[0]}: write METRIC=FILE")
        return {metric: Path(file) for metric, _, file in (text.partition("=") for text in self.weights)}


@command("eval", details=list_eval_fields, resumable="out")
def evaluate(
    model: Annotated[list[Path], UseAppendAction, arg(metavar="DIR|USER/NAME", help="may be given several times")] = [],  # noqa: B006  (never changed)
    json: Json = None,
    html: Annotated[Path | None, arg(metavar="FILE.html", help="a page with clips side by side")] = None,
    sheet: Annotated[Path | None, arg(metavar="PNG", help="draw the last model's best and worst clips here")] = None,
    quick: Annotated[Flag, arg(help="every measurement, on so few clips that they mean little")] = False,
    out: Annotated[Path | None, arg(metavar="DIR", help="keep rows and videos here; finished ones stay")] = None,
    scene: Annotated[AnyScene, arg(name="")] = AnyScene(),
    compare: Annotated[
        tuple[Path, Path] | None, arg(metavar="A.json B.json", help="what B does better or worse")
    ] = None,
    hub: Annotated[
        Path | None, arg(metavar="FILE.yaml", help="the Hub's result file, from --wbench REPORT.json of WBench itself")
    ] = None,
    fields: Fields = (),
) -> None:
    """Measure camera following, quality, memory, drift and speed in rendered scenes that no stage has seen; or, with
    --suite (or --prompts, --images, --trajectories), --data or --videos, in any scene, from pixels alone.

    --compare sets two results in any scene side by side. The exit code is 1 if anything is significantly worse.

    Under torchrun, processes share models and baselines in rendered scenes, and the videos of --suite and --data, which
    the first one measures.
    """
    _check_shared(bool(scene.videos or compare or hub), out)
    if compare:
        if model or html or sheet or quick or out or fields or hub or scene != AnyScene():
            raise UserError("--compare A.json B.json measures nothing; give besides only --json")
        return _compare(*compare, json)
    if hub:
        others = model or json or html or sheet or quick or out or fields
        if others or scene != AnyScene(wbench=scene.wbench) or not scene.wbench:
            raise UserError("--hub FILE.yaml measures nothing; give besides only --wbench REPORT.json of WBench itself")
        return _write_hub_results(scene.wbench, hub)
    if not (scene.videos or model):
        raise UserError("give --model DIR, or --videos DIR")
    if not scene.asked:
        if scene != AnyScene():
            raise UserError(
                "--metrics, --weights and --estimator are of --suite, --data and --videos, --wbench of --videos, "
                "--split and --limit of --data; add one"
            )
        return _in_rendered_scenes(model, json, html, sheet, quick, out, fields)
    if sheet or quick or fields:
        raise UserError("--sheet, --quick and sizes are for rendered scenes; leave them out")
    scene.check(model)
    return _in_any_scene(model, scene, json, html, out)


def _check_shared(makes_nothing: bool, out: Path | None) -> None:
    """UserError for what several processes cannot share."""
    from minwm.core.runtime import world_size

    if world_size() > 1 and makes_nothing:
        raise UserError(
            f"{world_size()} processes cannot share --videos, --compare or --hub; start minwm eval without torchrun"
        )
    if world_size() > 1 and not out:
        raise UserError(f"{world_size()} processes share their work through a folder: give --out DIR")


def _in_any_scene(models: list[Path], scene: AnyScene, json: Path | None, html: Path | None, out: Path | None) -> None:
    """Score a folder of videos, or those of models along the suite or in place of recorded clips."""
    from tempfile import TemporaryDirectory

    from minwm.core.files import write_json
    from minwm.core.runtime import rank
    from minwm.eval.metrics import METRICS
    from minwm.eval.recorded import RECORDING
    from minwm.eval.report.scores import write_scores
    from minwm.eval.wbench import navigation_report
    from minwm.train.parallel import LONG_WAIT, process_group

    results, baselines, sources, witnesses = {}, {}, {}, {}
    with TemporaryDirectory() as temporary, process_group(LONG_WAIT):
        for name, source in _sources(_names(models), scene, out or Path(temporary)):
            if rank():
                continue
            sources[name], results[name] = source, _score(name, source, scene, scene.metrics, witnesses)
        if rank():
            return
        for name, source in _baselines(models, scene):
            fit = (metric for metric in scene.metrics or METRICS if METRICS[metric].compares == (name != RECORDING))
            baselines[name] = _score(name, source, scene, [*fit], witnesses)
        if html:
            echo(f"page: {write_scores(html, results, baselines, witnesses, sources, _facts(), command_line())}")
    rows = {"videos": results, "baselines": baselines, "witnesses": witnesses}
    write_numbers({kind: {name: to_dict(x) for name, x in found.items()} for kind, found in rows.items()}, json)
    if scene.wbench:
        ((name, result),) = results.items()
        write_json(scene.wbench, navigation_report(name, result.scores.get("published", {})))


def _score(
    name: str, source: "VideoSource", scene: AnyScene, metrics: Sequence[str] | None, witnesses: "dict[str, Witness]"
) -> "Scores":
    """The scores of one source, and what a second estimator says of it, if there is one, added to `witnesses`."""
    from minwm.eval.metrics import RECOVERED, measure
    from minwm.eval.witness import call_witness

    first, *second = scene.estimator
    found = measure(source, metrics, partial(_say, name), scene.files, first)
    _say_scores(name, found)
    if second and {*RECOVERED} & found.scores.keys():
        witnesses[name] = call_witness(source, found, second[0], partial(_say, f"{name}, {second[0]}"))
        _say_differences(name, f"{first} and {second[0]}", witnesses[name])
    return found


def _sources(models: Mapping[str, Path], scene: AnyScene, out: Path) -> "Iterator[tuple[str, VideoSource]]":
    from minwm.core.runtime import rank, world_size
    from minwm.eval.recorded import recorded_source
    from minwm.eval.source import folder_source
    from minwm.eval.suite import model_source, read_lines, requests
    from minwm.train.parallel import first_process_first

    part = rank(), world_size()
    if scene.videos:
        yield str(scene.videos), folder_source(scene.videos)
    for name, path in models.items():
        folder = out / name.strip("/")
        if scene.data:
            loaded, recorded = _open_with_data(path, scene)
            about = {"model": str(path), "data": str(scene.data)}
            yield name, recorded_source(loaded, recorded, folder, about, part)
        else:
            loaded = open_model(path)
            routes, texts = (read_lines(file) if file else None for file in (scene.trajectories, scene.prompts))
            with first_process_first(part):
                wanted = requests(loaded.config, folder, routes, texts, scene.images)
            yield name, model_source(loaded, wanted, folder, str(path), part)


def _baselines(models: list[Path], scene: AnyScene) -> "Iterator[tuple[str, VideoSource]]":
    """Those of recorded clips, as the last model sees them."""
    from minwm.eval.recorded import baselines

    if scene.data:
        loaded, recorded = _open_with_data(models[-1], scene)
        yield from baselines(scene.data, recorded, loaded).items()


def _open_with_data(path: Path, scene: AnyScene) -> "tuple[Model, Recordings]":
    """A model, ready, and the recorded clips as it sees them."""
    from minwm.eval.recorded import recordings
    from minwm.store.hub import load

    assert scene.data is not None
    loaded = load(path)
    recorded = recordings(scene.data, loaded, scene.split, scene.limit)
    return loaded.ready(), recorded


def _say_scores(name: str, result: "Scores") -> None:
    for metric, scores in result.scores.items():
        for quantity, score in scores.items():
            if not set(quantity) & set("[@"):
                mean = score.mean
                _say(name, f"{metric}: {quantity} {mean.value:.3g} ({mean.low:.3g} to {mean.high:.3g})")


def _say_differences(name: str, estimators: str, witness: "Witness") -> None:
    for metric, differences in witness.differences.items():
        for quantity, found in differences.items():
            size = f"{found.median.value:.3g} apart (median of {found.videos} videos)" if found.median else "no video"
            beyond = "" if found.limit is None else f", {len(found.beyond)} by more than {found.limit:g}"
            alone = f", {len(found.only_one)} known to one of them" if found.only_one else ""
            _say(name, f"{metric}: {quantity} by {estimators}: {size}{beyond}{alone}")


class WorseError(UserError):
    """A result is significantly worse than another."""

    exit_code = 1


def _compare(before: Path, after: Path, json: Path | None) -> None:
    from minwm.eval.compare import compare

    found, worse = compare(before, after), list[str]()
    for name, differences in found.items():
        for difference in differences:
            gain, change = difference.gain, f"{difference.before:.3g} -> {difference.after:.3g}"
            interval = f"gain {gain.value:+.3g} ({gain.low:+.3g} to {gain.high:+.3g}), {difference.videos} videos"
            _say(name, f"{difference.name} {change}: {difference.verdict}, {interval}")
        worse += [difference.name for difference in differences if difference.verdict == "worse"]
    write_numbers({name: [to_dict(x) for x in differences] for name, differences in found.items()}, json)
    if worse:
        raise WorseError(f"{after} is significantly worse than {before} in {', '.join(worse)}")


def _write_hub_results(report: Path, file: Path) -> None:
    from minwm.core.hub import write_eval_results
    from minwm.eval.wbench import DATASET, hub_scores

    refuse_existing(file, ".yaml", "hub")
    scores = hub_scores(report)
    write_eval_results(file, DATASET, scores)
    echo(f"{file}: " + ", ".join(f"{task} {score}" for task, score in scores.items()))


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
    from minwm.core.runtime import rank, world_size
    from minwm.eval.cases import HELD_OUT
    from minwm.eval.report.evaluation import write_evaluation
    from minwm.eval.report.gallery import best_and_worst
    from minwm.eval.run import QUICK, EvalConfig
    from minwm.eval.run import evaluate as evaluate_models
    from minwm.eval.targets import targets
    from minwm.train.parallel import LONG_WAIT, process_group, wait_for_all

    cfg = override(QUICK if quick else EvalConfig(), parse_fields(fields))
    names, part = _names(model), (rank(), world_size())
    with TemporaryDirectory() as temporary, process_group(LONG_WAIT):
        models = {name: partial(open_model, path) for name, path in names.items()}
        result = evaluate_models(models, cfg, out or Path(temporary), echo, part=part)
        wait_for_all(part)
        if rank():
            return
        rows = {name: result.rows[name] for name in names}
        teacher = next((row for row in rows.values() if row.bench and row.bench.sampler == "autoregressive"), None)
        scenes = result.config.scenes
        aims = {name: targets(row, scenes, None if row is teacher else teacher) for name, row in rows.items()}
        for name, found in aims.items():
            for aim, value in found.items():
                echo(f"{name}: {aim.name}: {value:.3g} ({'met' if aim.met(value) else 'missed'}: {aim.aim})")
        plan = {"eval": to_dict(cfg), "held_out": HELD_OUT, "models": {name: str(path) for name, path in names.items()}}
        seconds = {name: row.eval_seconds for name, row in result.rows.items()}
        listed = {
            name: [{**to_dict(aim), "value": value, "met": aim.met(value)} for aim, value in found.items()]
            for name, found in aims.items()
        }
        every = {name: to_dict(row) for name, row in result.rows.items()}
        write_numbers({"plan": plan, "seconds": seconds, "targets": listed, "rows": every}, json)
        if sheet:
            write_image(sheet, best_and_worst(result, [*names][-1]))
        if html:
            facts = {**_facts(), "Clips": str(cfg.clips)}
            echo(f"page: {write_evaluation(html, result, aims, facts, command_line())}")


def _facts() -> dict[str, str]:
    """Of a page: where its numbers come from."""
    from minwm.core.runtime import git_commit, versions

    about = versions()
    commit, processor = git_commit() or "not a checkout", about.get("gpu", about["cpu"])
    return {"Commit": commit, "Processor": processor, "PyTorch": about["torch"]}


def _names(models: list[Path]) -> dict[str, Path]:
    """Short names by which the models go: as much of their paths as tells them apart."""
    depth = 1
    while len({Path(*path.parts[-depth:]) for path in models}) < len(models):
        depth += 1
        if depth > max(len(path.parts) for path in models):
            raise UserError("--model: the same folder is given twice")
    return {str(Path(*path.parts[-depth:])): path for path in models}
