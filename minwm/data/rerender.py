"""Procedural worlds, and walks through the place, rendered along trajectories: raw clips with exact poses."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minwm.cameras.track import CameraTrack
from minwm.cameras.trajectory import Trajectory
from minwm.core.config import to_dict
from minwm.core.runtime import git_commit
from minwm.data.clips import RENDERED, ClipFolder, ClipRecord, DataError
from minwm.data.source import TRIES, CaptureConfig, produce
from minwm.render.base import Rendered, Scene
from minwm.render.place import HOURS, SCENES, SceneKind

WORLDS_PER_SEED = 1_000_000


@dataclass(frozen=True, kw_only=True)
class RenderConfig(CaptureConfig):
    """Which clips of procedural worlds to render."""

    clips_per_world: int = 1
    """Clips rendered in each world."""
    supersample: int = 2
    """Rays per pixel and axis."""
    seed: int = 0
    """Clip i is rendered in world seed * 1,000,000 + i // clips_per_world, so that different seeds share no world."""
    scenes: SceneKind = "worlds"
    """Procedural worlds; or walks through the place, each at one of its hours in turn, others for each seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(clips_per_world=1, supersample=1)


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
        scene = _scene(self.source, self.seed(index))
        for _ in range(TRIES):
            track, trajectory = self.cfg.path(index, rng)
            origin = scene.spawn(rng, track)
            if origin is not None:
                return track, trajectory, origin
        raise DataError(
            f"world {self.seed(index)}: no free place for clip {index} in {TRIES} tries; "
            "use fewer latents, a slower motion or another seed"
        )


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
