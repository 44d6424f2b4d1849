"""An evaluation as one page: the parts of the pipeline's report, and what only `minwm eval` measures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from minwm.cameras.trajectory import parse
from minwm.eval.camera.motion import Following
from minwm.eval.cases import ANCHORS
from minwm.eval.drift import LIMIT, ROUTES
from minwm.eval.report.charts import Series, line_chart, number
from minwm.eval.report.pipeline import (
    Command,
    Example,
    Latency,
    ReportData,
    Section,
    Video,
    fixed,
    head_row,
    interval_text,
    write_report,
)
from minwm.eval.revisit import Revisit
from minwm.eval.run import Evaluated, Evaluation, Target
from minwm.eval.stats import Interval

EXAMPLES = 6
Rows = Mapping[str, Evaluated]


def write_page(
    path: Path, result: Evaluation, judged: Mapping[str, Sequence[Target]], facts: Mapping[str, str], line: str
) -> Path:
    """Write the page and return its path. `line` is the command that made the numbers."""
    rows = result.rows
    models = {name: row for name, row in rows.items() if name not in ANCHORS}
    data = ReportData(
        title="minwm eval: " + ", ".join(models),
        sentence="What the models make of worlds that no stage has seen, beside the truth and three other baselines.",
        facts=facts,
        seconds=sum(result.seconds.values()),
        fps=result.config.motion.fps,
        examples=_examples(result),
        latency=list(_latency(models)),
        following={name: row.follow for name, row in models.items()},
        anchors={name: rows[name].follow for name in ANCHORS},
        confusion={name: row.confusion for name, row in models.items() if row.confusion},
        quality={name: row.quality for name, row in rows.items()},
        quality_anchors=ANCHORS,
        more=[section for section in _sections(rows, models, judged) if section.html],
        commands=[Command("These numbers again", line)],
        caveats=[
            "Camera following is measured on pixels, by aligning them to the known world, and only where the first "
            "frame saw it. What a model invents elsewhere counts in PSNR, which it cannot keep high, but not in "
            "following.",
            "LPIPS is left out: it needs the weights of a network trained on photographs, which tell little about "
            "worlds that are none.",
        ],
    )
    return write_report(path, data)


def _sections(rows: Rows, models: Rows, judged: Mapping[str, Sequence[Target]]) -> list[Section]:
    return [
        Section("targets", "Targets", _targets(judged)),
        Section("motion", "Every second and every key", _motion(rows) + _keys(models)),
        Section("time", "Likeness over time", _over_time(rows)),
        Section("texture", "Flicker and seams", _texture(rows)),
        Section("revisit", "There and back", _revisits(rows)),
        Section("drift", "A minute without a break", _drift(rows)),
        Section("diversity", "Seeds and prompts", _diversity(models)),
    ]


def _examples(result: Evaluation) -> list[Example]:
    held, videos = result.truths.held, {"truth": result.truths.held.truth}
    videos |= {name: made for name, made in result.videos.items() if name != ANCHORS[0]}
    return [
        Example(
            held.captions[i],
            held.trajectories[i],
            parse(held.trajectories[i], stride=result.config.motion.stride).keys_per_frame(),
            [Video(name, made[i]) for name, made in videos.items()],
        )
        for i in range(min(EXAMPLES, len(held.truth)))
    ]


def _latency(models: Rows) -> Iterator[Latency]:
    for name, row in models.items():
        if (bench := row.bench) is not None:
            yield Latency(
                name, bench.passes, bench.first_chunk.median_ms, bench.chunk.median_ms, bench.chunk.p90_ms, bench.fps
            )


def table(head: Sequence[str], body: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Rows of (name, cells of HTML); those of baselines are set apart."""
    rows = "".join(
        f"<tr{' class=anchor' * (name in ANCHORS)}><th>{escape(name)}</th>" + "".join(f"<td>{c}</td>" for c in cells)
        for name, cells in body
    )
    return f'<div class="wide"><table>{head_row(*head)}{rows}</table></div>'


def _known(value: Interval | None, digits: int) -> str:
    return "&ndash;" if value is None else interval_text(value, digits)


def _targets(judged: Mapping[str, Sequence[Target]]) -> str:
    body = [
        (name, [escape(t.what), number(t.value), f"&le; {number(t.bound)}", "met" if t.met else "<b>missed</b>"])
        for name, found in judged.items()
        for t in found
    ]
    return table(["model", "aim", "value", "target", ""], body) if body else ""


def _following(f: Following) -> list[str]:
    return [
        _known(f.turn_ratio, 2), _known(f.turn_error, 2), _known(f.speed_ratio, 2), _known(f.direction_deg, 1),
        _known(f.rot_err_deg, 1), _known(f.trans_err_u, 3), _known(f.trans_aligned_u, 3), f"{f.turns} / {f.moves}",
    ]  # fmt: skip


COLUMNS = ("turn", "turn missed", "speed", "direction, °", "rotation, °", "position, u", "scaled, u", "samples")


def _motion(rows: Rows) -> str:
    charts = []
    for label, pick in (
        ("yaw and pitch missed, share", lambda f: f.turn_error),
        ("direction missed, degrees", lambda f: f.direction_deg),
    ):
        series = [
            Series(
                name, *_points([pick(f) for f in row.follow.motion.per_second]), i, dots=True, dashed=name in ANCHORS
            )
            for i, (name, row) in enumerate(rows.items())
        ]
        charts.append(
            f"<figure>{line_chart(series, x_label='second', y_label=label)}<figcaption>{label}</figcaption></figure>"
        )
    return (
        "<p>A sample is one clip in one second: the camera at its end as seen from its start. <b>Turn</b> and "
        "<b>speed</b>: shown over commanded, medians. <b>Turn missed</b>: |turn &minus; 1|, median. <b>Direction</b>: "
        "angle between shown and commanded movement, median; 90 for a camera that stands. <b>Rotation</b> and "
        "<b>position</b>: mean error of the path at the end of the second; <b>scaled</b>: after fitting one factor per "
        "clip. Bootstrap 95% intervals over clips.</p>"
        + table(["video", *COLUMNS], [(name, _following(row.follow.motion.overall)) for name, row in rows.items()])
        + f'<div class="pair">{"".join(charts)}</div>'
    )


def _keys(models: Rows) -> str:
    return "".join(
        f"<h3>{escape(name)}, by the keys held</h3>"
        + table(["keys", *COLUMNS], [(key, _following(f)) for key, f in row.follow.motion.per_key.items()])
        for name, row in models.items()
    )


def _points(values: Sequence[Interval | None]) -> tuple[list[int], list[float]]:
    known = [(i + 1, value.value) for i, value in enumerate(values) if value]
    return [x for x, _ in known], [y for _, y in known]


def _over_time(rows: Rows) -> str:
    longest = max(len(row.quality.psnr_at) for row in rows.values())
    if not longest:
        return ""
    head = [
        "video",
        *(f"PSNR at {s + 1} s, dB" for s in range(longest)),
        *(f"SSIM at {s + 1} s" for s in range(longest)),
    ]
    body = [
        (name, [*(_known(x, 1) for x in row.quality.psnr_at), *(_known(x, 3) for x in row.quality.ssim_at)])
        for name, row in rows.items()
    ]
    return "<p>Against the true view, mean over the quarter of a second that ends there.</p>" + table(head, body)


def _texture(rows: Rows) -> str:
    body = [
        (name, ["&ndash;" if x is None else fixed(x, 2) for x in (q.flicker, q.seam, q.sharpness)])
        for name, q in ((name, row.quality) for name, row in rows.items())
    ]
    return (
        "<p><b>Flicker</b>: second difference in time over that of the truth. <b>Seam</b>: change across chunk borders "
        "over change between latents of one chunk, relative to the truth. <b>Sharpness</b>: gradient energy relative "
        "to the truth. 1 is like the truth.</p>" + table(["video", "flicker", "seam", "sharpness"], body)
    )


def _revisits(rows: Rows) -> str:
    def cells(r: Revisit | None) -> list[str]:
        return [_known(x, 1) for x in ((r.consistency, r.away, r.gain, r.truth) if r else (None,) * 4)]

    head = ["video", *("consistency, dB", "turning point, dB", "gain, dB", "truth, dB") * 2]
    body = [(name, cells(row.revisit) + cells(row.revisit_away)) for name, row in rows.items() if row.revisit]
    return (
        "<p>Out and back within a clip of training (left), and until the first view is out of sight (right). "
        "<b>Consistency</b>: PSNR of frames on the way back to those on the way out at the same pose. <b>Turning "
        "point</b>: PSNR of the farthest frame to the first one. <b>Gain</b>: their difference; a video that never "
        "changes has none. <b>Truth</b>: PSNR to the true view once back.</p>" + table(head, body)
    )


def _drift(rows: Rows) -> str:
    known = {name: row.drift for name, row in rows.items() if row.drift}
    if not any(name not in ANCHORS for name in known):
        return ""
    limit, foreign = (
        max(getattr(curve, name) for curves in known.values() for curve in curves.values())
        for name in ("limit", "foreign_limit")
    )
    kinds: list[tuple[str, Callable[..., Sequence[float]]]] = [
        ("PSNR, dB", lambda c: [x.value for x in c.psnr]),
        ("sharpness", lambda c: c.sharpness),
        ("colours off, 8-bit levels", lambda c: c.colour),
        (f"strangeness (collapsed above {number(limit)})", lambda c: c.strangeness),
        (f"foreignness (collapsed above {number(foreign)})", lambda c: c.foreignness),
    ]
    parts = []
    for route in ROUTES:
        figures = []
        for label, values in kinds:
            series = [
                Series(name, range(1, 1 + len(values(curves[route]))), values(curves[route]), i, dashed=name in ANCHORS)
                for i, (name, curves) in enumerate(known.items())
            ]
            chart = line_chart(series, x_label="second", y_label=label, width=340, height=200)
            figures.append(f"<figure>{chart}<figcaption>{escape(label)}</figcaption></figure>")
        parts.append(f'<h3>{route}</h3><div class="curves">{"".join(figures)}</div>')
    body = [(name, [_collapse(curves[route].collapsed) for route in ROUTES]) for name, curves in known.items()]
    return (
        "<p>Streams of one model, never restarted. A clip has <b>collapsed</b> in the first second from which on, for "
        f"two seconds, its pictures are {LIMIT:g} times as strange as the worst second of the truth, or more foreign "
        "than that (as it is, or through the codec). Strange is a picture whose brightness, colours or detail are "
        "unlike those of true views, foreign is one whose small patches are.</p>"
        + table(["video", *ROUTES], body)
        + "".join(parts)
    )


def _collapse(seconds: Sequence[int | None]) -> str:
    """In words: how many clips, and when."""
    ends = sorted(second for second in seconds if second is not None)
    return f"{len(ends)} of {len(seconds)}, at {', '.join(map(str, ends))} s" if ends else f"none of {len(seconds)}"


def _diversity(models: Rows) -> str:
    body = [
        (name, [", ".join(map(number, d.seed)), ", ".join(map(number, d.prompt)), number(d.worlds)])
        for name, d in ((name, row.diversity) for name, row in models.items())
        if d
    ]
    head = ["model", "over seeds", "over prompts", "unrelated worlds"]
    return (
        "<p>Spread of videos from one image along one path, in 8-bit levels, after 1, 2, … seconds. What the image "
        "settles should not change.</p>" + table(head, body)
        if body
        else ""
    )
