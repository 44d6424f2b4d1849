"""Every recipe of both families on several processes: `python every_rank.py FILE.json` measures how far what they find
is from what one process finds.

steps    Gradients, their norm, losses and averaged weights of a step for each trained network: with weights shared by 2
         processes (FSDP), with weights shared and copied on 4 that share clips in pairs (HSDP), and with clips alone
         shared by 2. A deviation is the length of the difference, relative to that of what one process finds.
resumed  Runs of 2 processes that 1 and 4 go on with: the state bit by bit, then the largest relative deviation of
         norms and losses from the run of one process. By AdamW: Muon rounds to bfloat16, which makes them larger.
"""

import os
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from ranks import (
    PAIRS,
    RUNS,
    count_sent,
    log_deviation,
    resumed,
    same_steps,
    sent_as_planned,
    steps,
    train_to,
    world,
)

from minwm.core.files import read_json, write_json
from minwm.core.runtime import git_commit, rank, versions
from minwm.train.config import OptimConfig
from minwm.train.parallel import ParallelConfig

LAYOUTS = {
    "weights by 2": (2, ParallelConfig()),
    "weights and clips by 2, copied": (4, PAIRS),
    "clips by 2": (2, ParallelConfig(sequence=2, shard=1)),
}
BACKBONES = [name for name in RUNS if name != "codec"]
"""A codec has no tokens to share."""


def deviations(one: dict[str, torch.Tensor], many: dict[str, torch.Tensor]) -> dict[str, float]:
    kinds = defaultdict[str, list[str]](list)
    for key in one:
        kind = key.partition(" ")[0]
        kinds[kind if kind in ("gradient", "average", "norm") else "losses"].append(key)
    found = {}
    for kind, keys in kinds.items():
        a, b = (torch.cat([values[key].double().flatten() for key in keys]) for values in (one, many))
        found[kind] = float((b - a).norm() / a.norm())
    return found


def measure_steps(folder: Path, names: Sequence[str], parallel: ParallelConfig, file: Path) -> None:
    """The largest deviations of all steps of each run; every process makes them, the first one writes."""
    found = defaultdict[str, dict[str, float]](dict)
    for name in names:
        for one, many in same_steps(folder, name, parallel):
            for kind, value in deviations(one, many).items():
                found[name][kind] = max(value, found[name].get(kind, 0.0))
    if rank() == 0:
        write_json(file, found)


def share_first(out: Path) -> None:
    """Runs of two processes, to their state after two steps."""
    for name in BACKBONES:
        train_to(2, out / name, ParallelConfig(), name, optim=OptimConfig())


def go_on(out: Path, parallel: ParallelConfig) -> None:
    for name in BACKBONES:
        resumed(out / name, parallel, name, OptimConfig())


def main(out: Path) -> dict[str, Any]:
    for name in RUNS:
        torch.save(list(steps(name, ParallelConfig())), out / f"{name}.pt")
    found: dict[str, Any] = {}
    for layout, (size, parallel) in LAYOUTS.items():
        names = BACKBONES if parallel.sequence > 1 else [*RUNS]
        world(size, partial(measure_steps, out, names, parallel, out / "steps.json"))
        found[layout] = read_json(out / "steps.json")
    for name in BACKBONES:
        train_to(3, out / "whole" / name, ParallelConfig(), name, optim=OptimConfig())
    world(2, partial(share_first, out / "1"))
    copytree(out / "1", out / "4")
    world(1, partial(go_on, out / "1", ParallelConfig()))
    world(4, partial(go_on, out / "4", PAIRS))
    count_sent("hunyuan")
    world(4, partial(sent_as_planned, "hunyuan"))
    by = {size: {name: log_deviation(out / "whole" / name, out / size / name) for name in BACKBONES} for size in "14"}
    return {"steps": found, "resumed": by}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    about = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": versions(),
        "cores": os.cpu_count(),
    }
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(sys.argv[1]), {**about, **main(Path(folder))})
