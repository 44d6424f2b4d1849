"""What this machine can do, the roof of every measurement; and what a measurement took of it."""

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """What a stage cannot do without."""

    flops: float
    bytes: float = 0
    """Read from memory at least once."""


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

    def seconds(self, work: Work) -> float:
        """Roofline: the least time that this work takes."""
        return max(work.flops / self.tflops / 1e12, work.bytes / self.gbytes / 1e9)


def faster(a: Machine, b: Machine) -> Machine:
    """The better rates of two measurements of one machine; all else of the second."""
    return replace(b, tflops=max(a.tflops, b.tflops), gbytes=max(a.gbytes, b.gbytes))


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


def _timed(run: Callable[[], object], cuda: bool) -> float:
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


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> tuple[float | None, float | None]:
    """Peak of allocated and of reserved GPU memory in GB; None on a CPU."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device) / 1e9, torch.cuda.max_memory_reserved(device) / 1e9


def compiled_graphs() -> int:
    """Graphs that torch.compile made in this process so far."""
    from torch._dynamo.utils import counters  # it takes a second to import

    return counters["stats"]["unique_graphs"]
