"""Random trajectories for training data, balanced between left and right, with the horizon kept in view."""

import numpy as np

from minwm.cameras.track import CameraTrack, Intrinsics
from minwm.cameras.trajectory import KEYS, Motion, Trajectory, TrajectoryError, parse

# Sampling weights. Left and right weigh the same, so that a model learns no drift. No rise or sink: the camera stays
# at walking height, as in the reference data. Looking up or down is rare.
SINGLE_KEYS = {"w": 4.0, "s": 2.0, "a": 2.0, "d": 2.0, "j": 3.0, "l": 3.0, "i": 2.0, "k": 2.0, "static": 1.0}
CHORDS = {"w+j": 2.0, "w+l": 2.0, "s+j": 0.5, "s+l": 0.5, "a+l": 0.5, "d+j": 0.5, "w+a": 0.5, "w+d": 0.5}
MAX_PITCH_DEG = 25.0


def random_trajectory(
    rng: np.random.Generator, latents: int, *, max_pitch: int = 4, single_key: float = 0.4, stride: int = 4
) -> Trajectory:
    """A random trajectory of `latents` latents after the first.

    With probability `single_key` one key is held throughout; otherwise keys and chords change every 1 to 6 latents.
    The pitch stays within `max_pitch` latents of looking up or down.
    """
    if latents < 1:
        raise TrajectoryError(f"a random trajectory of {latents} latents; it needs at least 1")
    pitch, remaining, last, parts = 0, latents, "", []
    table = SINGLE_KEYS if rng.random() < single_key else SINGLE_KEYS | CHORDS
    while remaining:
        longest = {"i": max_pitch - pitch, "k": max_pitch + pitch}  # before the pitch limit is reached
        hold = remaining if table is SINGLE_KEYS else min(remaining, int(rng.integers(1, 7)))
        if table is SINGLE_KEYS:
            options = {key: weight for key, weight in table.items() if longest.get(key, hold) >= hold}
        else:
            options = {key: weight for key, weight in table.items() if key != last and longest.get(key, 1) > 0}
        weights = np.array(list(options.values()))
        last = str(rng.choice(list(options), p=weights / weights.sum()))
        hold = min(hold, longest.get(last, hold))
        pitch += hold * int(KEYS[last].pitch) if last in KEYS else 0
        parts.append(f"{last}*{hold}")
        remaining -= hold
    return parse(",".join(parts), stride=stride)


def random_track(
    rng: np.random.Generator, frames: int, motion: Motion, K: Intrinsics
) -> tuple[CameraTrack, Trajectory]:
    """A random trajectory and its track at pixel rate, whose elevation stays within MAX_PITCH_DEG.

    Raises TrajectoryError unless `frames` is `motion.stride * k + 1` with k >= 1.
    """
    if frames < motion.stride + 1 or (frames - 1) % motion.stride:
        raise TrajectoryError(f"{frames} frames do not fill whole latents; use {motion.stride} * k + 1, k >= 1")
    per_latent = motion.turn * motion.stride / motion.fps
    max_pitch = int(MAX_PITCH_DEG / per_latent) if per_latent > 0 else frames
    while True:  # yaw after pitch tilts the axes, so the sum of pitch angles does not bound the elevation
        latents = frames // motion.stride
        trajectory = random_trajectory(rng, latents, max_pitch=max_pitch, stride=motion.stride)
        track = trajectory.track(motion, K)
        if np.degrees(np.abs(np.arcsin(track.c2w[:, 1, 2].clip(-1, 1)))).max() <= MAX_PITCH_DEG:
            return track, trajectory
