"""Intent to cameras: actions, one grammar that reads every trajectory dialect, and random paths.

A trajectory is a list of segments, keys held for a number of latents: `w+j*8,a*4`. It says how the camera
moves *after* the first latent, so it fills `latents` + 1 latents and `stride * latents` + 1 pixel frames.

Keys: w s a d move forward, back, left, right; u dn rise and sink; j l turn left and right; i k look up and
down; static stands still. The words left right up down are turns, as in WorldPlay: j l i k.
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
"""Longer trajectories are refused: a typing error must not fill the memory."""


class TrajectoryError(UserError):
    """A trajectory cannot be read or used; shows the offending segment and the way out."""


@dataclass(frozen=True)
class Motion:
    """How fast intent moves the camera. Part of a model's config, so that a key means the same everywhere."""

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
    """Intent, in multiples of the motion's speed; the axes are those of the camera."""

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
        """The sum of keys held at once: opposite keys cancel, a key held twice counts once."""
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
    """c2w after each action, one step each (default: one pixel frame). Rotate first, then move along the new
    axes: R <- R Ry(yaw) Rx(pitch) Rz(roll), t <- t + R (right, -up, forward)."""
    dt = 1 / motion.fps if step_seconds is None else step_seconds
    intent = np.array([astuple(action) for action in actions], np.float64).reshape(-1, 6)
    steps = intent[:, :3] * [1, -1, 1] * (motion.move * dt)
    # y is down and z forward: a positive angle about y turns right, about x looks up, about z rolls clockwise
    angle = intent[:, 3:, None] * np.radians(motion.turn * dt)
    yaw, pitch, roll = angle[:, 0] * [0, 1, 0], angle[:, 1] * [1, 0, 0], angle[:, 2] * [0, 0, 1]
    turns = so3_exp(yaw) @ so3_exp(pitch) @ so3_exp(roll)
    poses = np.tile(np.eye(4), (len(intent), 1, 1))
    R, t = start[:3, :3], start[:3, 3]
    for pose, turn, step in zip(poses, turns, steps, strict=True):
        R = R @ turn
        t = t + R @ step
        pose[:3, :3], pose[:3, 3] = R, t
    return poses


class Segment(NamedTuple):
    """Keys (canonical, in canonical order) held for some latents."""

    keys: tuple[str, ...]
    latents: int


@dataclass(frozen=True)
class Trajectory:
    """Segments in order; made by `parse`. Equal motion means equal value."""

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
        return ",".join(f"{'+'.join(segment.keys)}*{segment.latents}" for segment in self.segments)

    def describe(self) -> str:
        """One line: the canonical form and the length it asks for."""
        return f"{self.canonical()} ({self.latents} latents after the first, {self.frames} frames)"

    def actions(self) -> list[Action]:
        """One per latent after the first."""
        return [Action.of(segment.keys) for segment in self.segments for _ in range(segment.latents)]

    def keys_per_frame(self) -> list[tuple[str, ...]]:
        """For each pixel frame the keys that led to it; none for frame 0, and none while standing still."""
        frames: list[tuple[str, ...]] = [()]
        for segment in self.segments:
            held = tuple(key for key in segment.keys if key != "static")
            frames += [held] * (self.stride * segment.latents)
        return frames

    def track(self, motion: Motion, K: Intrinsics, steps_per_latent: int | None = None) -> CameraTrack:
        """Cameras from the identity on, at pixel rate, or with another number of equal steps per latent
        (1 is the convention of the reference). Raises TrajectoryError if the strides disagree."""
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
    """Read a trajectory in any dialect: `w*8,a*4` and `w-8, right-3` count latents, `W:24` counts pixel
    frames (a multiple of `stride`), `w+j*8` holds two keys, a bare `w` is one latent.

    Raises TrajectoryError, with a caret under the segment, for an unknown or contradictory key or for a count
    that is not a positive whole number: nothing is ever rounded.
    """
    segments: list[Segment] = []
    begin = 0
    for part in text.split(","):
        try:
            segments.append(_segment(part.strip(), stride))
        except _SegmentError as error:
            raise TrajectoryError(_point_at(text, begin, part, str(error))) from None
        if sum(segment.latents for segment in segments) > MAX_LATENTS:
            raise TrajectoryError(_point_at(text, begin, part, f"more than {MAX_LATENTS} latents; use smaller counts"))
        begin += len(part) + 1
    merged = (
        Segment(keys, sum(segment.latents for segment in run)) for keys, run in groupby(segments, lambda s: s.keys)
    )
    return Trajectory(tuple(merged), stride)


class _SegmentError(Exception):
    """What is wrong with one segment; `parse` adds where."""


_SEGMENT = re.compile(r"([a-z.]+(?:\s*\+\s*[a-z.]+)*)\s*(?:([*:-])\s*(.*))?", re.DOTALL)


def _segment(text: str, stride: int) -> Segment:
    if not text:
        raise _SegmentError(f"empty segment; {HINT}")
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
    if not re.fullmatch("0*[1-9][0-9]{0,8}", count):
        most = f"{MAX_LATENTS * stride} pixel frames" if sign == ":" else f"{MAX_LATENTS} latents"
        raise _SegmentError(f"count {count!r} is not a whole number from 1 to {most}; write for example {chord}*3")
    number = int(count)
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


# ---------------------------------------------------------------------------------------------
# Random paths

# Left and right weigh the same, so that no model learns a drift. No rise or sink: scenes are walked, and the
# reference data has none. Looking up or down is rare: the horizon must stay in view.
_SINGLE = {"w": 4.0, "s": 2.0, "a": 2.0, "d": 2.0, "j": 3.0, "l": 3.0, "i": 2.0, "k": 2.0, "static": 1.0}
_CHORDS = {"w+j": 2.0, "w+l": 2.0, "s+j": 0.5, "s+l": 0.5, "a+l": 0.5, "d+j": 0.5, "w+a": 0.5, "w+d": 0.5}
_MAX_PITCH_DEG = 25.0


def random_trajectory(
    rng: np.random.Generator, latents: int, *, max_pitch: int = 4, whole: float = 0.4, stride: int = 4
) -> Trajectory:
    """A trajectory of that many latents: with probability `whole` one key throughout, else keys and chords
    held for 1 to 6 latents each. Looking up or down stays within `max_pitch` latents of level."""
    if latents < 1:
        raise TrajectoryError(f"a random trajectory of {latents} latents; it needs at least 1")
    pitch, left, last, parts = 0, latents, "", []
    table = _SINGLE if rng.random() < whole else _SINGLE | _CHORDS
    while left:
        room = {"i": max_pitch - pitch, "k": max_pitch + pitch}
        hold = left if table is _SINGLE else min(left, int(rng.integers(1, 7)))
        if table is _SINGLE:  # one key throughout: only those that may be held so long
            choices = {key: weight for key, weight in table.items() if room.get(key, hold) >= hold}
        else:
            choices = {key: weight for key, weight in table.items() if key != last and room.get(key, 1) > 0}
        weights = np.array(list(choices.values()))
        last = str(rng.choice(list(choices), p=weights / weights.sum()))
        hold = min(hold, room.get(last, hold))
        pitch += hold * int(KEYS[last].pitch) if last in KEYS else 0
        parts.append(f"{last}*{hold}")
        left -= hold
    return parse(",".join(parts), stride=stride)


def random_track(
    rng: np.random.Generator, frames: int, motion: Motion, K: Intrinsics
) -> tuple[CameraTrack, Trajectory]:
    """A random trajectory and its pixel-rate track, which never looks more than 25 degrees up or down."""
    if frames < motion.stride + 1 or (frames - 1) % motion.stride:
        raise TrajectoryError(f"{frames} frames do not fill whole latents; use {motion.stride} * k + 1, k >= 1")
    per_latent = motion.turn * motion.stride / motion.fps
    max_pitch = int(_MAX_PITCH_DEG / per_latent) if per_latent > 0 else frames
    while True:  # turning after looking up tilts the axes, so the sum of angles is not yet the elevation
        latents = frames // motion.stride
        trajectory = random_trajectory(rng, latents, max_pitch=max_pitch, stride=motion.stride)
        track = trajectory.track(motion, K)
        if np.degrees(np.abs(np.arcsin(track.c2w[:, 1, 2].clip(-1, 1)))).max() <= _MAX_PITCH_DEG:
            return track, trajectory


def smooth_track(
    rng: np.random.Generator, frames: int, motion: Motion, K: Intrinsics, *, period: float = 4.0
) -> CameraTrack:
    """A path like that of a hand or a mouse, where `random_track` is like keys: no axis exceeds the motion's
    speed, and no velocity swings faster than once in `period` seconds. Looks up and down by 15 degrees."""
    if frames < 1:
        raise TrajectoryError(f"a path of {frames} frames; it needs at least 1")
    time = np.arange(frames) / motion.fps
    rate = 2 * np.pi / period * rng.uniform(0.2, 1.0, (4, 3, 1))  # 4 axes, 3 waves each, radians per second
    right, forward, yaw, _ = np.sin(rate * time + rng.uniform(0, 2 * np.pi, rate.shape)).mean(1)
    forward = 0.7 * forward + rng.choice([-0.3, 0.3], p=[0.2, 0.8])  # mostly ahead, as people walk
    still = np.zeros(frames)
    intent = np.stack([0.7 * right, still, forward, yaw, still, still], -1)[1:]
    c2w = np.concatenate([np.eye(4)[None], integrate_actions(np.eye(4), [Action(*row) for row in intent], motion)])
    # Looking up and down is drawn as an angle, not as a speed, so that it stays bounded over any length
    swing = float(rate[3, 0, 0])
    reach = min(np.radians(15.0), np.radians(motion.turn) / swing) * rng.choice([-1.0, 1.0])
    c2w[:, :3, :3] = c2w[:, :3, :3] @ so3_exp(np.outer(reach * np.sin(swing * time), [1.0, 0.0, 0.0]))
    return CameraTrack(c2w=c2w, K=K, fps=motion.fps)
