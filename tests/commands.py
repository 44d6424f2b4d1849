"""Running commands inside the tests, and the line that an error leaves."""

from collections.abc import Callable

import pytest

from minwm.cli import main


def run(*words: object) -> int:
    return main([str(word) for word in words])


def error_line(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Reads the one line that an error leaves."""

    def read() -> str:
        lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return read
