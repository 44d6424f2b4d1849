"""Speed, memory and threads stay constant in long play: for seconds here, for ten minutes with `make test-all`."""

from typing import Any

import pytest
from browsing import ServerProcess, launched, needs_chromium, visit

pytestmark = needs_chromium
browser = pytest.fixture(launched)


@pytest.mark.parametrize(("seconds", "window"), [(12, 2), pytest.param(600, 10, marks=pytest.mark.slow)])
def test_nothing_grows(seconds: float, window: float, browser: Any) -> None:
    from play_soak import SETTLED, compared, soak

    server = ServerProcess("--world", "7", "--size", "64")
    try:
        for page in visit(browser, server.url):
            settled = min(SETTLED, seconds / 4)
            thirds = compared(soak(page, server, seconds, window), skip=round(settled / window))
    finally:
        server.close()
    first, last = thirds["first third"], thirds["last third"]
    assert last["server_threads"] <= first["server_threads"]
    assert last["server_mib"] < first["server_mib"] + 20 and last["page_mib"] < first["page_mib"] + 3
    assert last["fps"] > 0.7 * first["fps"]
    assert last["input_to_photon_p50_ms"] < 1.5 * first["input_to_photon_p50_ms"] + 100
