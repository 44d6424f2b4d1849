"""Pose noise does what it says; every ablation runs, resumes and is drawn."""

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from poses import pose_errors

from minwm.cameras.track import intrinsics
from minwm.cameras.trajectory import Motion, parse
from minwm.core.config import ConfigError
from minwm.data.noise import PoseNoise
from minwm.eval.report.charts import Dot, Panel, figure
from minwm.experiments import ablate
from minwm.experiments.ablations import ABLATIONS, Ablation, ablation

TRACK = parse("w+l*100").track(Motion(move=0.5, turn=16.0, fps=16.0), intrinsics(70.0, 64, 64))


def errors(noise: PoseNoise) -> tuple[np.ndarray, np.ndarray]:
    """Rotation in degrees and translation in units, over 20 clips: clips x frames."""
    found = [pose_errors(TRACK, noise(TRACK, f"clip {i}")) for i in range(20)]
    return np.stack([e["rot_deg"] for e in found]), np.stack([e["trans"] for e in found])


def test_no_noise_is_the_track_itself() -> None:
    rot, trans = errors(PoseNoise())
    assert rot.max() < 1e-5 and trans.max() < 1e-9


def test_jitter_is_as_large_at_the_end_as_at_the_start() -> None:
    rot, _ = errors(PoseNoise(jitter_deg=1.0))
    want = np.sqrt(2) * np.sqrt(8 / np.pi)  # of two poses, each a Maxwell law of three axes
    assert rot[:, 1:100].mean() == pytest.approx(want, rel=0.1)
    assert rot[:, -100:].mean() == pytest.approx(want, rel=0.1)
    assert np.abs(np.diff(rot[:, 1:])).mean() > 0.3 * want, "neighbours do not agree"


def test_drift_grows_with_the_root_of_time() -> None:
    rot, _ = errors(PoseNoise(drift_deg=1.0))
    second, ninth = (np.sqrt((rot[:, 16 * s] ** 2).mean()) for s in (1, 9))
    assert second == pytest.approx(np.sqrt(3), rel=0.35) and ninth / second == pytest.approx(3, rel=0.35)


def test_an_estimator_errs_slowly_in_scale_and_now_and_then_wildly() -> None:
    rot, _ = errors(PoseNoise(slow_deg=1.0))
    assert np.abs(np.diff(rot)).mean() < 0.3 and 1 < rot[:, 16:].mean() < 4
    _, trans = errors(PoseNoise(log_scale=0.5))
    assert trans[:, 0].max() == 0 and errors(PoseNoise(log_scale=0.5))[0].max() < 1e-5
    ends = trans[:, -1] / np.linalg.norm(TRACK.relative_to_first().c2w[-1, :3, 3])
    assert 0.2 < ends.mean() < 0.8
    rot, _ = errors(PoseNoise(outliers=0.05, outlier_deg=15.0))
    assert np.median(np.diff(rot)) < 1e-5
    assert (np.abs(np.diff(rot)) > 3).mean() == pytest.approx(0.1, abs=0.02), "a jump there and a jump back"


def test_noise_belongs_to_the_clip_and_the_seed() -> None:
    noise = PoseNoise(jitter_deg=2.0, outliers=0.1)
    a, b = (noise(TRACK, "one").c2w for _ in range(2))
    assert np.array_equal(a, b) and np.array_equal(a[0], np.eye(4))
    assert not np.allclose(a, noise(TRACK, "two").c2w)
    assert not np.allclose(a, replace(noise, seed=1)(TRACK, "one").c2w)
    with pytest.raises(ConfigError, match="jitter_deg=-1"):
        PoseNoise(jitter_deg=-1)


def test_arms_differ_in_what_the_ablation_varies_and_have_folders_of_their_own() -> None:
    for name in ABLATIONS:
        plan = ablation(name, Path("x"))
        assert plan.name == name and len({arm.name for arm in plan.arms}) == len(plan.arms)
        runs = {run.name: run for arm in plan.arms for run in arm.runs}
        assert all(runs[run.name] == run for arm in plan.arms for run in arm.runs)
    with pytest.raises(ConfigError, match="poses"):
        ablation("pose", Path("x"))


def test_the_figure_is_svg_with_a_dot_per_arm() -> None:
    dots = [Dot(x, x / 2, x / 2 - 0.1, x / 2 + 0.1, f"<{x}>") for x in (1, 2, 4)]
    for names in ({}, {1.0: "a & b", 2.0: "c", 4.0: "d"}):
        tree = ElementTree.fromstring(figure([Panel("p", dots), Panel("q", dots[:1])], "x", names))
        circles = [e for e in tree.iter() if e.tag.endswith("circle")]
        assert len(circles) == 4
        heights = [float(c.attrib["cy"]) for c in circles[:3]]
        assert heights[0] > heights[1] > heights[2], "more is higher up"


def tiny(plan: Ablation) -> Ablation:
    arms = [replace(arm, runs=tuple(replace(run, steps=3, batch=2) for run in arm.runs)) for arm in plan.arms]
    return replace(plan, arms=tuple(arms))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["poses", "camera", "distill", "sampling"])
def test_every_ablation_runs_and_resumes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    less = replace(ablate.EVALUATION, clips=3, walks=1, seconds=2)
    small = {"CLIPS": 36, "TRAJECTORIES": 4, "EVALUATION": less}
    for key, value in small.items():
        monkeypatch.setattr(ablate, key, value)
    # world 34 is the first one of the validation split
    plan, said = tiny(ablation(name, tmp_path)), []
    *_, results = ablate.run_ablation(plan, tmp_path, said.append)
    assert [r.name for r in results] == [arm.name for arm in plan.arms]
    assert all((r.drift is not None) == plan.drift for r in results)
    assert ablate.draw(plan, results).count("<circle") >= 2 * len(results)
    again: list[str] = []
    *_, kept = ablate.run_ablation(plan, tmp_path, again.append)
    assert kept == results and all(line.endswith("done before") for line in again)
