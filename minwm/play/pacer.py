"""When the next chunk is begun: as late as the screen allows, so that it reflects the newest input."""

from collections import deque
from collections.abc import Callable

SLACK = 0.03
"""Seconds between a chunk's frames leaving and the screen needing them: for the network, and for jitter."""
MEMORY = 16
"""Chunks whose cost is remembered; the dearest of them counts."""


class Pacer:
    """Media time on the wall clock.

    Never more than one chunk ahead of playback: chunk k is begun when chunk k-1 is due on the screen. If the screen
    says what it shows, and has not yet come there, the next chunk waits for it, but no longer than one would play.
    """

    def __init__(self, fps: float, frames: int, clock: Callable[[], float]) -> None:
        self.fps, self.frames, self.clock, self.speed = fps, frames, clock, 1.0
        self.costs: deque[float] = deque(maxlen=MEMORY)
        self.leads: deque[float] = deque(maxlen=MEMORY)
        self.restart()

    def restart(self) -> None:
        """Nothing has been made: the next chunk is due now."""
        self.begin = self.end = self.clock()
        self.first = 0
        self.shown: int | None = None

    def made(self, first: int, frames: int, cost: float = 0.0, lead: float | None = None) -> None:
        """Frames from number `first` on have left, made in `cost` seconds (0: not measured).

        The screen can begin with them `lead` seconds after they were begun, for the others come in time; else `cost`.
        """
        lead = cost if lead is None else lead
        self.begin = max(self.clock() - cost + lead, self.end)
        self.end = self.begin + frames / (self.fps * self.speed)
        self.first = first
        if cost:
            self.costs.append(cost)
            self.leads.append(lead)

    def wait(self) -> float:
        """Seconds until the next chunk is to be begun; not positive: now."""
        lead = max(self.leads, default=0.0) + SLACK
        due = max(self.begin, self.end - lead)
        if self.shown is not None and self.shown < self.first - 1:
            due = self.end + (self.end - self.begin)
        return due - self.clock()

    @property
    def rate(self) -> float:
        """Media seconds per second: the speed, or less where chunks take longer than they play."""
        mean = sum(self.costs) / max(len(self.costs), 1)
        return self.frames / self.fps / max(self.frames / (self.fps * self.speed), mean)
