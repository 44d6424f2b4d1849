"""Play for long with random keys in headless Chromium, and record latency, memory and threads over time.

    python benchmarks/play_soak.py results/play-soak.json 10 runs/demo/dmd 7:128

plays every model folder and every procedural world (SEED:PIXELS) for that many minutes each. Every ten seconds it
takes what the page itself has measured over them, the memory and threads of the server, the memory of the page, and
how many processes of the whole machine wanted a core (load average over a minute; the player itself is one to two).
"""

import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from browsing import ServerProcess
from play_latency import measure, press_keys

READ = """() => ({
    fps: minwm.stats.fps, input_to_photon_p50_ms: minwm.stats.p50, input_to_photon_p95_ms: minwm.stats.p95
})"""
WINDOW = 10.0
"""Seconds on which the statistics of the page look back."""
SETTLED = 60.0
"""Seconds until as much can be undone as is ever kept: from then on nothing may grow."""


def soak(page: Any, server: ServerProcess, seconds: float, window: float = WINDOW) -> list[dict[str, float]]:
    """What was seen at the end of every window."""
    samples, draw = [], random.Random(0)
    chromium = page.context.new_cdp_session(page)
    for _ in range(round(seconds / window)):
        press_keys(page, window, draw)
        chromium.send("HeapProfiler.collectGarbage")
        page_mib = chromium.send("Runtime.getHeapUsage")["usedSize"] / 2**20
        other = {"page_mib": page_mib, "machine_load": os.getloadavg()[0]}
        samples.append({**page.evaluate(READ), **footprint(server.process.pid), **other})
    return samples


def footprint(pid: int) -> dict[str, float]:
    """Resident memory and threads of a process (Linux)."""
    lines = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    status = {name: value.split()[0] for name, value in lines if value.split()}
    return {"server_mib": int(status["VmRSS"]) / 1024, "server_threads": int(status["Threads"])}


def compared(samples: list[dict[str, float]], skip: int = round(SETTLED / WINDOW)) -> dict[str, Any]:
    """Every sample, and medians of the first and of the last third of those after the start."""
    settled = samples[skip:]
    third = len(settled) // 3
    thirds = {"first third": settled[:third], "last third": settled[-third:]}
    medians = {
        name: {key: round(statistics.median(sample[key] for sample in part), 1) for key in samples[0]}
        for name, part in thirds.items()
    }
    return {**medians, "samples": {key: [round(sample[key], 1) for sample in samples] for key in samples[0]}}


def main(out: str, minutes: str, *scenarios: str) -> None:
    what = (
        f"{minutes} minutes of keys in the browser, a sample every {WINDOW:g} s; thirds of what follows {SETTLED:g} s"
    )
    measure(Path(out), [*scenarios], what, lambda page, server: compared(soak(page, server, 60 * float(minutes))))


if __name__ == "__main__":
    main(*sys.argv[1:])
