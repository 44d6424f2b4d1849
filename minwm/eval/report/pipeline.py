"""The report of a run: one HTML file with its videos, charts and tables inside, readable without a network.

All numbers come in through `ReportData`; this module only arranges them. Parts without data are left out.
"""

import base64
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
from jaxtyping import UInt8

from minwm.core.files import write_text
from minwm.core.media import contact_sheet, mp4_bytes, png_bytes
from minwm.eval.camera.follow import Confusion, FollowResult
from minwm.eval.image import Quality
from minwm.eval.report.charts import COLOURS, Series, bar, duration, heat_map, line_chart, number, smooth
from minwm.eval.stats import Interval

Frames = UInt8[np.ndarray, "n h w 3"]
VIDEO_PIXELS = 192
"""Small videos are enlarged (without smoothing) to about this height: colours survive the compression."""


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline."""

    name: str
    what: str
    """What it learns, in a few words."""
    init_from: str | None
    steps: int
    seconds: float
    losses: Mapping[str, Sequence[float]] = field(default_factory=dict)
    held_out: Sequence[tuple[int, float]] = ()
    """(step, loss) on clips that are not trained on."""
    """Curves by name, one value per logged step; the first is the stage's main loss."""
    log_every: int = 1
    passes_per_chunk: int | None = None
    """Network passes that one generated chunk costs with this model; None when it does not generate."""


@dataclass(frozen=True)
class Video:
    """One clip of the gallery."""

    label: str
    frames: Frames
    note: str = ""


@dataclass(frozen=True)
class Example:
    """A held-out clip: the true video first, then one of each model."""

    caption: str
    trajectory: str
    keys: Sequence[Collection[str]]
    """Keys held down in each frame (w a s d i j k l ...)."""
    videos: Sequence[Video]


@dataclass(frozen=True)
class Latency:
    """One row of the speed table. The first row of the table is what the others are compared with."""

    name: str
    passes: int
    """Network passes per chunk (for a bidirectional model: for the whole clip)."""
    first_ms: float
    """Until the first chunk exists, codec excluded."""
    chunk_ms: float
    """Median of the later chunks; for a bidirectional model its one time divided by its chunks."""
    p90_ms: float | None
    fps: float
    """Frames per second from noise to pixels."""


@dataclass(frozen=True)
class Command:
    """A line to reproduce the run, or to change one thing in it."""

    what: str
    line: str


@dataclass(frozen=True)
class Section:
    """A part of the page that someone else has made."""

    key: str
    title: str
    html: str


@dataclass(frozen=True)
class ReportData:
    """Everything that the report shows. Dictionaries keep their order: stages from first to last."""

    title: str
    sentence: str
    facts: Mapping[str, str]
    """Hardware, versions, commit, date: shown as they are."""
    seconds: float
    """Wall time of the whole run."""
    fps: float
    stages: Sequence[Stage] = ()
    examples: Sequence[Example] = ()
    latency: Sequence[Latency] = ()
    following: Mapping[str, FollowResult] = field(default_factory=dict)
    anchors: Mapping[str, FollowResult] = field(default_factory=dict)
    """Videos whose score is known in advance, measured like the models."""
    confusion: Mapping[str, Confusion] = field(default_factory=dict)
    quality: Mapping[str, Quality] = field(default_factory=dict)
    """Models and anchors; `quality_anchors` names the latter."""
    quality_anchors: Collection[str] = ()
    more: Sequence[Section] = ()
    """Shown after quality."""
    commands: Sequence[Command] = ()
    caveats: Sequence[str] = ()


def write_report(path: str | Path, data: ReportData) -> Path:
    """Write the page in one piece and return its path."""
    names = [stage.name for stage in data.stages]
    models = [name for name in (*data.following, *data.quality) if name not in names]
    colours = {name: i for i, name in enumerate(dict.fromkeys([*names, *models]))}
    sections = [
        ("pipeline", "Pipeline", _pipeline(data.stages)),
        ("gallery", "Held-out clips", _gallery(data.examples, data.fps)),
        ("speed", "Speed", _speed(data.latency)),
        ("camera", "Camera following", _following(data.following, data.anchors, colours)),
        ("control", "Counterfactual control", _confusions(data.confusion)),
        ("quality", "Quality and drift", _quality(data.quality, data.quality_anchors, colours)),
        *((section.key, section.title, section.html) for section in data.more),
        ("training", "Training", _training(data.stages)),
        ("reproduce", "Run it again, change one thing", _commands(data.commands)),
        ("caveats", "What to keep in mind", _caveats(data.caveats)),
    ]
    sections = [section for section in sections if section[2]]
    template = Template(files("minwm.eval").joinpath("report.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(data.title),
        sentence=escape(data.sentence),
        facts="".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in data.facts.items()),
        tiles=_tiles(data),
        nav="".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections),
        sections="".join(f'<section id="{k}"><h2>{title}</h2>{body}</section>' for k, title, body in sections),
    )
    path = Path(path)
    write_text(path, page)
    return path


def _tiles(data: ReportData) -> str:
    """The handful of numbers worth knowing, all taken from the data below."""
    tiles = [(duration(data.seconds), "whole run")]
    if len(data.latency) > 1:
        first, last = data.latency[0], data.latency[-1]
        tiles.append((f"{number(last.fps)} fps", f"{last.name}, end to end"))
        tiles.append((f"{number(first.first_ms / last.first_ms)}x", f"sooner on screen than {first.name}"))
    if data.following:
        name, result = list(data.following.items())[-1]
        tiles.append((f"{result.score.value:.2f}", f"camera score of {name}: 1 obeys, 0 stands still"))
        tiles.append((f"{100 * result.retrieval.value:.0f}%", f"right camera among {result.candidates}"))
    return "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in tiles)


def _pipeline(stages: Sequence[Stage]) -> str:
    if not stages:
        return ""
    total = max(sum(stage.seconds for stage in stages), 1e-9)
    cards = []
    for i, stage in enumerate(stages):
        main = next(iter(stage.losses.values()), ())
        facts = [("time", duration(stage.seconds))]
        if stage.steps:
            speed = f"{number(stage.steps / max(stage.seconds, 1e-9))} steps/s"
            facts += [("init", stage.init_from or "random"), ("steps", number(stage.steps)), ("speed", speed)]
        if len(main):
            ends = smooth(main)
            facts.append((next(iter(stage.losses)), f"{number(ends[0])} → {number(ends[-1])}"))
        if stage.passes_per_chunk is not None:
            facts.append(("passes per chunk", str(stage.passes_per_chunk)))
        rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
        cards.append(
            f'<li class="k{i % COLOURS}"><h3>{escape(stage.name)}</h3><p>{escape(stage.what)}</p><dl>{rows}</dl></li>'
        )
    share = "".join(
        f'<i class="f{i % COLOURS}" style="flex:{stage.seconds / total:.4f}" '
        f'title="{escape(stage.name)}: {duration(stage.seconds)}"></i>'
        for i, stage in enumerate(stages)
    )
    bar_of_time = f'<div class="share">{share}</div><p class="hint">Share of the time.</p>'
    return f'<ol class="stages">{"".join(cards)}</ol>{bar_of_time}'


def _gallery(examples: Sequence[Example], fps: float) -> str:
    if not examples:
        return ""
    controls = (
        '<div class="controls"><button id="play" type="button">Pause</button>'
        '<input id="scrub" type="range" min="0" max="1000" value="0" aria-label="position in all clips">'
        "</div>"
    )
    return controls + "".join(_example(example, fps) for example in examples)


def _example(example: Example, fps: float) -> str:
    figures = []
    for i, video in enumerate(example.videos):
        scale = max(1, round(VIDEO_PIXELS / video.frames.shape[1]))
        source = _data("video/mp4", mp4_bytes(video.frames, fps, scale=scale))
        figures.append(
            f'<figure{" class=truth" * (i == 0)}><video autoplay loop muted playsinline preload="auto" '
            f'src="{source}">'
            f"</video><figcaption>{escape(video.label)}<small>{escape(video.note)}</small></figcaption>"
            "</figure>"
        )
    every = max(1, (len(example.videos[0].frames) - 1) // 8)
    sheet = contact_sheet([v.frames for v in example.videos], every, [v.label for v in example.videos])
    keys = escape(json.dumps([sorted(held) for held in example.keys]), quote=True)
    return (
        f'<article class="example" data-keys="{keys}"><h3>{escape(example.caption)}</h3>'
        f'<p class="route"><code>{escape(example.trajectory)}</code><span class="pad"></span></p>'
        f'<div class="clips">{"".join(figures)}</div>'
        f'<details><summary>Every {every}{_ordinal(every)} frame</summary><div class="wide">'
        f'<img alt="frames of all clips" src="{_data("image/png", png_bytes(sheet))}"></div></details>'
        "</article>"
    )


def _speed(rows: Sequence[Latency]) -> str:
    if not rows:
        return ""
    base = rows[0]
    body = "".join(
        f"<tr><th>{escape(r.name)}</th><td>{r.passes}</td><td>{number(r.first_ms)}</td>"
        f"<td>{number(base.first_ms / r.first_ms)}&times;</td><td>{number(r.chunk_ms)}</td>"
        f"<td>{'' if r.p90_ms is None else number(r.p90_ms)}</td>"
        f"<td>{number(r.fps)}</td><td>{number(r.fps / base.fps)}&times;</td></tr>"
        for r in rows
    )
    head = head_row("model", "passes", "first chunk, ms", "sooner", "later chunks, ms", "p90", "frames/s", "speed-up")
    return (
        "<p>Time until the first chunk exists (network only), time of each later chunk, and frames per "
        "second "
        f"from noise to pixels. Factors are relative to {escape(base.name)}.</p>"
        f'<div class="wide"><table>{head}{body}</table></div>'
    )


def _following(
    models: Mapping[str, FollowResult], anchors: Mapping[str, FollowResult], colours: Mapping[str, int]
) -> str:
    rows = [(name, r, colours[name], False) for name, r in models.items()]
    rows += [(name, r, COLOURS - 1, True) for name, r in anchors.items()]
    if not rows:
        return ""
    body = "".join(
        f"<tr{' class=anchor' * anchor}><th>{escape(name)}</th>"
        f"<td>{bar(r.score.value, r.score.low, r.score.high, colour=colour)}</td>"
        f"<td>{interval_text(r.score, 2)}</td>"
        f"<td>{interval_text(r.rot_err_deg, 1)}</td><td>{interval_text(r.trans_err_u, 3)}</td>"
        f"<td>{_optional(r.turn_ratio)}</td>"
        f"<td>{_optional(r.speed_ratio)}</td><td>{100 * r.retrieval.value:.0f}%</td>"
        f"<td>{fixed(r.psnr_gap.value, 1)}</td>"
        f"<td>{100 * r.lost_frac:.0f}%</td></tr>"
        for name, r, colour, anchor in rows
    )
    head = head_row(
        "video", "-1 … 0 … 1", "score", "rotation, °", "position, u", "turn", "speed", "retrieval", "gap, dB", "lost"
    )
    result = rows[0][1]
    return (
        "<p>The camera that each video shows, found by aligning its frames with the known world, against "
        "the camera "
        "that was commanded. <b>Score</b> = 1 &minus; error / error of a camera that never moves, mean of "
        "rotation and "
        "position: 1 obeys, 0 stands still, below 0 moves the wrong way. <b>Turn</b> and <b>speed</b>: "
        "shown over "
        f"commanded. <b>Retrieval</b>: how often the commanded camera's true video is the nearest among "
        f"{result.candidates}, and by how many dB (<b>gap</b>). <b>Lost</b>: frames that resemble no view "
        "of the world; "
        f"they count as standing still. Measured on {result.clips} clips, with bootstrap 95% intervals; a "
        "camera that "
        f"never moves errs by {result.static_rot_deg:.1f}° and {result.static_trans_u:.3f} u.</p>"
        f'<div class="wide"><table class="follow">{head}{body}</table></div>'
    )


def _confusions(tables: Mapping[str, Confusion]) -> str:
    if not tables:
        return ""
    figures = "".join(
        f"<figure><figcaption>{escape(name)} <b>{100 * table.accuracy:.0f}%</b></figcaption>"
        f'<div class="wide">{heat_map(table.psnr, table.actions)}</div></figure>'
        for name, table in tables.items()
    )
    return (
        "<p>One first frame, one action per row. Columns: PSNR (dB) to the true video of each action. A "
        "model under "
        "control is brightest on the diagonal; the percentage is the share of rows where it is.</p>"
        f'<div class="pair">{figures}</div>'
    )


def _quality(rows: Mapping[str, Quality], anchors: Collection[str], colours: Mapping[str, int]) -> str:
    if not rows:
        return ""
    body = "".join(
        f"<tr{' class=anchor' * (name in anchors)}><th>{escape(name)}</th><td>{q.psnr:.2f}</td>"
        f"<td>{q.ssim:.3f}</td>"
        f"<td>{q.drift_db_per_chunk:+.2f}</td><td>{100 * q.sharpness:.0f}%</td></tr>"
        for name, q in rows.items()
    )
    head = head_row("video", "PSNR, dB", "SSIM", "drift, dB/chunk", "sharpness")
    chart = line_chart(
        [
            Series(
                name,
                range(q.given, len(q.psnr_per_chunk)),
                q.psnr_per_chunk[q.given :],
                colours[name],
                dots=True,
                dashed=name in anchors,
            )
            for name, q in rows.items()
        ],
        x_label="chunk",
        y_label="PSNR, dB",
    )
    return (
        "<p>Against the true render of the commanded camera, so a wrong camera costs here too. Sharpness "
        "is the "
        "gradient energy relative to the truth.</p>"
        f'<div class="pair"><div class="wide"><table>{head}{body}</table></div><figure>{chart}'
        "<figcaption>PSNR (dB) per chunk</figcaption></figure></div>"
    )


def _training(stages: Sequence[Stage]) -> str:
    figures = []
    for i, stage in enumerate(stages):
        for name, values in stage.losses.items():
            steps = [j * stage.log_every for j in range(len(values))]
            curves = [Series(name, steps, values, i, faint=True), Series(name, steps, smooth(values), i)]
            if stage.held_out and name == "loss":
                at, held_out = zip(*stage.held_out, strict=True)
                curves.append(Series("on other clips", at, held_out, i + 1))
            chart = line_chart(curves, x_label="step", y_label=f"{stage.name}: {name}", width=340, height=200)
            figures.append(f"<figure><figcaption>{escape(stage.name)}: {escape(name)}</figcaption>{chart}</figure>")
    return f'<div class="curves">{"".join(figures)}</div>' if figures else ""


def _commands(commands: Sequence[Command]) -> str:
    return "".join(f"<p>{escape(c.what)}</p><pre><code>{escape(c.line)}</code></pre>" for c in commands)


def _caveats(caveats: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in caveats) + "</ul>" if caveats else ""


def head_row(*names: str) -> str:
    return "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in names) + "</tr>"


def interval_text(x: Interval, digits: int) -> str:
    low, high = fixed(x.low, digits), fixed(x.high, digits)
    return f"{fixed(x.value, digits)} <small>[{low}, {high}]</small>"


def fixed(value: float, digits: int) -> str:
    """Fixed digits with a real minus sign, and never a negative zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "&minus;")


def _optional(value: float | None) -> str:
    return "&ndash;" if value is None else fixed(value, 2)


def _ordinal(n: int) -> str:
    return "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
