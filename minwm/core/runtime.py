"""The process and its machine: device, ranks, generators, optional libraries, versions, timing and progress."""

import contextlib
import functools
import hashlib
import importlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch

from minwm.core.config import UserError


class MissingExtraError(UserError):
    """A needed optional library is not installed."""


def pick_device() -> torch.device:
    """This process's GPU (by LOCAL_RANK) if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def rank() -> int:
    """Rank of this process under torchrun, else 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes under torchrun, else 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def cache_folder() -> Path:
    """Where what can be made or fetched again is kept: MINWM_CACHE, else ~/.cache/minwm."""
    return Path(os.environ.get("MINWM_CACHE") or "~/.cache/minwm").expanduser()


def generator(seed: int, *salt: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator seeded by a hash of the seed and the salt (its purpose, rank, step, ...)."""
    digest = hashlib.sha256(repr((seed, *salt)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library; MissingExtraError names the extra of minwm that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{error.name} is not installed; run: pip install 'minwm[{extra}]'") from error


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout that minwm runs from, with `-dirty` if tracked files changed; None without one."""
    root = Path(__file__).resolve().parents[2]
    if _git(root, "rev-parse", "--show-toplevel") != str(root):
        return None  # not a repository, or one that contains an installed minwm
    return _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python, torch, numba and CUDA, and names of platform, processor and GPU."""
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


def peak_memory_gb(device: torch.device) -> float | None:
    """Most memory so far, in GB: tensors on a GPU; on a CPU the resident set of this process, unknown on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


class StageTimer:
    """Seconds per stage, for stages that run one after the other.

    Reading the clock synchronises with the GPU, so that a stage includes the kernels that it launched.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.restart()

    def restart(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def record(self, stage: str, wait: bool = True) -> float:
        """Add the time since the last reading to `stage` and return it; `wait=False` does not wait for the GPU."""
        before, self._last = self._last, self._now() if wait else time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self._last - before
        return self._last - before

    def skip(self) -> None:
        """Start the next stage now; the time since the last reading counts for none."""
        self._last = time.perf_counter()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Progress:
    """A progress bar on standard error with speed, time left and a text; plain lines if it is no terminal."""

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

    def note(self, text: str) -> None:
        """Print a line beside the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def advance(self, amount: int = 1, text: str = "") -> None:
        """Count `amount` units as done; `text` is shown beside the bar, such as the current loss."""
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
    """Show a bar on rank 0: `with progress(len(items), "encoded") as bar: ... bar.advance(text="loss 0.1")`."""
    shown = Progress(total, label)
    with shown._bar:
        yield shown
