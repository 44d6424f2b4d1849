"""The play server: one generation loop, its player and its spectators, on one asyncio event loop.

Connections are `Transport`s, whatever carries them; the generation loop runs in a thread of its own.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

from minwm.core.config import UserError
from minwm.play.loop import NO_IMAGE, PlayLoop, StartImage
from minwm.play.protocol import (
    VERSION,
    ClientMessage,
    Error,
    Hello,
    Input,
    ProtocolError,
    Shown,
    Welcome,
    parse_client_message,
    to_json,
)
from minwm.play.scenario import Scenario
from minwm.play.send_queue import Codec, SendQueue

HELLO_TIMEOUT = 5.0
"""Seconds in which a connection must send hello, and must take the error that closes it."""
MAX_MESSAGES_PER_SECOND = 400
"""Of one client; the page sends at most 60 inputs, and a `shown` per frame."""
MAX_CLIENTS = 32
TICK = 0.25
"""Seconds between two checks of the timeouts."""

log = logging.getLogger("minwm.play")


@runtime_checkable
class Transport(Protocol):
    """A connection that delivers whole messages in order."""

    async def send(self, message: str | bytes) -> None:
        """Waits while the peer is slow. Raises ConnectionError when the connection is closed."""
        ...

    async def receive(self) -> str | bytes | None:
        """The next message; None when the connection is closed."""
        ...

    async def close(self) -> None: ...


@dataclass(eq=False)
class RemoteClient:
    """The server's record of a client; survives the loss of its connection."""

    queue: SendQueue
    transport: Transport
    ready: asyncio.Event
    """Set when the send queue has a message."""
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    """The `session` of the protocol: a secret with which the client reconnects."""
    disconnected_at: float | None = None


class PlayServer:
    """Serves one scenario. The first client plays, the others watch and wait for their turn."""

    def __init__(
        self,
        scenario: Scenario,
        rewind: int = 60,
        *,
        turn_limit: float = 180.0,
        reconnect_timeout: float = 3.0,
        idle_timeout: float = 300.0,
        rtc: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`rewind`: chunks that can be undone. In seconds: `turn_limit` for a player while others wait;
        `reconnect_timeout` until a disconnected player loses the turn to them; `idle_timeout` until a rollout without
        any client ends. `rtc`: whether clients may use WebRTC."""
        self.scenario, self.rewind, self.rtc, self.clock = scenario, rewind, rtc, clock
        self.turn_limit, self.reconnect_timeout, self.idle_timeout = turn_limit, reconnect_timeout, idle_timeout
        self.clients: list[RemoteClient] = []
        self.loop: PlayLoop | None = None
        self.turn_started = 0.0
        self.pool = ThreadPoolExecutor(1, "play-loop")

    # -----------------------------------------------------------------------------------------
    # Connections

    async def handle(self, transport: Transport) -> None:
        """Serve one connection until it is closed."""
        client = None
        try:
            client = await self._handshake(transport)
            sending = asyncio.create_task(self._send_loop(client, transport))
            try:
                await self._receive_loop(client, transport)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
        except ProtocolError as error:
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(HELLO_TIMEOUT):
                    await transport.send(to_json(Error(reason=str(error), fatal=True)))
        except ConnectionError:
            pass
        finally:
            if client and client.transport is transport:
                self._disconnect(client)
            await transport.close()

    async def _handshake(self, transport: Transport) -> RemoteClient:
        """Wait for hello, register or resume the client, and send welcome."""
        hello = await self._hello(transport)
        codec = self._codec(hello)
        event_loop, ready = asyncio.get_running_loop(), asyncio.Event()
        queue = SendQueue(codec, len(self.scenario.views), lambda: event_loop.call_soon_threadsafe(ready.set))
        client = next((client for client in self.clients if client.id == hello.resume), None)
        if client is None and len(self.clients) >= MAX_CLIENTS:
            raise ProtocolError(f"the server is full ({MAX_CLIENTS} clients); try again later")
        loop = self._running_loop(event_loop)
        if client:
            loop.detach(client.queue)
            client.queue.put_text(Error(reason="this session continues in another connection", fatal=True))
            client.transport, client.queue, client.ready, client.disconnected_at = transport, queue, ready, None
        else:
            client = RemoteClient(queue, transport, ready)
            self.clients.append(client)
            if client is self.clients[0]:
                self.turn_started = self.clock()
        if client is self.clients[0]:
            loop.reset_input()
        await transport.send(to_json(self._welcome(client, loop)))
        loop.attach(queue)
        self._broadcast_state()
        return client

    async def _hello(self, transport: Transport) -> Hello:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT):
                text = await transport.receive()
        except TimeoutError:
            raise ProtocolError(f"no hello within {HELLO_TIMEOUT:g} seconds") from None
        if text is None:
            raise ConnectionError
        hello = parse_client_message(text)
        if not isinstance(hello, Hello):
            raise ProtocolError("the first message must be hello")
        if hello.v != VERSION:
            raise ProtocolError(f"the server has protocol version {VERSION}, the page {hello.v}: reload the page")
        return hello

    def _codec(self, hello: Hello) -> Codec:
        """The first codec of the client's list that the server has; H.264 needs even frame sides."""
        even = self.scenario.config.width % 2 == 0 == self.scenario.config.height % 2
        for name in hello.codecs:
            if name == "jpeg" or (name == "h264" and even):
                return "h264" if name == "h264" else "jpeg"
        raise ProtocolError(f"no codec in common: this server has jpeg{' and h264' if even else ''}")

    def _welcome(self, client: RemoteClient, loop: PlayLoop) -> Welcome:
        role, queue_position = self._role(client)
        config = self.scenario.config
        return Welcome(
            session=client.id,
            role=role,
            queue_position=queue_position,
            codec=client.queue.codec,
            fps=config.motion.fps,
            width=config.width,
            height=config.height,
            chunk=loop.frames,
            views=list(self.scenario.views),
            title=self.scenario.title,
            prompt=loop.next_start.prompt,
            seed=loop.next_start.seed,
            turn=config.motion.turn,
            move=config.motion.move,
            rtc=self.rtc,
            capabilities=loop.capabilities,
        )

    async def _send_loop(self, client: RemoteClient, transport: Transport) -> None:
        queue, ready = client.queue, client.ready
        with contextlib.suppress(ConnectionError):
            while True:
                await ready.wait()
                ready.clear()
                while (message := queue.pop()) is not None:
                    await transport.send(message)
                if queue.closing:
                    break
        await transport.close()

    async def _receive_loop(self, client: RemoteClient, transport: Transport) -> None:
        second, count = 0.0, 0
        while (text := await transport.receive()) is not None:
            second, count = (second, count + 1) if self.clock() - second < 1 else (self.clock(), 1)
            if count > MAX_MESSAGES_PER_SECOND:
                raise ProtocolError(f"more than {MAX_MESSAGES_PER_SECOND} messages in a second")
            message = parse_client_message(text)
            if transport is client.transport:  # else it comes late: the session continues in another connection
                self._receive(client, message)

    def _receive(self, client: RemoteClient, message: ClientMessage) -> None:
        if isinstance(message, Hello):
            raise ProtocolError("only the first message may be hello")
        if self.loop is None:
            return
        if client is not self.clients[0]:
            if not isinstance(message, Input | Shown):
                client.queue.put_text(Error(reason="you are a spectator: only the player can give commands"))
        elif isinstance(message, Input):
            self.loop.set_input(message)
        elif isinstance(message, Shown):
            self.loop.set_shown(message.frame)
        else:
            try:
                self.loop.submit(message)
            except UserError as error:
                client.queue.put_text(Error(reason=str(error)))

    # -----------------------------------------------------------------------------------------
    # Clients and turns

    def client(self, session: str) -> RemoteClient:
        """The client of a session id; UserError if there is none."""
        for client in self.clients:
            if secrets.compare_digest(client.id.encode(), session.encode()):
                return client
        raise UserError("no such session; reload the page")

    def set_start_image(self, session: str, image: StartImage) -> None:
        """Restart from an image. Raises UserError unless `session` is the player's, and the scenario takes an image."""
        if self.client(session) is not self.clients[0] or self.loop is None:
            raise UserError("you are a spectator: only the player can set the start image")
        if not self.scenario.takes_image:
            raise UserError(NO_IMAGE)
        self.loop.submit(image)

    def _role(self, client: RemoteClient) -> tuple[Literal["player", "spectator"], int]:
        """Role and queue position."""
        position = self.clients.index(client)
        return ("spectator" if position else "player"), position

    def _disconnect(self, client: RemoteClient) -> None:
        """Remove a spectator; keep the player for a reconnect, with all axes released."""
        if self.loop:
            self.loop.detach(client.queue)
        if client not in self.clients:
            return
        client.disconnected_at = self.clock()
        if client is not self.clients[0]:
            self.clients.remove(client)
        elif self.loop:
            self.loop.reset_input()
        self._broadcast_state()

    async def run_timers(self) -> None:
        """Check the timeouts until cancelled."""
        while True:
            self.check_timeouts()
            await asyncio.sleep(TICK)

    def check_timeouts(self) -> None:
        """Pass the turn on, and end a rollout without clients, where the time is up."""
        if not self.clients:
            return
        now, player = self.clock(), self.clients[0]
        away = 0.0 if player.disconnected_at is None else now - player.disconnected_at
        if len(self.clients) == 1:
            self.turn_started = now
            if away > self.idle_timeout:
                self._stop_loop()
        elif away > self.reconnect_timeout or now - self.turn_started > self.turn_limit:
            self.clients.pop(0)
            if player.disconnected_at is None:
                self.clients.append(player)
            self.turn_started = now
            if self.loop:
                self.loop.reset_input(joined=False)
            self._broadcast_state()

    def _broadcast_state(self) -> None:
        if self.loop:
            state = self.loop.state()
            for client in self.clients:
                role, queue_position = self._role(client)
                client.queue.put_text(replace(state, role=role, queue_position=queue_position))

    def _send_error(self, reason: str) -> None:
        """Tell the player why a command failed."""
        if self.clients:
            self.clients[0].queue.put_text(Error(reason=reason))

    # -----------------------------------------------------------------------------------------
    # The generation loop

    def _running_loop(self, event_loop: asyncio.AbstractEventLoop) -> PlayLoop:
        """The generation loop; started if there is none."""
        if self.loop is None:
            self.loop = loop = PlayLoop(
                self.scenario,
                self.rewind,
                on_state=lambda: event_loop.call_soon_threadsafe(self._broadcast_state),
                on_error=lambda reason: event_loop.call_soon_threadsafe(self._send_error, reason),
            )
            future = self.pool.submit(loop.run)
            future.add_done_callback(lambda done: event_loop.call_soon_threadsafe(self._loop_ended, loop, done))
        return self.loop

    def _loop_ended(self, loop: PlayLoop, done: Future[None]) -> None:
        """If the loop failed, report it to all clients and disconnect them; the next hello starts a new loop."""
        error = done.exception()
        if error is None or loop is not self.loop:
            return
        log.error("generation failed", exc_info=error)
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        for client in self.clients:
            client.queue.put_text(Error(reason=f"generation failed ({what[:200]}); reload to start again", fatal=True))
        self._stop_loop()

    def _stop_loop(self) -> None:
        if self.loop:
            self.loop.close()
        self.loop, self.clients = None, []

    async def close(self) -> None:
        """Close all connections and wait for the generation thread."""
        transports = [client.transport for client in self.clients]
        self._stop_loop()
        for transport in transports:
            await transport.close()
        await asyncio.to_thread(self.pool.shutdown)
