"""The training loop alone, on a network of three numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minwm.core.metrics import read_metrics
from minwm.data.dataset import loader
from minwm.experiments.presets.demo import tiny_model
from minwm.recipes.base import Loss, Recipe
from minwm.recipes.diffusion import BidirectionalConfig
from minwm.train.config import OptimConfig, Run
from minwm.train.loop import DivergedError, loop
from minwm.train.parallel import Parallel
from minwm.train.state import States


@dataclass
class Numbers:
    """Record i is a row of a fixed table."""

    table: Tensor
    fingerprint: int = 0

    def __len__(self) -> int:
        return len(self.table)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self.table[list(indices)]


class Dot(Recipe[nn.Module]):
    """Loss: mean of w . x, whose gradient is the mean of x whatever w is."""

    def __init__(self, change: Callable[[int, Tensor], Tensor] = lambda _, loss: loss) -> None:
        self.net, self.change, self.seen = nn.Linear(3, 1, bias=False), change, []
        self.cfg, self.networks = BidirectionalConfig(), {"student": self.net}

    def loss(self, clip: Tensor, step: int, generator: torch.Generator) -> Loss:
        self.seen.append((clip, next(self.net.parameters()).detach().clone()))
        total = self.change(step, self.net(clip).mean())
        return Loss(total, "student", {"loss": total.detach()})


def run_loop(recipe: Dot, out: Path, held_out: Sequence[Tensor] = (), **changes: Any) -> nn.Module:
    run = Run(name="dot", model=tiny_model(), recipe=BidirectionalConfig(), data="", tensorboard=False)
    run = replace(run, **{"steps": 6, "batch": 2, "optim": OptimConfig(lr=0.1, clip=1e9), **changes})
    table = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    here = Parallel(run.parallel, torch.device("cpu"))
    clips = loader(Numbers(table), run.batch, run.seed, here.data_rank, here.data_ranks)
    return loop(run, out, recipe, clips, here, held_out)


def test_accumulation_averages_gradients(tmp_path: Path) -> None:
    split, whole = Dot(), Dot()
    whole.net.load_state_dict(split.net.state_dict())
    run_loop(split, tmp_path / "split", batch=2, accumulate=3)
    run_loop(whole, tmp_path / "whole", batch=6)
    norms = [line["grad_norm"] for line in read_metrics(tmp_path / "split")]
    for step, norm in enumerate(norms):
        batches = torch.cat([x for x, _ in split.seen[3 * step : 3 * step + 3]])
        assert norm == pytest.approx(float(batches.mean(0).norm()), rel=1e-5)
    torch.testing.assert_close(split.net.weight, whole.net.weight)
    same = zip(read_metrics(tmp_path / "split"), read_metrics(tmp_path / "whole"), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], abs=1e-5) for a, b in same)


def test_held_out_clips_are_watched_and_change_nothing(tmp_path: Path) -> None:
    alone, watched = Dot(), Dot()
    watched.net.load_state_dict(alone.net.state_dict())
    run_loop(alone, tmp_path / "alone", save_every=4)
    other = [torch.randn(2, 3), torch.randn(2, 3)]
    run_loop(watched, tmp_path / "watched", other, save_every=4)
    assert torch.equal(alone.net.weight, watched.net.weight)
    lines = read_metrics(tmp_path / "watched")
    assert [line["step"] for line in lines if "val" in line] == [3, 5]
    assert lines[-1]["val"] == pytest.approx(float(watched.net(torch.cat(other)).mean().detach()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_stops_before_the_step(tmp_path: Path, value: float) -> None:
    recipe = Dot(lambda step, loss: loss * value if step == 4 else loss)
    with pytest.raises(DivergedError, match=r"step 4: gradient norm (nan|inf).* after 3 steps .*lower optim.lr"):
        run_loop(recipe, tmp_path, save_every=3)
    assert torch.equal(recipe.net.weight, recipe.seen[4][1]), "the bad gradient was not applied"
    assert States(tmp_path).latest() == 3
    healed = Dot()
    run_loop(healed, tmp_path, save_every=3)
    assert torch.equal(healed.seen[0][1], recipe.seen[3][1])


def test_ema_is_the_average_and_zero_is_off(tmp_path: Path) -> None:
    recipe = Dot()
    mean = run_loop(recipe, tmp_path / "mean", ema=0.3)
    weights = [w for _, w in recipe.seen[1:]] + [recipe.net.weight.detach()]
    want = recipe.seen[0][1]
    for step, weight in enumerate(weights):
        decay = min(0.3, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * weight
    torch.testing.assert_close(dict(mean.named_parameters())["weight"], want)
    raw = Dot()
    assert run_loop(raw, tmp_path / "raw", ema=0.0) is raw.net


def test_gradients_are_clipped(tmp_path: Path) -> None:
    """By the norm that the log shows; Adam notices another scale of the gradient only through its epsilon."""
    norms = []
    recipe = Dot(lambda _, loss: 1e6 * loss)
    recipe.net.weight.register_post_accumulate_grad_hook(lambda p: norms.append(p.grad.norm()))
    run_loop(recipe, tmp_path, optim=OptimConfig(lr=0.1, clip=1e-9), steps=1)
    assert float(norms[0]) == pytest.approx(read_metrics(tmp_path)[0]["grad_norm"])
    moved = (recipe.net.weight - recipe.seen[0][1]).norm()
    assert 0 < moved < 0.1, "the clipped gradient is below Adam's epsilon"


def test_learning_rate() -> None:
    optim = OptimConfig(lr=2.0, warmup=10, final=0.25)
    rates = [optim.rate(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2, rel=1e-3)
    assert max(rates) == rates[9] and rates[9] > 1.9
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[50] == pytest.approx((2.0 + 0.5) / 2)
    assert rates[100] == pytest.approx(0.5)
    assert {OptimConfig(lr=3.0).rate(step, 9) for step in range(9)} == {3.0}
