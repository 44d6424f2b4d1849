"""A headless client of the play server, for scripts and tests.

async with connect(url) as transport:
    client = await Client.join(transport)
    await client.hold(Action.of("w"))
    async for frame in client.frames():
        frame.pixels    # h w 3 uint8
"""

import io
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import astuple, dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import UInt8

from minwm.cameras.trajectory import Action
from minwm.core.media import read_image
from minwm.play.protocol import (
    JPEG,
    VERSION,
    Axes,
    ClientMessage,
    Error,
    Header,
    Hello,
    Input,
    ProtocolError,
    Shown,
    SimpleCommand,
    State,
    Welcome,
    parse_server_message,
    to_json,
    unpack,
)
from minwm.play.server import Transport


@dataclass(frozen=True)
class ReceivedFrame:
    """A received frame."""

    header: Header
    payload: bytes

    @property
    def pixels(self) -> UInt8[np.ndarray, "h w 3"]:
        """The decoded image. Raises ProtocolError for H.264, which needs a decoder with the frames before."""
        if self.header.kind != JPEG:
            raise ProtocolError("a single H.264 frame cannot be decoded; join with codecs=('jpeg',)")
        return read_image(io.BytesIO(self.payload))


class Client:
    """Integrates its input over time as the protocol asks, and keeps the newest state and all errors."""

    def __init__(self, transport: Transport, welcome: Welcome, clock: Callable[[], float]) -> None:
        self.transport, self.welcome, self.clock = transport, welcome, clock
        self.role, self.queue_position = welcome.role, welcome.queue_position
        self.state: State | None = None
        self.errors: list[Error] = []
        self.input, self.input_time = Input(), clock()

    @classmethod
    async def join(
        cls,
        transport: Transport,
        codecs: tuple[str, ...] = ("jpeg",),
        resume: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> "Client":
        """Send hello and wait for welcome. Raises ProtocolError with the server's reason if it refuses."""
        await transport.send(to_json(Hello(v=VERSION, codecs=list(codecs), resume=resume)))
        reply = await transport.receive()
        answer = parse_server_message(reply or "")
        if not isinstance(answer, Welcome):
            raise ProtocolError(answer.reason if isinstance(answer, Error) else f"unexpected {answer.kind}")
        return cls(transport, answer, clock)

    async def send(self, message: ClientMessage) -> None:
        await self.transport.send(to_json(message))

    async def command(self, name: Any) -> None:
        await self.send(SimpleCommand(name=name))

    async def hold(self, action: Action, look: tuple[float, float] = (0.0, 0.0)) -> None:
        """Replace the held axes; `look` turns the camera by degrees to the right and up."""
        now = self.clock()
        total = np.add(self.input.total, (now - self.input_time) * np.array(self.input.held))
        yaw, pitch = np.add(self.input.look, look).tolist()
        self.input_time = now
        self.input = Input(
            seq=self.input.seq + 1,
            t=1000 * now,
            held=cast(Axes, astuple(action)),
            total=cast(Axes, tuple(total.tolist())),
            look=(yaw, pitch),
        )
        await self.send(self.input)

    async def receive(self) -> ReceivedFrame | State | Error | None:
        """The next message; None when the server has closed the connection."""
        message = await self.transport.receive()
        if message is None or isinstance(message, bytes):
            return message if message is None else ReceivedFrame(*unpack(message))
        answer = parse_server_message(message)
        if isinstance(answer, Error):
            self.errors.append(answer)
        elif isinstance(answer, State):
            self.state, self.role, self.queue_position = answer, answer.role, answer.queue_position
        else:
            raise ProtocolError("a second welcome")
        return answer

    async def frames(self, view: int | None = 0) -> AsyncIterator[ReceivedFrame]:
        """Frames of one view (None: of all views), each acknowledged as shown."""
        while (message := await self.receive()) is not None:
            if isinstance(message, ReceivedFrame):
                await self.send(Shown(frame=message.header.frame))
                if view is None or message.header.view == view:
                    yield message
