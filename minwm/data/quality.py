"""Why a clip of footage is not fit for training: rules with names and thresholds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch.nn.functional import avg_pool2d

from minwm.cameras.check import Limits, check_video, faults, steps
from minwm.cameras.track import CameraTrack
from minwm.data.clips import MOTION_WORDS, ClipFolder

EDGE, UNCHANGED, CHANGING = 20.0, 3.0, 12.0
"""Brightness: gradient of an edge, and standard deviations over time of pixels that stay and that change."""
AROUND = 9
"""Pixels: side of the square around an edge, of which more than half must change."""


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Thresholds; brightness is 0 to 255."""

    captions: bool = True
    """Whether a clip needs one."""
    dark: float = 15.0
    """Least mean brightness of a clip."""
    bright: float = 240.0
    """Largest."""
    bars: float = 0.02
    """Largest share of the rows, or columns, that are black throughout at an edge."""
    black: int = 24
    """Brightness up to which a pixel is black."""
    still: float = 0.3
    """Least mean change of a pixel from frame to frame, in a clip whose camera moves."""
    overlay: float = 0.0005
    """Largest share of pixels on edges that stay where they are while what surrounds them changes."""
    repeated: float = 0.2
    """Largest share of frames that repeat the one before, in a clip that moves."""
    cameras: Limits = field(default_factory=Limits)
    epipolar: bool = True
    """Whether poses are compared with the pictures (minwm camera check --video)."""


@dataclass(frozen=True)
class Failure:
    """One rule that a clip does not meet."""

    rule: str
    reason: str


@dataclass(frozen=True, eq=False)
class Candidate:
    """A clip before it is judged."""

    frames: UInt8[np.ndarray, "n h w 3"]
    track: CameraTrack
    seconds: Float[np.ndarray, " n"] | None = None
    """When each frame was taken, if not at an even rate."""


def failures(clip: Candidate, cfg: QualityConfig) -> list[Failure]:
    """Every rule that pictures and cameras do not meet, with what was measured."""
    return [Failure(name, reason) for name, rule in RULES.items() for reason in rule(clip, cfg)]


def caption_failures(caption: str, cfg: QualityConfig) -> list[Failure]:
    """What is wrong with the caption of a clip."""
    if cfg.captions and not caption.strip():
        return [Failure("caption", "it has none")]
    if match := MOTION_WORDS.search(caption):
        return [Failure("caption", f"it speaks of motion: {match[0]!r}")]
    return []


def check_quality(folder: ClipFolder, cfg: QualityConfig) -> list[str]:
    """Every rule that a raw clip does not meet, one line each with the clip's id."""
    lines = []
    for clip in folder.ids():
        record = folder.record(clip)
        found = failures(Candidate(folder.frames(clip), record.track), cfg) + caption_failures(record.caption, cfg)
        lines += [f"{clip}: {failure.rule}: {failure.reason}" for failure in found]
    return lines


def _exposure(clip: Candidate, cfg: QualityConfig) -> Iterator[str]:
    mean = float(clip.frames.mean())
    if not cfg.dark <= mean <= cfg.bright:
        yield f"its mean brightness is {mean:.1f}, not {cfg.dark:g} to {cfg.bright:g}"


def _letterbox(clip: Candidate, cfg: QualityConfig) -> Iterator[str]:
    peak = clip.frames.max((0, 3))  # of every pixel over time
    for name, lines in (("rows", peak.max(1)), ("columns", peak.max(0))):
        lit = np.flatnonzero(lines > cfg.black)
        dark = len(lines) - (lit[-1] - lit[0] + 1) if len(lit) else len(lines)
        if dark > cfg.bars * len(lines):
            yield f"{dark} of {len(lines)} {name} at its edges are black"


def _overlay(clip: Candidate, cfg: QualityConfig) -> Iterator[str]:
    """Burnt-in text, logos and the displays of games. Over a plain background they cannot be told from the scene."""
    grey = clip.frames.mean(-1, dtype=np.float32)
    change = grey.std(0)
    down, across = np.gradient(grey.mean(0))
    fixed = (np.hypot(down, across) > EDGE) & (change < UNCHANGED)
    changing = torch.from_numpy((change > CHANGING).astype(np.float32))[None, None]
    surrounded = avg_pool2d(changing, AROUND, 1, AROUND // 2)[0, 0].numpy() > 0.5
    if (share := float((fixed & surrounded).mean())) > cfg.overlay:
        yield f"{share:.2%} of its pixels are edges that stay while their surroundings change: text or a logo"


def _static(clip: Candidate, cfg: QualityConfig) -> Iterator[str]:
    change = _changes(clip.frames)
    moves = max(float(values.max(initial=0)) for values in steps(clip.track)) > 1e-6
    if moves and change.mean() < cfg.still:
        yield f"its camera moves, but pixels change by {change.mean():.2f} from frame to frame"


def _repeats(clip: Candidate, cfg: QualityConfig) -> Iterator[str]:
    change = _changes(clip.frames)
    share = float((change < 0.1 * change.mean()).mean()) if change.mean() >= cfg.still else 0.0
    if share > cfg.repeated:
        yield f"{share:.0%} of its frames repeat the one before"


def _cameras(clip: Candidate, cfg: QualityConfig) -> Iterator[str]:
    yield from map(str, faults(clip.track, clip.frames.shape[1:3], cfg.cameras, clip.seconds))


def _poses(clip: Candidate, cfg: QualityConfig) -> Iterator[str]:
    if cfg.epipolar:
        grey = [np.ascontiguousarray(frame) for frame in clip.frames.mean(-1).astype(np.uint8)]
        yield from map(str, check_video(clip.track, grey, clip.track.fps).faults)


def _changes(frames: UInt8[np.ndarray, "n h w 3"]) -> np.ndarray:
    """Mean change of a pixel from each frame to the next."""
    return np.array([np.abs(b.astype(np.int16) - a).mean() for a, b in pairwise(frames)])


RULES: dict[str, Callable[[Candidate, QualityConfig], Iterator[str]]] = {
    "exposure": _exposure,
    "letterbox": _letterbox,
    "overlay": _overlay,
    "static": _static,
    "repeated frames": _repeats,
    "cameras": _cameras,
    "poses": _poses,
}
