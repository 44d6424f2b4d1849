"""Clips per second of training on a CPU: by one process and by two, beside a plain loop around diffusers' Wan, and in
bfloat16 and compiled beside float32.

    PYTHONPATH=.:tests python benchmarks/training_throughput.py results/training-throughput.json

The demo's stages with random weights and random clips, 4 in a step, in float32, one thread a process.

processes  `minwm bench-train`, alone and under torchrun with two processes (FSDP by gloo), one after the other
plain      the network without cameras as diffusers' class: flow matching of the clips, gradient clipping, AdamW. It
           takes turns with ours (train/loop.py), step by step, by the CPU time of each: other work hardly changes it
place      stages of the place as its preset has them, on the clips of a step: in float32, in bfloat16, and compiled,
           in turns as before
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from releases import reference
from torch import nn

from minwm.bench.training import random_network
from minwm.core.files import write_json
from minwm.core.runtime import git_commit, versions
from minwm.experiments import presets
from minwm.families.wan.transformer import WanConfig
from minwm.train.config import Run
from minwm.train.loop import Trainer
from minwm.train.parallel import Parallel
from minwm.train.roles import build_recipe

CLIPS = 4
STAGES = ("camera", "dmd")
PLACE = ("foundation", "camera")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
STEPS = ["--batch", "2", "--accumulate", str(CLIPS // 2), "--steps", "8", "--warmup", "2"]


def by_processes(stage: str, count: int, folder: Path) -> dict[str, Any]:
    """What `minwm bench-train` writes of a stage; `load` is the machine's over the minute before."""
    file, start = folder / "numbers.json", [*TORCHRUN, str(count)] if count > 1 else []
    words = [*start, "-m", "minwm", "bench-train", f"demo/{stage}", *STEPS, "--json", str(file)]
    load = os.getloadavg()[0]
    subprocess.run([sys.executable, *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = json.loads(file.read_text())["stages"][stage]
    return {"clips_per_s": found["clips_per_s"], "roles": found["roles"], "load": load}


def our_step(run: Run) -> Callable[[int], None]:
    recipe = build_recipe(run, lambda _: random_network(run))
    trainer, clips = Trainer(run, recipe, Parallel(run.parallel, torch.device("cpu"))), recipe_clips(run)

    def step(number: int) -> None:
        trainer.update(number, trainer.gradients(number, repeat(clips)))

    return step


def plain_step(run: Run) -> Callable[[int], None]:
    assert isinstance(run.model.network, WanConfig)
    net, clips = reference(run.model.network), recipe_clips(run)
    optimiser = torch.optim.AdamW(net.parameters(), lr=run.optim.lr)

    def step(_: int) -> None:
        latents, noise, t = clips.latents, torch.randn_like(clips.latents), torch.rand(len(clips.latents))
        mixed = torch.lerp(latents, noise, t[:, None, None, None, None])
        velocity = net(mixed.transpose(1, 2), 1000 * t, clips.cond.text).sample.transpose(1, 2)
        optimiser.zero_grad()
        nn.functional.mse_loss(velocity, noise - latents).backward()
        nn.utils.clip_grad_norm_(net.parameters(), run.optim.clip)
        optimiser.step()

    return step


def recipe_clips(run: Run) -> Any:
    return run.recipe.example_batch(run.model, run.batch)


def in_turns(makers: dict[str, Callable[[int], None]], steps: int, warmup: int = 3) -> dict[str, np.ndarray]:
    """CPU seconds of every step of each."""
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for number in range(warmup + steps):
        for name, step in makers.items():
            start = time.process_time()
            step(number)
            seconds[name].append(time.process_time() - start)
    return {name: np.array(taken[warmup:]) for name, taken in seconds.items()}


def race(run: Run, steps: int = 30) -> dict[str, Any]:
    """Clips per second of CPU time, of the median step of both, and how many times as long ours takes, step by step."""
    torch.manual_seed(0)
    seconds = in_turns({"minwm": our_step(run), "plain": plain_step(run)}, steps)
    rates = {name: CLIPS / float(np.median(taken)) for name, taken in seconds.items()}
    return {
        "clips_per_cpu_s": rates,
        "times_as_long": float(np.median(seconds["minwm"] / seconds["plain"])),
        "steps": steps,
    }


def place_speed(stage: str, steps: int = 5) -> dict[str, Any]:
    """Clips per second of CPU time of the median step in each arithmetic."""
    run = replace(presets.stage(f"place/{stage}", Path()), accumulate=1)
    ways = {
        "float32": replace(run, precision="float32"),
        "bfloat16": run,
        "bfloat16, compiled": replace(run, compile=True),
    }
    seconds = in_turns({name: our_step(way) for name, way in ways.items()}, steps)
    return {
        "clips": run.batch,
        "clips_per_cpu_s": {name: run.batch / float(np.median(taken)) for name, taken in seconds.items()},
        "steps": steps,
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    date, found = datetime.now(UTC).isoformat(timespec="seconds"), {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            found[stage] = {str(count): by_processes(stage, count, Path(folder)) for count in (1, 2)}
    run = replace(presets.stage("demo/foundation", Path()), batch=CLIPS, accumulate=1)
    about = {"command": " ".join(["python", *sys.argv]), "date": date, "commit": git_commit(), "versions": versions()}
    found = {"processes": found, "plain": race(run), "place": {stage: place_speed(stage) for stage in PLACE}}
    write_json(out, {**about, "cores": os.cpu_count(), "clips": CLIPS, **found})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
