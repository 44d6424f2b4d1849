"""The process and its machine: device, seeds, ranks, optional libraries, provenance and progress."""

import contextlib
import functools
import hashlib
import importlib
import os
import platform
import random
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from minwm.core.config import UserError


class MissingExtraError(UserError):
    """An optional library is needed and not installed."""


def pick_device() -> torch.device:
    """This process's GPU (by LOCAL_RANK) if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def rank() -> int:
    """This process's number among those that torchrun started; 0 alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes torchrun started; 1 alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def seed_everything(seed: int) -> None:
    """Seed the global generators of python, numpy and torch; draws that matter take their own `generator`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator(seed: int, *salt: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator fixed by the seed and the salt (its purpose, rank, step), the same on every machine."""
    digest = hashlib.sha256(repr((seed, *salt)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library, or raise MissingExtraError saying which extra of minwm brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{error.name} is not installed; run: pip install 'minwm[{extra}]'") from error


@functools.cache
def git_commit() -> str | None:
    """The commit of the checkout minwm runs from, plus `-dirty` if tracked files changed; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if _git(root, "rev-parse", "--show-toplevel") != str(root):
        return None  # no repository, or one that merely surrounds an installed minwm
    return _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """What a measurement depends on: python, torch, numba, platform, processor, and the GPU if there is one."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # itself a subclass of str
        "platform": platform.platform(),
        "cpu": f"{_cpu_name()}, {os.cpu_count()} threads",
    }
    with contextlib.suppress(PackageNotFoundError):
        found["numba"] = version("numba")  # which draws the worlds, where it is installed
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return found


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Laps:
    """Seconds by stage, one stage after the other: the latency stamps of play, and a clock for measurements.

    Looking at the clock waits for the GPU, so a lap holds what was done in it.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.restart()

    def restart(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def lap(self, stage: str, wait: bool = True) -> float:
        """Seconds since the lap before; they count for `stage`. Without `wait`, the GPU may still be at work."""
        before, self._last = self._last, self._now() if wait else time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self._last - before
        return self._last - before

    def skip(self) -> None:
        """What was done since the lap before counts for no stage; it did not need the device."""
        self._last = time.perf_counter()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Progress:
    """A bar on standard error with speed, time left and a text; plain lines where that is no terminal."""

    def __init__(self, total: int, label: str) -> None:
        from rich import console, progress

        self._total, self._label, self._done, self._start = total, label, 0, time.monotonic()
        self._console = console.Console(stderr=True, highlight=False, quiet=rank() != 0)
        columns = "{task.description}", "{task.fields[speed]}", "{task.fields[text]}"
        name, speed, text = (progress.TextColumn(column, markup=False) for column in columns)
        count, left = progress.MofNCompleteColumn(), progress.TimeRemainingColumn(elapsed_when_finished=True)
        parts = (name, progress.BarColumn(), count, speed, left, text)
        self._bar = progress.Progress(*parts, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(label, total=total, speed="", text="")

    def advance(self, amount: int = 1, text: str = "") -> None:
        """Report `amount` more units done, with a short text such as the current loss."""
        tenth_before = 10 * self._done // max(self._total, 1)
        self._done += amount
        speed = self._done / max(time.monotonic() - self._start, 1e-9)
        self._bar.update(self._task, advance=amount, speed=f"{speed:.3g}/s", text=text)
        if not self._console.is_terminal and 10 * self._done // max(self._total, 1) > tenth_before:
            left = f"{(self._total - self._done) / speed:.0f} s left"
            parts = (f"{self._label} {self._done}/{self._total}", f"{speed:.3g}/s", left, text)
            self._console.print(" · ".join(part for part in parts if part), markup=False, soft_wrap=True)


@contextlib.contextmanager
def progress(total: int, label: str) -> Iterator[Progress]:
    """`with progress(len(items), "encoded") as bar: ... bar.advance(text="loss 0.1")`; rank 0 shows it."""
    shown = Progress(total, label)
    with shown._bar:
        yield shown
