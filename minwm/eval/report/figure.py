"""A figure that stands alone (SVG): panels side by side, a dot with its interval for every arm of an experiment."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from minwm.eval.report.charts import linear_ticks, number

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 320, 260, 64, 28, 92
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#444}.title{font-weight:600;fill:#111}"
    ".grid{stroke:#ddd}.dot{fill:#2f6fde}.whisker{stroke:#2f6fde;stroke-width:1.5;opacity:.45}"
    ".mean{fill:none;stroke:#2f6fde;stroke-width:1.5;opacity:.6}"
)


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

    def at_x(x: float) -> float:
        scale = float if names else math.log
        first, last = scale(places[0]), scale(places[-1])
        return LEFT + 18 + (WIDTH - LEFT - 48) * (scale(x) - first) / max(last - first, 1e-9)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (y - low) / (high - low)

    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(panel.title)}</text>']
    for tick in linear_ticks(low, high):
        y = at_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
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
