"""Captured scenes rendered again: posed pictures to Gaussians, and those along prescribed trajectories to clips.

    CAPTURE/transforms.json     cameras, in any format of cameras/formats; it names the pictures
    CAPTURE/caption.txt         what is there

A path stays where the scene was seen; a clip that leaves it is dropped, with rule and reason. Every capture leaves a
file in `ingested/` (data/ingest.py), written last, and its Gaussians in `scenes/`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from minwm.cameras.epipolar import PAIRS, follow, triangulate
from minwm.cameras.estimate.base import median_depth
from minwm.cameras.formats.base import CameraFile, Given
from minwm.cameras.formats.colmap import read_points
from minwm.cameras.formats.nerfstudio import natural
from minwm.cameras.formats.table import FORMATS, read_cameras
from minwm.cameras.track import CameraTrack
from minwm.core.config import ConfigError, UserError, lookup, to_dict
from minwm.core.files import find_files, locked, read_text, write_json
from minwm.core.media import PICTURE_SUFFIXES, VIDEO_SUFFIXES, read_image, read_video, reduced
from minwm.core.runtime import git_commit, pick_device, rank, world_size
from minwm.data.clips import ClipFolder, ClipRecord, DataError, readable_id
from minwm.data.distribute import each
from minwm.data.ingest import summary
from minwm.data.quality import Failure
from minwm.data.source import CaptureConfig
from minwm.render.captured import CapturedScene
from minwm.render.gaussians import read_ply, write_ply
from minwm.render.splat_fit import Capture, FitConfig, fit, held_out, psnr

TRIES = 8
"""Paths that are tried for a clip."""


@dataclass(frozen=True, kw_only=True)
class SplatConfig(CaptureConfig):
    """What is made of each capture."""

    source_license: str
    """Licence of the pictures: an SPDX name, or the name of the terms that came with them."""
    clips: int = 16
    """Clips of each capture."""
    cameras: str = "transforms.json"
    """Camera file, or model folder, in the capture."""
    camera_format: str = "nerfstudio"
    """A format of `minwm camera convert`."""
    camera_size: tuple[int, int] | None = None
    """Height and width that K is for, for formats that need it."""
    pictures: str = "."
    """Folder in the capture that names of pictures are relative to; where the camera file has no names, all pictures of
    this folder in the order of their names, or a video."""
    ply: str | None = None
    """Gaussians in the capture, in the world of its cameras; none: they are fitted."""
    rows: int = 128
    """Pictures are reduced to so many pixels on their shorter side for the fit."""
    depth: float = 1.5
    """Units to which the median depth of a capture is scaled; 1.5 is that of procedural worlds."""
    fit: FitConfig = field(default_factory=FitConfig)
    psnr: float = 24.0
    """Least PSNR of held-out pictures, dB; a capture below is refused."""
    reach: float = 0.75
    """Units that a camera may be away from all cameras of the capture."""
    coverage: float = 0.95
    """Least mean alpha of every frame."""
    floaters: float = 0.1
    """Largest share of a frame's cells that show something far in front of the points known there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(clips=1, rows=16)
        lookup(FORMATS, self.camera_format, "camera format")
        if not self.source_license.strip():
            raise ConfigError("source_license is empty: name the licence of the pictures, such as CC-BY-4.0")
        if not (self.depth > 0 and self.reach > 0 and 0 <= self.coverage <= 1 and 0 <= self.floaters <= 1):
            raise ConfigError("splat: depth and reach above 0, coverage and floaters from 0 to 1")


def splat_captures(captures: tuple[Path, ...], out: Path, cfg: SplatConfig, ray: bool = False) -> dict[str, Any]:
    """Make clips of the captures that are not done; returns counts as `ingest.summary`, a capture being a video.

    Under torchrun every rank takes its part of the captures; with `ray` the workers of a cluster do.
    """
    folder = ClipFolder.create(out, "splat", to_dict(cfg))
    with locked(out / "ingested" / str(rank())):
        todo = [path for path in captures[rank() :: world_size()] if not _note(out, path).exists()]
        gpus = int(pick_device().type == "cuda")
        for _ in each(partial(splat_capture, folder=folder, cfg=cfg), todo, "captures", ray, gpus):
            pass
    folder.finish()
    return summary(out)


def _note(out: Path, capture: Path) -> Path:
    return out / "ingested" / f"{capture_id(capture)}.json"


def capture_id(capture: Path) -> str:
    """Id of a capture: the first part of those of its clips."""
    return readable_id(capture.name, str(capture.absolute()))


def splat_capture(capture: Path, folder: ClipFolder, cfg: SplatConfig) -> None:
    """Write the clips of one capture, and last its note. A second call writes the same again."""
    begun, clips, dropped, refused = time.monotonic(), list[str](), list[dict[str, Any]](), ""
    try:
        fitted = fitted_capture(capture, folder.path, cfg)
        for index in range(cfg.clips):
            clip, failed = fitted.clip(index, cfg)
            dropped += [{"shot": index, "seconds": 0.0, "rule": one.rule, "reason": one.reason} for one in failed]
            if clip:
                folder.write(*clip)
                clips.append(clip[0].id)
    except (UserError, OSError) as error:
        refused = f"{capture}: {error}"
    note = {"video": str(capture), "clips": clips, "estimated": 0, "dropped": dropped, "refused": refused}
    write_json(_note(folder.path, capture), {**note, "seconds": round(time.monotonic() - begun, 3)})


@dataclass(frozen=True, eq=False)
class FittedCapture:
    """A capture as Gaussians, of which clips are rendered."""

    name: str
    scene: CapturedScene
    psnr: float
    """Of the pictures that were held out, in dB."""

    def clip(self, index: int, cfg: SplatConfig) -> tuple[tuple[ClipRecord, np.ndarray] | None, list[Failure]]:
        """Record and frames of a clip, and the paths tried before; None if each of TRIES paths leaves what was seen."""
        rng, failed = np.random.default_rng([cfg.seed, index]), []
        for _ in range(TRIES):
            track, trajectory = cfg.path(index, rng)
            origin = self.scene.spawn(rng, track)
            shown = walk(self.scene, None if origin is None else track.transformed(origin), cfg)
            if isinstance(shown, Failure):
                failed.append(Failure(shown.rule, f"clip {index}, {trajectory.canonical()}: {shown.reason}"))
                continue
            frames, quality = shown
            record = ClipRecord(
                id=f"{self.name}-{index:05d}",
                source="splat",
                source_id=self.name,
                source_license=cfg.source_license,
                split_key=self.name,
                track=track,
                caption=self.scene.caption,
                caption_source="sidecar",
                hw=frames.shape[1:3],
                pose_kind="ground_truth",
                origin=origin,
                generator=f"{CapturedScene.__module__} {git_commit() or 'unknown'}",
                trajectory=trajectory.canonical(),
                quality={**quality, "psnr": self.psnr},
            )
            return (record, frames), failed
        return None, failed


def walk(
    scene: CapturedScene, track: CameraTrack | None, cfg: SplatConfig
) -> tuple[UInt8[np.ndarray, "n h w 3"], dict[str, float]] | Failure:
    """Frames along a track in the scene, and the worst of what is asked of them; or the rule that the path breaks. None
    for a path that `CapturedScene.spawn` found no place for."""
    if track is None:
        return Failure("reach", f"no camera of the capture is within {cfg.reach:g} units of all of it, clear of points")
    frames, covered, floating = [], [], []
    for i, drawn in enumerate(scene.views(track, cfg.height, cfg.width)):
        covered.append(float(drawn.alpha.mean()))
        floating.append(scene.floaters(drawn, track, i))
        if covered[-1] < cfg.coverage:
            return Failure("coverage", f"{covered[-1]:.1%} of frame {i} is covered, less than {cfg.coverage:.0%}")
        if floating[-1] > cfg.floaters:
            return Failure("floaters", f"{floating[-1]:.1%} of frame {i} floats in front, over {cfg.floaters:.0%}")
        frames.append(drawn.frame())
    return np.stack(frames), {"coverage": min(covered), "floaters": max(floating)}


# ---------------------------------------------------------------------------------------------
# Captures


def fitted_capture(capture: Path, out: Path, cfg: SplatConfig) -> FittedCapture:
    """The Gaussians of a capture, fitted unless `out` has them or the capture brings them; DataError below cfg.psnr."""
    name, device = capture_id(capture), pick_device()
    caption = read_text(capture / "caption.txt").strip()
    pictures, factor = read_capture(capture, cfg)
    ply = out / "scenes" / f"{name}.ply"
    if not ply.exists():
        fitted = read_ply(capture / cfg.ply).scaled(factor) if cfg.ply else fit(pictures, cfg.fit, device)
        write_ply(ply, fitted)
    gaussians = read_ply(ply).to(device)
    found = psnr(gaussians, pictures, held_out(pictures, cfg.fit))
    if found < cfg.psnr:
        raise DataError(
            f"its Gaussians show pictures that were held out with {found:.1f} dB, less than psnr={cfg.psnr:g}; give "
            "more pictures or fit.steps, check the cameras (minwm camera check), or ask for less"
        )
    return FittedCapture(name, CapturedScene(gaussians, pictures.track.c2w, pictures.points, cfg.reach, caption), found)


def read_capture(capture: Path, cfg: SplatConfig) -> tuple[Capture, float]:
    """Pictures with cameras and points, and the factor that their lengths were scaled by."""
    known = FORMATS[cfg.camera_format]
    timeless = known.fps is None and not {"fps", "times"} & known.keeps
    given = Given(fps=1.0 if timeless else None, size=cfg.camera_size)
    cameras = read_cameras(capture / cfg.cameras, cfg.camera_format, given)
    track, frames = cameras.track, _pictures(capture, cameras, cfg)
    if cfg.camera_format.startswith("colmap"):
        points = read_points(capture / cfg.cameras)
    else:
        grey = [np.ascontiguousarray(frame) for frame in frames.mean(-1).astype(np.uint8)]
        pairs = follow(grey, pairs=max(PAIRS, len(grey) // 4))
        points = triangulate(pairs, track.c2w, track.K, frames.shape[1:3])
    factor = cfg.depth / median_depth(points, track) if len(points) else 1.0
    return Capture(frames, track.scaled(factor), points * factor), factor


def _pictures(capture: Path, cameras: CameraFile, cfg: SplatConfig) -> UInt8[np.ndarray, "n h w 3"]:
    place = capture / cfg.pictures
    if cameras.names:
        frames = [reduced(read_image(place / name), cfg.rows) for name in cameras.names]
    elif place.suffix.lower() in VIDEO_SUFFIXES:
        frames = [reduced(frame, cfg.rows) for frame in read_video(place)[0]]
    else:
        found: Sequence[Path] = sorted(find_files(place, PICTURE_SUFFIXES, "pictures"), key=lambda p: natural(p.name))
        frames = [reduced(read_image(path), cfg.rows) for path in found]
    if len(frames) != len(cameras.track):
        raise DataError(f"{len(frames)} pictures and {len(cameras.track)} cameras; give each picture its own")
    if len(sizes := sorted({frame.shape[:2] for frame in frames})) > 1:
        raise DataError(f"its pictures have different sizes (h, w): {sizes}; resize them to one")
    return np.stack(frames)
