"""Headless Chromium as a client of the play server: shared by the browser tests and the play benchmarks."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playing import ServerThread, painted

from minwm.play.scenario import Scenario

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="the browser tests need Chromium")
WATCH = """() => {
    minwm.client.addEventListener("state", ({ detail }) => (window.state = detail));
    const show = minwm.playback.show;
    minwm.playback.show = (view, image, frame) => {
        show(view, image, frame);
        if (!view) window.last = frame;
        if (!view && frame.flush) window.flushes = (window.flushes ?? 0) + 1;
    };
}"""
"""Keeps the newest state message and the frame on the screen in `window`, and counts flushes."""
READ_CANVAS = "() => document.querySelector('[data-testid=canvas]').toDataURL('image/png')"


AHEAD, RIGHT = "window.last.camera[11]", "window.last.camera[2]"
"""Of the frame on the screen: how far the camera has gone forward, and the sine of its turn to the right."""


def launched() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def hosting() -> Iterator[Callable[..., ServerThread]]:
    """A function that starts servers; they are closed after the test."""
    servers: list[ServerThread] = []

    def start(scenario: Scenario | None = None, **options: Any) -> ServerThread:
        servers.append(ServerThread(scenario or painted(), **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


class ServerProcess:
    """`minwm play` in a process of its own."""

    def __init__(self, *words: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "minwm", "play", *words, "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout
        line = ""
        while not (found := re.findall(r"http\S+", line)):  # a model prints its warm-up first
            line = self.process.stdout.readline()
            assert line, "the server ended"
        self.url = found[0]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)


def visit(chromium: Any, url: str, **options: Any) -> Iterator[Any]:
    """Open the page and wait for its first frame; at the end the page must have had no error."""
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
    page.wait_for_selector(f"[data-testid=status][data-state={state}]", timeout=60_000)


def hold(page: Any, seconds: float, *keys: str) -> None:
    for key in keys:
        page.keyboard.down(key)
    page.wait_for_timeout(1000 * seconds)
    for key in keys:
        page.keyboard.up(key)


def hold_until(page: Any, true: str, *keys: str) -> None:
    """How far the keys move in a second depends on the machine's load: waits for the state, not for a time."""
    for key in keys:
        page.keyboard.down(key)
    until(page, true)
    for key in keys:
        page.keyboard.up(key)


def pause(page: Any) -> None:
    """Pause, and wait until all frames are shown."""
    if page.get_attribute("[data-testid=status]", "data-state") == "live":
        page.click("[data-testid=pause]")
    settle(page)


def settle(page: Any) -> None:
    """Wait until the server is paused and the last frame of its newest chunk is on the screen."""
    until(page, "window.state?.paused && window.last?.frame === window.state.chunk * minwm.playback.maxQueued / 2")


def until(page: Any, true: str) -> None:
    page.wait_for_function(f"() => {true}", timeout=60_000)


def resting(page: Any) -> np.ndarray:
    """The camera-to-world matrix, once it has not changed for two chunks."""
    for _ in range(40):
        before = camera(page)
        until(page, f"window.last.frame > {page.evaluate('() => window.last.frame')} + minwm.playback.maxQueued")
        if np.array_equal(camera(page), before):
            return before
    raise AssertionError("the camera does not come to rest")


def pixels(page: Any) -> np.ndarray:
    data = page.evaluate(READ_CANVAS).partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def camera(page: Any) -> np.ndarray:
    rows = page.evaluate("() => Array.from(window.last.camera)")
    return np.concatenate([np.reshape(rows, (3, 4)), [[0, 0, 0, 1]]])


def ahead(page: Any) -> float:
    return float(resting(page)[2, 3])


def to_the_right(page: Any) -> float:
    """Radians."""
    pose = resting(page)
    return float(np.arctan2(pose[0, 2], pose[2, 2]))
