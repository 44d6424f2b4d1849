"""WebRTC transport (aiortc) for networks that lose packets: the messages of the WebSocket over two data channels.

Both channels are negotiated out of band. Channel 0 is reliable and ordered; channel 1 carries the droppable frames and
gives up on a packet after `MAX_PACKET_LIFETIME`. The client POSTs an SDP offer over HTTP and receives the answer.
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
from minwm.play.protocol import TEXT_LIMIT, droppable
from minwm.play.server import MAX_CLIENTS, Transport

MAX_PACKET_LIFETIME = 250
"""Milliseconds after which a lost frame is not retransmitted."""
OPEN_TIMEOUT = 10.0
"""Seconds in which the channels must open."""
CLOSE_TIMEOUT = 1.0
"""Seconds in which the last messages must arrive."""
MAX_BUFFERED = 64 * 1024
"""Bytes in a channel's send buffer above which `send` waits."""
MAX_UNREAD = 1024
"""Received messages that may wait to be read; a peer that sends more is disconnected."""
BAD_OFFER = "not a valid WebRTC offer of a data channel"


def rtc_available(host: str) -> bool:
    """Whether a server on `host` offers WebRTC: not on loopback, for aiortc opens UDP ports on all addresses."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    return not loopback and importlib.util.find_spec("aiortc") is not None


class Peer(Transport):
    """Either end of a WebRTC connection. Raises MissingExtraError without aiortc."""

    def __init__(self) -> None:
        aiortc = require("aiortc", "rtc")
        self.connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))  # no STUN server
        self.description = aiortc.RTCSessionDescription
        self.inbox: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        self.changed = asyncio.Condition()
        self.closed = False
        self.reliable, self.lossy = self._channel(0), self._channel(1, maxPacketLifeTime=MAX_PACKET_LIFETIME)
        self.connection.on("connectionstatechange", self._on_change)

    def _channel(self, number: int, **options: Any) -> Any:
        channel = self.connection.createDataChannel("minwm", negotiated=True, id=number, **options)
        channel.bufferedAmountLowThreshold = MAX_BUFFERED
        channel.on("message", self._on_message)
        for event in ("open", "close", "bufferedamountlow"):
            channel.on(event, self._on_change)
        return channel

    async def _on_change(self) -> None:
        if self.connection.connectionState in ("failed", "closed") or self.reliable.readyState == "closed":
            self._disconnect()
        async with self.changed:
            self.changed.notify_all()

    def _on_message(self, message: str | bytes) -> None:
        if self.inbox.qsize() < MAX_UNREAD:
            self.inbox.put_nowait(message)
        else:
            self._disconnect()

    def _disconnect(self) -> None:
        if not self.closed:
            self.closed = True
            self.inbox.put_nowait(None)

    async def _wait_for(self, condition: Callable[[], bool]) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.closed or condition())
        if self.closed:
            raise ConnectionError

    # -----------------------------------------------------------------------------------------
    # Signaling

    async def offer(self) -> str:
        await self.connection.setLocalDescription(await self.connection.createOffer())
        return self.connection.localDescription.sdp

    async def accept(self, sdp: str) -> None:
        """Take the answer to our offer and wait for the channels to open. Raises ConnectionError if that fails."""
        await self.connection.setRemoteDescription(self.description(sdp, "answer"))
        await self.opened()

    async def answer(self, sdp: str, address: str) -> str:
        """The SDP answer to an offer. `address`: of the sender. Raises UserError for an invalid offer."""
        from aiortc.exceptions import InvalidAccessError, InvalidStateError

        if re.findall(r"^m=(\w*)", sdp, re.MULTILINE) != ["application"]:  # audio and video would start decoders
            raise UserError(BAD_OFFER)
        # browsers replace their address by an mDNS name that only their own network can resolve
        resolved = re.sub(r"[\w-]+\.local\b", address, sdp)
        try:
            await self.connection.setRemoteDescription(self.description(resolved, "offer"))
            await self.connection.setLocalDescription(await self.connection.createAnswer())
        except (
            *(ValueError, LookupError, TypeError, AttributeError, AssertionError),  # from aiortc's SDP parser
            *(InvalidAccessError, InvalidStateError),
        ) as error:
            raise UserError(BAD_OFFER) from error
        return self.connection.localDescription.sdp

    async def opened(self) -> None:
        """Wait for the channels to open. Raises ConnectionError if they do not."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                await self._wait_for(lambda: self.reliable.readyState == self.lossy.readyState == "open")
        except TimeoutError:
            raise ConnectionError(f"no WebRTC connection within {OPEN_TIMEOUT:g} seconds") from None

    # -----------------------------------------------------------------------------------------
    # Transport

    async def send(self, message: str | bytes) -> None:
        channel = self.lossy if droppable(message) else self.reliable
        await self._wait_for(lambda: channel.bufferedAmount <= MAX_BUFFERED)
        try:
            channel.send(message)
        except ValueError as error:  # larger than the peer accepts
            self._disconnect()
            raise ConnectionError(str(error)) from error

    async def receive(self) -> str | bytes | None:
        return None if self.closed and self.inbox.empty() else await self.inbox.get()

    async def close(self) -> None:
        if not self.closed:
            self.reliable.close()
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self._wait_for(lambda: False)
            self._disconnect()
        await asyncio.shield(self.connection.close())  # completes even if the caller is cancelled


class Signaling:
    """Answers offers, and serves each connection that opens with `handle` in a task of its own."""

    def __init__(self, handle: Callable[[Transport], Awaitable[None]]) -> None:
        self.handle = handle
        self.tasks: set[asyncio.Task[None]] = set()

    async def answer(self, sdp: bytes, address: str) -> str:
        """The SDP answer. Raises UserError for an invalid offer, or if there are too many connections."""
        if len(sdp) > TEXT_LIMIT:
            raise UserError(f"an offer of {len(sdp)} bytes; at most {TEXT_LIMIT}")
        if len(self.tasks) >= 2 * MAX_CLIENTS:
            raise UserError(f"{len(self.tasks)} WebRTC connections are open; try again later")
        peer = Peer()
        try:
            answer = await peer.answer(sdp.decode(errors="replace"), address)
        except UserError:
            await peer.close()
            raise
        task = asyncio.create_task(self._serve(peer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return answer

    async def _serve(self, peer: Peer) -> None:
        try:
            await peer.opened()
            await self.handle(peer)
        except ConnectionError:
            pass
        finally:
            await peer.close()

    async def close(self) -> None:
        """Cancel the connections that are left: those that the server does not know yet."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
