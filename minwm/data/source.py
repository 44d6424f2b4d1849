"""Sources of clips: what makes clip `index` from its config alone, in any order and by any number of processes.

`produce` makes those that are missing, distributed over ranks (by index) and local processes.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float

from minwm.cameras.random_paths import random_track
from minwm.cameras.track import CameraTrack, intrinsics
from minwm.cameras.trajectory import Motion, Trajectory, parse
from minwm.core.config import ConfigError
from minwm.core.runtime import progress, rank, world_size
from minwm.data.clips import ClipFolder, ClipRecord, DataError

TRIES = 100
"""Trajectories tried per clip before DataError."""


@runtime_checkable
class ClipSource(Protocol):
    """A source of clips for `produce`; picklable, for worker processes."""

    @property
    def kind(self) -> str:
        """Name of the source; a folder holds clips of one kind and config."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """All that determines the clips, as JSON values."""
        ...

    def clip_id(self, index: int) -> str:
        """Id of clip `index`, unique in its folder."""
        ...

    def make(self, index: int) -> tuple[ClipRecord, np.ndarray]:
        """Record and frames (n h w 3 uint8) of one clip."""
        ...


def produce(source: ClipSource, out: Path, clips: int, *, workers: int = 1) -> ClipFolder:
    """Make clips 0 to clips - 1 of `source` in `out`, except those that are finished.

    Under torchrun every rank makes its part. Raises DataError if `out` was made with another config.
    """
    if workers < 1:
        raise DataError(f"workers={workers}: give at least 1")
    folder = ClipFolder.create(out, source.kind, source.config)
    done = set(folder.ids())
    mine = range(rank(), clips, world_size())
    pending = [i for i in mine if source.clip_id(i) not in done]
    with progress(len(pending), "clips") as bar:
        for _ in _run(source, folder, pending, workers):
            bar.advance()
    folder.finish()
    return folder


def _run(source: ClipSource, folder: ClipFolder, pending: Sequence[int], workers: int) -> Iterator[None]:
    if workers == 1 or len(pending) < 2:
        for index in pending:
            yield _make(source, folder, index)
        return
    context = multiprocessing.get_context("spawn")
    with _stopping(ProcessPoolExecutor(min(workers, len(pending)), context, _start_worker)) as pool:
        tasks = [pool.submit(_make, source, folder, index) for index in pending]
        try:
            for task in as_completed(tasks):
                yield task.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"{folder.path}: a worker process died (out of memory?); finished clips are kept, "
                "run the same command again with fewer --workers"
            ) from error


@contextmanager
def _stopping(pool: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """On any error or interrupt let running clips finish, and drop the rest."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; a clip in progress is finished
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make(source: ClipSource, folder: ClipFolder, index: int) -> None:
    folder.write(*source.make(index))


# ---------------------------------------------------------------------------------------------
# What the clips are like


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """The camera of all clips, and where it goes."""

    latents: int = 9
    """Latents per clip, the first included: stride * (latents - 1) + 1 frames; 1: single pictures."""
    height: int = 64
    """Pixels."""
    width: int = 64
    """Pixels."""
    fov: float = 70.0
    """Horizontal field of view in degrees, of square pixels."""
    focal: tuple[float, float] | None = None
    """fx / width and fy / height instead, for pixels that are not square."""
    motion: Motion = field(default_factory=Motion)
    """Speeds of the camera, and the frame rate."""
    trajectories: tuple[str, ...] = ()
    """Clip i follows trajectory i modulo their number; empty: random trajectories."""
    seed: int = 0
    """Other seeds make other clips."""

    def __post_init__(self) -> None:
        self.check_least(latents=1, height=8, width=8, seed=0)
        for text in self.trajectories:
            length = parse(text, stride=self.motion.stride).latents + 1
            if length != self.latents:
                raise ConfigError(f"{text!r} fills {length} latents, but latents={self.latents}")

    def check_least(self, **bounds: int) -> None:
        """Raise ConfigError for a field below its bound."""
        for name, bound in bounds.items():
            if (value := vars(self)[name]) < bound:
                raise ConfigError(f"{name}={value}: give at least {bound}")

    @property
    def frames(self) -> int:
        """Pixel frames per clip."""
        return self.motion.stride * (self.latents - 1) + 1

    @property
    def intrinsics(self) -> Float[np.ndarray, "4"]:
        """Normalised K of all clips."""
        return np.array([*self.focal, 0.5, 0.5]) if self.focal else intrinsics(self.fov, self.width, self.height)

    def path(self, index: int, rng: np.random.Generator) -> tuple[CameraTrack, Trajectory]:
        """Where the camera of clip `index` is to go: a track from the identity, and its keys."""
        if self.latents == 1:
            still = Trajectory((), self.motion.stride)
            return still.track(self.motion, self.intrinsics), still
        if not self.trajectories:
            return random_track(rng, self.frames, self.motion, self.intrinsics)
        trajectory = parse(self.trajectories[index % len(self.trajectories)], stride=self.motion.stride)
        return trajectory.track(self.motion, self.intrinsics), trajectory
