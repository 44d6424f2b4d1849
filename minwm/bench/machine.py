"""What this machine can do: the rate of large products and copies, the roof of every measurement."""

import os
import subprocess
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the device did in this run, in the dtype of the network."""

    tflops: float
    """Of one large matrix product, or of one large convolution where that is faster; the best of several."""
    gbytes: float
    """Read and written per second by one large copy; the best of several."""
    dtype: str
    load: float
    """Processes that wanted a processor in the last minute, this one included: more than there are disturb."""
    clocks: str | None
    """Clocks, limits and power of the GPU as its driver says, under load; None without one."""


# ------------------------------------------------------------------------------------------------ the roofline


@torch.no_grad()
def measure_machine(like: Tensor, repeats: int = 8) -> Machine:
    """In the dtype and on the device of `like`."""
    side, cuda = (8192, True) if like.is_cuda else (1536, False)
    a, b = torch.randn(2, side, side, dtype=like.dtype, device=like.device)
    source = torch.empty((1 << 30) if cuda else (1 << 26), dtype=torch.uint8, device=like.device).fill_(1)
    target, out = torch.empty_like(source), torch.empty_like(a)
    # on a CPU, products and convolutions come from two libraries, and either may know the processor better
    image, kernel = torch.randn(1, 256, 64, 64).to(a), torch.randn(256, 256, 3, 3).to(a)
    flops, copied = 0.0, float("inf")
    for _ in range(repeats):
        flops = max(flops, 2 * side**3 / _timed(lambda: torch.mm(a, b, out=out), cuda))
        flops = max(flops, 2 * kernel.numel() * 64**2 / _timed(lambda: F.conv2d(image, kernel, padding=1), cuda))
        copied = min(copied, _timed(lambda: target.copy_(source), cuda))
    return Machine(
        tflops=flops / 1e12,
        gbytes=2 * source.numel() / copied / 1e9,
        dtype=str(like.dtype).removeprefix("torch."),
        load=os.getloadavg()[0],
        clocks=_clocks() if cuda else None,
    )


def _timed(run: Any, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _clocks() -> str | None:
    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
