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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minwm.bench.target import Target
from minwm.core.config import UserError
from minwm.core.files import locked, read_json, write_json, write_text
from minwm.core.runtime import git_commit, versions

State = Literal["done", "failed", "timed out", "left out"]
BUDGET = 480.0
"""Seconds of all parts together."""
TAIL = 2000
"""Characters kept of what a part printed last."""


@dataclass(frozen=True)
class Part:
    name: str
    words: tuple[str, ...]
    """Of the command `python -m ...`. Where `writes`, it is followed by --json FILE."""
    seconds: float
    gib: float = 0.0
    """GPU memory that it needs."""
    targets: Mapping[str, Target] = field(default_factory=dict)
    """By the field of its JSON: names joined by dots (docs/performance.md)."""
    writes: bool = True
    planned_by: str = ""
    """The part whose `minwm plan` says what memory this one should need."""


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
        {
            "first_chunk.median_ms": Target("T1: Wan M1, ms", 270),
            "chunk.median_ms": Target("T2: Wan M2, ms", 850),
            "fps": Target("T4: Wan M3, frames per second", 18, at_least=True),
            "first_pixel.median_ms": Target("T6: Wan M4, ms", 450),
            "recompiles": Target("T12: recompiles", 0),
            "allocated_gb": Target("T11: Wan memory, GB", 18),
        },
    ),
    Part("device-tests", ("pytest", "-q", "-x", "-p", "no:cacheprovider", *DEVICE_TESTS), 90, writes=False),
    Part(
        "self-forcing",
        _bench("self-forcing", *FAST),
        60,
        20,
        {"chunk.median_ms": Target("T7: Self-Forcing's setting, M2, ms", 300)},
    ),
    Part(
        "hunyuan-fast",
        _bench("hunyuan1.5-8b", *FAST),
        120,
        60,
        {
            "first_chunk.median_ms": Target("T8: HunyuanVideo M1, ms", 640),
            "chunk.median_ms": Target("T9: HunyuanVideo M2, ms", 2050),
        },
    ),
    Part("wan-plain", _bench("wan2.1-1.3b", "--chunks", "5"), 60, 20, planned_by="wan-plan"),
    Part("wan-fp8", _bench("wan2.1-1.3b", *FAST, "--fp8", "all"), 90, 20),
    Part(
        "wan-training",
        ("minwm", "bench-train", "wan2.1-1.3b", "--steps", "1", "--warmup", "1"),
        120,
        80,
        planned_by="wan-plan",
    ),
    Part("wan-plan", ("minwm", "plan", "--preset", "wan2.1-1.3b"), 90),
)
"""On a CUDA GPU; the first minutes give the most."""
SMALL = (
    Part(
        "small",
        ("minwm", "bench", "--preset", "smoke", "--random-weights", "--repeats", "1", "--chunks", "2"),
        60,
        targets={"fps": Target("frames per second", 1, at_least=True), "recompiles": Target("recompiles", 0)},
        planned_by="small-plan",
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
    """What an earlier run of the same command found, if it succeeded."""
    path = out / f"{part.name}.json"
    if not path.exists() or (known := read_json(path))["state"] != "done" or known["words"] != [*part.words]:
        return None
    return Outcome(part, "done", known["seconds"], known["tail"], known["found"])


def finished(parts: Sequence[Part], out: Path) -> list[Outcome]:
    """All parts, those that have not succeeded in `out` as left out."""
    return [_finished(part, out) or Outcome(part, "left out", 0.0, "", {}) for part in parts]


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
    """Measured against target, memory against its plan, and what failed and why, as Markdown."""
    lines = ["# Self-test", "", "| part | state | seconds |", "|---|---|---|"]
    lines += [f"| {o.part.name} | {o.state} | {o.seconds:.0f} |" for o in outcomes]
    for table in (target_table(outcomes), plan_table(outcomes)):
        lines += ["", table] if table else []
    for outcome in outcomes:
        if outcome.state != "done":
            lines += ["", f"## {outcome.part.name}: {outcome.state}", "", "```", outcome.tail.strip(), "```"]
    return "\n".join([*lines, "", f"```\n{json.dumps(versions(), indent=1)}\n```", ""])


def target_table(outcomes: Sequence[Outcome]) -> str:
    """A row for each target of the parts."""
    rows = [row for outcome in outcomes for row in _rows(outcome)]
    return "\n".join(["| target | bound | measured | |", "|---|--:|--:|---|", *rows]) if rows else ""


def _rows(outcome: Outcome) -> Iterator[str]:
    for name, target in outcome.part.targets.items():
        value = _found(outcome, name)
        shown = "not measured" if value is None else f"{value:.4g}"
        verdict = "" if value is None else "met" if target.met(value) else "missed"
        yield f"| {target.name} | {target.aim} | {shown} | {verdict} |"


def _found(outcome: Outcome, name: str) -> float | None:
    """A number of the part's JSON."""
    value: Any = outcome.found
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None


def plan_table(outcomes: Sequence[Outcome]) -> str:
    """Peaks of allocated memory beside those that `minwm plan` says; only of parts that ran on a GPU."""
    plans = {outcome.part.name: outcome.found.get("stages", {}) for outcome in outcomes}
    rows = list[str]()
    for outcome in outcomes:
        stages = plans.get(outcome.part.planned_by, {})
        playing = [*stages][-1:] if "stages" not in outcome.found else []
        peaks = {(stage, "playing"): _found(outcome, "allocated_gb") for stage in playing}
        peaks |= {(stage, "training"): _found(outcome, f"stages.{stage}.allocated_gb") for stage in stages}
        for (stage, kind), peak in peaks.items():
            if peak is not None and kind in stages[stage]:
                plan = stages[stage][kind]["total"] / 1e9
                rows.append(f"| {outcome.part.name}: {kind} {stage} | {plan:.3g} | {peak:.3g} | {peak / plan:.2f} |")
    head = ["| memory, GB | planned | peak | peak / planned |", "|---|--:|--:|--:|"]
    return "\n".join([*head, *rows]) if rows else ""
