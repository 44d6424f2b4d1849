"""The endless stream of batches: every record once per epoch, exact resume, ranks that share one order."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from minwm.data.clips import DataError
from minwm.data.dataset import Loader


@dataclass
class Numbers:
    """Records that are their own index."""

    size: int
    fingerprint: int = 7

    def __len__(self) -> int:
        return self.size

    def batch(self, indices: Any) -> list[int]:
        return list(indices)


def test_resume_is_exact() -> None:
    whole = Loader(Numbers(10), 3, seed=5)
    for _ in range(7):
        next(whole)
    state = json.loads(json.dumps(whole.state()))
    resumed = Loader(Numbers(10), 3, seed=5)
    resumed.load(state)
    assert [next(resumed) for _ in range(9)] == [next(whole) for _ in range(9)]


def test_an_epoch_holds_every_record_once_in_a_new_order() -> None:
    stream = Loader(Numbers(10), 4, seed=1)
    drawn = [i for _ in range(5) for i in next(stream)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    assert stream.state() | {"epoch": 1, "position": 10} == stream.state()


def test_ranks_share_the_batch_of_one_process() -> None:
    one = Loader(Numbers(10), 6, seed=3)
    ranks = [Loader(Numbers(10), 2, seed=3, rank=r, world=3) for r in range(3)]
    for _ in range(8):
        assert next(one) == [i for r in ranks for i in next(r)]
    assert one.state() == ranks[0].state() == ranks[2].state()


def test_resuming_on_other_data_is_refused() -> None:
    state = Loader(Numbers(10), 2).state()
    with pytest.raises(DataError, match="fingerprint"):
        Loader(Numbers(10, fingerprint=8), 2).load(state)
    with pytest.raises(DataError, match="seed"):
        Loader(Numbers(10), 2, seed=1).load(state)
