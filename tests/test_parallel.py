"""Training on several processes is training on one; what cannot be shared is refused with a way out."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minwm.core.config import ConfigError
from minwm.core.files import read_json
from minwm.train.parallel import Parallel, ParallelConfig

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "results" / "parallel.json"


def run_script(name: str, place: Path) -> None:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "tests/contracts", ""))
    subprocess.run([sys.executable, ROOT / "tests" / name, place], check=True, env={**os.environ, "PYTHONPATH": path})


def test_worlds_of_2_and_4_train_as_one_process(tmp_path: Path) -> None:
    """Both families: FSDP, HSDP, sequence parallelism, states, SIGTERM, pipelines, evaluation (tests/ranks.py)."""
    run_script("ranks.py", tmp_path)


@pytest.mark.slow
def test_every_recipe_trains_on_2_and_4_processes_as_on_one(tmp_path: Path) -> None:
    """Both families, in three layouts, and resumed with other numbers (tests/every_rank.py)."""
    run_script("every_rank.py", tmp_path / "found.json")
    found = read_json(tmp_path / "found.json")
    assert largest(found["steps"]) < 1e-5 and largest(found["resumed"]) < 1e-5


def largest(values: Any) -> float:
    return max(map(largest, values.values())) if isinstance(values, dict) else values


def test_the_page_on_training_says_how_far_processes_are_apart() -> None:
    found, page = read_json(RESULT), (ROOT / "docs" / "train.md").read_text()
    rows = [row for layout in found["steps"].values() for row in layout.values()]
    assert [len(layout) for layout in found["steps"].values()] == [14, 13, 13]
    gradients, losses = (max(row[kind] for row in rows) for kind in ("gradient", "losses"))
    said = f"gradients are {gradients:.0e} apart at most, relative to their length, and losses {losses:.0e}"
    assert said in " ".join(page.split())
    assert f"norms and losses are {largest(found['resumed']):.0e}" in " ".join(page.split())


@pytest.mark.parametrize(
    ("batch", "accumulate", "message"),
    [
        (8, 1, "1 micro-batches of 8 clips cannot be shared by 4 groups.*; give --batch 2 --accumulate 4, of as many"),
        (6, 6, "give --batch 3 --accumulate 12"),
        (3, 1, "of 3 clips in a step, 1, 3 groups can have equal parts"),
    ],
)
def test_a_batch_that_cannot_be_shared_has_a_way_out(batch: int, accumulate: int, message: str) -> None:
    parallel = Parallel(ParallelConfig(), torch.device("cpu"))
    assert parallel.micro_batches(8, 3) == range(3)
    parallel.data_ranks, parallel.data_rank = 4, 1
    assert parallel.micro_batches(8, 8) == range(1, 8, 4)
    with pytest.raises(ConfigError, match=message):
        parallel.micro_batches(batch, accumulate)


def test_a_world_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.sequence=2: 1 processes are no multiple; give one of 1"):
        Parallel(ParallelConfig(sequence=2), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"parallel\.shard=0: must be more than 0"):
        ParallelConfig(shard=0)
