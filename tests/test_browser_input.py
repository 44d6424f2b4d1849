"""The page's inputs in headless Chromium: keys, mouse, gamepad, touch sticks, dropped images, buttons."""

import base64
from typing import Any

import numpy as np
import pytest
from browsing import (
    AHEAD,
    RIGHT,
    ahead,
    hold,
    hold_until,
    hosting,
    launched,
    needs_chromium,
    pause,
    resting,
    to_the_right,
    until,
    visit,
    wait_for,
)

from minwm.core.media import png_bytes

pytestmark = needs_chromium
chromium = pytest.fixture(launched, scope="module")
host = pytest.fixture(hosting)
DROP = """([name, type, bytes, event]) => {
    const data = new DataTransfer();
    data.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name, { type }));
    window.dispatchEvent(new DragEvent(event, { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


def test_a_dropped_image_becomes_the_start_image(chromium: Any, host: Any) -> None:
    server = host()
    red = base64.b64encode(png_bytes(np.full((90, 120, 3), (200, 30, 20), np.uint8))).decode()
    for page in visit(chromium, server.url):
        hold(page, 0.3, "KeyW")
        page.evaluate(DROP, ["red.png", "image/png", red, "dragover"])
        assert page.evaluate("() => getComputedStyle(document.body, '::after').content") == '"Drop the start image"'
        flushes = page.evaluate("() => window.flushes ?? 0")
        page.evaluate(DROP, ["red.png", "image/png", red, "drop"])
        until(page, f"window.flushes > {flushes}")
        image = server.play_server.loop.next_start.image
        assert image.shape == (16, 16, 3) and abs(image.mean((0, 1)) - (200, 30, 20)).max() < 6
        text = base64.b64encode(b"no image").decode()
        for event in ("dragover", "drop"):
            page.evaluate(DROP, ["a.txt", "text/plain", text, event])
        page.wait_for_selector("#toast:has-text('a.txt cannot be the start image')")
        assert np.array_equal(server.play_server.loop.next_start.image, image)


PAD = """() => {
    window.pad = { connected: true, index: 0, axes: [0, 0, 0, 0],
        buttons: Array.from({ length: 17 }, () => ({ pressed: false, value: 0 })) };
    navigator.getGamepads = () => [window.pad, null];
    window.push = (index, down) => (window.pad.buttons[index] = { pressed: down, value: Number(down) });
}"""


def test_a_gamepad_moves_turns_and_pauses(chromium: Any, host: Any) -> None:
    for page in visit(chromium, host().url):
        page.evaluate(PAD)
        page.evaluate("() => (pad.axes = [0.1, -0.1, 0, 0])")  # a worn stick at rest
        assert ahead(page) == 0
        page.evaluate("() => (pad.axes = [0, -1, 1, 0])")
        until(page, f"{AHEAD} > 0.2 && {RIGHT} > 0.2")  # left stick moves, right stick turns
        page.evaluate("() => (pad.axes = [0, 0, 0, 0])")
        resting(page)
        page.evaluate("() => push(7, true)")
        until(page, "window.last.camera[7] < -0.1")  # the right trigger rises
        page.evaluate("() => push(7, false)")
        resting(page)
        for state in ("paused", "live"):
            page.evaluate("() => push(9, true)")
            wait_for(page, state)
            page.evaluate("() => push(9, false)")
            page.evaluate("() => new Promise((polled) => requestAnimationFrame(() => requestAnimationFrame(polled)))")


def test_two_touch_sticks_at_once(chromium: Any, host: Any) -> None:
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
        until(page, f"{AHEAD} > 0.2 && {RIGHT} > 0.2")
        touch("touchEnd")
        resting(page)


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


def test_key_bindings_can_be_changed_and_are_kept(chromium: Any, host: Any) -> None:
    context = chromium.new_context()
    for page in visit(context, host().url):
        page.click("#settings-button")
        page.click("#bindings button:has-text('Forward')")
        page.keyboard.press("KeyT")
        page.click("#settings .primary")
        assert page.inner_text("#move-caps [data-action=forward]") == "T"
        hold(page, 0.4, "KeyW")
        assert ahead(page) == 0
        hold_until(page, f"{AHEAD} > 0.2", "KeyT")
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
        assert server.play_server.loop.scheduler.speed == 0.25
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
