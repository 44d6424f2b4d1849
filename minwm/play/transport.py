"""HTTP and WebSockets (aiohttp): the server's routes and access rules, and the client's side of a connection."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import UInt8

from minwm.core.config import UserError
from minwm.core.media import read_image, resize_and_crop
from minwm.play.loop import StartImage
from minwm.play.protocol import TEXT_LIMIT
from minwm.play.recording import Recording
from minwm.play.rtc import Peer, Signaling, rtc_available
from minwm.play.scenario import Scenario
from minwm.play.server import PlayServer, Transport

if TYPE_CHECKING:
    from aiohttp import ClientWebSocketResponse, web

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

WEB = Path(__file__).parent / "web"
UPLOAD_LIMIT = 8 << 20
"""Maximum size of an uploaded start image, bytes."""
UPLOAD_PIXELS = 50e6
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; media-src 'self' blob:"
HEADERS = {
    "Referrer-Policy": "no-referrer",  # the URL contains the token
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
HEARTBEAT = 15.0
"""Seconds between WebSocket pings; a client that does not answer is disconnected."""


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
    """A WebSocket to a play server. `url`: as `minwm play` prints it. Raises UserError if that fails."""
    from aiohttp import ClientError, ClientSession

    async with ClientSession() as session:
        try:
            ws = await session.ws_connect(endpoint(url, "ws"), max_msg_size=64 << 20)
        except ClientError as error:
            raise UserError(f"no play server at {url}: {error}") from error
        async with ws:
            yield WebSocket(ws)


@contextlib.asynccontextmanager
async def connect_rtc(url: str) -> AsyncIterator[Peer]:
    """The same over WebRTC."""
    from aiohttp import ClientSession

    peer = Peer()
    try:
        offer = await peer.offer()
        async with ClientSession() as session, session.post(endpoint(url, "rtc"), data=offer) as answer:
            if not answer.ok:
                raise UserError(f"no WebRTC at {url}: {await answer.text()}")
            await peer.accept(await answer.text())
        yield peer
    finally:
        await peer.close()


def endpoint(url: str, name: str) -> str:
    """The URL of a route, relative to that of the page."""
    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}").geturl()


@dataclass(frozen=True)
class Access:
    """Who may use the server: those who know the token, from its own page or from a page that is allowed explicitly."""

    token: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    public_url: str | None = None
    """The URL at which browsers reach the page, if a reverse proxy changes it."""
    embed: str | None = None
    """Origin (such as http://localhost:8888) whose pages may show the page in a frame; "*": any origin."""

    def __post_init__(self) -> None:
        for name, url in (("--public-url", self.public_url), ("--embed", self.embed)):
            if url not in (None, "*") and _origin(url) is None:
                raise UserError(f"{name} {url}: give an http or https URL such as https://example.org/play/")

    @property
    def policy(self) -> str:
        """The Content-Security-Policy header."""
        if self.embed == "*":  # "frame-ancestors *" would exclude pages that are not http(s), such as webviews
            return POLICY
        ancestors = _origin(self.embed) if self.embed else "'none'"
        return f"{POLICY}; frame-ancestors {ancestors}"

    def refusal(self, token: str, origin: str | None, host: str) -> str | None:
        """Why a request with this token, and these Origin and Host headers, is refused; None: it is allowed.

        A browser sends the origin of the page that makes the request; other clients send none.
        """
        if not secrets.compare_digest(token.encode(), self.token.encode()):
            return "Open the address that minwm play printed: the token is wrong."
        if origin is None or self.embed == "*":
            return None
        own = f"{origin.partition(':')[0]}://{host}"
        if _origin(origin) in {_origin(url) for url in (own, self.public_url, self.embed) if url} - {None}:
            return None
        return (
            f"The server at {host} refuses requests from pages of {origin}. Behind a reverse proxy, start minwm play "
            "with --public-url URL; to embed it in another page, with --embed ORIGIN."
        )


def _origin(url: str) -> str | None:
    """Scheme, host and port of an http(s) URL, without a default port; None for anything else, such as `null`."""
    from yarl import URL

    try:
        return str(URL(url).origin()) if url.startswith(("http://", "https://")) else None
    except ValueError:
        return None


class WebApp:
    """The HTTP routes. Without the token only the page's scripts and styles are served."""

    def __init__(self, server: PlayServer, access: Access) -> None:
        self.server, self.access, self.signaling = server, access, Signaling(server.handle)

    def app(self) -> web.Application:
        from aiohttp import web

        app = web.Application(client_max_size=UPLOAD_LIMIT)
        app.router.add_static("/static", WEB)
        routes: dict[str, Handler] = {
            "/": self.page,
            "/ws": self.socket,
            "/recording": functools.partial(self.file, Recording.mp4, "video/mp4", "minwm.mp4"),
            "/clip": functools.partial(self.file, Recording.clip, "application/zip", "minwm-clip.zip"),
        }
        for path, handler in routes.items():
            app.router.add_get(path, self.guarded(handler))
        app.router.add_post("/image", self.guarded(self.image))
        app.router.add_post("/rtc", self.guarded(self.rtc))
        headers = {**HEADERS, "Content-Security-Policy": self.access.policy}

        async def add_headers(_: web.Request, response: web.StreamResponse) -> None:
            response.headers.update(headers)

        async def timers(_: web.Application) -> AsyncIterator[None]:
            task = asyncio.create_task(self.server.run_timers())
            yield
            task.cancel()

        async def shutdown(_: web.Application) -> None:
            await self.server.close()
            await self.signaling.close()

        app.on_response_prepare.append(add_headers)
        app.cleanup_ctx.append(timers)
        app.on_shutdown.append(shutdown)
        return app

    def guarded(self, handler: Handler) -> Handler:
        """The handler behind the access rules, with UserErrors as JSON answers."""
        from aiohttp import web

        async def handle(request: web.Request) -> web.StreamResponse:
            token, origin = request.query.get("token", ""), request.headers.get("Origin")
            if refusal := self.access.refusal(token, origin, request.host):
                return web.Response(status=403, text=refusal)
            try:
                return await handler(request)
            except UserError as error:
                return web.json_response({"error": str(error)}, status=400)
            except web.HTTPRequestEntityTooLarge:
                reason = f"the image is too large: at most {UPLOAD_LIMIT >> 20} MiB"
                return web.json_response({"error": reason}, status=413)

        return handle

    async def page(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        return web.FileResponse(WEB / "index.html")

    async def socket(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        ws = web.WebSocketResponse(heartbeat=HEARTBEAT, max_msg_size=2 * TEXT_LIMIT, compress=False)
        await ws.prepare(request)
        await self.server.handle(WebSocket(ws))
        return ws

    async def rtc(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        if not self.server.rtc:
            raise UserError("this server has no WebRTC")
        return web.Response(text=await self.signaling.answer(await request.read(), request.remote or ""))

    async def image(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        session, data = request.query.get("session", ""), await request.read()
        self.server.client(session)
        config = self.server.scenario.config
        image = await asyncio.to_thread(read_start_image, data, config.height, config.width)
        self.server.set_start_image(session, StartImage(image))
        return web.json_response({})

    async def file(
        self, make: Callable[[Recording], bytes], kind: str, name: str, request: web.Request
    ) -> web.StreamResponse:
        """The newest recording, as `make` packs it."""
        from aiohttp import web

        self.server.client(request.query.get("session", ""))
        recording = self.server.loop and self.server.loop.recorded
        if recording is None:
            return web.json_response({"error": "nothing is recorded yet: record, move, stop"}, status=404)
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return web.Response(body=await asyncio.to_thread(make, recording), content_type=kind, headers=headers)


def read_start_image(data: bytes, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """Decode, crop and resize an upload. Raises UserError unless it is a PNG, JPEG or WebP of a reasonable size."""
    try:
        return resize_and_crop(read_image(io.BytesIO(data), ("PNG", "JPEG", "WEBP"), UPLOAD_PIXELS), height, width)
    except UserError as error:
        raise UserError("the start image cannot be read; give a PNG, JPEG or WebP") from error


async def serve(
    scenario: Scenario,
    host: str,
    port: int,
    rewind: int,
    access: Access,
    announce: Callable[[str], object],
) -> None:
    """Serve until cancelled. `announce` gets a line with the address. Raises UserError if the port is taken."""
    from aiohttp import web

    server = PlayServer(scenario, rewind, rtc=rtc_available(host))
    runner = web.AppRunner(WebApp(server, access).app(), access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); give another --port") from error
        hostname = socket.gethostname()
        name = {"127.0.0.1": "localhost", "0.0.0.0": hostname, "::": hostname}.get(host, host)
        url = access.public_url or f"http://{f'[{name}]' if ':' in name else name}:{runner.addresses[0][1]}"
        announce(f"{scenario.title}: {url.rstrip('/')}/?token={access.token}")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
