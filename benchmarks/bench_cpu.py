"""The engine, plain and compiled, against the straightforward form (plain.py): the same tiny model, weights and prompt.

    python benchmarks/bench_cpu.py --threads 1 2 --out results/bench-cpu.json

Both walk with a full ring, taking turns chunk by chunk, so that whatever else the machine does slows both alike.
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain import PlainStream
from torch import Tensor

from minwm.core.runtime import git_commit, versions
from minwm.core.types import Condition
from minwm.experiments import presets
from minwm.families.wan.transformer import Wan
from minwm.store.model import ModelConfig
from minwm.stream.rollout import Stream
from minwm.stream.solvers import FewStepSampler

Step = Callable[[Condition, Tensor], Tensor]


def tiny() -> ModelConfig:
    """The demo's model in its last form: cameras, 4 passes and a cache update per chunk."""
    base = presets.demo.tiny_model()
    return replace(base, network=replace(base.network, camera="dual"), sampler=FewStepSampler(steps=4, shift=3.0))


@dataclass
class Walk:
    """A camera that turns and moves on, seen by a network with random weights; the first chunk is one latent."""

    cfg: ModelConfig
    net: Wan
    chunk: int = 0

    @classmethod
    def make(cls) -> "Walk":
        torch.manual_seed(0)
        cfg = tiny()
        net = cfg.network.build().eval().requires_grad_(False)
        for parameter in net.parameters():  # also those that begin at zero
            torch.nn.init.normal_(parameter, std=0.05)
        assert isinstance(net, Wan)
        return cls(cfg, net)

    def next(self) -> tuple[Condition, Tensor]:
        """Condition and noise of the next chunk."""
        geometry, generator = self.cfg.geometry, torch.Generator().manual_seed(self.chunk)
        a, b = geometry.start(self.chunk), geometry.start(self.chunk + 1)
        self.chunk += 1
        w2c = torch.eye(4).repeat(1, b - a, 1, 1)
        turn = 0.02 * torch.arange(a, b)
        w2c[0, :, 0, 0], w2c[0, :, 0, 2] = turn.cos(), turn.sin()
        w2c[0, :, 2, 0], w2c[0, :, 2, 2] = -turn.sin(), turn.cos()
        w2c[0, :, 2, 3] = 0.05 * torch.arange(a, b)
        K = torch.tensor(self.cfg.intrinsics, dtype=torch.float32).expand(1, b - a, 4)
        noise = torch.randn(4, *self.cfg.latent_shape(1, b - a), generator=generator)
        return Condition(**self.cfg.encode_prompts(["a room"]), w2c=w2c, K=K), noise


def engine(walk: Walk, cond: Condition) -> Step:
    stream, sampler = Stream(walk.net, cond, walk.cfg.geometry), walk.cfg.sampler

    def step(cond: Condition, noise: Tensor) -> Tensor:
        bound = stream.prepare_chunk(cond)
        x = stream.next_chunk(bound, noise, sampler)
        stream.update_cache(bound, x)
        return x

    return step


def compiled(walk: Walk, cond: Condition) -> Step:
    net = copy.deepcopy(walk.net)
    net.compile_blocks()
    return engine(Walk(walk.cfg, net), cond)


def plain(walk: Walk, cond: Condition) -> Step:
    stream = PlainStream(walk.net, cond, walk.cfg.geometry)
    return lambda cond, noise: stream.step(cond, noise, walk.cfg.sampler)  # pyright: ignore[reportArgumentType]


MAKERS = {"plain": plain, "engine": engine, "compiled": compiled}


@torch.no_grad()
def race(makers: dict[str, Callable[[Walk, Condition], Step]], chunks: int) -> tuple[dict[str, list[float]], float]:
    """Milliseconds of every steady chunk by name, and the largest difference of a latent from the engine's."""
    walk, steps = Walk.make(), {}
    times: dict[str, list[float]] = {name: [] for name in makers}
    apart, full = 0.0, walk.cfg.geometry.slots
    for i in range(full + chunks):
        cond, noise = walk.next()
        steps = steps or {name: make(walk, cond) for name, make in makers.items()}
        made = {}
        for name, step in steps.items():
            start = time.perf_counter()
            made[name] = step(cond, noise)
            if i >= full:
                times[name].append(1000 * (time.perf_counter() - start))
        apart = max(apart, *(float((x - made["engine"]).abs().max()) for x in made.values()))
    return times, apart


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    return {
        name: {
            "median_ms": float(np.median(ms)),
            "p90_ms": float(np.percentile(ms, 90)),
            "least_ms": min(ms),
            "times_as_fast_as_plain": float(np.median(np.array(times["plain"]) / np.array(ms))),
        }
        for name, ms in times.items()
    }


def measure(makers: dict[str, Callable[[Walk, Condition], Step]], threads: list[int], chunks: int) -> dict[str, Any]:
    """What a result file holds."""
    rows, apart = {}, 0.0
    for count in threads:
        torch.set_num_threads(count)
        times, difference = race(makers, chunks)
        rows[str(count)], apart = summary(times), max(apart, difference)
    return {
        "what": "a steady chunk of the demo's network: 4 passes and the cache update of 2 latents, ring full",
        "chunks": chunks,
        "largest_difference": apart,
        "threads": rows,
        "load": os.getloadavg()[0],
        "versions": versions(),
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--chunks", type=int, default=60)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    text = json.dumps(measure(MAKERS, given.threads, given.chunks), indent=1)
    sys.stdout.write(text + "\n")
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
