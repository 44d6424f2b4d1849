"""Scenes rendered along trajectories: raw clips with exact poses.

A `ClipSource` makes clip `index` from its config alone, so clips can be made in any order and by any number of
processes. `produce` makes those that are missing, distributed over ranks (by index) and local processes.
"""

import functools
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
from minwm.core.config import ConfigError, to_dict
from minwm.core.runtime import git_commit, progress, rank, world_size
from minwm.data.clips import RENDERED, ClipFolder, ClipRecord, DataError
from minwm.render.base import Rendered, Scene
from minwm.render.place import HOURS, SCENES, SceneKind

TRIES = 100
"""Trajectories tried per clip before DataError."""
WORLDS_PER_SEED = 1_000_000


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
# Procedural worlds


@dataclass(frozen=True, kw_only=True)
class RenderConfig:
    """Which clips of procedural worlds to render."""

    latents: int = 9
    """Latents per clip, the first included: stride * (latents - 1) + 1 frames."""
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
    clips_per_world: int = 1
    """Clips rendered in each world."""
    trajectories: tuple[str, ...] = ()
    """Clip i follows trajectory i modulo their number; empty: random trajectories."""
    supersample: int = 2
    """Rays per pixel and axis."""
    seed: int = 0
    """Clip i is rendered in world seed * 1,000,000 + i // clips_per_world, so that different seeds share no world."""
    scenes: SceneKind = "worlds"
    """Procedural worlds; or walks through the place, each at one of its hours in turn, others for each seed."""

    def __post_init__(self) -> None:
        least = {"latents": 2, "height": 8, "width": 8, "clips_per_world": 1, "supersample": 1, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"render.{name}={getattr(self, name)}: give at least {bound}")
        for text in self.trajectories:
            length = parse(text, stride=self.motion.stride).latents + 1
            if length != self.latents:
                raise ConfigError(f"render: {text!r} fills {length} latents, but latents={self.latents}")

    @property
    def frames(self) -> int:
        """Pixel frames per clip."""
        return self.motion.stride * (self.latents - 1) + 1

    @property
    def intrinsics(self) -> Float[np.ndarray, "4"]:
        """Normalised K of all clips."""
        return np.array([*self.focal, 0.5, 0.5]) if self.focal else intrinsics(self.fov, self.width, self.height)


@dataclass(frozen=True)
class WorldSource:
    """Clips of procedural worlds, or of walks through the place. They are CC0: this code alone made their pixels."""

    cfg: RenderConfig
    kind: str = "procedural"

    @property
    def config(self) -> dict[str, Any]:
        return to_dict(self.cfg)

    @property
    def source(self) -> str:
        return next(source for source, scenes in RENDERED.items() if scenes == self.cfg.scenes)

    def seed(self, index: int) -> int:
        """Seed of the world of clip `index`; of the place, the number of its hour."""
        if self.cfg.scenes == "place":
            return index % len(HOURS)
        return self.cfg.seed * WORLDS_PER_SEED + index // self.cfg.clips_per_world

    def clip_id(self, index: int) -> str:
        if self.cfg.scenes == "place":
            return f"place-{self.cfg.seed:03d}-{index:06d}"
        return f"world-{self.seed(index):07d}-{index:06d}"

    def make(self, index: int) -> tuple[ClipRecord, np.ndarray]:
        seed = self.seed(index)
        track, trajectory, origin = self.place(index)
        scene = _scene(self.source, seed)
        rendered = scene.render(track.transformed(origin), self.cfg.height, self.cfg.width, self.cfg.supersample)
        record = ClipRecord(
            id=self.clip_id(index),
            source=self.source,
            source_id=self.clip_id(index) if self.cfg.scenes == "place" else f"world {seed}",
            source_license="CC0-1.0",
            split_key=self.clip_id(index) if self.cfg.scenes == "place" else split_key(seed),
            track=track,
            caption=scene.caption,
            caption_source="procedural",
            hw=(self.cfg.height, self.cfg.width),
            pose_kind="ground_truth",
            origin=origin,
            seed=seed,
            generator=f"{type(scene).__module__} {git_commit() or 'unknown'}",
            trajectory=trajectory.canonical(),
            quality={
                "inverse_depth": float(np.mean(1 / rendered.depth)),
                "nearest": float(rendered.depth.min()),
            },
        )
        return record, rendered.frames

    def place(self, index: int) -> tuple[CameraTrack, Trajectory, np.ndarray]:
        """A track from the identity, its trajectory, and the world pose of frame 0, from which the path is free."""
        rng = np.random.default_rng([self.cfg.seed, index])
        K = self.cfg.intrinsics
        scene = _scene(self.source, self.seed(index))
        for _ in range(TRIES):
            track, trajectory = self._path(index, rng, K)
            origin = scene.spawn(rng, track)
            if origin is not None:
                return track, trajectory, origin
        raise DataError(
            f"world {self.seed(index)}: no free place for clip {index} in {TRIES} tries; "
            "use fewer latents, a slower motion or another seed"
        )

    def _path(self, index: int, rng: np.random.Generator, K: np.ndarray) -> tuple[CameraTrack, Trajectory]:
        if not self.cfg.trajectories:
            return random_track(rng, self.cfg.frames, self.cfg.motion, K)
        text = self.cfg.trajectories[index % len(self.cfg.trajectories)]
        trajectory = parse(text, stride=self.cfg.motion.stride)
        return trajectory.track(self.cfg.motion, K), trajectory


def split_key(seed: int) -> str:
    """`ClipRecord.split_key` of clips in the procedural world of this seed."""
    return f"world:{seed}"


def render_worlds(out: Path, cfg: RenderConfig, *, clips: int, workers: int = 1) -> ClipFolder:
    """Render clips of procedural worlds into `out`; a later call continues, or adds clips if `clips` is larger."""
    return produce(WorldSource(cfg), out, clips, workers=workers)


def reproduce(record: ClipRecord, track: CameraTrack | None = None, *, supersample: int = 2) -> Rendered:
    """Frames and depth of a procedural clip, rendered again from its record.

    `track`, relative to the clip's frame 0, replaces the recorded path. Raises DataError for other sources.
    """
    if record.seed is None or record.origin is None:
        raise DataError(f"clip {record.id} comes from {record.source}; only procedural ones can be rendered again")
    path = record.track if track is None else track
    scene = _scene(record.source, record.seed)
    return scene.render(path.transformed(record.origin), *record.hw, supersample=supersample)


def check_renders(folder: ClipFolder, share: float = 0.01, least: float = 35.0) -> list[str]:
    """Render a share of the procedural clips again; one line for each below `least` dB PSNR from its mp4.

    The mp4 is near-lossless; a wrong pose, seed or renderer gives a far lower PSNR.
    """
    problems = []
    ids = folder.ids()
    for clip in ids[:: max(1, round(1 / share))]:
        record = folder.record(clip)
        if record.source not in RENDERED:
            continue
        error = reproduce(record).frames.astype(np.float64) - folder.frames(clip)
        psnr = 20 * np.log10(255 / max(float(np.sqrt((error**2).mean())), 1e-6))
        if psnr < least:
            problems.append(f"{clip}: {psnr:.1f} dB from its own world; it was made by {record.generator}")
    return problems


@functools.lru_cache(maxsize=4)
def _scene(source: str, seed: int) -> Scene:
    return SCENES[RENDERED[source]](seed)
