"""A model folder, in float16, of the averaged network in the newest state of a run that is still going on.

    python benchmarks/snapshot.py RUN CODEC OUT [--curve FILE]

RUN is the run's folder, CODEC that of its codec. OUT can be played and measured, and later runs can start from it
(`--init.student OUT`). FILE holds curves by stage: that of this one is put there, up to that state.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from minwm.core.config import from_dict
from minwm.core.files import read_json, write_json
from minwm.core.metrics import read_metrics
from minwm.core.runtime import versions
from minwm.store.folder import load_codec
from minwm.train.config import Run
from minwm.train.state import States

POINTS = 20
"""Of a curve of the training loss."""


def curve(run: Run, folder: Path, steps: int) -> dict[str, Any]:
    """Losses of a run's first steps, of the critic where there is one, and the time that they took."""
    rows = [row for row in read_metrics(folder) if row["step"] < steps]
    name = "critic" if "critic" in run.recipe.trained else "loss"
    parts = np.array_split([row[name] for row in rows if name in row], POINTS)
    return {
        "steps": steps,
        "of": run.steps,
        "batch": run.batch,
        "seconds": round(sum(run.batch * run.accumulate / row["clips_per_s"] for row in rows)),
        f"{name}_in_{POINTS}_equal_parts": [round(float(np.mean(part)), 4) for part in parts],
        "held_out_loss": [[row["step"] + 1, round(row["val"], 4)] for row in rows if "val" in row],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "codec", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--curve", type=Path)
    options = parser.parse_args()
    record, states = json.loads((options.run / "run.json").read_text()), States(options.run)
    run, steps = from_dict(Run, record["run"]), states.latest() or 0
    if options.curve:
        known = read_json(options.curve) if options.curve.exists() else {}
        about = {"commit": record["commit"], "versions": versions()}
        write_json(options.curve, {**known, run.name: {**about, **curve(run, options.run, steps)}})
    net, codec = run.model.network.build(), load_codec(options.codec)
    states.load(steps, {"ema": net}, [])
    run.recipe.save(options.out, run.model, net.half(), codec.half())
    sys.stdout.write(f"{options.out}: after {steps} steps\n")


if __name__ == "__main__":
    main()
