"""Decides when the generation of the next chunk starts: as late as playback allows, to reflect the newest input."""

from collections import deque
from collections.abc import Callable

MARGIN = 0.03
"""Seconds between sending a chunk's first frame and its display, for the network and for jitter."""
WINDOW = 16
"""Number of recent chunks of whose costs the maximum is used."""


class ChunkScheduler:
    """Maps media time to the wall clock of `clock`, in seconds.

    Generation stays at most one chunk ahead of playback: chunk k starts no earlier than chunk k-1 is displayed. If the
    client acknowledges frames and has not reached chunk k-1 yet, chunk k waits for it, at most one chunk's duration.
    """

    def __init__(self, fps: float, frames: int, clock: Callable[[], float]) -> None:
        """`frames`: per chunk."""
        self.fps, self.frames, self.clock, self.speed = fps, frames, clock, 1.0
        self.costs: deque[float] = deque(maxlen=WINDOW)
        self.delays: deque[float] = deque(maxlen=WINDOW)
        self.restart()

    def restart(self) -> None:
        """Forget the playback position: the next chunk is due now."""
        self.display_start = self.display_end = self.clock()
        self.first_frame = 0
        self.shown: int | None = None
        """Newest frame that the client has acknowledged."""

    def chunk_done(self, first_frame: int, frames: int, cost: float = 0.0, delay: float | None = None) -> None:
        """A chunk has been sent: `frames` frames from index `first_frame`, generated in `cost` seconds (0: unknown).

        `delay`: seconds after the start of generation at which smooth display can start, `cost` if not given; less
        than that where frames are sent one latent at a time.
        """
        delay = cost if delay is None else delay
        self.display_start = max(self.clock() - cost + delay, self.display_end)
        self.display_end = self.display_start + frames / (self.fps * self.speed)
        self.first_frame = first_frame
        if cost:
            self.costs.append(cost)
            self.delays.append(delay)

    def wait(self) -> float:
        """Seconds until the next chunk should start; start now if not positive."""
        due = max(self.display_start, self.display_end - max(self.delays, default=0.0) - MARGIN)
        if self.shown is not None and self.shown < self.first_frame - 1:
            due = self.display_end + (self.display_end - self.display_start)
        return due - self.clock()

    @property
    def rate(self) -> float:
        """Media seconds per second: the speed, or less where generation is slower than playback."""
        mean = sum(self.costs) / max(len(self.costs), 1)
        return self.frames / self.fps / max(self.frames / (self.fps * self.speed), mean)
