"""The play server over HTTP: access rules, uploads and downloads; and the command that starts it."""

import asyncio
import contextlib
import io
import socket
import zipfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
from playing import SECRET, SMALL, painted, served, tiny_model
from talking import frame_with, quiet_threads, until

from minwm.cameras.trajectory import Action
from minwm.cli import main
from minwm.cli.play import SCENE
from minwm.core.config import UserError
from minwm.core.media import png_bytes, read_video, write_image
from minwm.play.client import Client, ReceivedFrame
from minwm.play.loop import PlayLoop
from minwm.play.protocol import State
from minwm.play.rtc import BAD_OFFER, rtc_available
from minwm.play.scenario import Scenario, spawn_world, world_scenario
from minwm.play.server import PlayServer
from minwm.play.transport import UPLOAD_LIMIT, Access, WebSocket, connect, connect_rtc, endpoint, serve
from minwm.store.folder import save_model

quiet = pytest.fixture(quiet_threads, autouse=True)


Scene = Callable[[PlayServer, str, aiohttp.ClientSession], Awaitable[None]]


def visit(scene: Scene, scenario: Scenario | None = None, access: Access = SECRET) -> None:
    async def main() -> None:
        server = PlayServer(scenario or painted())
        async with served(server, access) as address, aiohttp.ClientSession() as session:
            await scene(server, address, session)

    asyncio.run(asyncio.wait_for(main(), 20))


@pytest.mark.parametrize(
    ("host", "has"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("192.0.2.1", True), ("box", True)],
)
def test_webrtc_is_offered_only_where_the_whole_machine_listens(host: str, has: bool) -> None:
    pytest.importorskip("aiortc", reason="WebRTC needs aiortc")
    assert rtc_available(host) == has


def test_an_invalid_webrtc_offer_is_refused() -> None:
    async def scene(server: PlayServer, address: str, session: aiohttp.ClientSession) -> None:
        async def call(offer: bytes, status: int, reason: str, token: str = "secret") -> None:
            async with session.post(f"{address}/rtc?token={token}", data=offer) as answer:
                assert answer.status == status and reason in await answer.text()

        await call(b"v=0", 400, "no WebRTC")
        server.rtc = True
        await call(b"v=0", 403, "token", token="wrong")
        await call(b"\xff\x00", 400, BAD_OFFER)
        await call(b"v=0\r\nm=audio 9 UDP/TLS/RTP/SAVPF 0\r\nm=application 9 DTLS/SCTP 5000\r\n", 400, BAD_OFFER)
        await call(b"v=0\r\n" * 9000, 400, "at most 16384")
        with pytest.raises(UserError, match="the token is wrong"):
            async with connect_rtc(f"{address}/?token=wrong"):
                pass

    pytest.importorskip("aiortc", reason="WebRTC needs aiortc")
    visit(scene)


def test_without_the_token_everything_is_refused() -> None:
    async def scene(server: PlayServer, address: str, session: aiohttp.ClientSession) -> None:
        for path in ("/", "/ws", "/recording", "/clip"):
            for query in ("", "?token=", "?token=wrong", "?token=%F0%9F%99%82", "?token=%ff"):
                async with session.get(address + path + query) as answer:
                    assert answer.status == 403 and "token" in await answer.text()
        for path in ("image", "rtc"):
            async with session.post(f"{address}/{path}?token=wrong", data=b"x") as answer:
                assert answer.status == 403
        with pytest.raises(UserError, match="403"):
            async with connect(f"{address}/?token=wrong"):
                pass
        async with session.get(f"{address}/?token=secret") as answer:
            assert answer.status == 200 and answer.headers["Referrer-Policy"] == "no-referrer"
        for path in ("/static/../transport.py", "/static/%2e%2e/transport.py", "/static/..%2ftransport.py"):
            async with session.get(address + path) as answer:
                assert answer.status in (403, 404)
        assert server.loop is None

    visit(scene)


def test_pages_of_other_sites_are_refused() -> None:
    async def scene(_: PlayServer, address: str, session: aiohttp.ClientSession) -> None:
        for origin in ("http://evil.example", "null", address.replace("http:", "http:").rsplit(":", 1)[0]):
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await session.ws_connect(f"{address}/ws?token=secret", origin=origin)
            assert caught.value.status == 403
        async with session.ws_connect(f"{address}/ws?token=secret", origin=address) as ws:
            assert not ws.closed

    visit(scene)


@pytest.mark.parametrize(
    ("access", "origin", "host", "allowed"),
    [
        ({}, None, "localhost:7860", True),
        ({}, "http://localhost:7860", "localhost:7860", True),
        ({}, "https://example.org", "example.org:443", True),
        ({}, "https://example.org", "example.org:8443", False),
        ({}, "https://example.org", "127.0.0.1:7860", False),
        ({}, "null", "localhost:7860", False),
        ({}, "https://[", "localhost:7860", False),
        ({"public_url": "https://Example.org:443/play/"}, "https://example.org", "127.0.0.1:7860", True),
        ({"public_url": "https://example.org"}, "http://example.org", "127.0.0.1:7860", False),
        ({"embed": "http://localhost:8888/lab"}, "http://localhost:8888", "localhost:7860", True),
        ({"embed": "http://localhost:8888"}, "http://localhost:9999", "localhost:7860", False),
        ({"embed": "*"}, "null", "localhost:7860", True),
    ],
)
def test_the_origin_must_be_the_servers_or_allowed(
    access: dict[str, str], origin: str | None, host: str, allowed: bool
) -> None:
    refusal = Access("secret", **access).refusal("secret", origin, host)
    assert refusal is None if allowed else refusal and "--public-url" in refusal and "--embed" in refusal
    assert "token is wrong" in (Access("secret", **access).refusal("wrong", origin, host) or "")


@pytest.mark.parametrize(
    ("embed", "ancestors"),
    [(None, "ancestors 'none'"), ("http://localhost:8888/lab", "ancestors http://localhost:8888"), ("*", "")],
)
def test_the_page_can_be_embedded_only_where_allowed(embed: str | None, ancestors: str) -> None:
    async def scene(_: PlayServer, address: str, session: aiohttp.ClientSession) -> None:
        async with session.get(f"{address}/?token=secret") as answer:
            assert answer.headers["Content-Security-Policy"].partition("; frame-")[2] == ancestors

    visit(scene, access=Access("secret", embed=embed))


def test_behind_a_reverse_proxy_the_public_url_is_printed_and_its_origin_accepted() -> None:
    access = Access("secret", public_url="https://example.org/play")

    async def scene(_: PlayServer, address: str, session: aiohttp.ClientSession) -> None:
        async with session.ws_connect(f"{address}/ws?token=secret", origin="https://example.org") as ws:
            assert (await Client.join(WebSocket(ws))).role == "player"
        printed: asyncio.Queue[str] = asyncio.Queue()
        server = asyncio.create_task(serve(painted(), "127.0.0.1", 0, 5, access, printed.put_nowait))
        assert await printed.get() == "painted: https://example.org/play/?token=secret"
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)

    visit(scene, access=access)
    assert endpoint("https://example.org/play/?token=secret", "ws") == "https://example.org/play/ws?token=secret"


def test_a_tunnel_needs_no_option() -> None:
    """As with `ssh -L`: the browser connects to another port, and sends that in Host and Origin."""

    async def scene(_: PlayServer, address: str, session: aiohttp.ClientSession) -> None:
        there = int(address.rpartition(":")[2])

        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 16):
                writer.write(data)
            writer.close()

        async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            theirs, ours = await asyncio.open_connection("127.0.0.1", there)
            with contextlib.suppress(ConnectionError):
                await asyncio.gather(carry(reader, ours), carry(theirs, writer))

        async with await asyncio.start_server(tunnel, "127.0.0.1", 0) as here:
            near = f"http://127.0.0.1:{here.sockets[0].getsockname()[1]}"
            async with session.ws_connect(f"{near}/ws?token=secret", origin=near) as ws:
                client = await Client.join(WebSocket(ws))
                await client.hold(Action.of("w"))
                await until(client, frame_with(1))

    visit(scene)


def test_start_images_are_checked() -> None:
    async def scene(server: PlayServer, address: str, session: aiohttp.ClientSession) -> None:
        async with connect(f"{address}/?token=secret") as transport:
            client = await Client.join(transport)
            image = f"{address}/image?token=secret&session={client.welcome.session}"
            png = png_bytes(np.zeros((40, 60, 3), np.uint8))
            gif = b"GIF89a" + bytes(100)
            huge = png[:16] + (100_000).to_bytes(4, "big") * 2 + png[24:]  # says that it is 100000 x 100000
            for data, status in ((gif, 400), (b"", 400), (png[:60], 400), (huge, 400)):
                async with session.post(image, data=data) as answer:
                    assert answer.status == status and "cannot be read" in (await answer.json())["error"]
            async with session.post(image, data=bytes(UPLOAD_LIMIT + 1)) as answer:
                assert answer.status == 413 and "8 MiB" in (await answer.json())["error"]
            async with session.post(f"{address}/image?token=secret&session=other", data=png) as answer:
                assert answer.status == 400 and "no such session" in (await answer.json())["error"]
            await until(client, lambda m: isinstance(m, ReceivedFrame) and m.header.chunk > 2)
            async with session.post(image, data=png) as answer:
                assert answer.status == 200 and await answer.json() == {}
            restarted = await until(client, lambda m: isinstance(m, ReceivedFrame) and m.header.flush)
            assert restarted.header.chunk == 0 and server.loop
            assert server.loop.next_start.image is not None and server.loop.next_start.image.shape == (16, 16, 3)

    visit(scene)


def test_a_recording_can_be_downloaded(tmp_path: Path) -> None:
    async def scene(server: PlayServer, address: str, session: aiohttp.ClientSession) -> None:
        async with connect(f"{address}/?token=secret") as transport:
            client = await Client.join(transport)
            query = f"?token=secret&session={client.welcome.session}"
            async with session.get(f"{address}/recording{query}") as answer:
                assert answer.status == 404 and "nothing is recorded" in (await answer.json())["error"]
            await client.command("record")
            await until(client, lambda m: isinstance(m, State) and m.recording)
            here = len(server.loop.inputs) if server.loop else 0
            await until(client, lambda m: isinstance(m, ReceivedFrame) and m.header.chunk > here + 3)
            await client.command("stop")
            await until(client, lambda m: isinstance(m, State) and not m.recording)
            async with session.get(f"{address}/recording{query}") as answer:
                assert answer.content_type == "video/mp4"
                (tmp_path / "x.mp4").write_bytes(await answer.read())
            async with session.get(f"{address}/clip{query}") as answer:
                assert "actions.json" in zipfile.ZipFile(io.BytesIO(await answer.read())).namelist()
        assert len(read_video(tmp_path / "x.mp4")[0]) % 4 == 1

    visit(scene)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("", "no model yet: make one with minwm pipeline demo"),
        ("--world 7 --compare truth", "rendered world"),
        ("--world 7 --steps 2", "rendered world"),
        ("--model {pipeline} --steps 0", "steps=0: at least 1"),
        ("--world -1", "numbered from 0"),
        ("--world 7 --size 4", "at least 16"),
        ("--world 7 --port 70000", "--port 70000: give 0 to 65535"),
        ("--world 7 --port -5", "--port -5: give 0 to 65535"),
        ("--world 7 --public-url example.org", "--public-url example.org: give an http or https URL"),
        ("--world 7 --embed null", "--embed null: give an http or https URL"),
        ("--world 7 --host 127.0.0.1 --port {taken}", "another --port"),
        ("--model {pipeline} --world 1 --start x.png", "not both"),
        ("--model {pipeline} --start {image} --compare truth --prompt room", "procedural world"),
        ("--model {pipeline} --start {image}", "give --prompt"),
    ],
)
def test_the_command_refuses_bad_options(
    words: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minwm.experiments.presets.demo.ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    save_model(tmp_path / "dmd", model.config, model.net, model.codec)
    write_image(tmp_path / "start.png", np.zeros((9, 9, 3), np.uint8))
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"pipeline": tmp_path, "image": tmp_path / "start.png", "taken": server.getsockname()[1]}
        threads = torch.get_num_threads()
        assert main(["play", *words.format(**names).split()]) == 2
        torch.set_num_threads(threads)
    assert reason in capsys.readouterr().err


def test_the_command_serves_the_last_stage_of_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the printed address to a moving camera, with the world beside the model, until the interrupt."""
    model = tiny_model()
    save_model(tmp_path / "dmd", model.config, model.net, model.codec)

    async def visit(
        scenario: Scenario, host: str, port: int, rewind: int, access: Access, announce: Callable[[str], Any]
    ) -> None:
        started = asyncio.Event()

        def heard(line: str) -> None:
            announce(line)
            started.set()

        server = asyncio.create_task(serve(scenario, host, port, rewind, access, heard))
        await started.wait()
        async with connect(capsys.readouterr().out.split()[-1]) as transport:
            client = await Client.join(transport)
            assert client.welcome.views == ["model", "world"] and client.welcome.capabilities.rewind == 5
            await client.hold(Action.of("w"))
            await until(client, lambda m: isinstance(m, ReceivedFrame) and m.header.view == 1 and m.header.seq == 1)
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("minwm.play.transport.serve", visit)
    words = ["play", "--model", str(tmp_path), "--compare", "truth", "--rewind", "5", "--port", "0"]
    assert main(words) == 0


def test_the_default_model_is_the_shipped_one_or_else_that_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs: list[Scenario] = []

    async def serve(scenario: Scenario, *_: Any) -> None:
        inputs.append(scenario)

    monkeypatch.setattr("minwm.play.transport.serve", serve)
    monkeypatch.setattr("minwm.experiments.presets.demo.ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    model, threads = tiny_model(), torch.get_num_threads()
    for folder in (Path("runs/demo/dmd"), tmp_path / "assets" / "place" / "dmd"):
        save_model(folder, model.config, model.net, model.codec)
        assert main(["play"]) == 0
    assert main(["play", "--world", "5", "--model", "runs/demo", "--compare", "truth", "--steps", "3"]) == 0
    assert [scenario.config.sampler.steps for scenario in inputs] == [model.config.sampler.steps] * 2 + [3]
    torch.set_num_threads(threads)
    assert [scenario.title for scenario in inputs] == ["demo/dmd", "place/dmd", "runs/demo"]
    assert inputs[0].start.prompt == spawn_world(SCENE["worlds"], model.config).scene.caption and inputs[1].takes_image


def test_a_model_without_camera_control_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def serve(scenario: Scenario, *_: Any) -> None:
        assert not PlayLoop(scenario).capabilities.camera

    monkeypatch.setattr("minwm.play.transport.serve", serve)
    config = replace(SMALL, network=replace(SMALL.network, camera="none"))
    save_model(tmp_path, config, config.network.build(), config.codec.build())
    threads = torch.get_num_threads()
    assert main(["play", "--model", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    assert "this model has no camera control" in capsys.readouterr().out


def test_received_frames_match_the_renderer() -> None:
    """With a key held, over a real socket, each frame is the renderer's image from the pose in its header."""
    scenario = world_scenario(7, replace(SMALL, height=48, width=64, focal=(0.6, 0.8)))

    async def scene(_: PlayServer, address: str, __: aiohttp.ClientSession) -> None:
        async with connect(f"{address}/?token=secret") as transport:
            client = await Client.join(transport)
            await client.hold(Action.of("wl"))
            shots = []
            async for shot in client.frames():
                shots.append(shot)
                if shot.header.chunk > 4:
                    break
        poses = np.stack([shot.header.c2w for shot in shots])
        truth = np.concatenate(list(spawn_world(7, scenario.config).advance(poses)))
        seen = np.stack([shot.pixels for shot in shots])
        error = seen.astype(float) - truth
        assert np.sqrt((error**2).mean((1, 2, 3))).max() < 6, "but for JPEG"
        moved = [shot for shot in shots if shot.header.seq == 1]
        assert len(moved) > 8 and moved[-1].header.c2w[2, 3] > 0.1
        assert np.abs(truth[0].astype(int) - truth[-1]).max() > 40

    visit(scene, scenario)
