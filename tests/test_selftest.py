"""The self-test: parts that crash or hang leave the others and are named; what is done is not done again."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import error_line, run
from performance_page import PAGE, RESULTS, section, with_section

from minwm.bench.parts import GPU, SMALL, SMALL_REFERENCE, Part
from minwm.bench.reference import SCRIPTS
from minwm.bench.selftest import Outcome, page, selftest
from minwm.bench.target import Target
from minwm.core.config import UserError
from minwm.core.media import write_video
from minwm.experiments import presets

line = pytest.fixture(error_line)
FOUND = {"fps": 20, "chunk": {"median_ms": 900}, "first_chunk": {"median_ms": 125}}
WRITES = f"import json, sys; open(sys.argv[-1], 'w').write(json.dumps({FOUND}))"


def script(folder: Path, name: str, body: str) -> tuple[str, ...]:
    """A module that can be run as `python -m`, from that folder."""
    (folder / f"{name}.py").write_text(body)
    return (name,)


def test_a_bad_part_leaves_the_others_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hangs = (
        "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    )
    fills = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))\nbytearray(2**30)"
    targets = {"fps": Target("speed", 18, at_least=True), "chunk.median_ms": Target("M2", 850), "none": Target("M5", 1)}
    parts = (
        Part("crashes", script(tmp_path, "crashes", "import os; print('deep trouble', flush=True); os.abort()"), 30),
        Part("hangs", script(tmp_path, "hangs", hangs), 0.5),
        Part("fills", script(tmp_path, "fills", fills), 30),
        Part("killed", script(tmp_path, "killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), 30),
        Part("large", script(tmp_path, "large", WRITES), 30, gib=80),
        Part("works", script(tmp_path, "works", WRITES), 30, targets=targets),
    )
    began, log = time.monotonic(), list[str]()
    outcomes = selftest(parts, tmp_path / "out", 24.0, log.append)
    assert [outcome.state for outcome in outcomes] == ["failed", "timed out", "failed", "failed", "left out", "done"]
    assert time.monotonic() - began < 20 and len(log) == 6
    text = (tmp_path / "out" / "page.md").read_text()
    assert "## crashes: failed" in text and "deep trouble" in text and "## hangs: timed out" in text
    assert "## fills: failed" in text and "MemoryError" in text and "## killed: failed" in text
    assert "ended by SIGKILL" in text and "ended by SIGABRT" in text
    assert "it needs 80 GiB of GPU memory, there are 24.0" in text
    assert "| speed | at least 18 | 20 | met |" in text and "| M2 | at most 850 | 900 | missed |" in text
    assert "| M5 | at most 1 | not measured |  |" in text
    assert json.loads((tmp_path / "out" / "works.json").read_text())["found"]["fps"] == 20

    (tmp_path / "works.py").unlink()
    (tmp_path / "crashes.py").write_text(WRITES)
    again = selftest(parts, tmp_path / "out", 24.0, log.append, budget=20.0)
    ended = ["done", "timed out", "failed", "failed", "left out", "done"]
    assert [outcome.state for outcome in again] == ended, "works is not run again"
    late = selftest(parts[1:2], tmp_path / "late", 24.0, log.append, budget=0.0)
    assert late[0].state == "left out" and "no time is left" in page(late)


def test_peaks_of_memory_stand_beside_their_plans() -> None:
    plan = {
        "stages": {"ar": {"training": {"total": 40e9}}, "dmd": {"training": {"total": 50e9}, "playing": {"total": 8e9}}}
    }
    found = {
        "bench": {"allocated_gb": 10.0},
        "training": {"stages": {"ar": {"allocated_gb": 44.0}, "dmd": {"allocated_gb": None}}},
        "plan": plan,
    }
    outcomes = [Outcome(Part(name, (), 1, planned_by="plan"), "done", 1.0, "", x) for name, x in found.items()]
    text = page(outcomes)
    assert "| bench: playing dmd | 8 | 10 | 1.25 |" in text and "| training: training ar | 40 | 44 | 1.10 |" in text
    assert text.count("training dmd") == 0 and "peak / planned" not in page(outcomes[2:])


def test_the_parts_of_a_gpu_name_what_exists() -> None:
    for part in GPU:
        if "--preset" in part.words or part.words[1] == "bench-train":
            name = part.words[part.words.index("--preset") + 1] if "--preset" in part.words else part.words[2]
            assert name in presets.PIPELINES or name in presets.MODELS
        for word in part.words:
            assert not word.startswith("tests/") or Path(__file__).parents[1].joinpath(word).exists()


def test_what_a_part_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even what does not listen, once the part has had time to end it itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minwm.bench.selftest.GRACE", 0.3)
    deaf = "trap '' TERM; while true; do echo >> beats; sleep 0.02; done"
    body = f"import subprocess\nsubprocess.Popen(['sh', '-c', {deaf!r}])\n"
    for name, rest, state in (("hangs", "import time; time.sleep(60)", "timed out"), ("ends", "", "done")):
        part = Part(name, script(tmp_path, name, body + rest), 2.0, writes=False)
        (outcome,) = selftest([part], tmp_path / "out", 0.0, lambda _: None)
        assert outcome.state == state
        beats = (tmp_path / "beats").stat().st_size
        time.sleep(0.1)
        assert (tmp_path / "beats").stat().st_size == beats


def test_the_whole_of_it_runs_on_a_cpu(tmp_path: Path) -> None:
    assert run("selftest", "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "page.md").read_text()
    assert len(re.findall(r"\| small\S* \| done \|", text)) == len(SMALL)
    assert "| frames per second | at least 1 |" in text


REFERENCE = """
cat "$DATA_PATH" | while read prompt; do
  sleep 0.2; mkdir -p "$OUTPUT_FOLDER"; cp $(dirname $0)/video.mp4 "$OUTPUT_FOLDER/$prompt.mp4"
done
echo "[timing] rank0 chunk0 latency excl. decode (from 2nd prompt): avg=0.250s over 2 samples"
"""


def test_the_references_own_inference_stands_beside_ours(tmp_path: Path, line: Callable[[], str]) -> None:
    """With a stand-in of its folder: a script of that name, which copies videos and prints as it does."""
    path = tmp_path / "minWM" / SCRIPTS["wan2.1-1.3b"].path
    path.parent.mkdir(parents=True)
    path.write_text(REFERENCE)
    write_video(path.parent / "video.mp4", np.zeros((20, 32, 32, 3), np.uint8), 16.0)
    parts = (Part("small", script(tmp_path, "small", WRITES), 30), *SMALL_REFERENCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])]))
        outcomes = selftest(parts, tmp_path / "out", 0.0, lambda _: None, reference=path.parents[3])
    assert [outcome.state for outcome in outcomes] == ["done", "done"], outcomes[-1].tail
    text = (tmp_path / "out" / "page.md").read_text()
    found = outcomes[-1].found
    assert "| small: M1, ms | 250 | 125 | 0.50 |" in text and found["videos"] == 2
    assert 1 < found["fps"] < 20 / 0.2 and f"| small: frames per second | {found['fps']:.4g} | 20 |" in text
    path.write_text("echo no GPU here; exit 3")
    words = ("bench", "--preset", "wan2.1-1.3b", "--reference")
    assert run(*words, path.parents[3]) == 2 and "ended with 3, 0 videos and no line of timing" in line()
    assert run(*words, tmp_path) == 2 and "give a checkout of minWM" in line()
    assert run("selftest", "--reference", tmp_path / "none") == 2 and "there is no such folder" in line()


def test_the_page_on_performance_holds_what_was_committed(tmp_path: Path) -> None:
    text = PAGE.read_text()
    assert with_section(text, section(RESULTS)) == text, "run benchmarks/performance_page.py"
    found = {"words": [*GPU[0].words], "state": "done", "seconds": 9.0, "tail": "", "commit": "abc"}
    found |= {"versions": {"gpu": "H200", "torch": "2"}, "found": {"fps": 21.5, "chunk": {"median_ms": 900}}}
    (tmp_path / f"{GPU[0].name}.json").write_text(json.dumps(found))
    made = section(tmp_path)
    assert "| T4: Wan M3, frames per second | at least 18 | 21.5 | met |" in made and "on H200, PyTorch 2" in made
    assert "| T2: Wan M2, ms | at most 850 | 900 | missed |" in made and "not measured" in made
    with pytest.raises(UserError, match="has no section"):
        with_section("nothing", made)
