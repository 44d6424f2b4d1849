"""How the cameras of a track differ from those that a model was trained on."""

import numpy as np

from minwm.cameras.track import CameraTrack, Intrinsics, so3_log
from minwm.cameras.trajectory import Motion


def speeds(track: CameraTrack) -> tuple[float, float]:
    """95th percentiles of the speed in units per second, and of the turn in degrees per second; 0 for one pose."""
    relative = track.relative()
    if not len(relative):
        return 0.0, 0.0
    move = np.linalg.norm(relative[:, :3, 3], axis=-1)
    turn = np.degrees(np.linalg.norm(so3_log(relative[:, :3, :3]), axis=-1))
    return float(np.percentile(move, 95)) * track.fps, float(np.percentile(turn, 95)) * track.fps


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
