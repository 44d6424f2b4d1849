"""The page in headless Chromium: a real server, real keys, and connections that fail."""

import asyncio
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browsing import (
    AHEAD,
    RIGHT,
    ServerProcess,
    ahead,
    camera,
    hold,
    hold_until,
    hosting,
    launched,
    needs_chromium,
    pause,
    pixels,
    settle,
    until,
    visit,
    wait_for,
)
from playing import painted
from torch import nn

from minwm.cli.play import _world_config
from minwm.core.media import write_image
from minwm.experiments.presets.demo import smoke
from minwm.play.rtc import Peer
from minwm.play.scenario import spawn_world
from minwm.play.server import RemoteClient, Transport
from minwm.play.transport import Access
from minwm.store.folder import save_model

pytestmark = needs_chromium
WORLD, SIZE = 7, 64
chromium = pytest.fixture(launched, scope="module")
host = pytest.fixture(hosting)


@pytest.fixture(scope="module")
def world() -> Iterator[ServerProcess]:
    server = ServerProcess("--world", str(WORLD), "--size", str(SIZE))
    yield server
    server.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small models with random weights."""
    folder = tmp_path_factory.mktemp("models")
    config = smoke(folder).stage("dmd").model
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        net, codec = config.network.build(), config.codec.build()
        nn.init.normal_(net.get_parameter("head.head.weight"), std=0.1)
        save_model(folder / name, config, net, codec)
    return folder


@pytest.fixture
def page(chromium: Any, world: ServerProcess) -> Iterator[Any]:
    yield from visit(chromium, world.url)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.square((a.astype(float) - b) / 255).mean() + 1e-12))


def truth(c2w: np.ndarray) -> np.ndarray:
    return next(spawn_world(WORLD, _world_config(SIZE)).advance(c2w[None]))[0]


def test_keys_move_the_camera_and_the_canvas_shows_its_view(page: Any) -> None:
    pause(page)
    before = pixels(page)
    page.click("[data-testid=pause]")
    hold_until(page, f"{AHEAD} > 0.2 && {RIGHT} > 0.4", "KeyW", "ArrowRight")
    pause(page)
    after, c2w = pixels(page), camera(page)
    assert c2w[2, 3] > 0.2 and np.arctan2(c2w[0, 2], c2w[2, 2]) > 0.2, "forward, and turned to the right"
    assert psnr(after, truth(c2w)) > 30 > psnr(before, after) + 8


def test_rewind_goes_back_and_replay_gives_the_same_frames(page: Any) -> None:
    page.evaluate("() => (window.flushes = 0)")
    page.click("[data-testid=reset]")
    until(page, "window.flushes")
    page.keyboard.down("KeyD")
    until(page, "window.last.camera[3] > 0.3")
    pause(page)
    page.keyboard.up("KeyD")
    far, seen = camera(page), pixels(page)
    frame = page.evaluate("() => window.last.frame")
    page.click("[data-testid=rewind]")
    until(page, f"window.last.frame < {frame}")
    assert 0 <= camera(page)[0, 3] < far[0, 3]
    page.click("[data-testid=reset]")
    page.click("[data-testid=pause]")
    hold_until(page, "window.last.camera[3] < -0.3", "KeyA")
    pause(page)
    other = pixels(page), camera(page)
    page.evaluate("() => (window.last = null)")
    page.click("[data-testid=replay]")
    settle(page)
    assert np.array_equal(camera(page), other[1]) and np.array_equal(pixels(page), other[0])
    assert not np.array_equal(pixels(page), seen)


def test_a_recording_is_a_clip(page: Any, tmp_path: Path) -> None:
    page.click("[data-testid=record]")
    wait_for(page, "recording")
    frame = page.evaluate("() => window.last.frame")
    hold_until(page, f"window.last.frame > {frame + 16}", "KeyW")
    page.click("[data-testid=record]")
    wait_for(page, "live")
    with page.expect_download() as download:
        page.click("[data-testid=save-clip]")
    download.value.save_as(tmp_path / "clip.zip")
    with zipfile.ZipFile(tmp_path / "clip.zip") as archive:
        archive.extractall(tmp_path / "clip")
    check = [
        sys.executable,
        "-m",
        "minwm",
        "data",
        "check",
        str(next((tmp_path / "clip").rglob("manifest.json")).parent),
    ]
    assert subprocess.run(check, check=False, capture_output=True).returncode == 0


def test_two_models_on_the_same_inputs_and_an_uploaded_image(chromium: Any, models: Path, tmp_path: Path) -> None:
    words = ("--model", str(models / "one"), "--compare", str(models / "two"), "--world", "5")
    server = ServerProcess(*words)
    try:
        for page in visit(chromium, server.url):
            assert page.locator("[data-testid=views] canvas").count() == 2
            canvas = "() => getComputedStyle(document.querySelector('[data-testid=canvas]'))"
            assert page.evaluate(f"{canvas}.imageRendering") == "auto", "frames are scaled smoothly"
            write_image(tmp_path / "red.png", np.full((90, 120, 3), (200, 30, 20), np.uint8))
            page.set_input_files("[data-testid=image]", tmp_path / "red.png")
            page.wait_for_function("() => window.last.frame < 30 && minwm.stats.fps > 0")
            page.wait_for_timeout(600)
            page.click("[data-testid=prompt]")
            page.fill("[data-testid=prompt]", "a red wall")
            page.keyboard.press("Enter")
            hold(page, 0.5, "KeyW")
            assert "paused" not in page.inner_text("[data-testid=status]").lower()
    finally:
        server.close()


def test_a_slow_page_falls_behind_and_catches_up(page: Any) -> None:
    page.evaluate("() => { const end = performance.now() + 3000; while (performance.now() < end); }")
    page.wait_for_timeout(1500)
    hold(page, 1.0, "KeyS")
    until(page, "minwm.stats.fps > 5 && minwm.stats.p50 < 1500")


def test_a_refused_visitor_sees_the_reason(chromium: Any, world: ServerProcess) -> None:
    page = chromium.new_page()
    answer = page.goto(world.url.partition("?")[0] + "?token=wrong")
    assert answer.status == 403 and "token" in page.inner_text("body")
    page.close()


def test_a_refused_origin_is_shown_with_the_way_out(chromium: Any, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a reverse proxy that rewrites Host."""
    refusal = Access.refusal
    monkeypatch.setattr(Access, "refusal", lambda self, token, origin, _: refusal(self, token, origin, "backend:1"))
    page = chromium.new_page()
    page.goto(host().url)
    wait_for(page, "fatal")
    assert "--public-url" in page.inner_text("#message-text")
    page.close()


@pytest.mark.parametrize("embed", [None, "*"])
def test_the_page_runs_in_a_frame_only_if_allowed(chromium: Any, host: Any, embed: str | None) -> None:
    page = chromium.new_page()
    page.set_content(f'<iframe src="{host(access=Access("secret", embed=embed)).url}"></iframe>')
    status = page.frame_locator("iframe").locator("[data-testid=status][data-state=live]")
    if embed:
        status.wait_for()
    else:
        page.wait_for_timeout(1000)
        assert status.count() == 0
    page.close()


def test_an_invalid_message_closes_only_its_connection(page: Any) -> None:
    replies = page.evaluate(
        """() => new Promise((resolve) => {
            const socket = new WebSocket(location.href.replace("http", "ws").replace("/?", "/ws?"));
            const received = [];
            socket.onopen = () => socket.send("{]");
            socket.onmessage = ({ data }) => received.push(data);
            socket.onclose = () => resolve(received.join());
        })"""
    )
    assert '"fatal":true' in replies.replace(" ", "")
    before = page.evaluate("() => window.last.frame")
    page.wait_for_function(f"() => window.last.frame > {before}")


@pytest.mark.usefixtures("page")
def test_a_second_client_watches(chromium: Any, world: ServerProcess) -> None:
    other = chromium.new_page()
    other.goto(world.url)
    wait_for(other, "watching")
    assert other.is_disabled("[data-testid=pause]")
    other.close()


@pytest.mark.parametrize("size", [(390, 844), (844, 390), (1440, 900)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_everything_fits_on_the_screen(size: tuple[int, int], chromium: Any, world: ServerProcess) -> None:
    width, height = size
    phone = width < 1000
    for page in visit(
        chromium, world.url, viewport={"width": width, "height": height}, has_touch=phone, is_mobile=phone
    ):
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        box = page.locator("[data-testid=canvas]").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= height
        assert page.locator("[data-testid=move-stick]").is_visible() == phone


# ---------------------------------------------------------------------------------------------
# Codecs, WebRTC, and connections that fail


def test_h264_where_the_browser_has_it(chromium: Any, host: Any) -> None:
    for page in visit(chromium, host().url + "&codec=h264"):
        assert page.evaluate("() => window.last.kind") in ("key", "delta")
        hold_until(page, f"{AHEAD} > 1.2", "KeyW")
        green = min(255, 128 + 40 * ahead(page))
        assert pixels(page)[..., 1].mean() == pytest.approx(green, abs=4), "colours are read as they were written"


def test_where_h264_cannot_be_decoded_jpeg_takes_over(chromium: Any, host: Any) -> None:
    context = chromium.new_context()
    context.add_init_script("VideoDecoder.prototype.configure = () => { throw new Error('no such decoder') }")
    page = context.new_page()
    page.goto(host().url + "&codec=h264")
    page.wait_for_selector("#toast:has-text('no such decoder). Using JPEG instead.')")
    wait_for(page, "live")
    until(page, "minwm.stats.fps > 5")
    context.close()


RTC_ONCE_LIVE = """localStorage.setItem('minwm.rtc', 'yes');
    const take = RTCPeerConnection.prototype.setRemoteDescription;
    RTCPeerConnection.prototype.setRemoteDescription = async function (answer) {
        while (!window.last) await new Promise((resolve) => setTimeout(resolve, 20));
        return take.call(this, answer);
    };"""


def test_webrtc_where_the_server_has_it(chromium: Any, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiortc", reason="WebRTC needs aiortc")
    server, tapped = host(rtc=True), asyncio.Event()
    handshake = server.play_server._handshake

    async def after_a_tap(transport: Transport) -> RemoteClient:
        if isinstance(transport, Peer):
            await tapped.wait()
        return await handshake(transport)

    def patient(route: Any) -> None:
        body = route.fetch().text().replace("OPEN_TIMEOUT = 6000", "OPEN_TIMEOUT = 60_000")
        route.fulfill(body=body, content_type="text/javascript")

    monkeypatch.setattr(server.play_server, "_handshake", after_a_tap)
    monkeypatch.setattr("minwm.play.rtc.OPEN_TIMEOUT", 60.0)
    context = chromium.new_context()
    context.route("**/rtc.js", patient)  # a loaded machine may need more than 6 seconds to connect
    context.add_init_script(RTC_ONCE_LIVE)
    for page in visit(context, server.url):
        until(page, "minwm.client.overRtc")
        page.keyboard.press("KeyW", delay=100)
        server.loop.call_soon_threadsafe(tapped.set)
        until(page, f"{AHEAD} > 0")  # a key counts before the server has answered on the new connection
        hold_until(page, f"{AHEAD} > 0.3", "KeyW")
        far = ahead(page)
        assert page.evaluate("() => minwm.client.overRtc")
        server.cut()  # the session continues over a WebSocket
        page.wait_for_selector("#toast:has-text('the connection broke. Using the WebSocket instead.')")
        wait_for(page, "live")
        assert not page.evaluate("() => minwm.client.overRtc") and ahead(page) >= far
        hold_until(page, f"{AHEAD} > {far + 0.1}", "KeyW")
    context.close()


def test_where_webrtc_cannot_connect_the_websocket_stays(chromium: Any, host: Any) -> None:
    pytest.importorskip("aiortc", reason="WebRTC needs aiortc")
    context = chromium.new_context()
    context.add_init_script(
        """localStorage.setItem('minwm.rtc', 'yes');
        RTCPeerConnection.prototype.setRemoteDescription = () => new Promise(() => {});"""
    )
    for page in visit(context, host(rtc=True).url):
        page.wait_for_selector("#toast:has-text('the server cannot be reached. Using the WebSocket instead.')")
        wait_for(page, "live")
    context.close()


def test_a_lost_connection_resumes_the_session(chromium: Any, host: Any) -> None:
    server = host()
    for page in visit(chromium, server.url):
        hold_until(page, f"{AHEAD} > 0.3", "KeyW")
        session, far = page.evaluate("() => minwm.client.session"), ahead(page)
        server.cut()
        page.wait_for_selector("[data-testid=status][data-state=lost]")
        wait_for(page, "live")
        assert page.evaluate("() => minwm.client.session") == session and ahead(page) == far
        frame = page.evaluate("() => window.last.frame")
        until(page, f"window.last.frame > {frame + 10}")


@pytest.mark.filterwarnings("ignore")
def test_a_failure_is_shown_and_the_page_can_start_again(chromium: Any, host: Any) -> None:
    for page in visit(chromium, host(painted(fails_at=100)).url):
        wait_for(page, "fatal")
        assert "generation failed (RuntimeError: out of memory)" in page.inner_text("#message-text")
        page.click("#message-button")
        wait_for(page, "live")
