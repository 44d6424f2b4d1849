"""The player as a visitor has it: headless Chromium, the real server, real keys."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from minwm.checkpoint import save_model
from minwm.cli.play import _world_config
from minwm.core.media import write_image
from minwm.play.game import enter
from minwm.presets import smoke

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="the browser tests need Chromium")
WORLD, SIZE = 7, 64
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
        self.url = re.findall(r"http\S+", self.process.stdout.readline())[0]

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
    page.goto(url)
    page.evaluate(
        "() => minwm.client.addEventListener('frame', ({ detail }) => { if (!detail.view) window.last = detail; })"
    )
    wait_for(page, "live")
    page.wait_for_function("() => window.last")
    yield page
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
    wait_for(page, "paused")
    page.wait_for_timeout(1200)


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
    page.click("[data-testid=reset]")
    page.wait_for_timeout(500)
    hold(page, 1.5, "KeyD")
    pause(page)
    far, seen = camera(page), picture(page)
    page.click("[data-testid=rewind]")
    page.wait_for_timeout(800)
    assert 0 <= camera(page)[0, 3] < far[0, 3]
    page.click("[data-testid=reset]")
    page.click("[data-testid=pause]")
    hold(page, 1.0, "KeyA")
    pause(page)
    other = picture(page), camera(page)
    page.click("[data-testid=replay]")
    page.wait_for_timeout(500)
    wait_for(page, "paused")
    page.wait_for_timeout(1200)
    assert np.array_equal(camera(page), other[1]) and np.array_equal(picture(page), other[0])
    assert not np.array_equal(picture(page), seen)


def test_a_recording_is_a_clip(page: Any, tmp_path: Path) -> None:
    page.click("[data-testid=record]")
    wait_for(page, "recording")
    hold(page, 1.0, "KeyW")
    page.click("[data-testid=record]")
    wait_for(page, "live")
    page.wait_for_timeout(500)
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
