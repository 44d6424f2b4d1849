"""What `minwm eval` measures: each number must read what was put into the videos."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from contracts.scenes import Wall

from minwm.bench.stream import random_model
from minwm.cameras.track import intrinsics, se3_exp, se3_inverse, se3_log
from minwm.cameras.trajectory import Motion, parse
from minwm.cli import main
from minwm.core.config import ConfigError, UserError
from minwm.core.media import read_image, to_pixels
from minwm.eval.camera.motion import MotionErrors, MotionResult, measure_motion
from minwm.eval.cases import BASELINES, Clips, EvalError, reconstruct
from minwm.eval.diversity import measure_diversity
from minwm.eval.drift import FIRST_SCENE, REACH, ROUTES, DriftCurves, LongRollouts, collapse, random_walk
from minwm.eval.image import chunk_spans, colour_distance, measure_quality
from minwm.eval.revisit import measure_revisits, routes
from minwm.eval.run import EvalConfig, EvalResult, check_alike, evaluate
from minwm.eval.stats import Bootstrap, Interval
from minwm.eval.targets import targets
from minwm.experiments import presets
from minwm.experiments.pipeline import evaluate_stages
from minwm.nets.chunks import StreamConfig
from minwm.nets.small_codec import SmallCodecConfig
from minwm.render.place import Place, pose
from minwm.render.worlds import World
from minwm.session.generate import whole_chunks
from minwm.store.folder import load_codec, save_model
from minwm.store.model import ModelConfig
from minwm.stream.solvers import FewStepSampler

MOTION = Motion(move=0.5, turn=16.0, fps=16.0)
K = intrinsics(70.0, 64, 64)
COMMANDS = ("w*8", "l*8", "w*4,l*4", "w+j*8")
CONFIG = replace(presets.demo.tiny_model(), sampler=FewStepSampler(steps=2))


def moved(change: float, lost: tuple[int, int] | None = None) -> MotionResult:
    """Cameras that do `change` times what was commanded, from latent to latent."""
    wanted = np.stack([parse(c).track(MOTION, K).at_latent_rate(4).c2w for c in COMMANDS])
    steps = se3_exp(change * se3_log(se3_inverse(wanted[:, :-1]) @ wanted[:, 1:]))
    shown = wanted.copy()
    for i in range(8):
        shown[:, i + 1] = shown[:, i] @ steps[:, i]
    scored, gone = np.ones(wanted.shape[:2], bool), np.zeros(wanted.shape[:2], bool)
    scored[:, 0] = False
    if lost:
        gone[lost] = True
    return measure_motion(shown, wanted, scored, gone, COMMANDS, 4, Bootstrap(4))


def value(errors: MotionErrors, name: str) -> float:
    return vars(errors)[name].value


@pytest.mark.parametrize("change", [1.0, 0.8, 0.0, -1.0])
def test_every_second_reads_the_motion_that_was_made(change: float) -> None:
    overall = moved(change).overall
    assert (overall.turns, overall.moves) == (5, 5)
    assert value(overall, "turn_ratio") == pytest.approx(change, abs=1e-6)
    assert value(overall, "turn_error") == pytest.approx(1 - change, abs=1e-6)
    assert value(overall, "speed_ratio") == pytest.approx(change, abs=0.06)  # a shorter arc bends less
    want = {1.0: 0.0, 0.8: 0.0, 0.0: 90.0, -1.0: 180.0}[change]
    assert value(overall, "direction_deg") == pytest.approx(want, abs=4)


def test_errors_grow_with_the_seconds_and_are_told_per_key() -> None:
    result = moved(0.5)
    assert set(result.per_key) == {"w", "l", "w+j"}
    assert [result.per_key[key].turns for key in ("w", "l", "w+j")] == [0, 3, 2]
    assert result.per_key["w"].turn_ratio is None and result.per_key["l"].direction_deg is None
    first, second = result.per_second
    assert value(first, "rot_err_deg") == pytest.approx(0.5 * (16 + 16) / 4)  # two of four clips turn at first
    assert value(second, "rot_err_deg") == pytest.approx(0.5 * (32 + 16 + 32) / 4)
    assert value(result.per_key["w"], "trans_err_u") == pytest.approx((0.25 + 0.25 + 0.5) / 3)
    assert value(result.per_key["w"], "trans_aligned_u") == pytest.approx(0, abs=1e-6)


def test_a_lost_frame_is_charged_as_standing_still() -> None:
    lost = moved(1.0, lost=(0, 4)).per_second[0]
    assert value(lost, "direction_deg") == 0  # the median of three clips that move
    assert value(lost, "trans_err_u") == pytest.approx(0.5 / 4)


def test_intervals_hold_the_mean_and_shrink_with_clips(rng: np.random.Generator) -> None:
    few, many = (Bootstrap(n).mean(rng.normal(size=(n, 3)) + 5) for n in (8, 128))
    assert few and many
    assert few.low < 5 < few.high and many.high - many.low < 0.5 * (few.high - few.low)
    gaps = np.full((4, 2), np.nan)
    assert Bootstrap(4).mean(gaps) is None and Bootstrap(4).median(gaps) is None
    gaps[2, 1] = 3.0
    found = Bootstrap(4).median(gaps)
    assert found and (found.value, found.low, found.high) == (3.0, 3.0, 3.0)


def test_flicker_and_seams_are_found_where_they_are(rng: np.random.Generator) -> None:
    spans = chunk_spans(33, first=1, chunk=2, stride=4)
    base = rng.integers(60, 180, (1, 1, 16, 16, 3)).astype(float)
    steady = base + np.arange(33)[None, :, None, None, None] + rng.normal(0, 0.5, (1, 33, 16, 16, 3))
    truth = steady.round().astype(np.uint8)
    assert measure_quality(truth, truth, spans, stride=4).seam == pytest.approx(1)
    jumps = truth + np.repeat(np.arange(5), [1, 8, 8, 8, 8])[None, :, None, None, None].astype(np.uint8) * 9
    found = measure_quality(jumps, truth, spans, stride=4)
    assert found.seam == pytest.approx(10, rel=0.2) and found.flicker and found.flicker > 1.5
    shaking = truth + (np.arange(33) % 2 * 8)[None, :, None, None, None].astype(np.uint8)
    shaken = measure_quality(shaking, truth, spans, stride=4)
    assert shaken.seam == pytest.approx(1, rel=0.2) and shaken.flicker and shaken.flicker > 5
    assert measure_quality(truth, truth, spans).flicker is None, "latent rate: nothing to see between latents"


def test_colour_distance_does_not_care_where_colours_are(rng: np.random.Generator) -> None:
    a = rng.integers(0, 200, (2, 3, 8, 8, 3), dtype=np.uint8)
    assert colour_distance(a, a[:, :, ::-1]).max() < 1e-4
    assert colour_distance(a, a + np.uint8(10)) == pytest.approx(np.full((2, 3), 10 * np.sqrt(3)), rel=1e-4)


def test_collapse_is_a_second_that_is_followed_by_another() -> None:
    assert collapse([1, 1, 1], 2.0) is None
    assert collapse([1, 3, 1, 1], 2.0) is None
    assert collapse([1, 3, 1, 3, 3], 2.0) == 4
    assert collapse([1, 1, 3], 2.0) == 3


def test_a_long_rollout_collapses_exactly_when_it_shows_no_world_any_more(rng: np.random.Generator) -> None:
    codec = load_codec(Path(str(presets.demo.starting_checkpoint("codec"))))
    run = LongRollouts.make(CONFIG, codec, World, count=1, seconds=3)

    def tiled(x: np.ndarray) -> np.ndarray:
        tiles = x.reshape(*x.shape[:2], 8, 8, 8, 8, 3).swapaxes(3, 4).reshape(*x.shape[:2], 64, 8, 8, 3)
        mixed = tiles[:, :, rng.permutation(64)].reshape(*x.shape[:2], 8, 8, 8, 8, 3)
        return mixed.swapaxes(3, 4).reshape(x.shape)

    for name in BASELINES:
        curves = run.measure(run.baseline(name))
        assert [c.collapsed for c in curves.values()] == [[None]] * 3, name
    truth = run.measure(run.truth)["random walk"]
    assert truth.sharpness == pytest.approx([1, 1, 1]) and max(truth.colour) < 1e-4
    broken = {
        "grey": lambda x: np.full_like(x, 128),
        "one colour": lambda x: np.broadcast_to(np.array([200, 40, 90], np.uint8), x.shape),
        "noise": lambda x: rng.integers(0, 256, x.shape, dtype=np.uint8),
        "white": lambda x: np.full_like(x, 255),
        "tiles of true pictures in the wrong places": tiled,
    }

    def grain(size: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: (x + size * rng.standard_normal(x.shape)).clip(0, 255).astype(np.uint8)

    def from_the_second_second_on(spoil: Callable[[np.ndarray], np.ndarray]) -> dict[str, DriftCurves]:
        videos = {route: np.concatenate([x[:, :5], spoil(x[:, 5:])], 1) for route, x in run.truth.items()}
        return run.measure(videos)

    for name, spoil in broken.items() | {"coarse grain": grain(60)}.items():
        assert [c.collapsed for c in from_the_second_second_on(spoil).values()] == [[2]] * 3, name
    alike = from_the_second_second_on(grain(20)).values()  # 22 dB
    assert all(max(c.patch_distance) > c.patch_limit and c.collapsed == [None] for c in alike), "like the truth"


def test_the_first_look_is_compared_after_a_full_turn() -> None:
    codec = load_codec(Path(str(presets.demo.starting_checkpoint("codec"))))
    config = replace(CONFIG, motion=replace(CONFIG.motion, turn=120.0))
    run = LongRollouts.make(config, codec, config.scene, count=1, seconds=4)
    truth = run.measure(run.truth)
    assert truth["turn around"].first_look and truth["turn around"].first_look.value > 50
    assert truth["random walk"].first_look is None
    forgotten = {route: x.copy() for route, x in run.truth.items()}
    forgotten["turn around"][:, 12] = 0  # after three seconds
    look = run.measure(forgotten)["turn around"].first_look
    assert look and look.value < 15


def test_a_random_walk_ends_wherever_it_starts() -> None:
    """Far from the middle of the place, too: it goes no further away."""
    scene, motion = Place(FIRST_SCENE), CONFIG.motion
    for x, z in ((-2.2, 4.8), (0.8, 2.2)):
        origin = pose(x, z, 120)
        walk = random_walk(scene, origin, np.random.default_rng(0), CONFIG, 60)
        far = np.linalg.norm((origin @ walk.c2w)[:, (0, 2), 3], axis=1)
        assert len(walk) == 60 * motion.stride + 1 and far.max() < max(REACH, far[0]) + 1.0
        assert scene.free((origin @ walk.c2w)[:, :3, 3]).all()


def test_targets_are_those_of_the_scenes() -> None:
    interval = Interval(22.0, 21.0, 23.0)
    curves = DriftCurves(
        psnr=[interval] * 60,
        sharpness=[0.9] * 60,
        colour=[],
        feature_distance=[],
        feature_limit=1.0,
        collapsed=[None, 7],
        first_look=Interval(20.5, 20.0, 21.0),
    )
    row = EvalResult(drift=dict.fromkeys(ROUTES, curves))
    found = {target.name: (value, target.aim, target.met(value)) for target, value in targets(row, "place").items()}
    assert found == {
        "PSNR to the truth after 1 s, dB": (22.0, "at least 25", False),
        "PSNR to the truth after 5 s, dB": (22.0, "at least 23", False),
        "PSNR to the truth after 60 s, dB": (22.0, "at least 20", True),
        "PSNR of a full turn to the first look, below that after 1 s, dB": (1.5, "at most 1", False),
        "gradient energy after 5 s, of the truth's": (0.9, "at least 0.8", True),
        "long rollouts that collapsed": (3.0, "at most 0", False),
    }
    assert [target.name for target in targets(row, "worlds")] == ["long rollouts that collapsed"]


def test_the_codec_streams_in_pieces_as_in_one() -> None:
    codec = load_codec(Path(str(presets.demo.starting_checkpoint("codec"))))
    frames = np.random.default_rng(0).integers(0, 256, (1, 33, 64, 64, 3), dtype=np.uint8)
    whole, pieces = reconstruct(codec, frames), reconstruct(codec, frames, latents=3)
    assert np.abs(whole.astype(int) - pieces).max() <= 1
    assert to_pixels(whole).isfinite().all()


def test_only_what_went_away_and_came_back_counts_as_remembered(rng: np.random.Generator) -> None:
    clips = Clips.make(CONFIG, routes(CONFIG, 2, away=False), World)
    assert [case.trajectory for case in clips.cases] == ["l*4,j*4", "w*4,s*4"]
    truth = measure_revisits(CONFIG, clips, clips.truth)
    assert truth.consistency.value > 50 and truth.gain.value > 20 and truth.truth and truth.truth.value > 50
    still = measure_revisits(CONFIG, clips, np.repeat(clips.truth[:, :1], 33, 1))
    assert still.gain.value == pytest.approx(0, abs=1e-4)
    noise = rng.integers(0, 256, clips.truth.shape, dtype=np.uint8)
    noise[:, 0] = clips.truth[:, 0]
    forgotten = measure_revisits(CONFIG, clips, noise)
    assert abs(forgotten.gain.value) < 2 and forgotten.truth and forgotten.truth.value < 12
    assert routes(CONFIG, 1, away=True) == ["l*18,j*18"], "72 degrees at 4 per latent"


def test_diversity_is_the_spread_over_seeds_and_prompts() -> None:
    model = random_model(CONFIG)
    clips = Clips.make(CONFIG, ["w*8", "l*8"], World)
    found = measure_diversity(model, clips, seeds=2, seed=0)
    assert len(found.seed) == len(found.prompt) == 2
    assert found.seed[-1] > 1 and found.worlds and found.worlds > 10
    assert max(found.prompt) == 0, "a fresh network has a silent head: it does not hear the prompt"


def test_clips_that_all_move_the_same_way_have_no_other_camera() -> None:
    clips = Clips.make(CONFIG, ["w*8", "w*8"], World)
    with pytest.raises(EvalError, match="clip 0: no other clip moves differently"):
        clips.baseline("another clip's camera", random_model(CONFIG).codec)


def test_models_that_see_other_things_are_not_compared() -> None:
    check_alike({"a": CONFIG, "b": CONFIG})
    with pytest.raises(UserError, match="a has latents=9, b has latents=21"):
        check_alike({"a": CONFIG, "b": replace(CONFIG, latents=21)})
    with pytest.raises(ConfigError, match=r"eval.clips=1"):
        EvalConfig(clips=1)


TEXT = replace(
    CONFIG,
    network=replace(CONFIG.network, dim=32, heads=2, layers=1, ffn=32, channels=4),
    codec=SmallCodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1),
    height=32,
    width=32,
    latents=8,
    stream=StreamConfig(chunk=4),
)
"""A tiny text-to-video model: its first chunk is as long as the others."""


def save(folder: Path, config: ModelConfig) -> None:
    model = random_model(config)
    save_model(folder, config, model.net, model.codec)


def test_lengths_are_rounded_up_to_whole_chunks() -> None:
    assert [whole_chunks(CONFIG, n) for n in (9, 10)] == [9, 11]
    assert [whole_chunks(TEXT, n) for n in (8, 9)] == [8, 12]
    assert routes(TEXT, 1, away=False) == ["l*3,j*3,static*1"]
    assert routes(TEXT, 1, away=True) == ["l*20,j*20,static*3"]


def test_a_text_to_video_model_is_evaluated_without_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "text", TEXT)
    sizes = [
        "--clips",
        "3",
        "--revisits",
        "2",
        "--walks",
        "1",
        "--seconds",
        "2",
        "--seeds",
        "2",
        "--bench-repeats",
        "1",
    ]
    command = ["eval", "--model", str(tmp_path / "text"), *sizes, "--out", str(tmp_path / "rows")]
    assert main([*command, "--json", str(tmp_path / "e.json"), "--html", str(tmp_path / "e.html")]) == 0
    assert "camera following, quality and counterfactual control need a first image" in capsys.readouterr().out
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert list(rows) == ["text", *BASELINES]
    row = rows["text"]
    assert row["follow"] is row["quality"] is row["confusion"] is None
    assert row["revisit"]["truth"] is None and row["revisit_away"]["consistency"] and row["bench"] and row["diversity"]
    for curves in row["drift"].values():
        assert len(curves["feature_distance"]) == 2 and curves["psnr"] == curves["colour"] == []
    page = (tmp_path / "e.html").read_text()
    assert '<section id="drift">' in page and '<section id="camera">' not in page
    assert main([*command, "--sheet", str(tmp_path / "e.png")]) == 2, "rows are kept; no clip follows a camera best"
    assert "evaluated" not in capsys.readouterr().out
    assert main([*command[:-2], "--out", str(tmp_path / "rows"), "--clips", "4"]) == 2, "rows of another config"


def test_the_wan_pipeline_is_evaluated_as_it_was_trained(tmp_path: Path) -> None:
    plan = presets.pipeline("wan2.1-1.3b", tmp_path)
    for name in plan.evaluated:
        model = plan.stage(name).model
        network = replace(TEXT.network, camera=model.network.camera)
        small = replace(model, network=network, codec=TEXT.codec, text=TEXT.text, negative=None, latents=8)
        save(tmp_path / name, replace(small, height=32, width=32, sampler=replace(model.sampler, steps=1)))
    log = list[str]()
    plan = replace(plan, evaluation=replace(plan.evaluation, clips=3, revisits=2, bench_repeats=1))
    result = evaluate_stages(plan, tmp_path, log.append)
    assert list(result.rows) == [*plan.evaluated, *BASELINES] and log[0].startswith("text starts")
    assert all(row.follow is None and row.revisit for row in result.rows.values())
    assert all(result.rows[name].diversity and result.rows[name].bench for name in plan.evaluated)


def test_any_scene_is_evaluated_and_finished_rows_are_kept(tmp_path: Path) -> None:
    config = replace(TEXT, stream=StreamConfig(chunk=2, first_chunk=1), latents=5)
    model, log = random_model(config), list[str]()
    cfg = EvalConfig(clips=3, counterfactual=(), revisits=0, walks=0, seeds=0, bench_repeats=0)
    for _ in range(2):
        result = evaluate({"image": lambda: model}, cfg, tmp_path, log.append, Wall)
    assert [line.split(":")[0] for line in log] == [f"evaluated {name}" for name in ("image", *BASELINES)]
    truth = result.rows["ground truth"]
    assert truth.follow and truth.follow.score.value > 0.8 and truth.quality and truth.quality.psnr > 50
    assert result.videos("image").shape == (3, 17, 32, 32, 3)
    assert result.cases[0].scene.caption == "a painted wall"


@pytest.mark.slow
def test_one_command_measures_and_writes_a_page(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(tmp_path / name, CONFIG)
    folders = [word for name in ("one", "two") for word in ("--model", str(tmp_path / name))]
    files = ["--json", str(tmp_path / "e.json"), "--html", str(tmp_path / "e.html")]
    files += ["--sheet", str(tmp_path / "e.png")]
    assert main(["eval", *folders, *files, "--quick", "--clips", "3", "--seconds", "2"]) == 0
    result = json.loads((tmp_path / "e.json").read_text())
    assert list(result["rows"]) == ["one", "two", *BASELINES]
    assert read_image(tmp_path / "e.png").shape[0] > 8 * 64, "two best and two worst clips, each with the truth"
    assert (
        result["rows"]["codec"]["follow"]["score"]["value"] < result["rows"]["ground truth"]["follow"]["score"]["value"]
    )
    assert {aim["met"] for aim in result["targets"]["one"]} <= {True, False}
    page = (tmp_path / "e.html").read_text()
    for key in ("targets", "motion", "time", "texture", "revisit", "drift", "diversity", "speed", "camera", "gallery"):
        assert f'<section id="{key}">' in page
    assert "http://" not in page and "https://" not in page
