"""What the player wants, integrated by duration: input states go in as they come, an action per chunk comes out."""

from dataclasses import replace

import numpy as np

from minwm.cameras.trajectory import Action, Motion
from minwm.play.protocol import Input

UNTOUCHED = Input()
LOOK = 2.0
"""The mouse turns at most this many times as fast as a held key; one chunk's worth of the rest waits its turn."""


class Intent:
    """The newest input, and what of all input no chunk has shown yet.

    What is held at a chunk's boundary acts for the whole chunk: `ahead` is how much of that was not yet made, and is
    not given again when it is. On release the rest of it is forgotten, never taken back. What was made between
    boundaries waits in `pending`, so a tap of 30 ms moves 30 ms worth.
    """

    def __init__(self, motion: Motion) -> None:
        self.motion = motion
        self.release()

    def release(self, counts_from: Input | None = UNTOUCHED) -> None:
        """Hands off. Whoever comes next counts from there; None: from the first input that comes."""
        self.newest, self.known = counts_from or Input(), counts_from is not None
        self.forget()

    def forget(self) -> None:
        """What was made until now moves nothing (a pause, a rewind); what is held stays held."""
        self.pending, self.ahead, self.look = np.zeros(6), np.zeros(6), np.zeros(2)

    def hear(self, said: Input, rate: float = 1.0) -> None:
        """Take note of an input unless a newer one is known. `rate`: media seconds per second of the client."""
        if said.seq < self.newest.seq:
            return
        if not self.known:
            self.newest, self.known = said, True
        made = rate * np.subtract(said.total, self.newest.total)
        paid = np.where(made * self.ahead > 0, np.sign(made) * np.minimum(abs(made), abs(self.ahead)), 0)
        self.pending += made - paid
        self.ahead = np.where(np.array(said.held) * self.ahead > 0, self.ahead - paid, 0)
        self.look += np.subtract(said.look, self.newest.look)
        self.newest = said

    def take(self, seconds: float) -> Action:
        """The action of the next chunk, which lasts so long."""
        held = seconds * np.array(self.newest.held)
        together = held * self.pending > 0  # a key held since shortly before the boundary: that is part of the chunk
        longer = np.where(abs(held) > abs(self.pending), held, self.pending)
        wanted = np.where(together, longer, held + self.pending)
        granted = wanted - self.pending
        self.ahead += np.where(granted * held > 0, granted, 0)
        self.pending = np.zeros(6)
        action = Action(*(wanted.clip(-seconds, seconds) / seconds).tolist())
        reach = LOOK * self.motion.turn * seconds  # degrees
        turned = self.look.clip(-reach, reach)
        self.look = (self.look - turned).clip(-reach, reach)
        if not turned.any():
            return action
        yaw, pitch = (turned / (self.motion.turn * seconds)).tolist()
        return replace(action, yaw=action.yaw + yaw, pitch=action.pitch + pitch)
