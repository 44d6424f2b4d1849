"""Game footage with true cameras, for `results/game-footage.json`: its cameras checked, and recovered from pixels.

    python benchmarks/game_footage.py results/game-footage.json camera_check --clips 8
    python benchmarks/game_footage.py results/game-footage.json camera_recovery --clips 4
    python benchmarks/game_footage.py results/game-footage.json wrong_motions --clips 4
    python benchmarks/game_footage.py results/game-footage.json heights --clips 16

Experiments that are not named stay as they are.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from camera_recovery import PATTERNS, YAW_DRIFT, scored
from wrong_cameras import WRONG

from minwm.cameras.check import check_video
from minwm.cameras.epipolar import fit, follow
from minwm.cameras.track import CameraTrack
from minwm.cameras.trajectory import Action, Motion, Trajectory
from minwm.core.files import write_json
from minwm.core.runtime import git_commit, versions
from minwm.data.clips import ClipRecord
from minwm.data.doom import TALL, DoomConfig
from minwm.data.record import record, walk
from minwm.data.source import TRIES
from minwm.eval.source import Video

RISE = 0.05
"""World units of height between two frames."""
TURNING = ("w+l*3,a*2,i*2,w*1", "a*2,k*2,j*2,w*2", "i*1,d+j*4,w*3", "s*3,l*2,k*1,s+a*2")
"""Walks with turns about two axes and steps aside, on which no wrong convention looks like the right one."""


def game_clips(cfg: DoomConfig, clips: int) -> Iterator[tuple[ClipRecord, np.ndarray]]:
    """Recorded clips of Freedoom's map01, and their frames."""
    with tempfile.TemporaryDirectory() as folder:
        made = record(Path(folder) / "raw", cfg, clips=clips)
        for clip in made.ids():
            yield made.record(clip), made.frames(clip)


def camera_check(clips: int) -> dict[str, Any]:
    """What `minwm camera check --video` says of game footage in its true cameras, and in each wrong reading of them:
    shares of clips that pass, and whose fault is named rightly; medians of the residual in pixels and of points in
    front."""
    rows: dict[str, list[tuple[bool, bool, float, float]]] = {}
    for one, frames in game_clips(DoomConfig(height=128, width=128, trajectories=TURNING), clips):
        grey = [np.ascontiguousarray(frame) for frame in frames.mean(-1).astype(np.uint8)]
        for name, (spoil, said) in {"true": (lambda c2w: c2w, ""), **WRONG}.items():
            result = check_video(CameraTrack(spoil(one.track.c2w), one.track.K, one.track.fps), grey, one.track.fps)
            named = any(re.search(said, str(fault)) for fault in result.faults)
            measured = (result.fit.residual, result.fit.in_front) if result.fit else (np.nan, np.nan)
            rows.setdefault(name, []).append((not result.faults, named, *measured))
    names = ("passes", "named", "residual_pixels", "in_front")
    return {"pixels": 128, "rows": {name: dict(zip(names, summary(row), strict=True)) for name, row in rows.items()}}


def summary(rows: Sequence[tuple[bool, bool, float, float]]) -> list[float]:
    passes, named, residual, in_front = np.array(rows, float).T
    return [float(x) for x in (passes.mean(), named.mean(), np.nanmedian(residual), np.nanmedian(in_front))]


def camera_recovery(clips: int) -> dict[str, Any]:
    """How far cameras recovered from the pixels of game footage are off, by the estimator and the measures of
    `camera_recovery.py`; speed up to one factor, as depth is not known."""
    rows = {}
    for size in (64, 128, 256):
        cfg = DoomConfig(height=size, width=size, latents=17, trajectories=PATTERNS)
        rows[f"{size} game"], _ = scored(
            {one.id: Video(one.id, frames, one.track.fps, one.track) for one, frames in game_clips(cfg, clips)}
        )
    return {"seconds": 4, "rows": rows}


@dataclass(frozen=True)
class Changed(Trajectory):
    """Keys that do something else than they command."""

    change: Callable[[Action], Action] = field(kw_only=True)

    def actions(self) -> list[Action]:
        return [self.change(action) for action in super().actions()]


def at_speed(speed: float) -> Callable[[Action], Action]:
    return lambda action: Action(*(speed * axis for axis in astuple(action)))


def wrong_motions(clips: int) -> dict[str, Any]:
    """What the estimator says of game footage that shows another motion than commanded: the game is played so. The
    commanded cameras are those of the exact clips."""
    rows = {}
    for size in (128, 256):
        cfg = DoomConfig(height=size, width=size, latents=17, trajectories=PATTERNS)
        game, drift, commanded = cfg.open(), YAW_DRIFT / cfg.motion.turn, dict[str, CameraTrack]()
        for name, change in {
            "exact": at_speed(1.0),
            "0.8x speed": at_speed(0.8),
            "0.5x speed": at_speed(0.5),
            "static": at_speed(0.0),
            "opposite": at_speed(-1.0),
            "yaw drift": lambda action, drift=drift: replace(action, yaw=action.yaw + drift),
        }.items():
            videos = dict[str, Video]()
            for index in range(clips):
                rng, clip = np.random.default_rng([cfg.seed, index]), f"{index}"
                trajectory = Changed(cfg.path(index, rng)[1].segments, change=change)
                views = next(found for _ in range(TRIES) if (found := walk(game, rng, trajectory, cfg)))
                if name == "exact":
                    c2w, K = np.stack([view.c2w for view in views]), np.stack([view.K for view in views])
                    commanded[clip] = CameraTrack(c2w, K, cfg.motion.fps).relative_to_first()
                frames = np.stack([view.frame for view in views])
                videos[clip] = Video(clip, frames, cfg.motion.fps, commanded[clip])
            rows[f"{size} game, {name}"], _ = scored(videos)
    return {"seconds": 4, "rows": rows}


def heights(clips: int) -> dict[str, Any]:
    """Cost of the epipolar fit (`cameras/epipolar.py`) with heights stretched by other factors than `doom.TALL`, over
    pairs of frames between which the floor rises or sinks."""
    cfg = DoomConfig(height=128, width=128, motion=Motion(move=2.0), trajectories=("w*8",), moved=0.85, seed=5)
    costs = dict[str, list[float]]()
    for one, frames in game_clips(cfg, clips):
        height = one.track.c2w[:, 1, 3]
        pairs = follow([np.ascontiguousarray(frame) for frame in frames.mean(-1).astype(np.uint8)])
        if steps := [pair for pair in pairs if abs(height[pair.second] - height[pair.first]) > RISE]:
            for factor in (1.0, 1.1, 1.2, 1.3, 1.4):
                c2w = one.track.c2w.copy()
                c2w[:, 1, 3] *= factor / TALL
                costs.setdefault(f"{factor}", []).append(fit(steps, c2w, one.track.K, one.hw).cost)
    return {"with_steps": len(costs["1.0"]), "cost": {factor: float(np.mean(x)) for factor, x in costs.items()}}


EXPERIMENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "camera_check": camera_check,
    "camera_recovery": camera_recovery,
    "wrong_motions": wrong_motions,
    "heights": heights,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--clips", type=int, default=16)
    given = parser.parse_args()
    about = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": versions(),
        "clips": given.clips,
    }
    found = {**about, **EXPERIMENTS[given.experiment](given.clips)}
    before = json.loads(given.out.read_text()) if given.out.exists() else {}
    write_json(given.out, {**before, given.experiment: found})


if __name__ == "__main__":
    main()
