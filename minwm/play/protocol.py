"""What page and server say to each other, version 1: JSON texts, and one binary message per frame and view.

Texts are parsed once, here, into the dataclasses below; what passes is well-formed. On the wire a message is its
fields and its `type` (here its kind); of a command with an argument, the kind is type and name.
"""

import json
import struct
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float

from minwm.core.config import ConfigError, UserError, from_dict, to_dict

VERSION = 1
TEXT_LIMIT = 16 * 1024
"""Bytes of a text from a client."""
PROMPT_LIMIT = 1000
"""Characters."""
REASON_LIMIT = 300
"""Characters of a reason; not all of a hostile message needs to come back."""

Axes = tuple[float, float, float, float, float, float]
"""In the order of `Action`: right, up, forward, yaw right, pitch up, roll clockwise."""
STILL: Axes = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class ProtocolError(UserError):
    """The other side did not keep to the protocol: its connection ends with this reason."""


def _within(name: str, value: float | tuple[float, ...], low: float, high: float) -> None:
    values = value if isinstance(value, tuple) else (value,)
    if not all(low <= v <= high for v in values):  # false for nan too
        raise ConfigError(f"{name} = {value}: give {low:g} to {high:g}")


# ---------------------------------------------------------------------------------------------
# From the client


@dataclass(frozen=True, kw_only=True)
class Hello:
    """The first message."""

    kind: ClassVar[str] = "hello"
    v: int
    codecs: list[str]
    """Best first."""
    resume: str | None = None
    """The session that a lost connection had."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """What is held now, and all that was done since hello."""

    kind: ClassVar[str] = "input"
    seq: int = 0
    t: float = 0.0
    """The client's clock, ms."""
    held: Axes = STILL
    """Intent now, each in [-1, 1]."""
    total: Axes = STILL
    """Integral of `held` over the client's time since hello, seconds."""
    look: tuple[float, float] = (0.0, 0.0)
    """Mouse look since hello, degrees: yaw right, pitch up."""

    def __post_init__(self) -> None:
        _within("seq", self.seq, 0, 2**32 - 1)
        _within("held", self.held, -1, 1)
        for name, value in (("t", self.t), ("total", self.total), ("look", self.look)):
            _within(name, value, -1e12, 1e12)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The newest frame on the screen."""

    kind: ClassVar[str] = "shown"
    frame: int


@dataclass(frozen=True, kw_only=True)
class Command:
    kind: ClassVar[str] = "command"
    name: Literal["pause", "resume", "step", "reset", "record", "stop", "branch", "replay"]


@dataclass(frozen=True, kw_only=True)
class Rewind:
    kind: ClassVar[str] = "command rewind"
    chunks: int

    def __post_init__(self) -> None:
        _within("chunks", self.chunks, 1, 1_000_000)


@dataclass(frozen=True, kw_only=True)
class Seed:
    kind: ClassVar[str] = "command seed"
    value: int

    def __post_init__(self) -> None:
        _within("seed", self.value, 0, 2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class Speed:
    kind: ClassVar[str] = "command speed"
    value: float

    def __post_init__(self) -> None:
        _within("speed", self.value, 0.25, 4)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    kind: ClassVar[str] = "command prompt"
    text: str

    def __post_init__(self) -> None:
        self.text.encode()  # half of a surrogate pair is no text: a ValueError
        if not self.text.strip() or len(self.text) > PROMPT_LIMIT:
            raise ConfigError(f"a prompt of {len(self.text)} characters: give 1 to {PROMPT_LIMIT}")


Order = Command | Rewind | Seed | Speed | Prompt
FromClient = Hello | Input | Shown | Order
WITH_ARGUMENT = tuple(order.kind.split()[1] for order in (Rewind, Seed, Speed, Prompt))

# ---------------------------------------------------------------------------------------------
# From the server


@dataclass(frozen=True, kw_only=True)
class Can:
    """What this game lets the player do."""

    prompt: bool
    image: bool
    rewind: int
    """Chunks that are kept for it."""


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The answer to hello."""

    kind: ClassVar[str] = "welcome"
    v: int = VERSION
    session: str
    role: Literal["player", "spectator"]
    queue: int
    """Turns before one's own."""
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
    """Degrees per second."""
    move: float
    """World units per second."""
    rtc: bool
    """The same conversation can be had over WebRTC: POST an offer to /rtc, and say hello again there."""
    can: Can


@dataclass(frozen=True, kw_only=True)
class State:
    kind: ClassVar[str] = "state"
    paused: bool
    recording: bool
    chunk: int
    rewind: int
    """Chunks that can be undone now."""
    speed: float
    seed: int
    prompt: str
    role: Literal["player", "spectator"] = "spectator"
    queue: int = 0


@dataclass(frozen=True, kw_only=True)
class Error:
    kind: ClassVar[str] = "error"
    reason: str
    fatal: bool = False
    """The server closes after it."""


FromServer = Welcome | State | Error


def text_of(message: FromClient | FromServer) -> str:
    values = to_dict(message)
    kind, _, name = values.pop("kind").partition(" ")
    return json.dumps({"type": kind, **({"name": name} if name else {}), **values})


def parse(text: str | bytes) -> FromClient:
    """A client's text; ProtocolError for anything else."""
    return _parse(text, TEXT_LIMIT, FromClient)


def parse_reply(text: str | bytes) -> FromServer:
    """A server's text; ProtocolError for anything else."""
    return _parse(text, 1 << 20, FromServer)


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
        if kind == Command.kind and values.get("name") in WITH_ARGUMENT:
            kind = f"{kind} {values.pop('name')}"
        return from_dict(union, {"kind": kind, **values})
    except (ValueError, TypeError, RecursionError, OverflowError, ConfigError) as error:
        reason, half = str(error), REASON_LIMIT // 2
        brief = reason if len(reason) <= REASON_LIMIT else f"{reason[: half - 5]} ... {reason[-half:]}"
        raise ProtocolError(brief) from None


# ---------------------------------------------------------------------------------------------
# Frames

JPEG, H264_KEY, H264 = 0, 1, 2
MAGIC = b"MW"
LAYOUT = struct.Struct("<2s4BH4I2d5f12f")
"""magic, version, kind, view, flags, 0, frame, chunk, seq, seed, media, t, times, pose: 108 bytes."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds on the way of a chunk (`encode`: of a frame) from the input to the wire."""

    queue: float = 0.0
    """The newest input, from its arrival to the chunk that reflects it; 0 if that was held all along."""
    diffuse: float = 0.0
    """For a rendered view: render."""
    decode: float = 0.0
    copy: float = 0.0
    encode: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Header:
    """All that is known about one frame."""

    kind: int
    view: int
    first: bool
    """The first frame after a start, reset or rewind: discard what waits."""
    frame: int
    """Counted in the walk: a rewind goes back."""
    chunk: int
    seq: int
    """The input that this frame reflects."""
    seed: int
    media: float
    """Media time since the start, ms."""
    t: float
    """The client's clock of that input, ms."""
    times: Times
    c2w: Float[np.ndarray, "4 4"]
    """OpenCV, relative to the first frame."""

    def pack(self) -> bytes:
        counts = self.frame, self.chunk, self.seq, self.seed
        start = MAGIC, VERSION, self.kind, self.view, int(self.first), 0
        return LAYOUT.pack(*start, *counts, self.media, self.t, *astuple(self.times), *self.c2w[:3].ravel())


def replaceable(message: str | bytes) -> bool:
    """Whether the next frame makes up for the loss of this message: a JPEG that begins nothing."""
    return isinstance(message, bytes) and (message[3:4], message[5:6]) == (bytes([JPEG]), b"\0")


def unpack(message: bytes) -> tuple[Header, bytes]:
    """A binary message as its header and its payload."""
    if len(message) < LAYOUT.size or message[:3] != MAGIC + bytes([VERSION]):
        raise ProtocolError(f"{len(message)} bytes that are no frame of version {VERSION}")
    _, _, kind, view, flags, _, frame, chunk, seq, seed, media, t, *rest = LAYOUT.unpack_from(message)
    pose = np.eye(4)
    pose[:3] = np.array(rest[5:]).reshape(3, 4)
    header = Header(
        kind=kind,
        view=view,
        first=bool(flags & 1),
        frame=frame,
        chunk=chunk,
        seq=seq,
        seed=seed,
        media=media,
        t=t,
        times=Times(**dict(zip(Times.__annotations__, rest[:5], strict=True))),
        c2w=pose,
    )
    return header, message[LAYOUT.size :]
