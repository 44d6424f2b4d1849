"""The page of a result in any scene: tables with intervals, curves over time, tables by key, and some of the videos."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from minwm.cameras.track import se3_inverse
from minwm.eval.camera.published import BASELINES as WRONG_PATHS
from minwm.eval.camera.score import keys_of
from minwm.eval.metrics import Score, Scores
from minwm.eval.recorded import RECORDING
from minwm.eval.report.charts import Series, line_chart
from minwm.eval.report.gallery import EXAMPLES, Example, gallery
from minwm.eval.report.page import Section, caveats, commands, interval, table, write_page
from minwm.eval.source import Video, VideoSource
from minwm.eval.witness import Witness

Rows = Mapping[str, Scores]
CAVEATS = (
    "Cameras are recovered from pixels; docs/evaluation.md says how far the estimator itself is off. A second without "
    "a camera is lost, and charged as standing still.",
    "The published scores fit the scale of the path: a static video gets half of WBench's marks, half speed nearly "
    "all. Read them beside turn_ratio, speed_ratio and the baselines below them.",
    "gated_psnr and gated_ssim cannot be compared with WBench's gated spatial consistency, which takes likeness from "
    "DreamSim.",
)


def write_scores(
    path: Path,
    models: Rows,
    baselines: Rows,
    witnesses: Mapping[str, Witness],
    sources: Mapping[str, VideoSource],
    facts: Mapping[str, str],
    line: str,
) -> Path:
    """Write the page and return its path. `witnesses` are those of rows that have one, `sources` those of the models;
    `line` is the command that made the numbers."""
    rows = {**models, **baselines}
    metrics = dict.fromkeys(metric for scores in rows.values() for metric in scores.scores)
    curves = "".join(_curves(metric, rows) for metric in metrics)
    count = len(next(iter(models.values())).tasks)
    return write_page(
        path,
        "minwm eval: " + ", ".join(models),
        "What the videos show, second by second, against what was asked for.",
        facts,
        [(str(count), "videos of each model")],
        [
            Section("scores", "Scores", "".join(_table(metric, rows) for metric in metrics)),
            Section("time", "Over time", f'<div class="curves">{curves}</div>' if curves else ""),
            Section("keys", "By the keys held", "".join(_keys(name, scores) for name, scores in models.items())),
            Section("estimators", "Two estimators of cameras", _witnesses(rows, witnesses)),
            gallery([*_examples(sources)], _first(sources).fps, "Videos"),
            Section("skipped", "What was not measured", _skipped(models)),
            commands({"These numbers again": line}),
            caveats(CAVEATS),
        ],
    )


def _quantities(metric: str, rows: Rows) -> list[str]:
    found = dict.fromkeys(name for scores in rows.values() for name in scores.scores.get(metric, {}))
    return [*found]


def _table(metric: str, rows: Rows) -> str:
    """Means over all videos; of published scores also those of the wrong paths."""
    names = [name for name in _quantities(metric, rows) if not set(name) & set("[@(")]
    body = {
        row: [_cell(scores.scores[metric].get(name)) for name in names]
        for row, scores in rows.items()
        if metric in scores.scores
    }
    for wrong in WRONG_PATHS:
        last = next((scores.scores[metric] for scores in reversed([*rows.values()]) if metric in scores.scores), {})
        found = {name: last.get(f"{name} ({wrong})") for name in names}
        if any(found.values()):
            body[f"{wrong} (a path, not a video)"] = [_cell(score) for score in found.values()]
    return f"<h3>{escape(metric)}</h3>" + table(["", *names], body)


def _cell(score: Score | None) -> str:
    return interval(score.mean if score else None, 3)


def _curves(metric: str, rows: Rows) -> str:
    """Of every quantity that is known after each second."""
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row, scores in rows.items():
        for label, score in scores.scores.get(metric, {}).items():
            name, at, second = label.partition("@")
            if at and "(" not in name:
                points.setdefault(name, {}).setdefault(row, []).append((int(second), score.mean.value))
    figures = ""
    for name, by_row in points.items():
        lines = [
            Series(row, [x for x, _ in sorted(p)], [y for _, y in sorted(p)], [*rows].index(row), dots=True)
            for row, p in by_row.items()
        ]
        chart = line_chart(lines, x_label="second", y_label=name, width=340, height=200)
        figures += f"<figure>{chart}<figcaption>{escape(f'{metric}: {name}')}</figcaption></figure>"
    return figures


def _keys(model: str, scores: Scores) -> str:
    found: dict[str, dict[str, Score]] = {}
    for label, score in scores.scores.get("camera", {}).items():
        name, bracket, keys = label.partition("[")
        if bracket:
            found.setdefault(keys.rstrip("]"), {})[name] = score
    names = [*dict.fromkeys(name for by_name in found.values() for name in by_name)]
    body = {keys: [_cell(by_name.get(name)) for name in names] for keys, by_name in found.items()}
    return f"<h3>{escape(model)}</h3>" + table(["keys", *names], body) if body else ""


def _witnesses(rows: Rows, witnesses: Mapping[str, Witness]) -> str:
    tables = ""
    for row, witness in witnesses.items():
        one, two, body = rows[row], witness.scores, dict[str, list[str]]()
        for metric, differences in witness.differences.items():
            for name, found in differences.items():
                beyond = "" if found.limit is None else f"{len(found.beyond)} by more than {found.limit:g}"
                cells = [_cell(scores.scores[metric].get(name)) for scores in (one, two)]
                cells += [interval(found.median, 3), beyond, str(found.videos), str(len(found.only_one))]
                body[f"{metric}: {name}"] = cells
        head = ["", one.estimator, two.estimator, "median difference", "videos that differ", "of", "known to one"]
        tables += f"<h3>{escape(row)}</h3>" + table(head, body)
    return tables


def _examples(sources: Mapping[str, VideoSource]) -> Iterator[Example]:
    for name in next(iter(sources.values())).names[:EXAMPLES]:
        made = {model: source.video(name) for model, source in sources.items() if name in source.names}
        video = next(iter(made.values()))
        truth = {} if video.reference is None else {RECORDING: video.reference}
        videos = {**truth, **{model: one.frames for model, one in made.items()}}
        yield Example(video.task.get("prompt", name), name, _held(video), videos)


def _first(sources: Mapping[str, VideoSource]) -> Video:
    source = next(iter(sources.values()))
    return source.video(source.names[0])


def _held(video: Video) -> Sequence[Sequence[str]]:
    """The keys that the commanded camera seems to hold in each frame, over the second that it is in."""
    track = video.camera
    if track is None or len(track) < 2:
        return [[]] * len(video.frames)
    second = max(1, round(video.fps))
    ends = [*range(0, len(track) - 1, second), len(track) - 1]
    steps = se3_inverse(track.c2w[ends[:-1]]) @ track.c2w[ends[1:]]
    held = [[key for key in keys_of(step).split("+") if key != "static"] for step in steps]
    return [held[min(frame // second, len(held) - 1)] for frame in range(len(track))]


def _skipped(models: Rows) -> str:
    lines = dict.fromkeys(f"{metric}: {why}" for scores in models.values() for metric, why in scores.skipped.items())
    return bool(lines) * f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
