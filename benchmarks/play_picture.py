"""A screenshot of the player, for the README.

    python benchmarks/play_picture.py docs/play.png 1280x800 --model runs/demo --compare truth

opens the page in headless Chromium, presses some keys, and takes a screenshot.
"""

import sys

from browsing import CHROMIUM, ServerProcess, hold, visit
from playwright.sync_api import sync_playwright

WAY = ((1.2, "KeyW"), (1.0, "ArrowRight"), (1.2, "KeyW"), (0.8, "KeyD", "ArrowLeft"))


def main(out: str, size: str, *words: str) -> None:
    width, height = map(int, size.split("x"))
    phone = width < height
    screen = {"viewport": {"width": width, "height": height}, "has_touch": phone, "is_mobile": phone}
    server = ServerProcess(*words)
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            for page in visit(browser, server.url, **screen, device_scale_factor=2 if phone else 1):
                for seconds, *keys in WAY:
                    hold(page, seconds, *keys)
                for key in ("KeyW", "ArrowRight"):
                    page.keyboard.down(key)
                page.wait_for_timeout(1000)
                page.screenshot(path=out)
    finally:
        server.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
