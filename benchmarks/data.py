"""What data construction costs, and how good estimated poses and captured scenes are, for `results/data.json`.

    python benchmarks/data.py results/data.json poses --clips 10
    python benchmarks/data.py results/data.json cost --clips 10
    python benchmarks/data.py results/data.json splats
    python benchmarks/data.py results/data.json streaming
    python benchmarks/data.py results/data.json streaming_wan

Experiments that are not named stay as they are. Times are CPU seconds of one thread, where nothing else is said.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import streaming, streaming_wan

from minwm.cameras.estimate.base import EstimateError
from minwm.cameras.estimate.colmap import Colmap
from minwm.cameras.formats.base import CameraFile
from minwm.cameras.formats.table import write_cameras
from minwm.cameras.track import CameraTrack, intrinsics, rotation_degrees
from minwm.cameras.trajectory import Motion, parse
from minwm.core.files import write_json
from minwm.core.media import write_image, write_video
from minwm.core.runtime import git_commit, versions
from minwm.data.clips import ClipFolder
from minwm.data.doom import DoomConfig
from minwm.data.encode import encode_clips
from minwm.data.ingest import IngestConfig, ingest
from minwm.data.record import record
from minwm.data.rerender import RenderConfig, render_worlds
from minwm.data.splat import SplatConfig, read_capture, splat_captures
from minwm.eval.image import psnr
from minwm.experiments.ablations import shipped
from minwm.nets.text import WordText
from minwm.render.splat_fit import FitConfig
from minwm.render.worlds import World
from minwm.store.folder import load_codec

LATENTS = 13
STANDS = 0.05
"""Units: a shorter path is that of a camera that only turns, or stands."""
PLANNED, PLAN_CORES = 1_000_000, (16, 64, 256, 1024)


def measured(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its CPU seconds."""
    start = time.process_time()
    return work(), time.process_time() - start


def pose_errors(found: CameraTrack, true: CameraTrack) -> tuple[float, float]:
    """Medians over frames, after the first: degrees, and distance at the best scale as a share of the path."""
    a, b = (track.relative_to_first().c2w for track in (found, true))
    degrees = rotation_degrees(np.swapaxes(a[1:, :3, :3], 1, 2) @ b[1:, :3, :3])
    a, b = a[1:, :3, 3], b[1:, :3, 3]
    away = np.linalg.norm((a * b).sum() / max((a * a).sum(), 1e-12) * a - b, axis=1)
    return float(np.median(degrees)), float(np.median(away)) / true.path_length()


def colmap_row(clips: ClipFolder, focal_known: bool) -> dict[str, Any]:
    """COLMAP on every clip of a folder: errors over those that it poses, and those that it loses."""
    errors, lost, seconds, turning = list[tuple[float, float]](), 0, list[float](), [0, 0]
    for clip in clips.ids():
        true, frames = clips.record(clip).track, clips.frames(clip)
        estimator = Colmap(focal=float(true.K[0, 0]) if focal_known else None)
        moves = true.path_length() > STANDS
        turning[0] += not moves
        start = time.process_time()
        try:
            found = estimator(frames, np.arange(len(true)) / true.fps, true.fps)
        except EstimateError:
            lost += moves
            turning[1] += not moves
        else:
            errors += [pose_errors(found.track, true)] if moves else []
        seconds.append(time.process_time() - start)
    table = np.array(errors).reshape(-1, 2)
    share = {f"{name}_{at}": float(np.percentile(table[:, i], at)) if len(table) else None
             for i, name in enumerate(("rotation_deg", "path_share")) for at in (50, 90)}  # fmt: skip
    return {
        "focal": "known" if focal_known else "solved",
        "moving_clips": len(errors) + lost,
        "moving_lost": lost,
        "turning_clips": turning[0],
        "turning_refused": turning[1],
        **share,
        "cpu_seconds_per_clip": float(np.mean(seconds)),
    }


def footage(clips: ClipFolder, folder: Path, cameras: bool) -> None:
    """Clips as videos with captions, and with camera files or without."""
    for clip in clips.ids():
        one = clips.record(clip)
        write_video(folder / f"{clip}.mp4", clips.frames(clip), one.track.fps, crf=16)
        (folder / f"{clip}.txt").write_text(one.caption)
        if cameras:
            one.track.save(folder / f"{clip}.camera.json")


def ingest_rows(clips: ClipFolder, root: Path) -> Iterator[dict[str, Any]]:
    """Ingest of the clips as videos, with cameras and without."""
    first = clips.record(clips.ids()[0])
    for cameras in (True, False):
        folder, out = root / f"videos-{cameras}", root / f"ingested-{cameras}"
        footage(clips, folder, cameras)
        cfg = IngestConfig(
            source_license="CC0-1.0",
            latents=LATENTS,
            height=first.hw[0],
            width=first.hw[1],
            estimator=Colmap(focal=float(first.track.K[0, 0])),
        )
        made, seconds = measured(lambda folder=folder, out=out, cfg=cfg: ingest(folder, out, cfg))
        size = sum(file.stat().st_size for file in (out / "clips").iterdir())
        yield {
            "poses": "camera files" if cameras else "COLMAP",
            "videos": made["videos"],
            "clips": made["clips"],
            "dropped": made["dropped"],
            "cpu_seconds_per_video": seconds / made["videos"],
            "megabytes_per_1000_clips": size / max(1, made["clips"]) / 1e3,
        }


def encode_row(raw: Path, out: Path, codec: Path) -> dict[str, Any]:
    """Raw clips to latent shards, on this CPU."""
    network = load_codec(codec)
    made, seconds = measured(lambda: encode_clips(raw, out, network, WordText()))
    count = sum(made["counts"].values())
    size = sum(file.stat().st_size for file in out.iterdir())
    return {
        "codec": made["codec"]["id"],
        "clips": count,
        "cpu_seconds_per_clip": seconds / count,
        "megabytes_per_1000_clips": size / count / 1e3,
    }


def worlds(root: Path, rows: int, clips: int) -> ClipFolder:
    cfg = RenderConfig(latents=LATENTS, height=rows, width=rows * 5 // 4, seed=9)
    return render_worlds(root / f"raw-{rows}", cfg, clips=clips)


def poses(root: Path, clips: int) -> dict[str, Any]:
    """COLMAP's poses of procedural worlds, and of walks through Freedoom's map01, against the true ones."""
    doom = DoomConfig(latents=LATENTS, height=256, width=320, units=128.0, seed=3)
    folders = {
        **{f"procedural worlds, {rows * 5 // 4}x{rows}": worlds(root, rows, clips) for rows in (128, 256)},
        "Freedoom's map01, 320x256": record(root / "doom", doom, clips=clips),
    }
    rows = {name: [colmap_row(folder, known) for known in (True, False)] for name, folder in folders.items()}
    return {"frames": 4 * (LATENTS - 1) + 1, "rows": rows}


def cost(root: Path, clips: int) -> dict[str, Any]:
    """Ingest of videos with camera files and without, and encoding with the demo's codec; and a plan from them."""
    raw = worlds(root, 256, clips)
    ingested, encoded = [*ingest_rows(raw, root)], encode_row(raw.path, root / "latents", shipped("codec"))
    steps = {
        "videos_ingested": ingested[0]["cpu_seconds_per_video"],
        "videos_ingested_with_colmap": ingested[1]["cpu_seconds_per_video"],
        "clips_encoded": encoded["cpu_seconds_per_clip"],
    }
    hours = [
        {"cores": cores, **{name: PLANNED * seconds / cores / 3600 for name, seconds in steps.items()}}
        for cores in PLAN_CORES
    ]
    return {
        "ingest": ingested,
        "encode": encoded,
        "core_hours_per_1000": {name: seconds * 1000 / 3600 for name, seconds in steps.items()},
        f"hours_for_{PLANNED}": hours,
    }


# ---------------------------------------------------------------------------------------------
# Captured scenes

WALK = "d*6,l*4,w*3,j*8,a*6,l*4,s*3"
SPLATS = SplatConfig(
    source_license="CC0-1.0",
    rows=96,
    height=96,
    width=96,
    clips=8,
    psnr=0.0,
    fit=FitConfig(gaussians=12_000, steps=400),
)


def write_capture(folder: Path, track: CameraTrack, frames: np.ndarray, caption: str) -> Path:
    names = tuple(f"images/{i:05d}.png" for i in range(len(frames)))
    for name, frame in zip(names, frames, strict=True):
        write_image(folder / name, frame)
    write_cameras(folder / "transforms.json", "nerfstudio", CameraFile(track, size=frames.shape[1:3], names=names))
    (folder / "caption.txt").write_text(caption)
    return folder


def splat_row(capture: Path, root: Path, world: World | None) -> dict[str, Any]:
    """A capture as Gaussians: PSNR of pictures held out; of a world, also of clips against it along their new paths."""
    made, seconds = measured(lambda: splat_captures((capture,), root / f"{capture.name}-clips", SPLATS))
    clips, (pictures, factor) = ClipFolder(root / f"{capture.name}-clips"), read_capture(capture, SPLATS)
    row = {"pictures": len(pictures.frames), "points": len(pictures.points), "clips": made["clips"]}
    row |= {"dropped": made["dropped"], "refused": made["refused"], "cpu_seconds": seconds}
    records = [clips.record(clip) for clip in clips.ids()]
    if records:
        row["psnr_held_out"] = records[0].quality["psnr"]
    if world:
        found = list[float]()
        for one in records:
            assert one.origin is not None
            path = one.track.transformed(one.origin).scaled(1 / factor)
            found += psnr(world.render(path, *one.hw).frames, clips.frames(one.id)).tolist()
        row["psnr_of_clips"] = float(np.mean(found))
    return row


def splats(root: Path, _clips: int) -> dict[str, Any]:
    """Two procedural worlds and a part of Freedoom's map01, each seen along WALK."""
    rows = {}
    for seed in (3, 7):
        world, track = World(seed), parse(WALK).track(Motion(), intrinsics(70.0, 96, 96))
        origin = world.spawn(np.random.default_rng(0), track)
        assert origin is not None
        track = track.transformed(origin)
        capture = write_capture(root / f"world-{seed}", track, world.render(track, 96, 96).frames, world.caption)
        rows[f"procedural world {seed}"] = splat_row(capture, root, world)
    latents = parse(WALK).latents + 1
    doom = DoomConfig(latents=latents, height=96, width=96, units=128.0, trajectories=(WALK,), seed=3)
    folder = record(root / "doom", doom, clips=1)
    (clip,) = folder.ids()
    one = folder.record(clip)
    capture = write_capture(root / clip, one.track, folder.frames(clip), one.caption)
    rows["Freedoom's map01"] = splat_row(capture, root, None)
    return {"pixels": 96, "gaussians": SPLATS.fit.gaussians, "steps": SPLATS.fit.steps, "rows": rows}


EXPERIMENTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "poses": poses,
    "cost": cost,
    "splats": splats,
    "streaming": streaming,
    "streaming_wan": streaming_wan,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--clips", type=int, default=10)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        found = EXPERIMENTS[given.experiment](Path(root), given.clips)
    about = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": versions(),
        "clips": given.clips,
    }
    before = json.loads(given.out.read_text()) if given.out.exists() else {}
    write_json(given.out, {**before, given.experiment: {**about, **found}})


if __name__ == "__main__":
    main()
