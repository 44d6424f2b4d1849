"""The page of `minwm data report --html`: clips that play, and every rule with its examples."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import launched, needs_chromium
from commands import run
from test_ingest import CFG, footage, walk

from minwm.core.files import write_json
from minwm.data.clips import ClipFolder
from minwm.data.ingest import ingest
from minwm.eval.report.charts import histogram


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a folder with two clips, one dropped for its pictures, one for its caption, and a refused video."""
    root = tmp_path_factory.mktemp("dataset")
    footage(root / "in", "walk")
    footage(root / "in", "<b>bold", walk(5)[1], walk(5)[0])
    footage(root / "in", "dark", walk()[1] // 32)
    footage(root / "in", "pans").with_suffix(".txt").write_text("the camera pans")
    footage(root / "in", "junk").write_bytes(b"x")
    ingest(root / "in", root / "out", replace(CFG, quality=replace(CFG.quality, epipolar=False)))
    folder = ClipFolder(root / "out")
    assert len(folder.ids()) == 2
    path = folder.clips / f"{folder.ids()[0]}.json"
    write_json(path, json.loads(path.read_text()) | {"source_license": "CC-BY-4.0", "parent_model": "a/model"})
    assert run("data", "report", root / "out", "--html", root / "page.html") == 0
    return root / "page.html"


def test_the_page_says_what_is_there_and_what_was_dropped(page_file: Path) -> None:
    page = page_file.read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page), "nothing is fetched"
    for text in (
        "<h3>exposure: 1</h3>", "its mean brightness is", "<h3>caption: 1</h3>", "<h3>refused videos: 1</h3>",
        "junk.mp4 cannot be read as a video", "footage, CC-BY-4.0, a/model, poses estimated", "footage, CC0-1.0, poses",
        "&lt;b&gt;bold.mp4 at 0.000 s", "units per second (toy)", "time of ingest", "words per caption",
    ):  # fmt: skip
        assert text in page, text
    assert "<b>bold" not in page
    disk = sum(file.stat().st_size for file in (page_file.parent / "out" / "clips").iterdir())
    assert f"{disk / 1e6:.4g} MB" in page


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    yield from launched()


@needs_chromium
def test_its_clips_play(page_file: Path, chromium: Any) -> None:
    page, problems = chromium.new_page(), list[str]()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(page_file.as_uri())
    playing = "[...document.querySelectorAll('video')].filter(v => v.currentTime > 0 && !v.paused).length"
    page.wait_for_function(f"() => {playing} === 2", timeout=10_000)
    assert not problems


def test_a_histogram_counts_every_value_and_marks_the_models_speed() -> None:
    values = np.random.default_rng(0).uniform(0, 2, 500).tolist()
    chart = histogram([*values, 1e9], x_label="speed", marks={"keys": 3.0})
    assert sum(map(int, re.findall(r": (\d+)</title>", chart))) == 501
    assert "keys" in chart and "no data" in histogram([], x_label="speed")
