"""A headless player, for scripts and tests: the page without a screen.

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
    Command,
    Error,
    FromClient,
    Header,
    Hello,
    Input,
    ProtocolError,
    Shown,
    State,
    Welcome,
    parse_reply,
    text_of,
    unpack,
)
from minwm.play.server import Transport


@dataclass(frozen=True)
class Shot:
    """A received frame."""

    header: Header
    payload: bytes

    @property
    def pixels(self) -> UInt8[np.ndarray, "h w 3"]:
        """Of a JPEG; H.264 needs a decoder that has seen what came before."""
        if self.header.kind != JPEG:
            raise ProtocolError("this frame is H.264; join with codecs=('jpeg',) to look at single frames")
        return read_image(io.BytesIO(self.payload))


class Client:
    """Knows what was held for how long, and keeps the newest state and the errors."""

    def __init__(self, transport: Transport, welcome: Welcome, clock: Callable[[], float]) -> None:
        self.transport, self.welcome, self.clock = transport, welcome, clock
        self.role, self.queue = welcome.role, welcome.queue
        self.state: State | None = None
        self.errors: list[Error] = []
        self.input, self.since = Input(), clock()

    @classmethod
    async def join(
        cls,
        transport: Transport,
        codecs: tuple[str, ...] = ("jpeg",),
        resume: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> "Client":
        """Say hello. Raises ProtocolError with the reason of a refusal."""
        await transport.send(text_of(Hello(v=VERSION, codecs=list(codecs), resume=resume)))
        reply = await transport.receive()
        answer = parse_reply(reply or "")
        if not isinstance(answer, Welcome):
            raise ProtocolError(answer.reason if isinstance(answer, Error) else f"unexpected {answer.kind}")
        return cls(transport, answer, clock)

    async def send(self, message: FromClient) -> None:
        await self.transport.send(text_of(message))

    async def command(self, name: Any) -> None:
        await self.send(Command(name=name))

    async def hold(self, action: Action, look: tuple[float, float] = (0.0, 0.0)) -> None:
        """Hold this from now on instead of what was held; `look` turns by degrees, at once."""
        now = self.clock()
        total = np.add(self.input.total, (now - self.since) * np.array(self.input.held))
        yaw, pitch = np.add(self.input.look, look).tolist()
        self.since = now
        self.input = Input(
            seq=self.input.seq + 1,
            t=1000 * now,
            held=cast(Axes, astuple(action)),
            total=cast(Axes, tuple(total.tolist())),
            look=(yaw, pitch),
        )
        await self.send(self.input)

    async def receive(self) -> Shot | State | Error | None:
        """The next message; None when the server has closed."""
        message = await self.transport.receive()
        if message is None or isinstance(message, bytes):
            return message if message is None else Shot(*unpack(message))
        answer = parse_reply(message)
        if isinstance(answer, Error):
            self.errors.append(answer)
        elif isinstance(answer, State):
            self.state, self.role, self.queue = answer, answer.role, answer.queue
        else:
            raise ProtocolError("welcome is said once")
        return answer

    async def frames(self, view: int | None = 0) -> AsyncIterator[Shot]:
        """Frames as they come, of one view or of all; the server is told that they were seen."""
        while (message := await self.receive()) is not None:
            if isinstance(message, Shot):
                await self.send(Shown(frame=message.header.frame))
                if view is None or message.header.view == view:
                    yield message
