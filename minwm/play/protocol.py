"""The wire protocol between page and server, version 2: JSON text messages, and one binary message per frame and view.

The dataclasses below are the text messages; parsing validates them. A message is sent as a JSON object with its fields
and a `type`. `kind` is that type; for a command with an argument, the type and the command's name ("command rewind").
"""

import json
import struct
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float

from minwm.core.config import ConfigError, UserError, from_dict, to_dict

VERSION = 2
TEXT_LIMIT = 16 * 1024
"""Maximum size of a text message from a client, bytes."""
PROMPT_LIMIT = 1000
"""Maximum length of a prompt, characters."""
REASON_LIMIT = 300
"""Maximum length of an error reason, characters."""

Axes = tuple[float, float, float, float, float, float]
"""In the order of `Action`'s fields: right, up, forward, yaw right, pitch up, roll clockwise."""
ZERO_AXES: Axes = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class ProtocolError(UserError):
    """The peer violated the protocol; its connection is closed with this reason."""


def _check_range(name: str, value: float | tuple[float, ...], low: float, high: float) -> None:
    values = value if isinstance(value, tuple) else (value,)
    if not all(low <= v <= high for v in values):  # also rejects NaN
        raise ConfigError(f"{name} = {value}: give {low:g} to {high:g}")


# ---------------------------------------------------------------------------------------------
# Messages from the client


@dataclass(frozen=True, kw_only=True)
class Hello:
    """The first message of a connection."""

    kind: ClassVar[str] = "hello"
    v: int
    """Protocol version."""
    codecs: list[str]
    """Supported codecs in order of preference."""
    resume: str | None = None
    """Session id of a lost connection that this one continues."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """Axes held now, and totals since hello: the newest message stands for all before it, so that none is missed."""

    kind: ClassVar[str] = "input"
    seq: int = 0
    t: float = 0.0
    """Client clock, ms."""
    held: Axes = ZERO_AXES
    """Current value of each axis, in [-1, 1]."""
    total: Axes = ZERO_AXES
    """Integral of `held` over the client clock since hello, seconds."""
    look: tuple[float, float] = (0.0, 0.0)
    """Accumulated mouse look since hello, degrees: yaw right, pitch up."""

    def __post_init__(self) -> None:
        _check_range("seq", self.seq, 0, 2**32 - 1)
        _check_range("held", self.held, -1, 1)
        for name, value in (("t", self.t), ("total", self.total), ("look", self.look)):
            _check_range(name, value, -1e12, 1e12)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Acknowledgement: the index of the newest frame on the screen."""

    kind: ClassVar[str] = "shown"
    frame: int


@dataclass(frozen=True, kw_only=True)
class SimpleCommand:
    """A command without an argument."""

    kind: ClassVar[str] = "command"
    name: Literal["pause", "resume", "step", "reset", "record", "stop", "branch", "replay"]


@dataclass(frozen=True, kw_only=True)
class Rewind:
    """Undo this many chunks."""

    kind: ClassVar[str] = "command rewind"
    chunks: int

    def __post_init__(self) -> None:
        _check_range("chunks", self.chunks, 1, 1_000_000)


@dataclass(frozen=True, kw_only=True)
class Seed:
    """Restart with another noise seed (a rendered world: another world)."""

    kind: ClassVar[str] = "command seed"
    value: int

    def __post_init__(self) -> None:
        _check_range("seed", self.value, 0, 2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Playback speed relative to the model's frame rate."""

    kind: ClassVar[str] = "command speed"
    value: float

    def __post_init__(self) -> None:
        _check_range("speed", self.value, 0.25, 4)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Another prompt, from the next chunk on."""

    kind: ClassVar[str] = "command prompt"
    text: str

    def __post_init__(self) -> None:
        self.text.encode()  # ValueError for a lone surrogate
        if not self.text.strip() or len(self.text) > PROMPT_LIMIT:
            raise ConfigError(f"a prompt of {len(self.text)} characters: give 1 to {PROMPT_LIMIT}")


Command = SimpleCommand | Rewind | Seed | Speed | Prompt
ClientMessage = Hello | Input | Shown | Command
ARGUMENT_COMMANDS = tuple(command.kind.split()[1] for command in (Rewind, Seed, Speed, Prompt))

# ---------------------------------------------------------------------------------------------
# Messages from the server


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What the player can change."""

    camera: bool
    prompt: bool
    image: bool
    rewind: int
    """Maximum number of chunks that can be undone."""


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The answer to hello."""

    kind: ClassVar[str] = "welcome"
    v: int = VERSION
    session: str
    role: Literal["player", "spectator"]
    queue_position: int
    """Number of clients whose turn comes first; 0 for the player."""
    codec: Literal["jpeg", "h264"]
    fps: float
    width: int
    height: int
    chunk: int
    """Frames per chunk."""
    views: list[str]
    title: str
    prompt: str
    seed: int
    turn: float
    """Turning speed, degrees per second."""
    move: float
    """Moving speed, world units per second."""
    rtc: bool
    """Whether WebRTC is available: POST an SDP offer to /rtc, then send hello on the data channel."""
    capabilities: Capabilities


@dataclass(frozen=True, kw_only=True)
class State:
    """Sent after every change and every chunk."""

    kind: ClassVar[str] = "state"
    paused: bool
    recording: bool
    chunk: int
    """Chunks generated since the start."""
    rewind: int
    """Chunks that can be undone now."""
    speed: float
    seed: int
    prompt: str
    role: Literal["player", "spectator"] = "spectator"
    queue_position: int = 0


@dataclass(frozen=True, kw_only=True)
class Error:
    kind: ClassVar[str] = "error"
    reason: str
    fatal: bool = False
    """Whether the server closes the connection after this message."""


ServerMessage = Welcome | State | Error


def to_json(message: ClientMessage | ServerMessage) -> str:
    values = to_dict(message)
    kind, _, name = values.pop("kind").partition(" ")
    return json.dumps({"type": kind, **({"name": name} if name else {}), **values})


def parse_client_message(text: str | bytes) -> ClientMessage:
    """Raises ProtocolError for anything but a valid client message."""
    return _parse(text, TEXT_LIMIT, ClientMessage)


def parse_server_message(text: str | bytes) -> ServerMessage:
    """Raises ProtocolError for anything but a valid server message."""
    return _parse(text, 1 << 20, ServerMessage)


def _parse(text: str | bytes, limit: int, union: Any) -> Any:
    if not isinstance(text, str):
        raise ProtocolError("a binary message where a text is expected")
    if len(text.encode("utf-8", "surrogatepass")) > limit:
        raise ProtocolError(f"a text of {len(text)} characters; at most {limit} bytes")
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or not isinstance(values.get("type"), str) or "kind" in values:
            raise ProtocolError('a message is a JSON object with a "type"')
        kind = values.pop("type")
        if kind == SimpleCommand.kind and values.get("name") in ARGUMENT_COMMANDS:
            kind = f"{kind} {values.pop('name')}"
        return from_dict(union, {"kind": kind, **values})
    except (ValueError, TypeError, RecursionError, OverflowError, ConfigError) as error:
        reason, half = str(error), REASON_LIMIT // 2
        brief = reason if len(reason) <= REASON_LIMIT else f"{reason[: half - 5]} ... {reason[-half:]}"
        raise ProtocolError(brief) from None


# ---------------------------------------------------------------------------------------------
# Binary messages: a header and an encoded frame

JPEG, H264_KEY, H264 = 0, 1, 2
MAGIC = b"MW"
HEADER_STRUCT = struct.Struct("<2s4BH4I2d5f12f")
"""magic, version, kind, view, flags, 0, frame, chunk, seq, seed, media, t, times, pose; little-endian, 108 bytes."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Durations between an input's arrival and sending the frame, milliseconds; of the chunk, except `encode`."""

    queue: float = 0.0
    """From the arrival of the newest input to the start of the chunk; 0 if no input arrived since the last chunk."""
    diffuse: float = 0.0
    """Denoising; for a rendered view, rendering."""
    decode: float = 0.0
    copy: float = 0.0
    """Device to host."""
    encode: float = 0.0
    """JPEG or H.264 encoding of this frame."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Header:
    """Metadata of one frame."""

    kind: int
    """JPEG, H264_KEY or H264."""
    view: int
    flush: bool
    """First frame after a start, reset or rewind: the client discards the frames that it has queued."""
    frame: int
    """Frame index since the start; a rewind moves it back."""
    chunk: int
    seq: int
    """Sequence number of the input that this frame reflects."""
    seed: int
    media: float
    """Media time since the start, ms."""
    t: float
    """Client clock of that input, ms."""
    times: Times
    c2w: Float[np.ndarray, "4 4"]
    """Camera-to-world, OpenCV axes, relative to the first frame."""

    def pack(self) -> bytes:
        counts = self.frame, self.chunk, self.seq, self.seed
        start = MAGIC, VERSION, self.kind, self.view, int(self.flush), 0
        return HEADER_STRUCT.pack(*start, *counts, self.media, self.t, *astuple(self.times), *self.c2w[:3].ravel())


def droppable(message: str | bytes) -> bool:
    """Whether losing this message does no lasting harm: true for a JPEG frame without the flush flag."""
    return isinstance(message, bytes) and (message[3:4], message[5:6]) == (bytes([JPEG]), b"\0")


def unpack(message: bytes) -> tuple[Header, bytes]:
    """Split a binary message into header and payload. Raises ProtocolError if it is not a frame of this version."""
    if len(message) < HEADER_STRUCT.size or message[:3] != MAGIC + bytes([VERSION]):
        raise ProtocolError(f"{len(message)} bytes that are not a frame of protocol version {VERSION}")
    _, _, kind, view, flags, _, frame, chunk, seq, seed, media, t, *rest = HEADER_STRUCT.unpack_from(message)
    pose = np.eye(4)
    pose[:3] = np.array(rest[5:]).reshape(3, 4)
    header = Header(
        kind=kind,
        view=view,
        flush=bool(flags & 1),
        frame=frame,
        chunk=chunk,
        seq=seq,
        seed=seed,
        media=media,
        t=t,
        times=Times(**dict(zip(Times.__annotations__, rest[:5], strict=True))),
        c2w=pose,
    )
    return header, message[HEADER_STRUCT.size :]
