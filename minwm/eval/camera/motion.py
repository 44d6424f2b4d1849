"""How the shown camera moved in every second and under every key, against what was commanded.

A sample is one clip during one second. Its motion is that of the camera at the end of the second as seen from the
camera at its start, so an error made earlier is not charged again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from minwm.cameras.track import se3_inverse, so3_log
from minwm.cameras.trajectory import parse
from minwm.eval.stats import Bootstrap, Interval

Array = np.ndarray
Poses = Float[Array, "c f 4 4"]
MIN_DEGREES, MIN_UNITS = 3.0, 0.05
"""A sample counts as turning, or moving, from this much commanded motion on."""
STILL = 0.1
"""A camera that moved less than this share of the command has no direction, and is charged 90 degrees."""


@dataclass(frozen=True)
class MotionErrors:
    """Medians over samples with bootstrap intervals over clips; None where nothing was commanded."""

    turns: int
    """Samples in which yaw or pitch was commanded."""
    moves: int
    turn_ratio: Interval | None
    """Shown rotation along the commanded axis over the commanded one: 1 follows, 0 does not turn."""
    turn_error: Interval | None
    """|turn_ratio - 1| per sample, then the median: the share by which commanded yaw and pitch are missed."""
    speed_ratio: Interval | None
    """The same for the movement."""
    direction_deg: Interval | None
    """Angle between shown and commanded movement."""
    rot_err_deg: Interval | None
    """Mean error of the orientation at the end of the second, relative to the first frame."""
    trans_err_u: Interval | None
    """Mean error of the position there, world units."""
    trans_aligned_u: Interval | None
    """The same after the shown path is scaled, one factor per clip, to fit the commanded one best."""


@dataclass(frozen=True)
class MotionResult:
    overall: MotionErrors
    per_second: list[MotionErrors]
    """Second 1, 2, ... of the clips."""
    per_key: dict[str, MotionErrors]
    """By the keys held throughout a second, such as `w+j`."""


def measure_motion(
    shown: Poses,
    commanded: Poses,
    scored: Bool[Array, "c f"],
    lost: Bool[Array, "c f"],
    trajectories: Sequence[str],
    latents_per_second: int,
    bootstrap: Bootstrap,
) -> MotionResult:
    """Poses at the latent rate, relative to the first frame. `trajectories` are the commands in keys, "" if unknown.

    A lost frame is charged as a camera that stood still, since the start of its second or of the clip.
    """
    ends = range(latents_per_second, commanded.shape[1], latents_per_second)
    if not ends:
        ends = range(commanded.shape[1] - 1, commanded.shape[1])  # less than a second: the whole clip is the sample
    samples = [_second(shown, commanded, scored, lost, max(0, end - latents_per_second), end) for end in ends]
    table = {name: np.stack([sample[name] for sample in samples], 1) for name in samples[0]}
    keys = np.array([[_keys_held(text, end - latents_per_second, end) for end in ends] for text in trajectories])

    def summary(chosen: Bool[Array, "c k"]) -> MotionErrors:
        return _summarise({name: np.where(chosen, values, np.nan) for name, values in table.items()}, bootstrap)

    every = np.ones(keys.shape, bool)
    return MotionResult(
        summary(every),
        [summary(every & (np.arange(len(ends)) == i)) for i in range(len(ends))],
        {str(key): summary(keys == key) for key in sorted(set(keys.flat) - {""})},
    )


def _second(shown: Poses, commanded: Poses, scored: Array, lost: Array, start: int, end: int) -> dict[str, Array]:
    """Measurements of all clips in one second, NaN where it does not count."""
    command, did = (se3_inverse(poses[:, start]) @ poses[:, end] for poses in (commanded, shown))
    did = np.where(lost[:, end, None, None], np.eye(4), did)
    turn, turned = so3_log(command[:, :3, :3]), so3_log(did[:, :3, :3])
    move, moved = command[:, :3, 3], did[:, :3, 3]
    angle, length = np.linalg.norm(turn, axis=-1), np.linalg.norm(move, axis=-1)
    turns = scored[:, end] & (np.degrees(angle) >= MIN_DEGREES)
    moves = scored[:, end] & (length >= MIN_UNITS)
    turn_ratio = (turned * turn).sum(-1) / np.maximum(angle, 1e-9) ** 2
    far = np.linalg.norm(moved, axis=-1)
    cosine = (moved * move).sum(-1) / np.maximum(far * length, 1e-9)
    direction = np.where(far < STILL * length, 90.0, np.degrees(np.arccos(cosine.clip(-1, 1))))
    at, goal, scale = shown[:, end, :3, 3], commanded[:, end, :3, 3], _scales(shown, commanded, scored & ~lost)
    way = so3_log(shown[:, end, :3, :3].swapaxes(1, 2) @ commanded[:, end, :3, :3])
    still_deg, still_u = np.linalg.norm(so3_log(commanded[:, end, :3, :3]), axis=-1), np.linalg.norm(goal, axis=-1)

    def where(mask: Array, values: Array) -> Array:
        return np.where(mask, values, np.nan)

    def charged(error: Array, still: Array) -> Array:
        return where(scored[:, end], np.where(lost[:, end], np.maximum(error, still), error))

    return {
        "turn_ratio": where(turns, turn_ratio),
        "turn_error": where(turns, np.abs(turn_ratio - 1)),
        "speed_ratio": where(moves, (moved * move).sum(-1) / np.maximum(length, 1e-9) ** 2),
        "direction_deg": where(moves, direction),
        "rot_err_deg": np.degrees(charged(np.linalg.norm(way, axis=-1), still_deg)),
        "trans_err_u": charged(np.linalg.norm(at - goal, axis=-1), still_u),
        "trans_aligned_u": charged(np.linalg.norm(scale[:, None] * at - goal, axis=-1), still_u),
    }


def _scales(shown: Poses, commanded: Poses, mask: Bool[Array, "c f"]) -> Float[Array, " c"]:
    """The factor per clip that takes its shown path nearest to the commanded one; never negative."""
    at, goal = shown[..., :3, 3], commanded[..., :3, 3]
    joint, own = (((x * at).sum(-1) * mask).sum(1) for x in (goal, at))
    return np.maximum(joint, 0) / np.maximum(own, 1e-6)


def _keys_held(trajectory: str, start: int, end: int) -> str:
    """The keys held from latent `start` to latent `end`; "" if they changed."""
    if not trajectory or start < 0:
        return ""
    held = [segment.keys for segment in parse(trajectory).segments for _ in range(segment.latents)][start:end]
    return "+".join(held[0]) if len(set(held)) == 1 else ""


def _summarise(table: dict[str, Float[Array, "c k"]], bootstrap: Bootstrap) -> MotionErrors:
    medians = ("turn_ratio", "turn_error", "speed_ratio", "direction_deg")
    return MotionErrors(
        turns=int((~np.isnan(table["turn_ratio"])).sum()),
        moves=int((~np.isnan(table["direction_deg"])).sum()),
        **{name: (bootstrap.median if name in medians else bootstrap.mean)(table[name]) for name in table},
    )
