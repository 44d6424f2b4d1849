"""The house: who plays, who watches, whose turn is next; and one conversation with each of them.

All of it runs on one event loop and knows connections only as `Transport`s; the walk itself runs in a thread.
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
from minwm.play.game import Game
from minwm.play.player import Picture, Player
from minwm.play.protocol import (
    VERSION,
    Error,
    Hello,
    Input,
    ProtocolError,
    Shown,
    Welcome,
    parse,
    text_of,
)
from minwm.play.video import Codec, Outlet

HELLO_WITHIN = 5.0
"""Seconds that a connection has for its first message."""
MESSAGES_PER_SECOND = 400
"""A page sends at most 60 inputs, and a `shown` per frame."""
SEATS = 32
TICK = 0.25

log = logging.getLogger("minwm.play")


@runtime_checkable
class Transport(Protocol):
    """A connection that keeps messages whole and in order."""

    async def send(self, message: str | bytes) -> None:
        """Waits while the other side is slow. Raises ConnectionError when it has gone."""
        ...

    async def receive(self) -> str | bytes | None:
        """The next message; None when the other side has gone."""
        ...

    async def close(self) -> None: ...


@dataclass(eq=False)
class Seat:
    """Somebody who plays or watches. The id is theirs alone: with it a lost connection comes back."""

    outlet: Outlet
    transport: Transport
    something: asyncio.Event
    """Set when the outlet holds something to send."""
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    left: float | None = None
    """When the connection was lost."""


class House:
    """One walk at a time; the first seat plays, the others watch and wait for their turn."""

    def __init__(
        self,
        game: Game,
        rewind: int = 60,
        *,
        turn: float = 180.0,
        grace: float = 3.0,
        keep: float = 300.0,
        rtc: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Seconds: `turn` for each while others wait; `grace` until who left loses the turn to them; `keep` until a
        walk that nobody came back to ends. `rtc`: visitors may come over WebRTC."""
        self.game, self.rewind, self.turn, self.grace, self.keep = game, rewind, turn, grace, keep
        self.rtc, self.clock = rtc, clock
        self.seats: list[Seat] = []
        self.player: Player | None = None
        self.turn_began = 0.0
        self.pool = ThreadPoolExecutor(1, "walk")

    # -----------------------------------------------------------------------------------------
    # A conversation

    async def attend(self, transport: Transport) -> None:
        """One connection, from hello to goodbye."""
        seat = None
        try:
            seat = await self._welcome(transport)
            sending = asyncio.create_task(self._send(seat, transport))
            try:
                await self._listen(seat, transport)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
        except ProtocolError as error:
            with contextlib.suppress(ConnectionError, TimeoutError):
                farewell = transport.send(text_of(Error(reason=str(error), fatal=True)))
                await asyncio.wait_for(farewell, HELLO_WITHIN)
        except ConnectionError:
            pass
        finally:
            if seat and seat.transport is transport:
                self._leave(seat)
            await transport.close()

    async def _welcome(self, transport: Transport) -> Seat:
        """Wait for hello, find a seat, and say what is played."""
        try:
            text = await asyncio.wait_for(transport.receive(), HELLO_WITHIN)
        except TimeoutError:
            raise ProtocolError(f"no hello within {HELLO_WITHIN:g} seconds") from None
        if text is None:
            raise ConnectionError
        hello = parse(text)
        if not isinstance(hello, Hello):
            raise ProtocolError("the first message must be hello")
        if hello.v != VERSION:
            raise ProtocolError(f"this server speaks version {VERSION}, the page {hello.v}: reload it")
        config, codec = self.game.config, self._codec(hello)
        loop, something = asyncio.get_running_loop(), asyncio.Event()
        outlet = Outlet(codec, len(self.game.views), lambda: loop.call_soon_threadsafe(something.set))
        seat = next((seat for seat in self.seats if seat.id == hello.resume), None)
        if seat is None and len(self.seats) >= SEATS:
            raise ProtocolError(f"all {SEATS} places are taken; come back later")
        player = self._walk(loop)
        if seat:
            player.detach(seat.outlet)
            seat.outlet.say(Error(reason="this session goes on in another connection", fatal=True))
            seat.transport, seat.outlet, seat.something, seat.left = transport, outlet, something, None
        else:
            seat = Seat(outlet, transport, something)
            self.seats.append(seat)
        if seat is self.seats[0]:
            player.release()
        role, queue = self._place(seat)
        welcome = Welcome(
            session=seat.id,
            role=role,
            queue=queue,
            codec=codec,
            fps=config.motion.fps,
            width=config.width,
            height=config.height,
            chunk=player.frames,
            views=list(self.game.views),
            title=self.game.title,
            prompt=player.begin.prompt,
            seed=player.begin.seed,
            turn=config.motion.turn,
            move=config.motion.move,
            rtc=self.rtc,
            can=player.can,
        )
        await transport.send(text_of(welcome))
        player.attach(outlet)
        self._tell()
        return seat

    def _codec(self, hello: Hello) -> Codec:
        """The first of the client's that we have; H.264 needs even sides."""
        even = self.game.config.width % 2 == 0 == self.game.config.height % 2
        for name in hello.codecs:
            if name == "jpeg" or (name == "h264" and even):
                return "h264" if name == "h264" else "jpeg"
        raise ProtocolError(f"no codec in common: this server has jpeg{' and h264' if even else ''}")

    async def _send(self, seat: Seat, transport: Transport) -> None:
        outlet, something = seat.outlet, seat.something
        try:
            while True:
                await something.wait()
                something.clear()
                while (message := outlet.pop()) is not None:
                    await transport.send(message)
                if outlet.closing:
                    break
        except ConnectionError:
            pass
        await transport.close()

    async def _listen(self, seat: Seat, transport: Transport) -> None:
        second, count = 0.0, 0
        while (text := await transport.receive()) is not None:
            second, count = (second, count + 1) if self.clock() - second < 1 else (self.clock(), 1)
            if count > MESSAGES_PER_SECOND:
                raise ProtocolError(f"more than {MESSAGES_PER_SECOND} messages in a second")
            message = parse(text)
            if isinstance(message, Hello):
                raise ProtocolError("hello is said once")
            player = self.player
            if player is None:
                continue
            if seat is not self.seats[0]:
                if not isinstance(message, Input | Shown):
                    seat.outlet.say(Error(reason="you are watching: commands are for who plays"))
            elif isinstance(message, Input):
                player.hear(message)
            elif isinstance(message, Shown):
                player.shown(message.frame)
            else:
                try:
                    player.order(message)
                except UserError as error:
                    seat.outlet.say(Error(reason=str(error)))

    # -----------------------------------------------------------------------------------------
    # Seats and turns

    def seat(self, session: str) -> Seat:
        """Raises UserError for a session that is not here."""
        for seat in self.seats:
            if secrets.compare_digest(seat.id.encode(), session.encode()):
                return seat
        raise UserError("no such session; reload the page")

    def picture(self, session: str, picture: Picture) -> None:
        """A new start picture. Raises UserError unless it is this session's turn, and the game takes one."""
        if self.seat(session) is not self.seats[0] or self.player is None:
            raise UserError("you are watching: the start picture is for who plays")
        if not self.game.takes_image:
            raise UserError("this game does not begin with a picture")
        self.player.order(picture)

    def _place(self, seat: Seat) -> tuple[Literal["player", "spectator"], int]:
        queue = self.seats.index(seat)
        return ("spectator" if queue else "player"), queue

    def _leave(self, seat: Seat) -> None:
        """Who watches loses the seat; who plays keeps it for a while."""
        if self.player:
            self.player.detach(seat.outlet)
        if seat not in self.seats:
            return
        seat.left = self.clock()
        if seat is not self.seats[0]:
            self.seats.remove(seat)
        elif self.player:
            self.player.release()
        self._tell()

    async def keep_time(self) -> None:
        """Pass the turn on, and end walks that nobody comes back to; runs as long as the house is open."""
        while True:
            self.look_around()
            await asyncio.sleep(TICK)

    def look_around(self) -> None:
        if not self.seats:
            return
        now, playing = self.clock(), self.seats[0]
        away = 0.0 if playing.left is None else now - playing.left
        if len(self.seats) == 1:
            self.turn_began = now
            if away > self.keep:
                self._end_walk()
        elif away > self.grace or now - self.turn_began > self.turn:
            self.seats.pop(0)
            if playing.left is None:
                self.seats.append(playing)
            self.turn_began = now
            if self.player:
                self.player.release(joined=False)
            self._tell()

    def _tell(self, reason: str | None = None) -> None:
        """The state to everyone; or, to who plays, what an order failed of."""
        if self.player is None:
            return
        if reason is not None:
            if self.seats:
                self.seats[0].outlet.say(Error(reason=reason))
            return
        state = self.player.state()
        for seat in self.seats:
            role, queue = self._place(seat)
            seat.outlet.say(replace(state, role=role, queue=queue))

    # -----------------------------------------------------------------------------------------
    # The walk

    def _walk(self, loop: asyncio.AbstractEventLoop) -> Player:
        """The walk that is on, or a new one."""
        if self.player is None:
            self.player = player = Player(
                self.game, self.rewind, lambda reason: loop.call_soon_threadsafe(self._tell, reason)
            )
            ended = self.pool.submit(player.run)
            ended.add_done_callback(lambda ended: loop.call_soon_threadsafe(self._ended, player, ended))
        return self.player

    def _ended(self, player: Player, ended: Future[None]) -> None:
        """The thread of a walk has ended: if by an error, everybody hears of it, and the next hello begins anew."""
        error = ended.exception()
        if error is None or player is not self.player:
            return
        log.error("the walk ended by an error", exc_info=error)
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        for seat in self.seats:
            seat.outlet.say(Error(reason=f"generation failed ({what[:200]}); reload to begin anew", fatal=True))
        self._end_walk()

    def _end_walk(self) -> None:
        if self.player:
            self.player.close()
        self.player, self.seats = None, []

    async def close(self) -> None:
        """Say goodbye, and wait for the thread."""
        transports = [seat.transport for seat in self.seats]
        self._end_walk()
        for transport in transports:
            await transport.close()
        await asyncio.to_thread(self.pool.shutdown)
