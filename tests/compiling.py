"""Recording what a CUDA graph would, and counting what torch.compile compiles, in a process without the import hook of
the tests."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from contracts.backbones import condition
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from minwm.nets.backbone import Backbone
from minwm.nets.chunks import Geometry
from minwm.stream.rollout import Stream
from minwm.stream.solvers import FewStepSampler

graphs: list[nn.Module] = []


def backend(module: nn.Module, _inputs: list[Tensor]) -> Callable:
    graphs.append(module)
    return module.forward


def traced(function: Any, inputs: list[Tensor]) -> Any:
    """What a CUDA graph does, on a CPU: the operators are recorded, and all that is no input stays as it was.

    In a thread of its own, because torch writes down the whole stack for each of them, and that of a test is deep.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.no_grad()(make_fx(function)), *inputs).result()


@torch.no_grad()
def walk(net: Backbone, chunks: int, steps: int, window: int = 2) -> Tensor:
    """The last chunk of a stream whose ring was filled."""
    cond, dtype = condition(2, batch=1), next(net.parameters()).dtype
    geometry = Geometry(tokens=net.tokens_per_frame(4, 6), chunk=2, window=window, text_rows=net.text_rows)
    stream, x = Stream(net, cond, geometry), torch.empty(0)
    for i in range(chunks):
        chunk = stream.prepare_chunk(cond)
        noise = torch.randn(steps, 1, 2, 4, 4, 6, generator=torch.Generator().manual_seed(i), dtype=dtype)
        x = stream.next_chunk(chunk, noise, FewStepSampler(steps=steps))
        stream.update_cache(chunk, x)
    return x


def run_script(script: str) -> None:
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=Path(__file__).parent)
