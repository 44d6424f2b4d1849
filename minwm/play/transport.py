"""HTTP and WebSockets, through aiohttp: the routes of the player, and a client's connections."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import UInt8

from minwm.core.config import UserError
from minwm.core.media import read_image, resize_and_crop
from minwm.play.game import Game
from minwm.play.player import Picture
from minwm.play.protocol import TEXT_LIMIT
from minwm.play.recording import Recording
from minwm.play.rtc import Exchange, Peer, offered
from minwm.play.server import House, Transport

if TYPE_CHECKING:
    from aiohttp import ClientWebSocketResponse, web

WEB = Path(__file__).parent / "web"
UPLOAD_LIMIT = 8 << 20
"""Bytes of a start picture."""
UPLOAD_PIXELS = 50e6
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
HEARTBEAT = 15.0
"""Seconds between pings: a client that does not answer has gone."""


class WebSocket(Transport):
    """Either end of a WebSocket."""

    def __init__(self, ws: web.WebSocketResponse | ClientWebSocketResponse) -> None:
        self.ws = ws

    async def send(self, message: str | bytes) -> None:
        if isinstance(message, str):
            await self.ws.send_str(message)
        else:
            await self.ws.send_bytes(message)

    async def receive(self) -> str | bytes | None:
        from aiohttp import WSMsgType

        message = await self.ws.receive()
        return message.data if message.type in (WSMsgType.TEXT, WSMsgType.BINARY) else None

    async def close(self) -> None:
        await self.ws.close()


@contextlib.asynccontextmanager
async def connect(url: str) -> AsyncIterator[WebSocket]:
    """A connection to the player at the address that `minwm play` printed."""
    from aiohttp import ClientError, ClientSession

    parts = urlsplit(url)
    async with ClientSession() as session:
        try:
            ws = await session.ws_connect(parts._replace(path="/ws").geturl(), max_msg_size=64 << 20)
        except ClientError as error:
            raise UserError(f"no player at {url}: {error}") from error
        async with ws:
            yield WebSocket(ws)


@contextlib.asynccontextmanager
async def connect_rtc(url: str) -> AsyncIterator[Peer]:
    """The same over WebRTC."""
    from aiohttp import ClientSession

    peer = Peer()
    try:
        async with ClientSession() as session:
            where = urlsplit(url)._replace(path="/rtc").geturl()
            async with session.post(where, data=await peer.offer()) as answer:
                if not answer.ok:
                    raise UserError(f"no WebRTC at {url}: {await answer.text()}")
                await peer.accept(await answer.text())
        yield peer
    finally:
        await peer.close()


class Site:
    """The routes. Whoever does not know the token gets nothing but the page's scripts and styles."""

    def __init__(self, house: House, token: str) -> None:
        self.house, self.token, self.exchange = house, token, Exchange(house.attend)

    def app(self) -> web.Application:
        from aiohttp import web

        app = web.Application(client_max_size=UPLOAD_LIMIT)
        app.router.add_static("/static", WEB)
        routes: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
            "/": self.page,
            "/ws": self.socket,
            "/recording": functools.partial(self.file, Recording.mp4, "video/mp4", "minwm.mp4"),
            "/clip": functools.partial(self.file, Recording.clip, "application/zip", "minwm-clip.zip"),
        }
        for path, handler in routes.items():
            app.router.add_get(path, self.guarded(handler))
        app.router.add_post("/image", self.guarded(self.image))
        app.router.add_post("/rtc", self.guarded(self.rtc))

        async def dress(_: web.Request, response: web.StreamResponse) -> None:
            response.headers.update(HEADERS)

        async def lifetime(_: web.Application) -> AsyncIterator[None]:
            clock = asyncio.create_task(self.house.keep_time())
            yield
            clock.cancel()

        async def farewell(_: web.Application) -> None:
            await self.house.close()
            await self.exchange.close()

        app.on_response_prepare.append(dress)
        app.cleanup_ctx.append(lifetime)
        app.on_shutdown.append(farewell)
        return app

    def guarded(
        self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """The token must be right, and a browser must come from our own page; mistakes are told in JSON."""
        from aiohttp import web

        async def handle(request: web.Request) -> web.StreamResponse:
            if not secrets.compare_digest(request.query.get("token", "").encode(), self.token.encode()):
                return web.Response(status=403, text="Open the address that minwm play printed: the token is wrong.")
            origin = request.headers.get("Origin")
            if origin is not None and urlsplit(origin).netloc != request.host:
                return web.Response(status=403, text="This request comes from another site's page.")
            try:
                return await handler(request)
            except UserError as error:
                return web.json_response({"error": str(error)}, status=400)
            except web.HTTPRequestEntityTooLarge:
                reason = f"the picture is too large: at most {UPLOAD_LIMIT >> 20} MiB"
                return web.json_response({"error": reason}, status=413)

        return handle

    async def page(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        return web.FileResponse(WEB / "index.html")

    async def socket(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        ws = web.WebSocketResponse(heartbeat=HEARTBEAT, max_msg_size=2 * TEXT_LIMIT, compress=False)
        await ws.prepare(request)
        await self.house.attend(WebSocket(ws))
        return ws

    async def rtc(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        if not self.house.rtc:
            raise UserError("this server has no WebRTC")
        return web.Response(text=await self.exchange.answer(await request.read(), request.remote or ""))

    async def image(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        session, data = request.query.get("session", ""), await request.read()
        self.house.seat(session)
        config = self.house.game.config
        picture = await asyncio.to_thread(start_picture, data, config.height, config.width)
        self.house.picture(session, Picture(picture))
        return web.json_response({})

    async def file(
        self, make: Callable[[Recording], bytes], kind: str, name: str, request: web.Request
    ) -> web.StreamResponse:
        from aiohttp import web

        self.house.seat(request.query.get("session", ""))
        recording = self.house.player and self.house.player.recorded
        if recording is None:
            return web.json_response({"error": "nothing is recorded yet: record, walk, stop"}, status=404)
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return web.Response(body=await asyncio.to_thread(make, recording), content_type=kind, headers=headers)


def start_picture(data: bytes, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """An uploaded picture, fitted; UserError if it is no PNG, JPEG or WebP, or would take much memory."""
    try:
        return resize_and_crop(read_image(io.BytesIO(data), ("PNG", "JPEG", "WEBP"), UPLOAD_PIXELS), height, width)
    except UserError as error:
        raise UserError("this is no picture that can be read; give a PNG, JPEG or WebP") from error


async def serve(game: Game, host: str, port: int, rewind: int, say: Callable[[str], Any]) -> None:
    """Play until cancelled. `say` gets the address. Raises UserError if the port is taken."""
    from aiohttp import web

    token = secrets.token_urlsafe(16)
    house = House(game, rewind, rtc=offered(host))
    runner = web.AppRunner(Site(house, token).app(), access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); give another --port") from error
        address = runner.addresses[0]
        anywhere = socket.gethostname()
        name = {"127.0.0.1": "localhost", "0.0.0.0": anywhere, "::": anywhere}.get(host, host)
        say(f"{game.title}: http://{f'[{name}]' if ':' in name else name}:{address[1]}/?token={token}")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
