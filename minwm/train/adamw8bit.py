"""AdamW whose moments are held in 8 bits (Dettmers et al., arXiv 2110.02861), by torchao.

A moment is a code of 8 bits for each number, and a float32 scale for each block of 256 in a row. Blocks lie within
rows, which FSDP deals out whole: so a state is the same on any number of processes, bit for bit.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from minwm.core.config import ConfigError
from minwm.core.runtime import require

BLOCK = 256
"""Numbers that share a scale."""
ROWS = 64
"""Of a matrix, below which its moments stay float32: they are little, and some process might have no row of it."""
EXTRA = "quant"
"""Of minwm, with torchao."""


def fits_8bit(parameter: Tensor) -> bool:
    """Whether the moments of a parameter can be held in 8 bits; the same on any number of processes."""
    rows, *row = parameter.shape
    return rows >= ROWS and bool(row) and math.prod(row) % BLOCK == 0


def nbytes_8bit(parameter: Tensor) -> int:
    """Bytes of both moments: codes, scales, and a table of 256 float32 for each."""
    return 2 * (parameter.numel() + 4 * parameter.numel() // BLOCK + 4 * 256)


def adamw_8bit(
    weights: Sequence[Tensor], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser of weights that `fits_8bit` takes, its moments zero.

    torchao compiles the update on a GPU; on a CPU it runs as it is. Raises
    MissingExtraError without torchao, and ConfigError for another device, or a process that has no row of a weight.
    """
    torchao = require("torchao.optim", EXTRA)
    optimizer = torchao.AdamW8bit(weights, lr, betas, weight_decay=weight_decay, block_size=BLOCK)
    for weight in weights:
        moments = {"exp_avg": _zeros(weight, signed=True), "exp_avg_sq": _zeros(weight, signed=False)}
        optimizer.state[weight] = {"step": torch.tensor(0.0), **moments}
    if all(weight.device.type == "cpu" for weight in weights):
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)
    return optimizer


def _zeros(weight: Tensor, signed: bool) -> Tensor:
    """A moment of zeros, its rows with the processes that have those of the weight."""
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    if local.device.type not in ("cpu", "cuda"):
        raise ConfigError(f"optimizer=adamw8bit: torchao has no update for {local.device.type}; give adamw")
    if not len(local):
        raise ConfigError(
            f"optimizer=adamw8bit: {len(weight)} rows of a weight leave a process without; give a smaller "
            "parallel.shard, or adamw"
        )
    state = require("torchao.optim.subclass_8bit", EXTRA).OptimState8bit
    zeros = state.zeros(local.shape, signed, BLOCK, local.device, local.dtype)
    return _as_rows_of(weight, zeros, weight.shape)


def stored(moment: Tensor) -> dict[str, Tensor]:
    """What holds a moment, by the end of its name: itself, or the codes and the scales of its rows (no copies)."""
    local = moment.to_local() if isinstance(moment, DTensor) else moment
    if not is_traceable_wrapper_subclass(local):
        return {"": moment}
    state: Any = local
    rows, *row = moment.shape
    scale, shape = state.scale.view(len(state), -1), torch.Size((rows, math.prod(row) // BLOCK))
    return {".codes": _as_rows_of(moment, state.codes, moment.shape), ".scale": _as_rows_of(moment, scale, shape)}


def _as_rows_of(whole: Tensor, local: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of `shape` of which this process has `local`, dealt out as `whole` is."""
    if not isinstance(whole, DTensor):
        return local
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, whole.device_mesh, whole.placements, run_check=False, shape=shape, stride=stride)
