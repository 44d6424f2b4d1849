"""Accumulates a client's input messages into one `Action` per chunk."""

from dataclasses import replace

import numpy as np

from minwm.cameras.trajectory import Action, Motion
from minwm.play.protocol import Input

NO_INPUT = Input()
MAX_LOOK_RATE = 2.0
"""Limit of mouse look, in multiples of the turning speed; at most one chunk's worth of the excess is carried over."""


class InputAccumulator:
    """The newest input, and the input of the past that no chunk has applied yet. Not thread-safe.

    An axis held at a chunk boundary acts for the whole chunk, before the user has held it that long: `ahead` is that
    difference (axis * seconds), which later input is set off against. On release the rest of it is dropped, never
    undone. Input between two boundaries is added to `pending`, so a tap of 30 ms moves the camera for 30 ms.
    """

    def __init__(self, motion: Motion) -> None:
        self.motion = motion
        self.reset()

    def reset(self, baseline: Input | None = NO_INPUT) -> None:
        """Release everything. Totals count from `baseline`; None: from the next input."""
        self.newest, self.has_baseline = baseline or NO_INPUT, baseline is not None
        self.clear()

    def clear(self) -> None:
        """Drop input that was not applied yet, as after a pause or a rewind; held axes stay held."""
        self.pending, self.ahead, self.look = np.zeros(6), np.zeros(6), np.zeros(2)

    def add(self, new: Input, rate: float = 1.0) -> None:
        """Ignores an input that is older than the newest. `rate`: media seconds per second of the client's clock."""
        if new.seq < self.newest.seq:
            return
        if not self.has_baseline:
            self.newest, self.has_baseline = new, True
        held = rate * np.subtract(new.total, self.newest.total)
        paid = np.where(held * self.ahead > 0, np.sign(held) * np.minimum(abs(held), abs(self.ahead)), 0)
        self.pending += held - paid
        self.ahead = np.where(np.array(new.held) * self.ahead > 0, self.ahead - paid, 0)
        self.look += np.subtract(new.look, self.newest.look)
        self.newest = new

    def take(self, seconds: float) -> Action:
        """The action of the next chunk, which lasts `seconds`."""
        held = seconds * np.array(self.newest.held)
        same_direction = held * self.pending > 0  # pressed shortly before the boundary: part of this chunk
        longer = np.where(abs(held) > abs(self.pending), held, self.pending)
        applied = np.where(same_direction, longer, held + self.pending)
        extra = applied - self.pending
        self.ahead += np.where(extra * held > 0, extra, 0)
        self.pending = np.zeros(6)
        action = Action(*(applied.clip(-seconds, seconds) / seconds).tolist())
        limit = MAX_LOOK_RATE * self.motion.turn * seconds  # degrees
        turned = self.look.clip(-limit, limit)
        self.look = (self.look - turned).clip(-limit, limit)
        if not turned.any():
            return action
        yaw, pitch = (turned / (self.motion.turn * seconds)).tolist()
        return replace(action, yaw=action.yaw + yaw, pitch=action.pitch + pitch)
