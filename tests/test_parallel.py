"""Training on several processes is training on one; what cannot be shared is refused with a way out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minwm.core.config import ConfigError
from minwm.train.parallel import Parallel, ParallelConfig


def test_worlds_of_2_and_4_train_as_one_process(tmp_path: Path) -> None:
    """Every recipe, both families: FSDP, HSDP, sequence parallelism, states, SIGTERM (tests/ranks.py)."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here / "contracts"), str(here.parent)])
    subprocess.run([sys.executable, here / "ranks.py", tmp_path], check=True, env={**os.environ, "PYTHONPATH": path})


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
