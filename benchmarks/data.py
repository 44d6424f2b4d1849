"""What data construction costs, and how good estimated poses are, for `results/data.json`.

    python benchmarks/data.py results/data.json minwm/assets/demo/codec [FOLDER ...] --clips 24 --rows 128 256

Clips of procedural worlds, and of folders of raw clips with true poses, are posed by COLMAP and compared with the
truth; and they are ingested and encoded. Times are CPU seconds of one thread.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minwm.cameras.estimate.base import EstimateError
from minwm.cameras.estimate.colmap import Colmap
from minwm.cameras.track import CameraTrack, rotation_degrees
from minwm.core.files import write_json
from minwm.core.media import write_video
from minwm.core.runtime import git_commit, versions
from minwm.data.clips import ClipFolder
from minwm.data.encode import encode_clips
from minwm.data.ingest import IngestConfig, ingest
from minwm.data.rerender import RenderConfig, render_worlds
from minwm.nets.text import WordText
from minwm.store.folder import load_codec

LATENTS = 13
STANDS = 0.05
"""Units: a shorter path is that of a camera that only turns, or stands."""
PLAN_CLIPS, PLAN_CORES = 1_000_000, (16, 64, 256, 1024)


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
        record = clips.record(clip)
        write_video(folder / f"{clip}.mp4", clips.frames(clip), record.track.fps, crf=16)
        (folder / f"{clip}.txt").write_text(record.caption)
        if cameras:
            record.track.save(folder / f"{clip}.camera.json")


def ingest_rows(clips: ClipFolder, root: Path) -> Iterator[dict[str, Any]]:
    """Ingest of the clips as videos, with cameras and without."""
    record = clips.record(clips.ids()[0])
    for cameras in (True, False):
        folder, out = root / f"videos-{cameras}", root / f"ingested-{cameras}"
        footage(clips, folder, cameras)
        cfg = IngestConfig(
            source_license="CC0-1.0",
            latents=LATENTS,
            height=record.hw[0],
            width=record.hw[1],
            estimator=Colmap(focal=float(record.track.K[0, 0])),
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


def plan(steps: dict[str, float]) -> list[dict[str, Any]]:
    """Hours for a million clips on so many cores, from CPU seconds per clip; every clip is independent."""
    return [
        {"cores": cores, **{f"{name}_hours": PLAN_CLIPS * seconds / cores / 3600 for name, seconds in steps.items()}}
        for cores in PLAN_CORES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("codec", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 256])
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": versions(),
        "frames": 4 * (LATENTS - 1) + 1,
    }
    with tempfile.TemporaryDirectory() as name:
        root, folders = Path(name), dict[str, ClipFolder]()
        for rows in given.rows:
            cfg = RenderConfig(latents=LATENTS, height=rows, width=rows * 5 // 4, seed=9)
            folders[f"procedural worlds, {cfg.width}x{rows}"] = render_worlds(
                root / f"raw-{rows}", cfg, clips=given.clips
            )
        last = [*folders.values()][-1]
        folders |= {path.name: ClipFolder(path) for path in given.folders}
        found["poses_by_colmap"] = {
            name: [colmap_row(folder, known) for known in (True, False)] for name, folder in folders.items()
        }
        found["ingest"] = [*ingest_rows(last, root)]
        found["encode"] = encode_row(last.path, root / "latents", given.codec)
    camera_files, colmap = (row["cpu_seconds_per_video"] for row in found["ingest"])
    steps = {"ingest": camera_files, "ingest_with_colmap": colmap, "encode": found["encode"]["cpu_seconds_per_clip"]}
    found["core_hours_per_1000_clips"] = {name: seconds * 1000 / 3600 for name, seconds in steps.items()}
    found[f"plan_for_{PLAN_CLIPS}_clips"] = plan(steps)
    write_json(given.out, found)


if __name__ == "__main__":
    main()
