"""What `minwm bench` says of its results: two side by side, a drawing of one, and whether it meets a latency target."""

from collections.abc import Mapping
from typing import Any

from minwm.bench.stream import BenchResult
from minwm.core.config import UserError


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Lines that set two files of `minwm bench --json` side by side; more than 1 means that the second is faster."""
    one, two = (
        {**x["stages"], **{name: x[name] for name in ("first_chunk", "chunk", "action_to_pixel") if x[name]}}
        for x in (a, b)
    )
    pairs = ((name, one[name]["median_ms"], two[name]["median_ms"]) for name in one if name in two)
    lines = [f"{name}: {x:.3g} ms -> {y:.3g} ms, {x / y:.2f}x" for name, x, y in pairs]
    for name in ("engine", "machine"):
        x, y = a[name] or {}, b[name] or {}  # an older file may have fewer fields
        lines += [f"{name}.{k}: {x.get(k)} -> {y.get(k)}" for k in {**x, **y} if x.get(k) != y.get(k)]
    if a["versions"] != b["versions"]:
        lines.append("measured on different machines or versions: ratios say nothing about the code alone")
    return lines


def plot(result: BenchResult) -> str:
    """An SVG: every stage of a chunk as a bar, the part that the roofline demands dark."""
    rows = {**result.stages, "chunk": result.chunk}
    if result.action_to_pixel:
        rows["action_to_pixel"] = result.action_to_pixel
    ends = [max(row.median_ms, row.bound_ms or 0) for row in rows.values()]
    longest, step = max(ends), 26
    width, left, height = 640, 120, step * len(rows) + 34
    size = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for i, (name, row) in enumerate(rows.items()):
        y, scale = 8 + step * i, (width - left - 200) / longest
        share = f", {row.percent:.0f}% of the roofline" if row.percent else ""
        parts += [
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{name.replace("_", " ")}</text>',
            f'<rect x="{left}" y="{y}" width="{row.median_ms * scale:.1f}" height="18" fill="#9ecae1"/>',
            f'<rect x="{left}" y="{y}" width="{(row.bound_ms or 0) * scale:.1f}" height="18" fill="#08519c"/>',
            f'<text x="{left + ends[i] * scale + 6:.1f}" y="{y + 14}">{row.median_ms:.3g} ms{share}</text>',
        ]
    if result.machine:
        rates = f"{result.machine.tflops:.3g} TFLOP/s, {result.machine.gbytes:.3g} GB/s"
        parts.append(f'<text x="{left}" y="{height - 8}">dark: {rates}, measured in the same run</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def check_latency(result: BenchResult, target_ms: float) -> None:
    """Raise UserError if the 90th percentile of `action_to_pixel` (M5) is above the target in milliseconds."""
    timing = result.action_to_pixel
    if timing is None or timing.p90_ms is None:
        raise UserError("--latency is about actions, which a bidirectional model does not take; leave it out")
    if timing.p90_ms > target_ms:
        raise UserError(
            f"action_to_pixel has a 90th percentile of {timing.p90_ms:.3g} ms, and --latency asks for {target_ms:g}: "
            "fewer steps, smaller chunks, a smaller window, a tiny decoder or engine options are faster"
        )
