"""Everything that shows whether a machine reaches the targets, as parts in processes of their own.

Each part is a command of minwm with a time limit. What it wrote, how it ended and its last lines stand in OUT/PART.json
as soon as it has ended; OUT/page.md is written anew after each. A part that crashes, hangs or runs out of memory is
named there, and the others go on. Run again, it repeats only what did not succeed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minwm.core.config import UserError
from minwm.core.files import locked, read_json, write_json, write_text
from minwm.core.runtime import git_commit, versions

State = Literal["done", "failed", "timed out", "left out"]
BUDGET = 480.0
"""Seconds of all parts together."""
TAIL = 2000
"""Characters kept of what a part printed last."""


@dataclass(frozen=True)
class Target:
    """A number in the JSON of a part, and its bound (docs/performance.md)."""

    name: str
    field: str
    """Its place: names joined by dots."""
    bound: float
    at_least: bool = False


@dataclass(frozen=True)
class Part:
    name: str
    words: tuple[str, ...]
    """Of the command `python -m ...`. Where `writes`, it is followed by --json FILE."""
    seconds: float
    gib: float = 0.0
    """GPU memory that it needs."""
    targets: tuple[Target, ...] = ()
    writes: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    part: Part
    state: State
    seconds: float
    tail: str
    found: dict[str, Any]
    """What the part wrote."""


FAST = ("--compile", "--kernels", "--graphs", "--attention", "fastest", "--decode", "compile", "--overlap")
DEVICE_TESTS = ("tests/test_kernels.py", "tests/test_engine.py", "tests/test_fp8.py", "tests/test_decode.py")


def _bench(preset: str, *options: str) -> tuple[str, ...]:
    return ("minwm", "bench", "--preset", preset, "--random-weights", "--repeats", "3", *options)


GPU = (
    Part(
        "wan-fast",
        _bench("wan2.1-1.3b", *FAST),
        120,
        20,
        (
            Target("T1: Wan M1, ms", "first_chunk.median_ms", 270),
            Target("T2: Wan M2, ms", "chunk.median_ms", 850),
            Target("T4: Wan M3, frames per second", "fps", 18, at_least=True),
            Target("T6: Wan M4, ms", "first_pixel.median_ms", 450),
            Target("T12: recompiles", "recompiles", 0),
            Target("T11: Wan memory, GB", "allocated_gb", 18),
        ),
    ),
    Part("device-tests", ("pytest", "-q", "-x", "-p", "no:cacheprovider", *DEVICE_TESTS), 90, writes=False),
    Part("self-forcing", _bench("self-forcing", *FAST), 60, 20, (Target("T7: M2, ms", "chunk.median_ms", 300),)),
    Part(
        "hunyuan-fast",
        _bench("hunyuan1.5-8b", *FAST),
        120,
        60,
        (
            Target("T8: HunyuanVideo M1, ms", "first_chunk.median_ms", 640),
            Target("T9: HunyuanVideo M2, ms", "chunk.median_ms", 2050),
        ),
    ),
    Part("wan-plain", _bench("wan2.1-1.3b", "--chunks", "5"), 60, 20),
    Part("wan-fp8", _bench("wan2.1-1.3b", *FAST, "--fp8", "all"), 90, 20),
    Part("wan-training", ("minwm", "bench-train", "wan2.1-1.3b", "--steps", "1", "--warmup", "1"), 120, 80),
    Part("wan-plan", ("minwm", "plan", "--preset", "wan2.1-1.3b"), 30),
)
"""On a CUDA GPU; the first minutes give the most."""
SMALL = (
    Part(
        "small",
        ("minwm", "bench", "--preset", "smoke", "--random-weights", "--repeats", "1", "--chunks", "2"),
        60,
        targets=(Target("frames per second", "fps", 1, at_least=True), Target("recompiles", "recompiles", 0)),
    ),
    Part("small-training", ("minwm", "bench-train", "smoke/ar", "--steps", "1", "--warmup", "1"), 60),
    Part("small-plan", ("minwm", "plan", "--preset", "smoke/dmd"), 60),
)
"""On a CPU: every kind of part, with a small model."""


def gpu_memory_gib() -> float:
    """Of the first CUDA GPU, as its driver says; UserError without one."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        return float(listed[0]) / 1024
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError) as error:
        raise UserError(f"--gpu: no CUDA GPU answers ({error}); leave it out to run the small parts here") from error


def selftest(
    parts: Sequence[Part], out: Path, gib: float, log: Callable[[str], None], budget: float = BUDGET
) -> list[Outcome]:
    """Run the parts, in order, each after the other; `gib` is the GPU memory there is."""
    outcomes, end = list[Outcome](), time.monotonic() + budget
    with locked(out):
        for part in parts:
            outcome = _finished(part, out) or _run(part, out, gib, end - time.monotonic())
            log(f"{part.name}: {outcome.state} ({outcome.seconds:.0f} s)")
            outcomes.append(outcome)
            write_text(out / "page.md", page(outcomes))
    return outcomes


def _finished(part: Part, out: Path) -> Outcome | None:
    """What an earlier run of the same command found."""
    path = out / f"{part.name}.json"
    if not path.exists() or (known := read_json(path))["state"] != "done" or known["words"] != [*part.words]:
        return None
    return Outcome(part, "done", known["seconds"], known["tail"], known["found"])


def _run(part: Part, out: Path, gib: float, left: float) -> Outcome:
    result, output = out / f"{part.name}.result.json", out / f"{part.name}.log"
    result.unlink(missing_ok=True)
    seconds, state = 0.0, "left out"
    reason = f"it needs {part.gib:g} GiB of GPU memory, there are {gib:.1f}" if part.gib > gib else ""
    reason = reason or ("no time is left" if left <= 0 else "")
    if not reason:
        words = [sys.executable, "-m", *part.words, *(["--json", str(result)] if part.writes else [])]
        began = time.monotonic()
        with output.open("w") as file:
            state = _wait(subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True), part, left)
        seconds = time.monotonic() - began
    tail = reason or output.read_text(errors="replace")[-TAIL:]
    found = read_json(result) if state == "done" and part.writes else {}
    outcome = Outcome(part, state, seconds, tail, found)
    about = {"words": [*part.words], "commit": git_commit(), "versions": versions()}
    write_json(out / f"{part.name}.json", {"state": state, "seconds": seconds, "tail": tail, **about, "found": found})
    result.unlink(missing_ok=True)
    return outcome


def _wait(process: "subprocess.Popen[bytes]", part: Part, left: float) -> State:
    """Wait for a process and kill it, with all that it started, at its limit."""
    try:
        return "done" if process.wait(min(part.seconds, left)) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def page(outcomes: Sequence[Outcome]) -> str:
    """Measured against target, and what failed and why, as Markdown."""
    lines = ["# Self-test", "", "| part | state | seconds |", "|---|---|---|"]
    lines += [f"| {o.part.name} | {o.state} | {o.seconds:.0f} |" for o in outcomes]
    if rows := [row for outcome in outcomes for row in _rows(outcome)]:
        lines += ["", "| target | bound | measured | |", "|---|---|---|---|", *rows]
    for outcome in outcomes:
        if outcome.state != "done":
            lines += ["", f"## {outcome.part.name}: {outcome.state}", "", "```", outcome.tail.strip(), "```"]
    return "\n".join([*lines, "", f"```\n{json.dumps(versions(), indent=1)}\n```", ""])


def _rows(outcome: Outcome) -> Iterator[str]:
    for target in outcome.part.targets:
        value: Any = outcome.found
        for name in target.field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        bound = f"at {'least' if target.at_least else 'most'} {target.bound:g}"
        met = isinstance(value, int | float) and (value >= target.bound if target.at_least else value <= target.bound)
        shown = "not measured" if value is None else f"{value:.4g}"
        yield f"| {target.name} | {bound} | {shown} | {'met' if met else 'missed' if value is not None else ''} |"
