"""How the world that comes with the package was trained: settings, hours and curves of its runs, for `results/`.

    python benchmarks/world_record.py results/world-64-training.json docs/world-training.svg runs/world-64/{ar,dmd}

The drawing is made from the JSON alone; a test holds it and the table in docs/world.md to that.
"""

import json
import sys
from pathlib import Path
from typing import Any

from minwm.core.metrics import read_metrics
from minwm.core.runtime import git_commit, versions
from minwm.eval.report.charts import Series, line_chart, smooth

POINTS = 60
WIDTH, HEIGHT = 340, 220
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#444}.grid{stroke:#ddd}.line{fill:none;stroke-width:1.6}"
    ".s0{stroke:#2f6fde}.s1{stroke:#d9730d}"
)


def record(folder: Path) -> dict[str, Any]:
    """A run, which may have been stopped early: what it was, and its curves thinned to `POINTS`."""
    (newest,) = (folder / "state").glob("*/state.json")
    about, state = (json.loads(path.read_text()) for path in (folder / "run.json", newest))
    run, lines = about["run"], [line for line in read_metrics(folder) if line["trains"] == "student"]
    name = next(key for key in lines[0] if key not in ("step", "trains"))
    every = max(1, len(lines) // POINTS)
    curve = list(zip([line["step"] for line in lines], smooth([line[name] for line in lines]), strict=True))[::every]
    return {
        "stage": folder.name,
        "steps": state["step"],
        **{key: run[key] for key in ("batch", "seed", "ema", "optim", "recipe", "init", "precision")},
        **{key: about[key] for key in ("commit", "versions", "started")},
        "clips": about["data"].get("counts") or about["data"]["clips"],
        "hours": state["seconds"] / 3600,
        "loss": {"name": name, "points": [[step, round(value, 5)] for step, value in curve]},
        "held_out": [[line["step"], round(line["val"], 5)] for line in lines if "val" in line][-POINTS:],
    }


def draw(results: dict[str, Any]) -> str:
    """One panel per run: its loss, and that on clips that it never saw, which has its own noise and no dropouts."""
    panels = []
    for i, run in enumerate(results["runs"]):
        curves = [(run["loss"]["name"], run["loss"]["points"]), ("on other clips", run["held_out"])]
        lines = [Series(name, [x for x, _ in line], [y for _, y in line], n) for n, (name, line) in enumerate(curves)]
        label = f"{run['stage']}: {run['loss']['name']}"
        chart = line_chart(lines, x_label=f"step of {label}", y_label=label, width=WIDTH, height=HEIGHT)
        chart = chart[: chart.index("</svg>") + 6].replace("<svg ", f'<svg width="{WIDTH}" height="{HEIGHT}" ')
        panels.append(f'<g transform="translate({i % 3 * WIDTH} {i // 3 * HEIGHT})">{chart}</g>')
    rows = -(-len(panels) // 3)
    size = f'width="{3 * WIDTH}" height="{rows * HEIGHT}"'
    fill = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{fill}{"".join(panels)}</svg>\n'


if __name__ == "__main__":
    numbers, drawing, *folders = map(Path, sys.argv[1:])
    about = {"command": " ".join(sys.argv), "commit": git_commit(), "versions": versions()}
    found = {**about, "runs": [record(folder) for folder in folders]}
    numbers.write_text(json.dumps(found, indent=1) + "\n")
    drawing.write_text(draw(found))
