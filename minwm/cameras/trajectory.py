"""Keys to camera poses: actions, their integration, and one grammar for every trajectory dialect.

A trajectory is a list of segments, each holding keys for a number of latents: `w+j*8,a*4`. It describes the motion
*after* the first latent, so it covers `latents + 1` latents and `stride * latents + 1` pixel frames.

Keys: w s a d move forward, back, left, right; u dn rise and sink; j l turn left and right; i k look up and down;
static stands still. The words left, right, up, down are turns (j l i k), as in HY-WorldPlay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minwm.cameras.track import CameraTrack, Intrinsics, so3_exp
from minwm.core.config import ConfigError, UserError

MAX_LATENTS = 100_000
"""Longest trajectory that `parse` accepts; a mistyped count must not exhaust the memory."""


class TrajectoryError(UserError):
    """A trajectory cannot be parsed or used; the message shows the offending segment and a remedy."""


@dataclass(frozen=True)
class Motion:
    """Camera speeds and frame rate of a model: what one key press means in world units, degrees and frames."""

    move: float = 0.5
    """World units per second."""
    turn: float = 16.0
    """Degrees per second."""
    fps: float = 16.0
    """Pixel frames per second."""
    stride: int = 4
    """Pixel frames per latent."""

    def __post_init__(self) -> None:
        for name, speed in (("move", self.move), ("turn", self.turn)):
            if not (np.isfinite(speed) and speed >= 0):
                raise ConfigError(f"motion.{name} = {speed}; a speed is finite and not negative")
        if not (np.isfinite(self.fps) and self.fps > 0):
            raise ConfigError(f"motion.fps = {self.fps}; give a positive number of pixel frames per second")
        if self.stride < 1:
            raise ConfigError(f"motion.stride = {self.stride}; a latent holds at least 1 pixel frame")


@dataclass(frozen=True)
class Action:
    """Camera velocity along and about the camera's own axes, in multiples of the speeds in `Motion`."""

    move_x: float = 0.0
    """To the right."""
    move_y: float = 0.0
    """Up."""
    move_z: float = 0.0
    """Forward."""
    yaw: float = 0.0
    """To the right."""
    pitch: float = 0.0
    """Up."""
    roll: float = 0.0
    """Clockwise, as seen by the camera."""

    @classmethod
    def of(cls, keys: Iterable[str]) -> Action:
        """The sum of keys held at once: opposite keys cancel, a key given twice counts once."""
        names = {key.strip().lower() for key in keys}
        canonical = {ALIASES.get(name, name) for name in names}
        unknown = sorted(canonical - KEYS.keys())
        if unknown:
            raise TrajectoryError(f"{unknown[0]!r} is not a key; {HINT}")
        held = [astuple(KEYS[key]) for key in canonical]
        return cls(*(sum(axis) for axis in zip(*held, strict=True))) if held else cls()


KEYS: dict[str, Action] = {
    "w": Action(move_z=1.0),
    "s": Action(move_z=-1.0),
    "a": Action(move_x=-1.0),
    "d": Action(move_x=1.0),
    "u": Action(move_y=1.0),
    "dn": Action(move_y=-1.0),
    "j": Action(yaw=-1.0),
    "l": Action(yaw=1.0),
    "i": Action(pitch=1.0),
    "k": Action(pitch=-1.0),
    "static": Action(),
}
ALIASES = {"left": "j", "right": "l", "up": "i", "down": "k", "none": "static", ".": "static"}
HINT = (
    "use w s a d (move), u dn (rise, sink), j l i k or left right up down (turn, look), static; "
    "for example w*8 or w+j*4,a*2"
)


def integrate_actions(
    start: Float[np.ndarray, "4 4"],
    actions: Sequence[Action],
    motion: Motion,
    step_seconds: float | None = None,
) -> Float[np.ndarray, "n 4 4"]:
    """Camera-to-world poses after each of n actions, each held for `step_seconds` (default: one pixel frame).

    A step rotates first, then moves along the new axes:
    R <- R Ry(yaw) Rx(pitch) Rz(roll), t <- t + R (right, -up, forward).
    """
    dt = 1 / motion.fps if step_seconds is None else step_seconds
    velocity = np.array([astuple(action) for action in actions], np.float64).reshape(-1, 6)
    steps = velocity[:, :3] * [1, -1, 1] * (motion.move * dt)
    # y is down and z forward: a positive angle about y turns right, about x looks up, about z rolls clockwise
    angle = velocity[:, 3:, None] * np.radians(motion.turn * dt)
    yaw, pitch, roll = angle[:, 0] * [0, 1, 0], angle[:, 1] * [1, 0, 0], angle[:, 2] * [0, 0, 1]
    turns = so3_exp(yaw) @ so3_exp(pitch) @ so3_exp(roll)
    poses = np.tile(np.eye(4), (len(velocity), 1, 1))
    R, t = start[:3, :3], start[:3, 3]
    for pose, turn, step in zip(poses, turns, steps, strict=True):
        R = R @ turn
        t = t + R @ step
        pose[:3, :3], pose[:3, 3] = R, t
    return poses


class Segment(NamedTuple):
    """Keys (canonical names in canonical order) held for a number of latents."""

    keys: tuple[str, ...]
    latents: int


@dataclass(frozen=True)
class Trajectory:
    """A parsed trajectory. Adjacent segments with the same keys are merged, so equal motions compare equal."""

    segments: tuple[Segment, ...]
    stride: int = 4

    @property
    def latents(self) -> int:
        """Latents after the first one."""
        return sum(segment.latents for segment in self.segments)

    @property
    def frames(self) -> int:
        """Pixel frames, the first one included."""
        return self.stride * self.latents + 1

    def canonical(self) -> str:
        """The canonical text, which `parse` reads back to an equal trajectory."""
        return ",".join(f"{'+'.join(segment.keys)}*{segment.latents}" for segment in self.segments)

    def describe(self) -> str:
        """One line: the canonical text and the number of latents and frames."""
        return f"{self.canonical()} ({self.latents} latents after the first, {self.frames} frames)"

    def actions(self) -> list[Action]:
        """One per latent after the first."""
        return [Action.of(segment.keys) for segment in self.segments for _ in range(segment.latents)]

    def keys_per_frame(self) -> list[tuple[str, ...]]:
        """The keys held while each pixel frame was reached; empty for frame 0 and for `static`."""
        frames: list[tuple[str, ...]] = [()]
        for segment in self.segments:
            held = tuple(key for key in segment.keys if key != "static")
            frames += [held] * (self.stride * segment.latents)
        return frames

    def track(self, motion: Motion, K: Intrinsics, steps_per_latent: int | None = None) -> CameraTrack:
        """The camera track from the identity on, at pixel rate or with `steps_per_latent` equal steps per latent.

        One step per latent is the convention of minWM and HY-WorldPlay. Raises TrajectoryError if the strides differ.
        """
        if motion.stride != self.stride:
            raise TrajectoryError(
                f"trajectory was read for {self.stride} frames per latent, the motion has {motion.stride}; "
                f"use parse(text, stride={motion.stride})"
            )
        steps = motion.stride if steps_per_latent is None else steps_per_latent
        if steps < 1:
            raise TrajectoryError(f"steps_per_latent = {steps}; use 1 (latent rate) or {motion.stride} (pixel rate)")
        rate = motion.fps * steps / motion.stride
        actions = [action for action in self.actions() for _ in range(steps)]
        poses = integrate_actions(np.eye(4), actions, motion, 1 / rate)
        return CameraTrack(c2w=np.concatenate([np.eye(4)[None], poses]), K=K, fps=rate)


# ---------------------------------------------------------------------------------------------
# The grammar


def parse(text: str, *, stride: int = 4) -> Trajectory:
    """Parse a trajectory in any dialect.

    `w*8,a*4` and `w-8, right-3` count latents; `W:24` counts pixel frames (a multiple of `stride`); `w+j*8` holds two
    keys; a bare `w` lasts one latent. As in HY-WorldPlay, a decimal count is cut to its whole part (`right-0.5` lasts
    no latent), and segments that are empty or last no latent are left out. Raises TrajectoryError, with a caret under
    the segment, for an unknown or contradictory key, for a count that is no number and for a path of no latents.
    """
    segments: list[Segment] = []
    begin = 0
    for part in text.split(","):
        try:
            segments += [_segment(part.strip(), stride)] if part.strip() else []
        except _SegmentError as error:
            raise TrajectoryError(_point_at(text, begin, part, str(error))) from None
        if sum(segment.latents for segment in segments) > MAX_LATENTS:
            raise TrajectoryError(_point_at(text, begin, part, f"more than {MAX_LATENTS} latents; use smaller counts"))
        begin += len(part) + 1
    segments = [segment for segment in segments if segment.latents]
    if not segments:
        raise TrajectoryError(_point_at(text, 0, text, f"it lasts no latent; {HINT}"))
    merged = (
        Segment(keys, sum(segment.latents for segment in run)) for keys, run in groupby(segments, lambda s: s.keys)
    )
    return Trajectory(tuple(merged), stride)


class _SegmentError(Exception):
    """What is wrong with one segment; `parse` adds its position."""


_SEGMENT = re.compile(r"([a-z.]+(?:\s*\+\s*[a-z.]+)*)\s*(?:([*:-])\s*(.*))?", re.DOTALL)


def _segment(text: str, stride: int) -> Segment:
    match = _SEGMENT.fullmatch(text.lower())
    if match is None:
        raise _SegmentError(f"{text!r} is not keys*count; {HINT}")
    keys, sign, count = match.groups()
    chord = _chord([key.strip() for key in keys.split("+")])
    return Segment(chord, 1 if sign is None else _latents("+".join(chord), sign, count.strip(), stride))


def _chord(names: list[str]) -> tuple[str, ...]:
    keys = [ALIASES.get(name, name) for name in names]
    for index, (name, key) in enumerate(zip(names, keys, strict=True)):
        if key not in KEYS:
            raise _SegmentError(f"{name!r} is not a key; {HINT}")
        if key == "static" and len(keys) > 1:
            raise _SegmentError(f"{name!r} cannot be held with another key; drop it")
        if key in keys[:index]:
            raise _SegmentError(f"{name!r} repeats {names[keys.index(key)]!r}; drop one of them")
        for other, before in zip(names[:index], keys[:index], strict=True):
            if Action.of([key, before]) == Action():
                raise _SegmentError(f"{other!r} and {name!r} contradict each other; drop one, or use static")
    return tuple(key for key in KEYS if key in keys)


def _latents(chord: str, sign: str, count: str, stride: int) -> int:
    digits = re.fullmatch(r"0*([0-9]{1,9})(\.[0-9]*)?", count)
    if digits is None:
        most = f"{MAX_LATENTS * stride} pixel frames" if sign == ":" else f"{MAX_LATENTS} latents"
        raise _SegmentError(f"count {count!r} is not a number from 0 to {most}; write for example {chord}*3")
    number = int(digits[1])
    if sign != ":":
        return number
    below = number // stride
    if number % stride:
        nearest = " or ".join(f"{chord}:{n * stride}" for n in (below, below + 1) if n)
        raise _SegmentError(
            f"':' counts pixel frames and a latent is {stride} of them, which {number} does not fill; "
            f"write {nearest}, or count latents: {chord}*{max(below, 1)}"
        )
    return below


def _point_at(text: str, begin: int, part: str, problem: str) -> str:
    line = re.sub(r"\s", " ", text)  # a line break would move the caret
    begin += len(part) - len(part.lstrip())
    return f"trajectory: {problem}\n  {line}\n  {' ' * begin}{'^' * max(1, len(part.strip()))}"
