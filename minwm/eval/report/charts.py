"""Charts as SVG and HTML text: those of a page, whose CSS gives the colours (classes s0..s7), and figures for the
docs, which stand alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

COLOURS = 8
RAW_POINTS = 300
"""A raw curve is thinned to this many points: more cannot be told apart on a page."""
BINS = 40
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 320, 260, 64, 28, 92
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#444}.title{font-weight:600;fill:#111}"
    ".grid{stroke:#ddd}.dot{fill:#2f6fde}.whisker{stroke:#2f6fde;stroke-width:1.5;opacity:.45}"
    ".mean{fill:none;stroke:#2f6fde;stroke-width:1.5;opacity:.6}"
)
"""Of a figure's panels."""


@dataclass(frozen=True)
class Series:
    """One line of a chart. Values that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False
    """Drawn thin and pale, without an entry in the legend: raw data behind a smooth line."""
    dots: bool = False
    dashed: bool = False


def smooth(values: Sequence[float]) -> list[float]:
    """Centred running mean over a fifteenth of the curve, shorter at both ends."""
    y = np.asarray(values, float)
    half = max(1, len(y) // 30)
    total = np.concatenate([[0.0], np.cumsum(y)])
    stop = np.minimum(np.arange(len(y)) + half + 1, len(y))
    start = np.maximum(np.arange(len(y)) - half, 0)
    return ((total[stop] - total[start]) / (stop - start)).tolist()


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, width: int = 460, height: int = 230) -> str:
    """Lines with axes, and a legend when there are several names. The y axis is logarithmic when positive
    values span more than a factor of 20."""
    lines = [(s, *_finite(s)) for s in series]
    lines = [(s, x, y) for s, x, y in lines if len(x)]
    if not lines:
        return '<p class="none">no data</p>'
    xs, ys = np.concatenate([x for _, x, _ in lines]), np.concatenate([y for _, _, y in lines])
    log = bool(ys.min() > 0 and ys.max() / ys.min() > 20)
    y_ticks, x_ticks = (_log_ticks if log else linear_ticks)(ys.min(), ys.max()), linear_ticks(xs.min(), xs.max(), 6)
    y_low, y_high = min(ys.min(), y_ticks[0]), max(ys.max(), y_ticks[-1])
    left, right, top, bottom = 46, 10, 10, 34

    at_x, at_y = _axis(xs.min(), xs.max(), left, width - right), _axis(y_low, y_high, height - bottom, top, log=log)
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_label)}">']
    parts += _grid(y_ticks, at_y, left, width - right)
    base = height - bottom + 15
    parts += [f'<text x="{at_x(tick):.1f}" y="{base}" text-anchor="middle">{number(tick)}</text>' for tick in x_ticks]
    middle = (left + width - right) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for s, x, y in lines:
        points = " ".join(f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in zip(x, y, strict=True))
        style = f"line s{s.colour % COLOURS}" + " faint" * s.faint + " dashed" * s.dashed
        title = f"<title>{escape(s.name)}</title>"
        parts.append(f'<polyline class="{style}" points="{points}">{title}</polyline>')
        if s.dots:
            parts += [
                f'<circle class="dot s{s.colour % COLOURS}" cx="{at_x(a):.1f}" cy="{at_y(b):.1f}" r="3">'
                f"<title>{escape(s.name)}: {number(float(b))}</title></circle>"
                for a, b in zip(x, y, strict=True)
            ]
    shown = [s for s, *_ in lines if not s.faint]
    return "".join(parts) + "</svg>" + (_legend(shown) if len(shown) > 1 else "")


def histogram(
    values: Sequence[float], *, x_label: str, marks: Mapping[str, float] = {}, width: int = 460, height: int = 200
) -> str:
    """How often values occur, in up to `BINS` bins from 0 on, with labelled lines at `marks`; the largest hundredth is
    in the last bin."""
    x = np.asarray(values, float)
    if not len(x):
        return '<p class="none">no data</p>'
    high = max(float(np.percentile(x, 99)), *marks.values(), 1e-6) * 1.05
    counts, edges = (a.tolist() for a in np.histogram(np.clip(x, 0, high), min(BINS, max(5, len(x) // 2)), (0, high)))
    left, right, top, bottom = 46, 10, 22, 34
    at_x, at_y = _axis(0, high, left, width - right), _axis(0, max(counts), height - bottom, top)
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(x_label)}">']
    parts += _grid(linear_ticks(0, max(counts), 4), at_y, left, width - right)
    for count, start, end in zip(counts, edges, edges[1:], strict=False):
        a, b, y = at_x(start), at_x(end), at_y(count)
        box = f'x="{a:.1f}" y="{y:.1f}" width="{b - a - 1:.1f}" height="{height - bottom - y:.1f}"'
        parts.append(f'<rect class="dot s0" {box}><title>{number(start)} to {number(end)}: {count}</title></rect>')
    for name, mark in marks.items():
        x_mark = f"{at_x(mark):.1f}"
        parts.append(f'<line class="line s1" x1="{x_mark}" x2="{x_mark}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(f'<text x="{x_mark}" y="{top - 6}" text-anchor="middle">{escape(name)}</text>')
    base = height - bottom + 15
    for tick in linear_ticks(0, high, 6):
        parts.append(f'<text x="{at_x(tick):.1f}" y="{base}" text-anchor="middle">{number(tick)}</text>')
    middle = (left + width - right) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts) + "</svg>"


def _axis(low: float, high: float, start: float, end: float, *, log: bool = False) -> Callable[[float], float]:
    """Values from `low` to `high` as positions from `start` to `end`."""
    scale = math.log if log else float
    span = max(scale(high) - scale(low), 1e-12)
    return lambda value: start + (end - start) * (scale(value) - scale(low)) / span


def _grid(ticks: Sequence[float], at_y: Callable[[float], float], left: float, right: float) -> list[str]:
    return [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{at_y(tick):.1f}" y2="{at_y(tick):.1f}"/>'
        f'<text x="{left - 6}" y="{at_y(tick) + 3.5:.1f}" text-anchor="end">{number(tick)}</text>'
        for tick in ticks
    ]


def bar(value: float, low: float, high: float, *, colour: int = 0) -> str:
    """A score in [-1, 1] as a bar from zero, with its interval as a whisker. Values outside are cut at the
    ends."""

    def at(x: float) -> float:
        return 50 + 50 * min(1.0, max(-1.0, x))

    start, end = sorted((50.0, at(value)))
    return (
        '<div class="bar"><i class="zero"></i>'
        f'<i class="fill f{colour % COLOURS}" style="left:{start:.1f}%;width:{end - start:.1f}%"></i>'
        f'<i class="whisker" style="left:{at(low):.1f}%;width:{max(at(high) - at(low), 0.5):.1f}%"></i></div>'
    )


def heat_map(table: Sequence[Sequence[float]], labels: Sequence[str]) -> str:
    """A square table whose cells are shaded row by row; the largest entry of each row is marked."""
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    rows = []
    for label, row in zip(labels, table, strict=True):
        low, high = min(row), max(row)
        cells = "".join(
            f'<td class="heat{" best" * (value == high)}" '
            f'style="--h:{80 * (value - low) / max(high - low, 1e-9):.0f}%">{value:.1f}</td>'
            for value in row
        )
        rows.append(f"<tr><th>{escape(label)}</th>{cells}</tr>")
    return f'<table class="heatmap"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def number(value: float) -> str:
    """Three significant digits, without trailing zeros or exponents where possible."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.0f}" if size >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds in words: 0.4 s, 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _finite(series: Series) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) > RAW_POINTS:
        pick = np.linspace(0, len(x) - 1, RAW_POINTS).round().astype(int)
        x, y = x[pick], y[pick]
    return x, y


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    span = high - low or abs(high) or 1.0
    raw = span / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)] or [low]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 3) if len(powers) < 5 else (1,)
    inside = [m * 10.0**p for p in powers for m in digits if low * 0.999 <= m * 10.0**p <= high * 1.001]
    return inside or [low, high]


def _legend(series: Sequence[Series]) -> str:
    items = "".join(f'<li class="k{s.colour % COLOURS}">{escape(s.name)}</li>' for s in series)
    return f'<ul class="legend">{items}</ul>'


@dataclass(frozen=True)
class Dot:
    x: float
    value: float
    low: float
    high: float
    name: str


@dataclass(frozen=True)
class Panel:
    title: str
    dots: Sequence[Dot]


def figure(panels: Sequence[Panel], x_label: str, names: Mapping[float, str]) -> str:
    """`names` of the places on the x axis; without any it is a number, on a logarithmic scale."""
    drawn = "".join(
        f'<g transform="translate({i * WIDTH} 0)">{_panel(panel, x_label, names)}</g>' for i, panel in enumerate(panels)
    )
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}" viewBox="0 0 {WIDTH * len(panels)} {HEIGHT}"'
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{background}{drawn}</svg>\n'


def _panel(panel: Panel, x_label: str, names: Mapping[float, str]) -> str:
    places = sorted({dot.x for dot in panel.dots})
    low, high = min(0.0, *(d.low for d in panel.dots)), max(d.high for d in panel.dots)
    high = high if high > low else low + 1
    at_x = _axis(places[0], places[-1], LEFT + 18, WIDTH - 30, log=not names)
    at_y = _axis(low, high, HEIGHT - BOTTOM, TOP)
    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(panel.title)}</text>']
    parts += _grid(linear_ticks(low, high), at_y, LEFT, WIDTH - 12)
    for place in places:
        x, y = at_x(place), HEIGHT - BOTTOM + 14
        turned = f' text-anchor="end" transform="rotate(-35 {x:.1f} {y})"' if names else ' text-anchor="middle"'
        parts.append(f'<text x="{x:.1f}" y="{y}"{turned}>{escape(names.get(place) or number(place))}</text>')
    if not names:
        parts.append(
            f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - BOTTOM + 34}" text-anchor="middle">{escape(x_label)}</text>'
        )
        means = [(place, [d.value for d in panel.dots if d.x == place]) for place in places]
        points = " ".join(f"{at_x(place):.1f},{at_y(sum(v) / len(v)):.1f}" for place, v in means)
        parts.append(f'<polyline class="mean" points="{points}"/>')
    for d in panel.dots:
        x = at_x(d.x)
        parts.append(
            f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{at_y(d.low):.1f}" y2="{at_y(d.high):.1f}"/>'
        )
        label = f"<title>{escape(d.name)}: {number(d.value)}</title>"
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{at_y(d.value):.1f}" r="3.5">{label}</circle>')
    return "".join(parts)
