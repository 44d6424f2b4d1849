"""Everything that shows whether a machine reaches the targets, as parts (`parts.py`) in processes of their own.

What a part wrote, how it ended and its last lines stand in OUT/PART.json as soon as it has ended; OUT/page.md is
written anew after each. A part that crashes, hangs or runs out of memory is named there, and the others go on. Run
again, it repeats only what did not succeed.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from minwm.bench.parts import REFERENCE, Part
from minwm.core.config import UserError
from minwm.core.files import locked, read_json, write_json, write_text
from minwm.core.runtime import git_commit, versions

State = Literal["done", "failed", "timed out", "left out"]
BUDGET = 480.0
"""Seconds of all parts together."""
GRACE = 5.0
"""Seconds that a part has to end what it started elsewhere, such as the workers of torchrun."""
TAIL = 2000
"""Characters kept of what a part printed last."""


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    part: Part
    state: State
    seconds: float
    tail: str
    found: dict[str, Any]
    """What the part wrote."""


def gpu_memory_gib() -> float:
    """Of the first CUDA GPU, as its driver says; UserError without one."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        return float(listed[0]) / 1024
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError) as error:
        raise UserError(f"--gpu: no CUDA GPU answers ({error}); leave it out to run the small parts here") from error


def selftest(
    parts: Sequence[Part],
    out: Path,
    gib: float,
    log: Callable[[str], None],
    budget: float = BUDGET,
    reference: Path = Path(),
) -> list[Outcome]:
    """Run the parts, in order, each after the other; `gib` is the GPU memory there is, `reference` the checkout that
    parts which are `beside` others run in, whose time is kept for them."""
    outcomes, end = list[Outcome](), time.monotonic() + budget
    with locked(out):
        for part in parts:
            kept = 0.0 if part.beside else sum(other.seconds for other in parts if other.beside)
            outcome = _finished(part, out) or _run(part, out, gib, end - kept - time.monotonic(), reference)
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


def _run(part: Part, out: Path, gib: float, left: float, reference: Path) -> Outcome:
    result, output = out / f"{part.name}.result.json", out / f"{part.name}.log"
    result.unlink(missing_ok=True)
    seconds, state = 0.0, "left out"
    reason = f"it needs {part.gib:g} GiB of GPU memory, there are {gib:.1f}" if part.gib > gib else ""
    reason = reason or ("no time is left" if left <= 0 else "")
    if not reason:
        words = [str(reference) if word == REFERENCE else word for word in part.words]
        words = [sys.executable, "-m", *words, *(["--json", str(result)] if part.writes else [])]
        began = time.monotonic()
        with output.open("w") as file:
            state = _wait(subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True), part, left, file)
        seconds = time.monotonic() - began
    tail = reason or output.read_text(errors="replace")[-TAIL:]
    found = read_json(result) if state == "done" and part.writes else {}
    outcome = Outcome(part, state, seconds, tail, found)
    about = {"words": [*part.words], "commit": git_commit(), "versions": versions()}
    write_json(out / f"{part.name}.json", {"state": state, "seconds": seconds, "tail": tail, **about, "found": found})
    result.unlink(missing_ok=True)
    return outcome


def _wait(process: "subprocess.Popen[bytes]", part: Part, left: float, output: IO[str]) -> State:
    """Wait for a process; at its end, or at its limit, what it has started is ended too."""
    try:
        if (code := process.wait(min(part.seconds, left))) < 0:
            output.write(f"\nended by {signal.Signals(-code).name} (SIGKILL: mostly the system, for want of memory)\n")
        return "done" if code == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        with contextlib.suppress(ProcessLookupError):
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the processes of its group, and kill those that are left after `GRACE`; ProcessLookupError once there are
    none."""
    os.killpg(process.pid, signal.SIGTERM)
    end = time.monotonic() + GRACE
    while time.monotonic() < end:
        process.poll()  # or it would stay in the group
        os.killpg(process.pid, 0)
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def page(outcomes: Sequence[Outcome]) -> str:
    """Measured against target, memory against its plan, and what failed and why, as Markdown."""
    lines = ["# Self-test", "", "| part | state | seconds |", "|---|---|---|"]
    lines += [f"| {o.part.name} | {o.state} | {o.seconds:.0f} |" for o in outcomes]
    for table in (target_table(outcomes), reference_table(outcomes), plan_table(outcomes)):
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


def reference_table(outcomes: Sequence[Outcome]) -> str:
    """What the reference's own inference takes, beside ours."""
    by_name, rows = {outcome.part.name: outcome for outcome in outcomes}, list[str]()
    for outcome in outcomes:
        ours = by_name.get(outcome.part.beside)
        for name, what in {"first_chunk.median_ms": "M1, ms", "fps": "frames per second"}.items():
            found = [None if one is None else _found(one, name) for one in (outcome, ours)]
            if found[0] and found[1] and ours:
                shown = " | ".join(f"{value:.4g}" for value in found if value)
                rows.append(f"| {ours.part.name}: {what} | {shown} | {found[1] / found[0]:.2f} |")
    return "\n".join(["| | minWM | here | here / minWM |", "|---|--:|--:|--:|", *rows]) if rows else ""


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
