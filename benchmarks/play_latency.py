"""Measure live play in headless Chromium: latency from random key presses to the display of their frames.

    python benchmarks/play_latency.py results/play-cpu.json minwm/assets/world/dmd 7:128

plays every model folder and every procedural world (SEED:PIXELS) for half a minute each, and writes the statistics of
the page over the last ten seconds.
"""

import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from browsing import CHROMIUM, ServerProcess, visit
from playwright.sync_api import sync_playwright

from minwm.core.files import write_json
from minwm.core.runtime import git_commit, versions

KEYS = ("KeyW", "KeyS", "KeyA", "KeyD", "ArrowLeft", "ArrowRight")
READ = "() => ({ fps: minwm.stats.fps, p50: minwm.stats.p50, p95: minwm.stats.p95, ...minwm.stats.timings })"


def press_keys(page: Any, seconds: float, draw: random.Random) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        key = draw.choice(KEYS)
        page.keyboard.down(key)
        page.wait_for_timeout(draw.uniform(50, 400))
        page.keyboard.up(key)
        page.wait_for_timeout(draw.uniform(50, 400))


def latency(page: Any, _: ServerProcess) -> dict[str, float]:
    draw, readings = random.Random(0), []
    press_keys(page, 20, draw)
    for _second in range(10):
        press_keys(page, 1, draw)
        readings.append(page.evaluate(READ))
    median = {name: statistics.median(reading[name] for reading in readings) for name in readings[0]}
    milliseconds = {f"{name}_ms": median[name] for name in ("diffuse", "decode", "copy", "encode", "queue")}
    photon = {"input_to_photon_p50_ms": readings[-1]["p50"], "input_to_photon_p95_ms": readings[-1]["p95"]}
    return {"fps": median["fps"], **photon, **milliseconds}


def measure(out: Path, scenarios: list[str], what: str, how: Callable[[Any, ServerProcess], dict[str, Any]]) -> None:
    """Play each scenario in the browser, and write what `how` measures of it."""
    results: dict[str, Any] = {}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for scenario in scenarios:
            seed, _, size = scenario.partition(":")
            words = ("--world", seed, "--size", size) if size else ("--model", scenario)
            server = ServerProcess(*words)
            try:
                for page in visit(browser, server.url):
                    results[f"world {seed}, {size}x{size}" if size else scenario] = how(page, server)
            finally:
                server.close()
        version = browser.version
        browser.close()
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": {**versions(), "chromium": version},
        "what": f"{what}; the browser shares the two cores with the server",
    }
    write_json(out, {**about, **results})


def main(out: str, *scenarios: str) -> None:
    measure(Path(out), [*scenarios], "medians over the last 10 of 30 seconds", latency)


if __name__ == "__main__":
    main(*sys.argv[1:])
