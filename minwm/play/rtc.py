"""The same messages over WebRTC, for networks that lose packets, through aiortc.

A connection has two channels, known to both sides beforehand: 0 delivers everything in order; 1 carries pictures that
the next one replaces, and rather loses than holds up. Who calls sends an offer (SDP) over HTTP and gets an answer.
"""

import asyncio
import contextlib
import importlib.util
import ipaddress
import re
from collections.abc import Awaitable, Callable
from typing import Any

from minwm.core.config import UserError
from minwm.core.runtime import require
from minwm.play.protocol import TEXT_LIMIT, replaceable
from minwm.play.server import SEATS, Transport

LATE = 250
"""Milliseconds after which a lost picture is not sent again."""
PATIENCE = 10.0
"""Seconds until the channels must be open."""
FAREWELL = 1.0
"""Seconds that the last words have to arrive."""
WAITING = 64 * 1024
"""Bytes on their way to a peer, beyond which who sends must wait."""
UNHEARD = 1024
"""Messages of a peer that may wait to be read: one that sends faster is cut off."""


def offered(host: str) -> bool:
    """Whether a server that listens there has WebRTC: it opens UDP ports on every address of the machine."""
    try:
        inside = ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = host == "localhost"
    return not inside and importlib.util.find_spec("aiortc") is not None


class Peer(Transport):
    """Either end. Raises MissingExtraError without aiortc."""

    def __init__(self) -> None:
        aiortc = require("aiortc", "rtc")
        self.connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))  # asks no third party
        self.description = aiortc.RTCSessionDescription
        self.inbox: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        self.changed = asyncio.Condition()
        self.gone = False
        self.reliable, self.lossy = self._channel(0), self._channel(1, maxPacketLifeTime=LATE)
        self.connection.on("connectionstatechange", self._notice)

    def _channel(self, number: int, **options: Any) -> Any:
        channel = self.connection.createDataChannel("minwm", negotiated=True, id=number, **options)
        channel.bufferedAmountLowThreshold = WAITING
        channel.on("message", self._hear)
        for event in ("open", "close", "bufferedamountlow"):
            channel.on(event, self._notice)
        return channel

    async def _notice(self) -> None:
        if self.connection.connectionState in ("failed", "closed") or self.reliable.readyState == "closed":
            self._lose()
        async with self.changed:
            self.changed.notify_all()

    def _hear(self, message: str | bytes) -> None:
        if self.inbox.qsize() < UNHEARD:
            self.inbox.put_nowait(message)
        else:
            self._lose()

    def _lose(self) -> None:
        if not self.gone:
            self.gone = True
            self.inbox.put_nowait(None)

    async def _until(self, true: Callable[[], bool]) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.gone or true())
        if self.gone:
            raise ConnectionError

    # -----------------------------------------------------------------------------------------
    # The call

    async def offer(self) -> str:
        await self.connection.setLocalDescription(await self.connection.createOffer())
        return self.connection.localDescription.sdp

    async def accept(self, sdp: str) -> None:
        """The answer to our offer; returns when messages can be sent. Raises ConnectionError if that fails."""
        await self.connection.setRemoteDescription(self.description(sdp, "answer"))
        await self.opened()

    async def answer(self, sdp: str, address: str) -> str:
        """The answer to an offer that came from that address. Raises UserError if it is none."""
        from aiortc.exceptions import InvalidAccessError, InvalidStateError

        if re.findall(r"^m=(\w*)", sdp, re.MULTILINE) != ["application"]:  # sound and video would start decoders
            raise UserError("this is no offer of a data channel")
        # a browser hides its address behind a name that only its own network knows
        shown = re.sub(r"[\w-]+\.local\b", address, sdp)
        try:
            await self.connection.setRemoteDescription(self.description(shown, "offer"))
            await self.connection.setLocalDescription(await self.connection.createAnswer())
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            raise UserError("this is no offer of a data channel") from error
        except (InvalidAccessError, InvalidStateError) as error:
            raise UserError("this is no offer of a data channel") from error
        return self.connection.localDescription.sdp

    async def opened(self) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                await self._until(lambda: self.reliable.readyState == self.lossy.readyState == "open")
        except TimeoutError:
            raise ConnectionError(f"no connection within {PATIENCE:g} seconds") from None

    # -----------------------------------------------------------------------------------------
    # Transport

    async def send(self, message: str | bytes) -> None:
        channel = self.lossy if replaceable(message) else self.reliable
        await self._until(lambda: channel.bufferedAmount <= WAITING)
        try:
            channel.send(message)
        except ValueError as error:  # larger than the other side takes
            self._lose()
            raise ConnectionError(str(error)) from error

    async def receive(self) -> str | bytes | None:
        return None if self.gone and self.inbox.empty() else await self.inbox.get()

    async def close(self) -> None:
        if not self.gone:
            self.reliable.close()
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(FAREWELL):
                    await self._until(lambda: False)
            self._lose()
        await asyncio.shield(self.connection.close())  # a call that is cancelled still ends well


class Exchange:
    """Answers offers; every call that comes about is a conversation of its own."""

    def __init__(self, attend: Callable[[Transport], Awaitable[None]]) -> None:
        self.attend = attend
        self.calls: set[asyncio.Task[None]] = set()

    async def answer(self, sdp: bytes, address: str) -> str:
        """Raises UserError for what is no offer, or if there are too many calls."""
        if len(sdp) > TEXT_LIMIT:
            raise UserError(f"an offer of {len(sdp)} bytes; at most {TEXT_LIMIT}")
        if len(self.calls) >= 2 * SEATS:
            raise UserError("too many calls at once; come back later")
        peer = Peer()
        try:
            answer = await peer.answer(sdp.decode(errors="replace"), address)
        except UserError:
            await peer.close()
            raise
        call = asyncio.create_task(self._converse(peer))
        self.calls.add(call)
        call.add_done_callback(self.calls.discard)
        return answer

    async def _converse(self, peer: Peer) -> None:
        try:
            await peer.opened()
            await self.attend(peer)
        except ConnectionError:
            pass
        finally:
            await peer.close()

    async def close(self) -> None:
        """Who is not in the house yet goes now; the others have heard goodbye."""
        for call in self.calls:
            call.cancel()
        await asyncio.gather(*self.calls, return_exceptions=True)
