"""Encoders, one per view and codec, and the bounded send queue of each client."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from minwm.core.media import Frame, H264Encoder, jpeg_bytes
from minwm.play.protocol import H264, H264_KEY, JPEG, Error, Header, State, to_json

Codec = Literal["jpeg", "h264"]
MAX_QUEUED_CHUNKS = 2
"""Chunks that may wait in a send queue; beyond it the oldest is dropped."""
MAX_QUEUED_TEXTS = 16
SMALL = 256 * 256
"""Pixels up to which frames are encoded at high quality: the page enlarges them."""


class Encoder:
    """Encodes the frames of one view for all clients of one codec."""

    def __init__(self, codec: Codec, height: int, width: int, fps: float) -> None:
        small = height * width <= SMALL
        self.video = H264Encoder(height, width, fps, crf=14 if small else 23) if codec == "h264" else None
        self.quality = 92 if small else 80

    def __call__(self, frame: Frame, key: bool) -> tuple[int, bytes]:
        """Kind (see `Header`) and payload; `key` requests a key frame."""
        if self.video is None:
            return JPEG, jpeg_bytes(frame, self.quality)
        payload, is_key = self.video.encode(frame, key)
        return H264_KEY if is_key else H264, payload


@dataclass(frozen=True, eq=False)
class Packet:
    """An encoded frame. `serial` numbers the chunks as they were generated; unlike `header.chunk` it only grows."""

    serial: int
    header: Header
    payload: bytes


class SendQueue:
    """Messages waiting to be sent to one client. Thread-safe; putting never blocks: a slow client loses old frames."""

    def __init__(self, codec: Codec, views: int, on_put: Callable[[], object]) -> None:
        """`on_put` is called from the putting thread after each message."""
        self.codec: Codec = codec
        self.on_put = on_put
        self.packets: deque[Packet] = deque()
        self.texts: dict[str, str] = {}
        self.closing = False
        """A fatal error is queued; nothing is sent after the texts."""
        self._views, self._lock = set(range(views)), threading.Lock()
        self._unflushed = set(self._views)  # views whose next frame must have the flush flag
        self._undecodable = set(self._views) if codec == "h264" else set()

    @property
    def needs_key_frame(self) -> bool:
        """Whether some view cannot be decoded until its next key frame."""
        return bool(self._undecodable)

    def put_frame(self, packet: Packet) -> None:
        header = packet.header
        with self._lock:
            if header.flush:
                self._drop([waiting for waiting in self.packets if waiting.serial < packet.serial])
            if header.kind == H264_KEY:
                self._undecodable.discard(header.view)
            if header.view in self._undecodable:
                return
            self.packets.append(packet)
            if len(serials := sorted({waiting.serial for waiting in self.packets})) > MAX_QUEUED_CHUNKS:
                late = [w for w in self.packets if self.codec == "h264" or w.serial == serials[0]]
                self._drop(late)
                if self.codec == "h264":  # each frame depends on the one before
                    self._undecodable = set(self._views)
        self.on_put()

    def _drop(self, late: list[Packet]) -> None:
        self._unflushed |= {packet.header.view for packet in late if packet.header.flush}
        self.packets = deque(packet for packet in self.packets if packet not in late)

    def put_text(self, message: State | Error) -> None:
        """Texts are sent before frames. A state replaces the one that waits."""
        with self._lock:
            key = message.reason if isinstance(message, Error) else message.kind
            self.texts.pop(key, None)
            self.texts[key] = to_json(message)
            if len(self.texts) > MAX_QUEUED_TEXTS:
                del self.texts[next(iter(self.texts))]
            self.closing |= isinstance(message, Error) and message.fatal
        self.on_put()

    def pop(self) -> str | bytes | None:
        """The next message to send; None if the queue is empty."""
        with self._lock:
            if self.texts:
                return self.texts.pop(next(iter(self.texts)))
            if self.packets and not self.closing:
                packet = self.packets.popleft()
                header = replace(packet.header, flush=packet.header.flush or packet.header.view in self._unflushed)
                self._unflushed.discard(header.view)
                return header.pack() + packet.payload
            return None
