"""AdamW with 8-bit moments: close to AdamW, a quarter of its memory, and the same after a break."""

import sys
from pathlib import Path

import pytest
import torch
from test_train_loop import Dot, run_loop
from torch import nn

from minwm.core.config import ConfigError
from minwm.core.runtime import MissingExtraError
from minwm.train.adamw8bit import nbytes_8bit
from minwm.train.config import OptimConfig
from minwm.train.parallel import ParallelConfig
from minwm.train.state import States, state_tensors


class Matrix(Dot):
    """One matrix with 8-bit moments, and biases whose moments are float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        spread = nn.Linear(3, 256)
        self.net = nn.Sequential(spread, nn.GELU(), nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 1))
        self.networks = {"student": self.net}


def trained(out: Path, steps: int, optimizer: str = "adamw8bit") -> nn.Module:
    optim = OptimConfig(optimizer=optimizer, lr=1e-3)  # pyright: ignore[reportArgumentType]
    return run_loop(Matrix(), out, steps=steps, optim=optim, ema=0.0, save_every=2)


def test_a_resumed_run_is_the_run_in_one_go(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", 4).state_dict()
    trained(tmp_path / "parts", 2)
    resumed = trained(tmp_path / "parts", 4).state_dict()
    assert all(torch.equal(resumed[name], x) for name, x in whole.items())


def test_it_does_what_adamw_does_in_a_quarter_of_its_memory(tmp_path: Path) -> None:
    start, eight, full = Matrix().net, *(trained(tmp_path / name, 6, name) for name in ("adamw8bit", "adamw"))
    moved, apart = (
        torch.cat([(p - q).flatten() for p, q in zip(full.parameters(), net.parameters(), strict=True)]).norm()
        for net in (start, eight)
    )
    assert 0 < apart < 0.1 * moved
    net = Matrix().net
    matrix = net.get_parameter("2.weight")
    optimizers = OptimConfig(optimizer="adamw8bit").build(net)
    assert [len(optimizer.param_groups[0]["params"]) for optimizer in optimizers.values()] == [5, 1]
    tensors = state_tensors({"student": net}, [optimizers["adamw8bit"]])
    held = {name: x.nbytes for name, x in tensors.items() if "exp_avg" in name}
    tables = 2 * 4 * 256
    assert sum(held.values()) + tables == nbytes_8bit(matrix) < 0.3 * 8 * matrix.numel()
    assert States(tmp_path / "adamw8bit").latest() == 6


def test_what_it_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="optimizer=adamw8bit: Linear has no weight for it; give adamw"):
        OptimConfig(optimizer="adamw8bit").build(nn.Linear(100, 100))
    with pytest.raises(ConfigError, match="no update for meta; give adamw"):
        OptimConfig(optimizer="adamw8bit").build(nn.Linear(256, 64, device="meta"))
    with pytest.raises(ConfigError, match=r"cpu_offload.* give adamw"):
        run_loop(Dot(), tmp_path, parallel=ParallelConfig(cpu_offload=True), optim=OptimConfig(optimizer="adamw8bit"))
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(MissingExtraError, match=r"torchao.optim is not installed; run: pip install 'minwm\[quant\]'"):
        OptimConfig(optimizer="adamw8bit").build(nn.Linear(256, 64))
