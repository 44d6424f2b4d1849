"""Frames on their way to clients: encoded once per codec, and what waits for each client, bounded."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from minwm.core.media import Frame, LiveVideo, jpeg
from minwm.play.protocol import H264, H264_KEY, JPEG, Error, Header, State, text_of

Codec = Literal["jpeg", "h264"]
WAITING_CHUNKS = 2
"""Chunks that may wait for one client; the oldest gives way."""
WAITING_TEXTS = 16
SMALL = 256 * 256
"""Pixels up to which a picture is kept in every detail: it will be looked at enlarged."""


class Encoder:
    """The frames of one view for all clients of one codec."""

    def __init__(self, codec: Codec, height: int, width: int, fps: float) -> None:
        small = height * width <= SMALL
        self.video = LiveVideo(height, width, fps, crf=14 if small else 23) if codec == "h264" else None
        self.quality = 92 if small else 80

    def __call__(self, frame: Frame, key: bool) -> tuple[int, bytes]:
        """Kind and payload; `key`: a decoder must be able to begin here."""
        if self.video is None:
            return JPEG, jpeg(frame, self.quality)
        payload, is_key = self.video.encode(frame, key)
        return H264_KEY if is_key else H264, payload


@dataclass(frozen=True, eq=False)
class Packet:
    """An encoded frame. `serial` counts chunks as they were made, and never goes back."""

    serial: int
    header: Header
    payload: bytes


class Outlet:
    """What waits for one client. Putting something in never blocks, however slow the client is.

    `wake` is called, from any thread, when there is something to send.
    """

    def __init__(self, codec: Codec, views: int, wake: Callable[[], object]) -> None:
        self.codec: Codec = codec
        self.wake = wake
        self.frames: deque[Packet] = deque()
        self.texts: dict[str, str] = {}
        self.closing = False
        """A fatal error is the last thing that this client hears."""
        self._views, self._lock = set(range(views)), threading.Lock()
        self._fresh = set(self._views)  # views of which the client must discard what it has
        self._undecodable = set(self._views) if codec == "h264" else set()

    @property
    def wants_key(self) -> bool:
        """Nothing can be decoded until a key frame comes."""
        return bool(self._undecodable)

    def put(self, packet: Packet) -> None:
        header = packet.header
        with self._lock:
            if header.first:
                self._drop([waiting for waiting in self.frames if waiting.serial < packet.serial])
            if header.kind == H264_KEY:
                self._undecodable.discard(header.view)
            if header.view in self._undecodable:
                return
            self.frames.append(packet)
            if len(serials := sorted({waiting.serial for waiting in self.frames})) > WAITING_CHUNKS:
                late = [w for w in self.frames if self.codec == "h264" or w.serial == serials[0]]
                self._drop(late)
                if self.codec == "h264":  # each frame needs the one before
                    self._undecodable = set(self._views)
        self.wake()

    def _drop(self, late: list[Packet]) -> None:
        self._fresh |= {packet.header.view for packet in late if packet.header.first}
        self.frames = deque(packet for packet in self.frames if packet not in late)

    def say(self, message: State | Error) -> None:
        """Texts go before frames. Of states only the newest counts."""
        with self._lock:
            key = message.reason if isinstance(message, Error) else message.kind
            self.texts.pop(key, None)
            self.texts[key] = text_of(message)
            if len(self.texts) > WAITING_TEXTS:
                del self.texts[next(iter(self.texts))]
            self.closing |= isinstance(message, Error) and message.fatal
        self.wake()

    def pop(self) -> str | bytes | None:
        """The next message to send, if any."""
        with self._lock:
            if self.texts:
                return self.texts.pop(next(iter(self.texts)))
            if self.frames and not self.closing:
                packet = self.frames.popleft()
                header = replace(packet.header, first=packet.header.first or packet.header.view in self._fresh)
                self._fresh.discard(header.view)
                return header.pack() + packet.payload
            return None
