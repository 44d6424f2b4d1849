"""The measurements of an evaluation as sections of a page: the same for one model and for a whole pipeline."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

from minwm.bench.target import Target
from minwm.eval.camera.motion import MotionErrors
from minwm.eval.cases import BASELINES
from minwm.eval.drift import FEATURE_LIMIT, LIKE_TRUTH, ROUTES, DriftCurves
from minwm.eval.report.charts import Series, bar, heat_map, line_chart, number
from minwm.eval.report.page import Section, fixed, interval, table
from minwm.eval.revisit import Revisit
from minwm.eval.run import EvalResult
from minwm.eval.stats import Interval

Rows = Mapping[str, EvalResult]


def evaluation_sections(rows: Rows) -> list[Section]:
    """Everything that was measured, models first."""
    return [
        Section("speed", "Speed", _speed(rows)),
        Section("camera", "Camera following", _following(rows)),
        Section("control", "Counterfactual control", _confusions(rows)),
        Section("quality", "Quality and drift", _quality(rows)),
        Section("motion", "Every second and every key", _motion(rows) + _keys(rows)),
        Section("time", "Likeness over time", _over_time(rows)),
        Section("texture", "Flicker and seams", _texture(rows)),
        Section("revisit", "There and back", _revisits(rows)),
        Section("drift", "A minute without a break", _drift(rows)),
        Section("diversity", "Seeds and prompts", _diversity(rows)),
    ]


def tiles(rows: Rows) -> list[tuple[str, str]]:
    """The handful of numbers worth knowing: of the last model, and beside the first."""
    found = []
    timed = [(name, row.bench) for name, row in rows.items() if row.bench]
    if len(timed) > 1:
        (first, slow), (last, fast) = timed[0], timed[-1]
        found.append((f"{number(fast.fps)} fps", f"{last}, end to end"))
        found.append(
            (f"{number(slow.first_chunk.median_ms / fast.first_chunk.median_ms)}x", f"sooner on screen than {first}")
        )
    followed = [(name, row.follow) for name, row in rows.items() if row.follow and name not in BASELINES]
    for name, follow in followed[-1:]:
        found.append((f"{follow.score.value:.2f}", f"camera score of {name}: 1 follows, 0 stands still"))
        found.append((f"{100 * follow.retrieval.value:.0f}%", f"right camera among {follow.candidates}"))
    return found


def target_section(targets: Mapping[str, Mapping[Target, float]]) -> Section:
    """Targets by model; a table per model, for each has several rows."""
    html = ""
    for name, found in targets.items():
        verdicts = {t: "met" if t.met(value) else "<b>missed</b>" for t, value in found.items()}
        rows = {t.name: [number(value), t.aim, verdicts[t]] for t, value in found.items()}
        html += f"<h3>{escape(name)}</h3>{table(['target', 'value', 'asked', ''], rows)}" if rows else ""
    return Section("targets", "Targets", html)


def _colour(rows: Rows, name: str) -> int:
    return [*rows].index(name)


def _figure(chart: str, label: str) -> str:
    return f"<figure>{chart}<figcaption>{escape(label)}</figcaption></figure>"


def _speed(rows: Rows) -> str:
    timed = {name: row.bench for name, row in rows.items() if row.bench}
    if not timed:
        return ""
    base = next(iter(timed.values()))
    body = {
        name: [
            str(r.passes), number(r.first_chunk.median_ms),
            f"{number(base.first_chunk.median_ms / r.first_chunk.median_ms)}&times;", number(r.chunk.median_ms),
            "&ndash;" if r.chunk.p90_ms is None else number(r.chunk.p90_ms), number(r.fps),
            f"{number(r.fps / base.fps)}&times;",
        ]
        for name, r in timed.items()
    }  # fmt: skip
    head = ["model", "passes", "first chunk, ms", "sooner", "later chunks, ms", "p90", "frames/s", "speed-up"]
    return (
        "<p>Time until the first chunk exists (network only), time of each later chunk, and frames per second from "
        f"noise to pixels. Factors are relative to {escape(next(iter(timed)))}. Passes are those of a chunk, of a "
        f"bidirectional model those of the whole clip.</p>{table(head, body)}"
    )


def _following(rows: Rows) -> str:
    followed = {name: row.follow for name, row in rows.items() if row.follow}
    if not followed:
        return ""
    body = {
        name: [
            bar(r.score.value, r.score.low, r.score.high, colour=_colour(rows, name)), interval(r.score, 2),
            interval(r.rot_err_deg, 1), interval(r.trans_err_u, 3), fixed(r.turn_ratio, 2), fixed(r.speed_ratio, 2),
            f"{100 * r.retrieval.value:.0f}%", fixed(r.psnr_gap.value, 1), f"{100 * r.lost_frac:.0f}%",
        ]
        for name, r in followed.items()
    }  # fmt: skip
    head = [
        "video",
        "-1 … 0 … 1",
        "score",
        "rotation, °",
        "position, u",
        "turn",
        "speed",
        "retrieval",
        "gap, dB",
        "lost",
    ]
    result = next(iter(followed.values()))
    return (
        "<p>The camera that each video shows, found by aligning its frames with the known scene, against the camera "
        "that was commanded. <b>Score</b> = 1 &minus; error / error of a camera that never moves, mean of rotation and "
        "position: 1 follows, 0 stands still, below 0 moves the wrong way. <b>Turn</b> and <b>speed</b>: shown over "
        "commanded. <b>Retrieval</b>: how often the commanded camera's true video is the nearest among "
        f"{result.candidates}, and by how many dB (<b>gap</b>). <b>Lost</b>: frames that resemble no view of the "
        f"scene; they count as standing still. Measured on {result.clips} clips, with bootstrap 95% intervals; a "
        f"camera that never moves errs by {result.static_rot_deg:.1f}° and {result.static_trans_u:.3f} u.</p>"
        + table(head, body, "follow")
    )


def _confusions(rows: Rows) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(name)} <b>{100 * row.confusion.accuracy:.0f}%</b></figcaption>"
        f'<div class="wide">{heat_map(row.confusion.psnr, row.confusion.actions)}</div></figure>'
        for name, row in rows.items()
        if row.confusion
    )
    return figures and (
        "<p>One first frame, one action per row. Columns: PSNR (dB) to the true video of each action. A model under "
        "control is brightest on the diagonal; the percentage is the share of rows where it is.</p>"
        f'<div class="pair">{figures}</div>'
    )


def _quality(rows: Rows) -> str:
    compared = {name: row.quality for name, row in rows.items() if row.quality}
    if not compared:
        return ""
    body = {
        name: [f"{q.psnr:.2f}", f"{q.ssim:.3f}", f"{q.drift_db_per_chunk:+.2f}", f"{100 * q.sharpness:.0f}%"]
        for name, q in compared.items()
    }
    curves = [
        Series(name, range(q.given, len(q.psnr_per_chunk)), q.psnr_per_chunk[q.given :], _colour(rows, name), dots=True,
               dashed=name in BASELINES)
        for name, q in compared.items()
    ]  # fmt: skip
    return (
        "<p>Against the true render of the commanded camera, so a wrong camera costs here too. Sharpness is the "
        'gradient energy relative to the truth.</p><div class="pair">'
        + table(["video", "PSNR, dB", "SSIM", "drift, dB/chunk", "sharpness"], body)
        + _figure(line_chart(curves, x_label="chunk", y_label="PSNR, dB"), "PSNR (dB) per chunk")
        + "</div>"
    )


def _errors(e: MotionErrors) -> list[str]:
    return [
        interval(e.turn_ratio, 2), interval(e.turn_error, 2), interval(e.speed_ratio, 2), interval(e.direction_deg, 1),
        interval(e.rot_err_deg, 1), interval(e.trans_err_u, 3), interval(e.trans_aligned_u, 3),
        f"{e.turns} / {e.moves}",
    ]  # fmt: skip


ERRORS = ("turn", "turn missed", "speed", "direction, °", "rotation, °", "position, u", "scaled, u", "samples")


def _motion(rows: Rows) -> str:
    motions = {name: row.follow.motion for name, row in rows.items() if row.follow}
    kinds: list[tuple[str, Callable[[MotionErrors], Interval | None]]] = [
        ("yaw and pitch missed, share", lambda e: e.turn_error),
        ("direction missed, degrees", lambda e: e.direction_deg),
    ]
    charts = ""
    for label, pick in kinds:
        series = []
        for name, motion in motions.items():
            known = [(i + 1, x.value) for i, e in enumerate(motion.per_second) if (x := pick(e))]
            x, y = [second for second, _ in known], [value for _, value in known]
            series.append(Series(name, x, y, _colour(rows, name), dots=True, dashed=name in BASELINES))
        charts += _figure(line_chart(series, x_label="second", y_label=label), label)
    return bool(motions) * (
        "<p>A sample is one clip in one second: the camera at its end as seen from its start. <b>Turn</b> and "
        "<b>speed</b>: shown over commanded, medians. <b>Turn missed</b>: |turn &minus; 1|, median. <b>Direction</b>: "
        "angle between shown and commanded movement, median; 90 for a camera that stands. <b>Rotation</b> and "
        "<b>position</b>: mean error of the path at the end of the second; <b>scaled</b>: after fitting one factor per "
        "clip. Bootstrap 95% intervals over clips.</p>"
        + table(["video", *ERRORS], {name: _errors(motion.overall) for name, motion in motions.items()})
        + f'<div class="pair">{charts}</div>'
    )


def _keys(rows: Rows) -> str:
    return "".join(
        f"<h3>{escape(name)}, by the keys held</h3>"
        + table(["keys", *ERRORS], {key: _errors(e) for key, e in row.follow.motion.per_key.items()})
        for name, row in rows.items()
        if row.follow and name not in BASELINES
    )


def _over_time(rows: Rows) -> str:
    compared = {name: row.quality for name, row in rows.items() if row.quality}
    seconds = range(1, 1 + max((len(q.psnr_at) for q in compared.values()), default=0))
    head = ["video", *(f"PSNR at {s} s, dB" for s in seconds), *(f"SSIM at {s} s" for s in seconds)]
    body = {
        name: [*(interval(x, 1) for x in q.psnr_at), *(interval(x, 3) for x in q.ssim_at)]
        for name, q in compared.items()
    }
    note = "<p>Against the true view, mean over the quarter of a second that ends there.</p>"
    return bool(seconds) * (note + table(head, body))


def _texture(rows: Rows) -> str:
    body = {
        name: [fixed(x, 2) for x in (row.quality.flicker, row.quality.seam, row.quality.sharpness)]
        for name, row in rows.items()
        if row.quality
    }
    return bool(body) * (
        "<p><b>Flicker</b>: second difference in time over that of the truth. <b>Seam</b>: change across chunk borders "
        "over change between latents of one chunk, relative to the truth. <b>Sharpness</b>: gradient energy relative "
        "to the truth. 1 is like the truth.</p>" + table(["video", "flicker", "seam", "sharpness"], body)
    )


def _revisits(rows: Rows) -> str:
    def cells(r: Revisit | None) -> list[str]:
        return [interval(x, 1) for x in ((r.consistency, r.away, r.gain, r.truth) if r else (None,) * 4)]

    head = ["video", *("consistency, dB", "turning point, dB", "gain, dB", "truth, dB") * 2]
    body = {name: cells(row.revisit) + cells(row.revisit_away) for name, row in rows.items() if row.revisit}
    return bool(body) * (
        "<p>Out and back within a clip of training (left), and until the first view is out of sight (right). "
        "<b>Consistency</b>: PSNR of frames on the way back to those on the way out at the same pose. <b>Turning "
        "point</b>: PSNR of the farthest frame to the first one. <b>Gain</b>: their difference; a video that never "
        "changes has none. <b>Truth</b>: PSNR to the true view once back.</p>" + table(head, body)
    )


def _drift(rows: Rows) -> str:
    drifts = {name: row.drift for name, row in rows.items() if row.drift}
    if not drifts.keys() - {*BASELINES}:
        return ""
    curves = [one for routes in drifts.values() for one in routes.values()]
    feature, patch = number(max(c.feature_limit for c in curves)), number(max(c.patch_limit for c in curves))
    kinds: list[tuple[str, Callable[[DriftCurves], Sequence[float]]]] = [
        ("PSNR, dB", lambda c: [x.value for x in c.psnr]),
        ("sharpness", lambda c: c.sharpness),
        ("colours off, 8-bit levels", lambda c: c.colour),
        (f"feature distance (collapsed above {feature})", lambda c: c.feature_distance),
        (f"patch distance (collapsed above {patch})", lambda c: c.patch_distance),
    ]
    charts = ""
    for route in ROUTES:
        figures = ""
        for label, pick in kinds:
            values = {name: pick(routes[route]) for name, routes in drifts.items()}
            series = [
                Series(name, range(1, 1 + len(y)), y, _colour(rows, name), dashed=name in BASELINES)
                for name, y in values.items()
            ]
            figures += _figure(line_chart(series, x_label="second", y_label=label, width=340, height=200), label)
        charts += f'<h3>{route}</h3><div class="curves">{figures}</div>'
    body = {name: [_collapsed(routes[route].collapsed) for route in ROUTES] for name, routes in drifts.items()}
    return (
        "<p>Streams of one model, never restarted. A clip has <b>collapsed</b> in the first second from which on, for "
        f"two seconds, its feature distance is {FEATURE_LIMIT:g} times that of the worst second of the truth, or its "
        "patch distance above that (as it is, or reconstructed by the codec), and it has less than "
        f"{LIKE_TRUTH:g} dB to the truth. The feature distance is large where "
        "brightness, colours or detail are unlike those of true views, the patch distance where small patches are."
        f"</p>{table(['video', *ROUTES], body)}{charts}"
    )


def _collapsed(seconds: Sequence[int | None]) -> str:
    """How many clips, and when."""
    ends = sorted(second for second in seconds if second is not None)
    return f"{len(ends)} of {len(seconds)}, at {', '.join(map(str, ends))} s" if ends else f"none of {len(seconds)}"


def _diversity(rows: Rows) -> str:
    body = {
        name: [", ".join(map(number, d.seed)), ", ".join(map(number, d.prompt)), fixed(d.worlds, 1)]
        for name, row in rows.items()
        if (d := row.diversity)
    }
    return bool(body) * (
        "<p>Spread of videos from one start along one path, in 8-bit levels, after 1, 2, … seconds. What a first image "
        "determines should not change.</p>" + table(["model", "over seeds", "over prompts", "unrelated scenes"], body)
    )
