"""Camera following, quality and the report: they must read known deviations from known videos."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minwm.cameras.track import CameraTrack, intrinsics, se3_exp, se3_inverse, se3_log
from minwm.cameras.trajectory import Motion, parse
from minwm.eval.camera.align import AlignConfig, blurred
from minwm.eval.camera.confusion import measure_confusion
from minwm.eval.camera.follow import FollowReference, FollowResult, measure_following
from minwm.eval.cases import Case, EvalError
from minwm.eval.image import QualityError, chunk_spans, measure_quality, psnr, ssim
from minwm.eval.report import charts
from minwm.eval.report.gallery import Example, gallery
from minwm.eval.report.page import Section, caveats, commands, write_page
from minwm.eval.report.sections import evaluation_sections, tiles
from minwm.eval.run import EvalResult
from minwm.render.worlds import World

MOTION = Motion(move=0.5, turn=24.0, fps=16.0)
K = intrinsics(70.0, 64, 64)
ROUTES = ("w*3", "l*3", "d*2,w+j*1")
FAST = AlignConfig(supersample=1)
FRAMES = np.ndarray


def degraded(frames: FRAMES) -> FRAMES:
    """Roughly what a small codec and generator do: blur, colour drift and noise."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(frames.copy()).flatten(0, 1).movedim(-1, 1).float()
    soft = blurred(images, 1.0).movedim(1, -1).numpy().reshape(frames.shape)
    tint = rng.normal(0, 6, (*frames.shape[:2], 1, 1, 3))
    return (soft + tint + rng.normal(0, 4, frames.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def reference() -> FollowReference:
    rng, cases = np.random.default_rng(0), []
    for seed, route in enumerate(ROUTES):
        world, track = World(seed), parse(route).track(MOTION, K)
        placement = world.spawn(rng, track)
        assert placement is not None
        cases.append(Case(world, track, placement))
    return FollowReference.render(cases, 64, 64, choices=2, config=FAST)


def driven(reference: FollowReference, speed: float) -> FRAMES:
    """The true videos of cameras that do `speed` times what was commanded."""
    videos = []
    for case in reference.cases:
        track = case.camera.at_latent_rate(reference.stride)
        start = track.c2w[0]
        path = start @ se3_exp(speed * se3_log(se3_inverse(start) @ track.c2w))
        videos.append(case.scene.render(CameraTrack(path, track.K, track.fps), 64, 64, supersample=1).frames)
    return np.stack(videos)


@pytest.fixture(scope="module")
def of_truth(reference: FollowReference) -> FollowResult:
    return measure_following(reference, reference.candidates[:, 0], FAST)


def test_a_correct_video_scores_one(of_truth: FollowResult) -> None:
    result = of_truth
    assert result.retrieval.value == 1 and result.psnr_gap.value > 10
    assert result.rot_err_deg.value < 0.4 and result.trans_err_u.value < 0.02
    assert result.score.value > 0.95 and result.lost_frac == 0
    assert result.speed_ratio == pytest.approx(1, abs=0.05) and result.turn_ratio == pytest.approx(1, abs=0.05)


def test_a_correct_but_degraded_video_scores_nearly_one(reference: FollowReference) -> None:
    result = measure_following(reference, degraded(reference.candidates[:, 0]), FAST)
    assert result.retrieval.value == 1
    assert result.rot_err_deg.value < 0.8 and result.score.value > 0.88


def test_smooth_errors_of_colour_that_do_not_move_are_no_motion(reference: FollowReference) -> None:
    """They would be, if colours were compared instead of details."""
    stain = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    stain = blurred(stain, 8.0)[0].movedim(0, -1)
    stained = reference.candidates[:, 0] + 45 * (stain / stain.std()).numpy()
    stained[:, 0] = reference.candidates[:, 0, 0]
    stained = stained.clip(0, 255).astype(np.uint8)
    details, colours = (
        measure_following(reference, stained, replace(FAST, detail=detail)) for detail in (FAST.detail, 0.0)
    )
    assert details.score.value > 0.9 and details.trans_err_u.value < 0.5 * colours.trans_err_u.value


@pytest.mark.parametrize(("speed", "score"), [(0.0, 0.0), (0.5, 0.5), (-1.0, -1.0)])
def test_deviations_are_read_as_what_they_are(reference: FollowReference, speed: float, score: float) -> None:
    result = measure_following(reference, degraded(driven(reference, speed)), FAST)
    assert result.score.value == pytest.approx(score, abs=0.12)
    assert result.turn_ratio == pytest.approx(speed, abs=0.1)
    assert result.speed_ratio == pytest.approx(speed, abs=0.15)
    if speed == 0:
        assert result.rot_err_deg.value == pytest.approx(result.static_rot_deg, abs=0.5)
        assert result.trans_err_u.value == pytest.approx(result.static_trans_u, abs=0.03)
    if speed <= 0:
        assert result.retrieval.value == 0 and result.psnr_gap.value < 0


def test_noise_is_lost_and_earns_nothing(reference: FollowReference, rng: np.random.Generator) -> None:
    result = measure_following(reference, rng.integers(0, 256, reference.candidates[:, 0].shape, dtype=np.uint8), FAST)
    assert result.lost_frac == 1 and result.score.value <= 0.01 and result.speed_ratio is None


def test_videos_at_the_pixel_rate_are_the_same_measurement(reference: FollowReference) -> None:
    slow = reference.candidates[:, 0]
    full = np.zeros((len(slow), reference.stride * (slow.shape[1] - 1) + 1, *slow.shape[2:]), np.uint8)
    full[:, :: reference.stride] = slow
    assert (reference.latent_rate(full) == slow).all()
    with pytest.raises(EvalError, match="camera following needs"):
        reference.latent_rate(full[:, :-1])


def test_equal_commands_leave_nothing_to_tell_apart() -> None:
    world, track = World(0), parse("w*2").track(MOTION, K)
    with pytest.raises(EvalError, match="no other clip moves differently"):
        FollowReference.render([Case(world, track)] * 2, 64, 64)


def test_confusion_finds_the_action_that_was_played(rng: np.random.Generator) -> None:
    truth = rng.integers(0, 256, (3, 4, 16, 16, 3), dtype=np.uint8)
    played = truth[[0, 2, 2]]
    table = measure_confusion(played, truth, ["w", "a", "d"])
    assert table.accuracy == pytest.approx(2 / 3)
    assert int(np.argmax(table.psnr[1])) == 2


def test_psnr_and_ssim_of_known_changes(rng: np.random.Generator) -> None:
    a = rng.integers(10, 200, (2, 3, 32, 32, 3), dtype=np.uint8)
    assert psnr(a, a + np.uint8(10)) == pytest.approx(np.full((2, 3), 20 * np.log10(25.5)), abs=1e-3)
    assert psnr(a, a) == pytest.approx(np.full((2, 3), 58.92), abs=0.01)
    assert ssim(a, a) == pytest.approx(np.ones((2, 3)))
    assert (ssim(a, a[:, ::-1]) < 0.3)[:, [0, 2]].all()
    with pytest.raises(QualityError, match="cannot compare"):
        psnr(a, a[:, :2])


def test_drift_is_the_slope_over_generated_chunks(rng: np.random.Generator) -> None:
    truth = rng.integers(60, 180, (2, 33, 16, 16, 3), dtype=np.uint8)
    spans = chunk_spans(33, first=1, chunk=2, stride=4)
    assert spans == [(0, 1), (1, 9), (9, 17), (17, 25), (25, 33)]
    assert chunk_spans(29, first=4, chunk=4, stride=4) == [(0, 1), (1, 13), (13, 29)], "the image is a span of its own"
    worse = truth.copy()
    for error, (start, stop) in zip((0, 5, 10, 20, 40), spans, strict=True):
        worse[:, start:stop] += np.uint8(error)
    result = measure_quality(worse, truth, spans)
    assert result.drift_db_per_chunk == pytest.approx(-20 * np.log10(2), abs=1e-3)
    assert result.psnr_per_chunk[0] > 50 > result.psnr_per_chunk[1]
    assert result.sharpness == pytest.approx(1)
    with pytest.raises(QualityError, match="nothing was generated"):
        measure_quality(truth, truth, spans[:1])


def test_charts_skip_what_is_not_finite() -> None:
    chart = charts.line_chart([charts.Series("a", [0, 1, 2], [1.0, float("nan"), 3.0])], x_label="step", y_label="loss")
    assert "nan" not in chart and "<polyline" in chart
    assert "no data" in charts.line_chart([], x_label="x", y_label="y")
    assert len(charts.smooth([1.0, 2.0, 3.0])) == 3


def test_the_report_is_one_file_with_everything_inside(
    tmp_path: Path, of_truth: FollowResult, rng: np.random.Generator
) -> None:
    truth = rng.integers(0, 256, (1, 5, 16, 16, 3), dtype=np.uint8)
    model = EvalResult(
        follow=of_truth,
        quality=measure_quality(truth, truth, [(0, 1), (1, 5)]),
        confusion=measure_confusion(truth[[0, 0]], truth[[0, 0]], ["w", "s"]),
    )
    rows = {"few <step>": model, "static camera": EvalResult(follow=of_truth)}
    example = Example("a red box", "w*1", [("w",)] * 5, {"ground truth": truth[0], "few <step>": truth[0]})
    sections = [
        gallery([example], 16),
        *evaluation_sections(rows),
        commands({"all of it": "make demo"}),
        caveats(["x"]),
    ]
    facts = {"hardware": "two cores"}
    page = write_page(tmp_path / "deep" / "report.html", "A & B", "What this is.", facts, tiles(rows), sections)
    html = page.read_text()
    assert "A &amp; B" in html and "few <step>" not in html and "few &lt;step&gt;" in html
    assert html.count("data:video/mp4;base64,") == 2 and html.count("data:image/png;base64,") == 1
    assert "http://" not in html and "https://" not in html and "<link" not in html
    for key in ("gallery", "camera", "control", "quality", "motion", "texture", "reproduce", "caveats"):
        assert f'<section id="{key}">' in html and f'href="#{key}"' in html
    for key in ("speed", "time", "revisit", "drift", "diversity"):
        assert f'<section id="{key}">' not in html, "what was not measured is left out"
    assert "camera score of few" in html


def test_parts_without_data_are_left_out(tmp_path: Path) -> None:
    sections = [gallery([], 16), *evaluation_sections({"text model": EvalResult()}), Section("empty", "Empty", "")]
    page = write_page(tmp_path / "report.html", "t", "s", {}, [("1 s", "whole run")], sections).read_text()
    assert "<section" not in page and "whole run" in page
