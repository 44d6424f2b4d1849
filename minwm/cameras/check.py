"""What is wrong with a camera track: by itself, against its video, and against what a model was trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from minwm.cameras.epipolar import Fit, best, fit, follow
from minwm.cameras.track import CameraTrack, Intrinsics, rotation_degrees, so3_log
from minwm.cameras.trajectory import Motion

FOCAL, CENTRE = (0.2, 3.0), (0.2, 0.8)
"""Focal lengths and principal points of usual lenses, in widths and heights."""
SQUARE = 0.05
"""Largest relative difference of the two focal lengths in pixels."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How rough the path of a camera may be."""

    jump: float = 5.0
    """A step this many times the median one is a jump."""
    jump_deg: float = 5.0
    """A turn between two frames below this is no jump."""
    jitter_deg: float = 0.3
    """A median turn away from the middle between the neighbours above this is jitter."""


LIMITS = Limits()


@dataclass(frozen=True)
class Fault:
    """Something wrong with a track."""

    what: str
    """Evidence included."""
    cure: str

    def __str__(self) -> str:
        return f"{self.what}; {self.cure}"


def speeds(track: CameraTrack) -> tuple[float, float]:
    """95th percentiles of the speed in units per second, and of the turn in degrees per second; 0 for one pose."""
    move, turn = steps(track)
    if not len(move):
        return 0.0, 0.0
    return float(np.percentile(move, 95)) * track.fps, float(np.percentile(turn, 95)) * track.fps


def steps(track: CameraTrack) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Units moved and degrees turned from each frame to the next."""
    relative = track.relative()
    return np.linalg.norm(relative[:, :3, 3], axis=-1), rotation_degrees(relative[:, :3, :3])


def jitter(track: CameraTrack, seconds: Float[np.ndarray, " n"] | None = None) -> float:
    """Median over frames of the angle in degrees between a camera and where its neighbours say that it is.

    `seconds`: when each frame was taken, if not at an even rate.
    """
    times = np.arange(len(track)) / track.fps if seconds is None else seconds
    once = np.flatnonzero(np.diff(times, prepend=-np.inf) > 0)  # a frame that is shown twice has one pose
    R, times = track.c2w[once, :3, :3], times[once]
    if len(R) < 3:
        return 0.0
    part = (times[1:-1] - times[:-2]) / (times[2:] - times[:-2])
    half = so3_log(R[:-2].swapaxes(1, 2) @ R[2:]) * part[:, None]
    own = so3_log(R[:-2].swapaxes(1, 2) @ R[1:-1])
    return float(np.degrees(np.median(np.linalg.norm(own - half, axis=-1))))


def faults(
    track: CameraTrack,
    size: tuple[int, int] | None = None,
    limits: Limits = LIMITS,
    seconds: Float[np.ndarray, " n"] | None = None,
) -> list[Fault]:
    """What a track shows by itself; `size` is (h, w) of its pictures, `seconds` when they were taken (`jitter`)."""
    return [*_jumps(track, limits), *_jitter(track, limits, seconds), *_lens(track, size)]


def _jumps(track: CameraTrack, limits: Limits) -> Iterator[Fault]:
    cure = "cut the clip there: the video has another shot, or the poses were lost"
    move, turn = steps(track)
    for values, least, words in (
        (move, 0.0, f"moves {{:.3g}} {track.unit} units"),
        (turn, limits.jump_deg, "turns {:.3g} degrees"),
    ):
        typical = np.median(values[values > 1e-9]) if (values > 1e-9).any() else 0.0
        for frame in np.flatnonzero(values > max(limits.jump * typical, least))[:3] if typical else ():
            usual = f"the median step is {typical:.3g}"
            yield Fault(f"from frame {frame} to {frame + 1} it {words.format(values[frame])}, {usual}", cure)


def _jitter(track: CameraTrack, limits: Limits, seconds: Float[np.ndarray, " n"] | None) -> Iterator[Fault]:
    if (found := jitter(track, seconds)) > limits.jitter_deg:
        what = f"the poses jitter by {found:.2g} degrees from frame to frame (limit {limits.jitter_deg:g})"
        yield Fault(what, "estimate them anew from larger pictures, smooth them, or leave the clip out")


def _lens(track: CameraTrack, size: tuple[int, int] | None) -> Iterator[Fault]:
    for name, values, (low, high) in (
        ("focal lengths", track.K[:, :2], FOCAL),
        ("principal point", track.K[:, 2:], CENTRE),
    ):
        if bad := [row for row in values if not (low < row.min() and row.max() < high)]:
            what = f"the {name} {np.round(bad[0], 3).tolist()} of width and height are outside {low} to {high}"
            yield Fault(what, "K belongs to a picture of another size: give the size that it was made for")
    if size:
        ratio = float(np.median(track.K[:, 0] * size[1] / (track.K[:, 1] * size[0])))
        if abs(ratio - 1) > SQUARE:
            what = f"pixels of {size[1]}x{size[0]} pictures are {ratio:.3f} times as high as wide"
            yield Fault(what, "K belongs to a picture of another shape: crop K with the picture, do not stretch it")


@dataclass(frozen=True)
class VideoCheck:
    """A track against its video."""

    fit: Fit | None
    """None if nothing could be followed."""
    faults: list[Fault]
    notes: list[str]


def check_video(track: CameraTrack, frames: Sequence[UInt8[np.ndarray, "h w"]], fps: float) -> VideoCheck:
    """Compare a track with the grey frames of its video; `fps` is that of the video."""
    notes = []
    if len(track) != len(frames):
        seconds, poses_seconds = (len(frames) - 1) / fps, (len(track) - 1) / track.fps
        if abs(seconds - poses_seconds) > 1 / track.fps or len(track) < 2:
            what = f"there are {len(track)} poses in {poses_seconds:.3g} s and {len(frames)} frames in {seconds:.3g} s"
            return VideoCheck(None, [Fault(what, "give each frame a pose; is --fps that of the poses?")], notes)
        notes.append(f"{track.fps:g} poses per second are compared with {fps:g} frames, by interpolation")
        track = track.at(np.arange(len(frames)) * (track.fps / fps), fps)
    size = frames[0].shape
    pairs = follow(frames)
    if not pairs:
        return VideoCheck(None, [], [*notes, "nothing can be followed in the video: it is too short or without detail"])
    found = fit(pairs, track.c2w, track.K, size)
    other = best(pairs, track, size)
    listed = [Fault(" or ".join(e.fault for e in other), " or ".join(e.cure for e in other))] if other else []
    if not (found.good or other):
        what = f"the poses do not fit the video, as they are or in any other convention ({found})"
        listed = [Fault(what, "they are another clip's, or too noisy: estimate them anew")]
    return VideoCheck(found, listed, notes)


def differences(track: CameraTrack, motion: Motion, K: Intrinsics) -> list[str]:
    """One line for each: speeds over twice those of the keys, focal lengths or principal point off by over a tenth."""
    move, turn = speeds(track)
    found = []
    if move > 2 * motion.move:
        found.append(
            f"it moves {move:.3g} units ({track.unit}) per second, the model's keys {motion.move:.3g}; scale the poses"
        )
    if turn > 2 * motion.turn:
        found.append(f"it turns {turn:.3g} degrees per second, the model's keys {motion.turn:.3g}; slow it down")
    off = np.abs(track.K / K - 1).max(0) > 0.1
    if off.any():
        given, trained = (np.round(x, 3).tolist() for x in (track.K[0], K))
        found.append(f"its K is {given}, the model's {trained}; crop the picture and its K to the model's view")
    return found
