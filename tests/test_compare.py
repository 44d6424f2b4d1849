"""Two results side by side: what changed is found by name, what did not is not, and other clips are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import error_line, run

from minwm.core.config import to_dict
from minwm.eval.compare import Difference, judged, sign_flip
from minwm.eval.metrics import measure
from minwm.eval.source import Video, VideoSource
from minwm.eval.stats import Interval

line = pytest.fixture(error_line)
COUNT = 12


def result(path: Path, noise: float, model: str = "mine", first: int = 0) -> Path:
    """What `minwm eval` writes of videos that differ so much from their references."""
    rng = np.random.default_rng(0)

    def video(name: str) -> Video:
        own = np.random.default_rng(int(name))
        truth = own.integers(60, 190, (5, 16, 16, 3))
        shown = truth + noise * own.normal(1, 0.2) * rng.normal(size=truth.shape)
        return Video(name, shown.clip(0, 255).astype(np.uint8), 4.0, reference=truth.astype(np.uint8))

    found = measure(VideoSource([str(first + i) for i in range(COUNT)], video), ["likeness", "texture"])
    path.write_text(json.dumps({"videos": {model: to_dict(found)}}))
    return path


def test_what_changed_is_found_and_the_exit_code_says_whether_it_is_worse(
    tmp_path: Path, line: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = result(tmp_path / "good.json", 10.0), result(tmp_path / "bad.json", 14.0, model="other")
    assert run("eval", "--compare", bad, good, "--json", tmp_path / "c.json") == 0
    assert "likeness: psnr" in capsys.readouterr().out
    found: list[dict[str, Any]] = json.loads((tmp_path / "c.json").read_text())["other -> mine"]
    assert [(x["name"], x["verdict"]) for x in found] == [("likeness: psnr", "better"), ("likeness: ssim", "better")]
    assert found[0]["gain"]["value"] == pytest.approx(20 * np.log10(1.4), abs=0.1) and found[0]["videos"] == COUNT
    assert run("eval", "--compare", good, bad) == 1
    assert "bad.json is significantly worse" in (text := line()) and text.endswith("likeness: psnr, likeness: ssim")
    assert run("eval", "--compare", good, good) == 0 and capsys.readouterr().out.count("undecided") == 2


def test_results_of_other_clips_are_refused_by_name(tmp_path: Path, line: Callable[[], str]) -> None:
    ours, others = result(tmp_path / "a.json", 10.0), result(tmp_path / "b.json", 10.0, first=1)
    assert run("eval", "--compare", ours, others) == 2
    assert "a.json has a video 0" in (text := line()) and "b.json has none" in text
    changed = json.loads(ours.read_text())
    changed["videos"]["mine"]["tasks"]["3"]["reference"] = "another"
    (tmp_path / "c.json").write_text(json.dumps(changed))
    assert run("eval", "--compare", ours, tmp_path / "c.json") == 2 and "video 3: its reference is" in line()
    changed = json.loads(ours.read_text())
    changed["videos"]["mine"]["estimator"] = "colmap"
    (tmp_path / "c.json").write_text(json.dumps(changed))
    assert run("eval", "--compare", ours, tmp_path / "c.json") == 2 and "by klt and by colmap" in line()
    changed["videos"] = {"x": changed["videos"]["mine"], "y": changed["videos"]["mine"]}
    (tmp_path / "c.json").write_text(json.dumps(changed))
    assert run("eval", "--compare", ours, tmp_path / "c.json") == 2 and "no model is in both" in line()
    (tmp_path / "rendered.json").write_text('{"rows": {}}')
    assert run("eval", "--compare", ours, tmp_path / "rendered.json") == 2 and "it has no scores by video" in line()
    assert run("eval", "--compare", ours, others, "--suite") == 2 and "measures nothing" in line()


def test_nothing_is_called_worse_when_nothing_changed() -> None:
    """In 40 comparisons of 12 quantities over 16 videos one is expected to call something worse."""
    rng, alarms = np.random.default_rng(1), 0
    for _ in range(40):
        gains = {str(i): row for i, row in enumerate(rng.normal(size=(12, 16)))}
        means = {name: Interval(float(row.mean()), 0, 0) for name, row in gains.items()}
        found = [Difference(name, 0, 0, means[name], sign_flip(row), 16) for name, row in gains.items()]
        alarms += any(difference.verdict == "worse" for difference in judged(found))
    assert alarms <= 4
    assert sign_flip(np.ones(3)) == pytest.approx(2 / 2**3, abs=0.02), "three videos cannot say more"
