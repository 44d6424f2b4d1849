"""How far cameras recovered from pixels alone are off, on rendered videos whose cameras are known, for `results/`.

    python benchmarks/camera_recovery.py results/camera-recovery.json --sizes 64 128 256 --clips 6
    python benchmarks/camera_recovery.py results/camera-recovery-colmap.json --sizes 128 256 --conditions clean \
        --motions exact --estimator klt colmap

Clean renders; blurred ones; drifting ones (blur, noise, and a smooth change of colour that grows with time). Of each
the commanded motion, and others than that: slower, still, backwards, with a drift of yaw. A second estimator is set
beside the first (`witnesses`).
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minwm.cameras.track import CameraTrack, rigid, se3_inverse, so3_exp
from minwm.core.config import to_dict
from minwm.core.runtime import git_commit, versions
from minwm.eval.camera.align import blurred
from minwm.eval.camera.estimators import ESTIMATORS
from minwm.eval.cases import Case, Clips
from minwm.eval.metrics import Scores, measure
from minwm.eval.source import Frames, Video, VideoSource
from minwm.eval.witness import call_witness
from minwm.experiments import presets
from minwm.render.worlds import World

PATTERNS = ("w*16", "l*16", "a*16", "w+j*16", "w*8,l*8", "s*16", "j*8,w*8", "d+j*16")
WHAT = "Cameras recovered from pixels alone against the true ones, in rendered videos; mean over clips, 95% interval"
Row = dict[str, dict[str, float]]
YAW_DRIFT = 1.5
"""Degrees per second."""


def degraded(frames: Frames, blur: float, noise: float, colour: float) -> Frames:
    """Blurred by so many pixels, with noise and a smooth change of colour that grows to so many levels."""
    x = blurred(torch.from_numpy(frames).movedim(-1, 1).float(), blur).movedim(1, -1).numpy()
    rng, (n, h, w, _) = np.random.default_rng(0), x.shape
    waves = np.sin(2 * np.pi * (np.arange(w)[None] / w + np.arange(h)[:, None] / h + rng.random()))[..., None]
    x = x + colour * np.linspace(0, 1, n)[:, None, None, None] * waves * rng.uniform(-1, 1, 3)
    return (x + noise * rng.standard_normal(x.shape)).round().clip(0, 255).astype(np.uint8)


CONDITIONS = {"clean": (0.0, 0.0, 0.0), "blurred": (1.5, 0.0, 0.0), "drifting": (0.8, 3.0, 25.0)}


def slower(track: CameraTrack, speed: float) -> CameraTrack:
    """The path as far as `speed` times its time."""
    whole = track.resample(track.fps / speed)
    return CameraTrack(whole.c2w[: len(track)], track.K, track.fps)


def drifting(track: CameraTrack) -> CameraTrack:
    """The path, turned to the right more and more."""
    yaw = np.radians(YAW_DRIFT / track.fps) * np.arange(len(track))
    turn = rigid(so3_exp(yaw[:, None] * [0, 1, 0]), np.zeros((len(track), 3)))
    return CameraTrack(track.c2w @ turn, track.K, track.fps)


MOTIONS = {
    "exact": lambda track: track,
    "0.8x speed": lambda track: slower(track, 0.8),
    "0.5x speed": lambda track: slower(track, 0.5),
    "static": lambda track: CameraTrack(track.c2w[:1].repeat(len(track), 0), track.K, track.fps),
    "opposite": lambda track: CameraTrack(se3_inverse(track.c2w), track.K, track.fps),
    "yaw drift": drifting,
}


def scored(videos: Mapping[str, Video], estimators: Sequence[str] = ("klt",)) -> tuple[Row, dict[str, Any] | None]:
    """Mean and 95% interval of what holds for all seconds; and the same by a second estimator, with each video's
    rotation errors by both and how far all quantities differ."""
    source, (first, *second) = VideoSource([*videos], videos.__getitem__), estimators
    found = measure(source, ["camera"], estimator=first)
    if not second:
        return means(found), None
    witness = call_witness(source, found, second[0])
    errors = {one.estimator: one.scores["camera"]["rot_err_deg"].videos for one in (found, witness.scores)}
    differences = to_dict(witness)["differences"]["camera"]
    return means(found), {**means(witness.scores), "rotation_errors": errors, "differences": differences}


def means(found: Scores) -> Row:
    return {name: vars(score.mean) for name, score in found.scores["camera"].items() if not set(name) & set("[@")}


def rendered(case: Case, size: int, shown: CameraTrack, name: str, condition: str) -> Video:
    view = case.scene.render(shown.transformed(case.origin), size, size)
    frames = view.frames if condition == "clean" else degraded(view.frames, *CONDITIONS[condition])
    return Video(name, frames, shown.fps, case.track, first_depth=view.depth[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--conditions", choices=CONDITIONS, nargs="+", default=[*CONDITIONS])
    parser.add_argument("--motions", choices=MOTIONS, nargs="+", default=[*MOTIONS])
    parser.add_argument("--estimator", choices=ESTIMATORS, nargs="+", default=["klt"])
    given = parser.parse_args()
    config = replace(presets.demo.tiny_model(), latents=17)
    cases = Clips.make(config, [PATTERNS[i % len(PATTERNS)] for i in range(given.clips)], World).cases
    rows, witnesses = dict[str, Row](), dict[str, dict[str, Any]]()
    for size, condition, name in product(given.sizes, given.conditions, given.motions):
        shown = [MOTIONS[name](case.track) for case in cases]
        videos = {f"{i}": rendered(case, size, shown[i], f"{i}", condition) for i, case in enumerate(cases)}
        row = f"{size} {condition}, {name}"
        rows[row], witness = scored(videos, given.estimator)
        witnesses |= {row: witness} if witness else {}
    about = {
        "what": WHAT,
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    about |= {"commit": git_commit(), "versions": versions()}
    about |= {"clips": given.clips, "seconds": 4}
    given.out.write_text(json.dumps({**about, "rows": rows, "witnesses": witnesses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
