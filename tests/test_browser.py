"""The player as a visitor has it: headless Chromium, the real server, real keys."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playing import Hosted, painted
from torch import nn

from minwm.checkpoint import save_model
from minwm.cli.play import _world_config
from minwm.core.media import png_bytes, write_image
from minwm.play.game import Game, enter
from minwm.presets import smoke

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="the browser tests need Chromium")
WORLD, SIZE = 7, 64
WATCH = """() => {
    minwm.client.addEventListener("state", ({ detail }) => (window.state = detail));
    const show = minwm.player.show;
    minwm.player.show = (view, picture, frame) => {
        show(view, picture, frame);
        if (!view) window.last = frame;
        if (!view && frame.flush) window.begun = (window.begun ?? 0) + 1;
    };
}"""
"""Keeps what the server has said last, and the frame that is on the screen."""
PICTURE = "() => document.querySelector('[data-testid=canvas]').toDataURL('image/png')"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Server:
    """`minwm play` in a process of its own."""

    def __init__(self, *words: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "minwm", "play", *words, "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout
        said = ""
        while not (found := re.findall(r"http\S+", said)):  # a model says before that it warms up
            said = self.process.stdout.readline()
            assert said, "the server ended"
        self.url = found[0]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture(scope="module")
def world() -> Iterator[Server]:
    server = Server("--world", str(WORLD), "--size", str(SIZE))
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
        nn.init.normal_(net.head.head.weight, std=0.1)
        save_model(folder / name, config, net, codec)
    return folder


@pytest.fixture
def page(chromium: Any, world: Server) -> Iterator[Any]:
    yield from visit(chromium, world.url)


def visit(chromium: Any, url: str, **options: Any) -> Iterator[Any]:
    """A visitor who sees the first picture; at the end nothing may have gone wrong on the page."""
    page, problems = chromium.new_page(**options), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    try:
        page.goto(url)
        page.evaluate(WATCH)
        wait_for(page, "live")
        until(page, "window.last")
        yield page
    finally:
        page.close()
    assert not problems


def wait_for(page: Any, state: str) -> None:
    page.wait_for_selector(f"[data-testid=status][data-state={state}]", timeout=15_000)


def hold(page: Any, seconds: float, *keys: str) -> None:
    for key in keys:
        page.keyboard.down(key)
    page.wait_for_timeout(1000 * seconds)
    for key in keys:
        page.keyboard.up(key)


def pause(page: Any) -> None:
    """Stop, and wait until all that was made is seen."""
    if page.get_attribute("[data-testid=status]", "data-state") == "live":
        page.click("[data-testid=pause]")
    settle(page)


def settle(page: Any) -> None:
    """Wait until the walk is paused, and the end of its newest chunk on the screen."""
    until(page, "window.state?.paused && window.last?.frame === window.state.chunk * minwm.player.most / 2")


def until(page: Any, true: str) -> None:
    page.wait_for_function(f"() => {true}", timeout=20_000)


def resting(page: Any) -> np.ndarray:
    """The camera, once it stands still for two chunks."""
    for _ in range(40):
        before = camera(page)
        until(page, f"window.last.frame > {page.evaluate('() => window.last.frame')} + minwm.player.most")
        if np.array_equal(camera(page), before):
            return before
    raise AssertionError("the camera does not come to rest")


def picture(page: Any) -> np.ndarray:
    data = page.evaluate(PICTURE).partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def camera(page: Any) -> np.ndarray:
    rows = page.evaluate("() => Array.from(window.last.camera)")
    return np.concatenate([np.reshape(rows, (3, 4)), [[0, 0, 0, 1]]])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.square((a.astype(float) - b) / 255).mean() + 1e-12))


def truth(c2w: np.ndarray) -> np.ndarray:
    return enter(WORLD, _world_config(SIZE)).advance(c2w[None])[0]


def test_keys_move_the_camera_and_the_picture_is_what_it_sees(page: Any) -> None:
    pause(page)
    before = picture(page)
    page.click("[data-testid=pause]")
    hold(page, 1.0, "KeyW", "ArrowRight")
    pause(page)
    after, c2w = picture(page), camera(page)
    assert c2w[2, 3] > 0.2 and np.arctan2(c2w[0, 2], c2w[2, 2]) > 0.2, "forward, and turned to the right"
    assert psnr(after, truth(c2w)) > 30 > psnr(before, after) + 8


def test_rewind_goes_back_and_replay_gives_the_same_pictures(page: Any) -> None:
    page.evaluate("() => (window.begun = 0)")
    page.click("[data-testid=reset]")
    until(page, "window.begun")
    page.keyboard.down("KeyD")
    page.wait_for_timeout(1500)
    pause(page)
    page.keyboard.up("KeyD")
    far, seen = camera(page), picture(page)
    frame = page.evaluate("() => window.last.frame")
    page.click("[data-testid=rewind]")
    until(page, f"window.last.frame < {frame}")
    assert 0 <= camera(page)[0, 3] < far[0, 3]
    page.click("[data-testid=reset]")
    page.click("[data-testid=pause]")
    hold(page, 1.0, "KeyA")
    pause(page)
    other = picture(page), camera(page)
    page.evaluate("() => (window.last = null)")
    page.click("[data-testid=replay]")
    settle(page)
    assert np.array_equal(camera(page), other[1]) and np.array_equal(picture(page), other[0])
    assert not np.array_equal(picture(page), seen)


def test_a_recording_is_a_clip(page: Any, tmp_path: Path) -> None:
    page.click("[data-testid=record]")
    wait_for(page, "recording")
    hold(page, 1.0, "KeyW")
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


def test_two_models_on_the_same_inputs_and_a_picture_of_ones_own(chromium: Any, models: Path, tmp_path: Path) -> None:
    words = ("--model", str(models / "one"), "--compare", str(models / "two"), "--world", "5")
    server = Server(*words)
    try:
        for page in visit(chromium, server.url):
            assert page.locator("[data-testid=views] canvas").count() == 2
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
    assert page.evaluate("() => minwm.stats.fps") > 5
    assert page.evaluate("() => minwm.stats.p50") < 1500


def test_who_may_not_come_in_is_told_why(chromium: Any, world: Server) -> None:
    page = chromium.new_page()
    answer = page.goto(world.url.partition("?")[0] + "?token=wrong")
    assert answer.status == 403 and "token" in page.inner_text("body")
    page.close()


def test_garbage_ends_its_own_connection_alone(page: Any) -> None:
    said = page.evaluate(
        """() => new Promise((resolve) => {
            const socket = new WebSocket(location.href.replace("http", "ws").replace("/?", "/ws?"));
            const heard = [];
            socket.onopen = () => socket.send("{]");
            socket.onmessage = ({ data }) => heard.push(data);
            socket.onclose = () => resolve(heard.join());
        })"""
    )
    assert '"fatal":true' in said.replace(" ", "")
    before = page.evaluate("() => window.last.frame")
    page.wait_for_function(f"() => window.last.frame > {before}")


@pytest.mark.usefixtures("page")
def test_second_visitor_watches(chromium: Any, world: Server) -> None:
    other = chromium.new_page()
    other.goto(world.url)
    wait_for(other, "watching")
    assert other.is_disabled("[data-testid=pause]")
    other.close()


@pytest.mark.parametrize("size", [(390, 844), (844, 390), (1440, 900)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_everything_fits_on_the_screen(size: tuple[int, int], chromium: Any, world: Server) -> None:
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
# With a server in this process, whose house can be looked into


@pytest.fixture
def host() -> Iterator[Callable[..., Hosted]]:
    """Start servers, and end them."""
    servers: list[Hosted] = []

    def start(game: Game | None = None, **how: Any) -> Hosted:
        servers.append(Hosted(game or painted(), **how))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def ahead(page: Any) -> float:
    return float(resting(page)[2, 3])


def to_the_right(page: Any) -> float:
    """Radians."""
    pose = resting(page)
    return float(np.arctan2(pose[0, 2], pose[2, 2]))


DROP = """([name, type, bytes, event]) => {
    const data = new DataTransfer();
    data.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name, { type }));
    window.dispatchEvent(new DragEvent(event, { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


def test_a_dropped_picture_is_where_the_walk_begins(chromium: Any, host: Any) -> None:
    server = host()
    red = base64.b64encode(png_bytes(np.full((90, 120, 3), (200, 30, 20), np.uint8))).decode()
    for page in visit(chromium, server.url):
        hold(page, 0.3, "KeyW")
        page.evaluate(DROP, ["red.png", "image/png", red, "dragover"])
        assert page.evaluate("() => getComputedStyle(document.body, '::after').content") == '"Drop the start picture"'
        page.evaluate(DROP, ["red.png", "image/png", red, "drop"])
        until(page, "window.last.flush && window.last.frame === 0 || window.last.frame < 40 && window.last.chunk < 10")
        image = server.house.player.begin.image
        assert image.shape == (16, 16, 3) and abs(image.mean((0, 1)) - (200, 30, 20)).max() < 6
        text = base64.b64encode(b"no picture").decode()
        for event in ("dragover", "drop"):
            page.evaluate(DROP, ["a.txt", "text/plain", text, event])
        page.wait_for_selector("#toast:has-text('a.txt cannot be the start picture')")
        assert np.array_equal(server.house.player.begin.image, image)


PAD = """() => {
    window.pad = { connected: true, index: 0, axes: [0, 0, 0, 0],
        buttons: Array.from({ length: 17 }, () => ({ pressed: false, value: 0 })) };
    navigator.getGamepads = () => [window.pad, null];
    window.push = (index, down) => (window.pad.buttons[index] = { pressed: down, value: Number(down) });
}"""


def test_a_gamepad_walks_turns_and_pauses(chromium: Any, host: Any) -> None:
    for page in visit(chromium, host().url):
        page.evaluate(PAD)
        page.evaluate("() => (pad.axes = [0.1, -0.1, 0, 0])")  # a worn stick at rest
        assert ahead(page) == 0
        page.evaluate("() => (pad.axes = [0, -1, 1, 0])")
        page.wait_for_timeout(700)
        page.evaluate("() => (pad.axes = [0, 0, 0, 0])")
        assert ahead(page) > 0.2 and to_the_right(page) > 0.2, "left stick walks, right stick turns"
        page.evaluate("() => push(7, true)")
        page.wait_for_timeout(400)
        page.evaluate("() => push(7, false)")
        assert resting(page)[1, 3] < -0.1, "the right trigger rises"
        for state in ("paused", "live"):
            page.evaluate("() => push(9, true)")
            wait_for(page, state)
            page.evaluate("() => push(9, false)")
            page.wait_for_timeout(100)


def test_two_thumbs_on_two_sticks(chromium: Any, host: Any) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    for page in visit(chromium, host().url, **phone):
        finger = page.context.new_cdp_session(page)
        boxes = [page.locator(f"[data-testid={name}-stick]").bounding_box() for name in ("move", "look")]
        middle = [(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in boxes]

        def touch(kind: str, *offsets: tuple[float, float], finger: Any = finger, middle: Any = middle) -> None:
            pairs = enumerate(zip(middle, offsets, strict=False))
            points = [{"x": x + dx, "y": y + dy, "id": i} for i, ((x, y), (dx, dy)) in pairs]
            finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

        touch("touchStart", (0, 0), (0, 0))
        touch("touchMove", (0, -50), (50, 0))
        page.wait_for_timeout(700)
        touch("touchEnd")
        assert ahead(page) > 0.2 and to_the_right(page) > 0.2


def test_mouse_look_by_dragging_and_with_a_locked_pointer(chromium: Any, host: Any) -> None:
    for page in visit(chromium, host().url):
        box = page.locator("[data-testid=canvas]").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.wait_for_timeout(300)  # longer than a click
        page.mouse.move(x + 100, y, steps=5)
        page.mouse.up()
        assert to_the_right(page) == pytest.approx(np.radians(12), abs=0.01), "0.12 degrees per pixel"
        page.mouse.click(x, y)
        until(page, "document.pointerLockElement !== null")
        page.mouse.move(x + 50, y, steps=5)
        assert to_the_right(page) > np.radians(15), "no button is held"


def test_keys_can_be_bound_anew_and_stay_so(chromium: Any, host: Any) -> None:
    context = chromium.new_context()
    for page in visit(context, host().url):
        page.click("#settings-button")
        page.click("#bindings button:has-text('Forward')")
        page.keyboard.press("KeyT")
        page.click("#settings .primary")
        assert page.inner_text("#move-caps [data-action=forward]") == "T"
        hold(page, 0.4, "KeyW")
        assert ahead(page) == 0
        hold(page, 0.4, "KeyT")
        assert ahead(page) > 0.2
        page.reload()
        assert page.inner_text("#move-caps [data-action=forward]") == "T"
    context.close()


def test_steps_speed_and_seed(chromium: Any, host: Any) -> None:
    server = host()
    for page in visit(chromium, server.url):
        pause(page)
        chunk = page.evaluate("() => window.last.chunk")
        page.keyboard.press("Period")
        until(page, f"window.last.chunk === {chunk + 1}")
        page.select_option("[data-testid=speed]", "0.25")
        until(page, "window.state.speed === 0.25")
        assert server.house.player.pacer.speed == 0.25
        page.click("[data-testid=pause]")
        until(page, "minwm.stats.fps > 8 && minwm.stats.fps < 24")  # of 64
        page.fill("[data-testid=seed]", "41")
        page.click("[data-testid=seed-send]")
        until(page, "window.last.seed === 41")


def test_everything_can_be_reached_and_done_with_the_keyboard(chromium: Any, host: Any) -> None:
    for page in visit(chromium, host().url):
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("() => document.activeElement.dataset.testid ?? document.activeElement.id"))
        everything = page.evaluate(
            """() => [...document.querySelectorAll("button, input, select, textarea")]
                .filter((e) => e.checkVisibility() && !e.disabled).map((e) => e.dataset.testid ?? e.id)"""
        )
        assert set(everything) <= reached
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("button, input, select, textarea")].filter((e) =>
                !(e.ariaLabel || e.textContent.trim() || e.title || e.labels?.length)).map((e) => e.outerHTML)"""
        )
        assert not unnamed
        page.focus("[data-testid=pause]")
        page.keyboard.press("Space")
        wait_for(page, "paused")
        page.keyboard.press("Enter")
        wait_for(page, "live")


# ---------------------------------------------------------------------------------------------
# Other ways over the network, and what becomes of them


def test_h264_where_the_browser_has_it(chromium: Any, host: Any) -> None:
    for page in visit(chromium, host().url + "&codec=h264"):
        assert page.evaluate("() => window.last.kind") in ("key", "delta")
        hold(page, 0.8, "KeyW")
        far = ahead(page)
        green = float(picture(page)[..., 1].mean())
        assert green == pytest.approx(128 + 40 * far, abs=6) and green > 134


def test_where_h264_cannot_be_decoded_jpeg_takes_over(chromium: Any, host: Any) -> None:
    context = chromium.new_context()
    context.add_init_script("VideoDecoder.prototype.configure = () => { throw new Error('no such decoder') }")
    page = context.new_page()
    page.goto(host().url + "&codec=h264")
    page.wait_for_selector("#toast:has-text('no such decoder). Going on with JPEG.')")
    wait_for(page, "live")
    until(page, "minwm.stats.fps > 20")
    context.close()


def test_webrtc_where_the_server_has_it(chromium: Any, host: Any) -> None:
    pytest.importorskip("aiortc", reason="WebRTC needs aiortc")
    server = host(rtc=True)
    context = chromium.new_context()
    context.add_init_script("localStorage.setItem('minwm.rtc', 'yes')")
    for page in visit(context, server.url):
        until(page, "minwm.client.overRtc")
        hold(page, 0.8, "KeyW")
        far = ahead(page)
        assert far > 0.3 and page.evaluate("() => minwm.client.overRtc")
        server.cut()  # and when it breaks, the walk goes on over a WebSocket
        page.wait_for_selector("#toast:has-text('the connection broke. Going on over a WebSocket.')")
        wait_for(page, "live")
        assert not page.evaluate("() => minwm.client.overRtc") and ahead(page) >= far
        hold(page, 0.4, "KeyW")
        assert ahead(page) > far + 0.1
    context.close()


def test_where_no_packet_comes_through_the_websocket_stays(chromium: Any, host: Any) -> None:
    pytest.importorskip("aiortc", reason="WebRTC needs aiortc")
    context = chromium.new_context()
    context.add_init_script(
        """localStorage.setItem('minwm.rtc', 'yes');
        RTCPeerConnection.prototype.setRemoteDescription = () => new Promise(() => {});"""
    )
    for page in visit(context, host(rtc=True).url):
        page.wait_for_selector("#toast:has-text('no way through to the server. Going on over a WebSocket.')")
        wait_for(page, "live")
    context.close()


def test_a_lost_connection_comes_back_to_the_same_walk(chromium: Any, host: Any) -> None:
    server = host()
    for page in visit(chromium, server.url):
        hold(page, 0.5, "KeyW")
        session, far = page.evaluate("() => minwm.client.session"), ahead(page)
        server.cut()
        page.wait_for_selector("[data-testid=status][data-state=lost]")
        wait_for(page, "live")
        assert page.evaluate("() => minwm.client.session") == session and ahead(page) == far > 0.2
        frame = page.evaluate("() => window.last.frame")
        until(page, f"window.last.frame > {frame + 10}")


@pytest.mark.filterwarnings("ignore")
def test_a_failure_is_told_and_another_walk_can_begin(chromium: Any, host: Any) -> None:
    for page in visit(chromium, host(painted(fails_at=100)).url):
        wait_for(page, "fatal")
        assert "generation failed (RuntimeError: out of memory)" in page.inner_text("#message-text")
        page.click("#message-button")
        wait_for(page, "live")
