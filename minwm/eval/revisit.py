"""Revisits: a camera goes out and comes back, or turns away and back; does the model show what it showed before?"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from minwm.cameras.track import CameraTrack, rotation_degrees
from minwm.eval.camera.score import Samples
from minwm.eval.cases import Clips, Videos
from minwm.eval.image import psnr, ssim
from minwm.eval.stats import Bootstrap, Interval
from minwm.session.generate import whole_chunks
from minwm.store.model import ModelConfig

THERE_AND_BACK = (("l", "j"), ("w", "s"), ("j", "l"), ("a", "d"), ("s", "w"), ("d", "a"))
TURN_AWAY = 72.0
"""Degrees of the long revisits: nothing of the first view is left in the picture."""
AWAY_DEGREES, AWAY_UNITS = 10.0, 0.25
"""How far a path goes, at least, before coming back is a return."""
SAME = 0.02
"""Share of that within which two poses are the same."""
GATE_SAMPLES, GATE = 10, 0.15
"""Frames that are compared with the first, and the change that one of them has to show."""


@dataclass(frozen=True)
class Revisit:
    """Likeness of frames on the way back to those on the way out at the same pose; means over clips."""

    consistency: Interval
    """PSNR between both, over the half of the way that is nearest to the start."""
    away: Interval
    """PSNR between the turning point and the first frame: how much there was to remember."""
    gain: Interval
    """The difference: 0 for a video that never changed, and for one that has forgotten everything."""
    truth: Interval | None
    """PSNR to the true view over the last half second, when the camera is back; None for text starts."""


def routes(config: ModelConfig, clips: int, *, away: bool) -> list[str]:
    """Out and back within a training clip, or (`away`) so far that the first view is lost from sight."""
    half, latents = (config.latents - 1) // 2, config.latents
    if away:
        per_latent = config.motion.turn * config.motion.stride / config.motion.fps
        half = config.stream.chunk * math.ceil(TURN_AWAY / per_latent / config.stream.chunk)
        latents = whole_chunks(config, 2 * half + 1)
    rest = latents - 1 - 2 * half
    pairs = [THERE_AND_BACK[i % len(THERE_AND_BACK)] for i in range(clips)]
    return [f"{out}*{half},{back}*{half}" + (f",static*{rest}" if rest else "") for out, back in pairs]


def measure_revisits(config: ModelConfig, clips: Clips, videos: Videos) -> Revisit:
    """Videos at the pixel rate, along `routes`."""
    out = int(clips.cases[0].trajectory.partition(",")[0].partition("*")[2])
    turn, stride = out * config.motion.stride, config.motion.stride
    near = np.arange(turn // 2 + 1)
    same = psnr(videos[:, 2 * turn - near], videos[:, near]).mean(1)
    away = psnr(videos[:, turn], videos[:, 0])
    bootstrap = Bootstrap(len(videos))
    consistency, distinct, gain = (bootstrap(lambda i, x=x: x[i].mean()) for x in (same, away, same - away))
    truth = None
    if config.image_start:
        end = slice(2 * turn + 1 - 2 * stride, 2 * turn + 1)
        back = psnr(videos[:, end], clips.truth[:, end]).mean(1)
        truth = bootstrap(lambda i: back[i].mean())
    return Revisit(consistency, distinct, gain, truth)


def measure_returns(frames: UInt8[np.ndarray, "n h w 3"], track: CameraTrack) -> Samples:
    """`consistency` and `gain` (as in `Revisit`) wherever a path returns to a pose after a second or more; without any,
    nothing."""
    second, found = max(1, round(track.fps)), list[tuple[int, int, int]]()
    for back in range(second, len(track), max(1, second // 4)):
        away = _away(track.c2w[:back], track.c2w[back])
        for first in np.flatnonzero(away[: back - second + 1] < SAME)[:1]:
            farthest = int(first + away[first:].argmax())
            if away[farthest] >= 1:
                found.append((int(first), farthest, back))
    if not found:
        return {}
    first, farthest, back = (frames[[*indices]] for indices in zip(*found, strict=True))
    same, changed = psnr(back, first), psnr(farthest, first)
    return {"consistency": same.tolist(), "gain": (same - changed).tolist()}


def _away(path: Float[np.ndarray, "n 4 4"], pose: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, " n"]:
    """How far poses are from one, 1 is as far as `AWAY_DEGREES` or `AWAY_UNITS`."""
    degrees = rotation_degrees(pose[:3, :3].T @ path[:, :3, :3])
    return degrees / AWAY_DEGREES + np.linalg.norm(path[:, :3, 3] - pose[:3, 3], axis=1) / AWAY_UNITS


def measure_gated(frames: UInt8[np.ndarray, "n h w 3"], track: CameraTrack) -> Samples:
    """The gate of WBench's spatial consistency (`gated_spatial_consistency`) by SSIM and PSNR: likeness of the last
    frame to the first, in [0, 1], times min(1, change on the way / `GATE`); of paths that end where they begin.

    WBench takes the likeness from DreamSim, so its numbers are others: not comparable.
    """
    away = _away(track.c2w, track.c2w[0])
    if away[-1] >= SAME or away.max() < 1:
        return {}
    shown = frames[np.linspace(0, len(frames) - 1, GATE_SAMPLES).astype(int)]
    first = np.repeat(frames[:1], GATE_SAMPLES, 0)
    likeness = {"gated_ssim": np.maximum(ssim(shown, first), 0), "gated_psnr": 1 - 10 ** (-psnr(shown, first) / 20)}
    return {name: [float(like[-1] * min(1.0, (1 - like.min()) / GATE))] for name, like in likeness.items()}
