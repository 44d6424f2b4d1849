"""What the options that change the result cost in quality, on the shipped model, held-out worlds and fixed noise.

    python benchmarks/bench_options.py --out results/options-cpu.json

PSNR of generated frames against the usual stream (4 passes and a cache update per chunk) and against the true view.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import minwm
from minwm.core.runtime import git_commit, versions
from minwm.eval.cases import held_out
from minwm.eval.image import psnr
from minwm.eval.stats import Bootstrap
from minwm.render.worlds import World
from minwm.session.prepare import fp8_trial
from minwm.store.folder import load_model
from minwm.store.model import Model, ModelConfig
from minwm.stream.accelerate import EngineConfig, Fp8, prepare_network

FOLDER = Path(minwm.__file__).parent / "assets" / "world" / "dmd"


def model(change: Callable[[ModelConfig], ModelConfig] = lambda cfg: cfg, fp8: Fp8 = "none") -> Model:
    loaded = load_model(FOLDER)
    loaded = replace(loaded, config=change(loaded.config))
    prepare_network(EngineConfig(fp8=fp8), loaded.net, loaded.config.geometry, fp8_trial(loaded))
    return loaded


def steps(count: int) -> Model:
    return model(lambda cfg: replace(cfg, sampler=replace(cfg.sampler, steps=count)))


OPTIONS: dict[str, Callable[[], Model]] = {
    "usual": model,
    "FP8 cache": lambda: model(fp8="cache"),
    "FP8 linears": lambda: model(fp8="linears"),
    "FP8 both": lambda: model(fp8="all"),
    "merged refresh": lambda: model(lambda cfg: replace(cfg, stream=replace(cfg.stream, merged_refresh=True))),
    "2 steps": lambda: steps(2),
    "1 step": lambda: steps(1),
}


def measure(clips: int, seed: int) -> dict[str, Any]:
    """What a result file holds."""
    held, rows, bootstrap, usual = None, {}, Bootstrap(clips), None
    for name, make in OPTIONS.items():
        tried = make()
        held = held or held_out(tried.config, clips, World)
        videos = held.generate(tried, seed)
        usual = videos if usual is None else usual
        passes = tried.config.sampler.passes + (not tried.config.stream.merged_refresh)
        scores = {"true view": psnr(videos, held.truth)}
        if name != "usual":
            scores["usual stream"] = psnr(videos, usual)
        means = {to: bootstrap.mean(values[:, 1:]) for to, values in scores.items()}  # the first image is given
        rows[name] = {"passes": passes, **{to: asdict(mean) for to, mean in means.items() if mean}}
    return {
        "what": f"PSNR in dB, mean over frames and {clips} clips with its 95% interval; {FOLDER.name}, float32",
        "clips": clips,
        "seed": seed,
        "options": rows,
        "versions": versions(),
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    text = json.dumps(measure(given.clips, given.seed), indent=1)
    sys.stdout.write(text + "\n")
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
