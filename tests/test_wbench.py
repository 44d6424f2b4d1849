"""Results of WBench: its report from videos of its cases, and its result file for the Hub."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import error_line, run
from huggingface_hub import parse_eval_result_entries
from yaml import safe_load

from minwm.cameras.track import intrinsics
from minwm.cameras.trajectory import Motion, parse
from minwm.core.config import parse_json
from minwm.core.files import write_json
from minwm.core.media import write_video

line = pytest.fixture(error_line)
LEADER = {
    "aesthetic_quality": 0.6534,
    "imaging_quality": 0.6746,
    "temporal_flickering": 0.9222,
    "dynamic_degree": 0.8861,
    "motion_smoothness": 0.9688,
    "hpsv3_quality": 0.7522,
    "scene_adherence": 0.7222,
    "subject_adherence": 0.9216,
    "navigation_trajectory": 0.7998,
    "background_consistency": 0.9337,
    "spatial_consistency": 0.8443,
    "gated_spatial_consistency": 0.8305,
    "perspective_consistency": 0.8356,
    "segment_continuity": 0.9873,
    "geometric_consistency": 0.8878,
    "photometric_consistency": 0.7980,
    "subject_consistency": 0.9212,
    "visual_plausibility": 0.6177,
    "causal_fidelity": 0.8488,
}
"""Of HiDream-O1-World on 2026-08-14, whose score on the leaderboard is 80.9."""


def report(path: Path, metrics: dict[str, float], cases: int = 158) -> Path:
    part = {name: {"mean": value, "n": cases} for name, value in metrics.items()}
    write_json(path, {"model": "x", "n_cases": cases, "n_navi": cases, "full": part, "navi": part})
    return path


def test_the_hubs_file_has_the_score_of_the_leaderboard(tmp_path: Path, line: Callable[[], str]) -> None:
    file = tmp_path / ".eval_results" / "wbench.yaml"
    words = ("eval", "--hub", file, "--wbench")
    assert run(*words, report(tmp_path / "few.json", LEADER, 12)) == 2
    assert "is of 12 navigation cases; the Hub's score is that of all 158" in line()
    lacks = {name: value for name, value in LEADER.items() if name != "scene_adherence"}
    assert run(*words, report(tmp_path / "lacks.json", lacks)) == 2 and "lacks scene_adherence" in line()
    assert not file.exists()
    whole = report(tmp_path / "report.json", LEADER)
    assert run(*words, whole) == 0
    assert safe_load(file.read_text()) == [
        {"dataset": {"id": "meituan-longcat/WBench", "task_id": "wbench_navi"}, "value": 80.9}
    ]
    assert parse_eval_result_entries(safe_load(file.read_text()))[0].value == 80.9
    assert run(*words, whole) == 2 and "exists" in line()
    assert run(*words, whole, "--suite") == 2 and "measures nothing" in line()


def test_videos_of_its_cases_give_its_report_of_navigation(tmp_path: Path, line: Callable[[], str]) -> None:
    """Still videos: half of the marks, as WBench itself gives them."""
    motion, videos = Motion(move=0.5, turn=16.0, fps=4.0), tmp_path / "videos"
    track = parse("w*1,d*1,a*1,static*1").track(motion, intrinsics(70.0, 32, 32))
    picture = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    for case in ("7", "e_5"):
        write_video(videos / f"case_{case}_combined.mp4", [picture] * len(track), motion.fps)
        track.save(videos / f"case_{case}_combined.json")
    file = tmp_path / "report.json"
    words = ("eval", "--videos", videos, "--wbench", file, "--metrics")
    assert run(*words, "published") == 2 and "has no turns.json" in line()
    turns = {case: {"turn_frames": [0, 5, 9, 13, 17]} for case in ("7", "e_5")}
    (videos / "turns.json").write_text(json.dumps({"fps": motion.fps, "cases": turns}))
    assert run(*words, "texture") == 2 and "those of published; add it to --metrics" in line()
    assert run(*words, "published") == 0
    found = parse_json(file.read_text())
    assert found.keys() == {"model", "made_by", "n_cases", "n_navi", "full", "navi"} and found["n_navi"] == 2
    assert found["navi"]["navigation_consistency"] == {"mean": 1.0, "n": 2}
    assert found["navi"]["navigation_trajectory"]["n_consistency"] == 2
    assert 0.45 < found["navi"]["navigation_trajectory"]["mean"] < 0.8 and found["full"] == found["navi"]
    assert run(*words, "published") == 2 and "exists" in line()
    assert run("eval", "--hub", tmp_path / "x.yaml", "--wbench", file) == 2 and "is of 2 navigation cases" in line()
