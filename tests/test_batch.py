"""Lists of videos: which entries are read, and that a list is made whole, once, and by several processes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import error_line, run

from minwm.bench.stream import random_model
from minwm.cameras.track import CameraTrack
from minwm.cameras.trajectory import Motion, parse
from minwm.core.config import UserError
from minwm.core.media import read_video, write_image, write_video
from minwm.experiments import presets
from minwm.nets.chunks import StreamConfig
from minwm.nets.small_codec import SmallCodecConfig
from minwm.session.batch import generate_all, read_requests
from minwm.session.clips import GenerateConfig, plan_requests
from minwm.session.generate import generate
from minwm.store.folder import save_model
from minwm.stream.solvers import FewStepSampler

line = pytest.fixture(error_line)
MOTION = Motion(move=0.5, turn=16.0, fps=16.0)
WBENCH = {
    "id": "e_5",
    "environment_prompt": "A harbour at dusk.",
    "character_prompt": "A grey dog.",
    "settings": {"perspective": "first_person", "initial_image": "images/e_5.png"},
    "interactions": [{"type": "navigation", "action": "W+→"}, {"type": "event_edit", "action": "It starts to rain."}],
}
BASE = presets.demo.tiny_model()
CONFIG = replace(
    BASE,
    network=replace(BASE.network, dim=32, heads=2, layers=1, ffn=32, channels=4),
    codec=SmallCodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1),
    sampler=FewStepSampler(steps=2),
    stream=StreamConfig(chunk=2, first_chunk=1),
    height=32,
    width=32,
    latents=5,
)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_benchmarks_of_minwm_and_wbench_are_read(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "e_5.png", np.zeros((8, 8, 3), np.uint8))
    write_image(tmp_path / "img" / "1.png", np.zeros((8, 8, 3), np.uint8))
    entry = {"id": 1, "image": "img/1.png", "caption": "A garden path.", "trajectory": "a*4,w*8,s*7"}
    (plain,) = read_requests(write(tmp_path / "example.json", [entry]), MOTION, seed=7)
    assert (plain.name, plain.prompt, plain.trajectory, plain.seed) == ("1", "A garden path.", "a*4,w*8,s*7", 7)
    assert plain.image == tmp_path / "img" / "1.png"

    write(tmp_path / "cases" / "case_e_5.json", WBENCH)
    dance = {"type": "subject_action", "action": "The dog dances."}
    write(tmp_path / "cases" / "case_f_1.json", {**WBENCH, "id": "f_1", "interactions": [dance]})
    (case,) = read_requests(tmp_path / "cases", MOTION)
    assert case.name == "case_e_5_combined" and case.prompt == "A harbour at dusk. A grey dog."
    assert case.trajectory == "w+l*16,static*16", "four seconds a turn; what is no navigation stands still"
    assert case.turns == (0, 65, 129) and case.image == tmp_path / "images" / "e_5.png"


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([{"prompt": "x"}], "entry 0 needs a prompt and a trajectory"),
        ([{"prompt": "x", "trajectory": "w*2", "sed": 1}], "has the unknown field 'sed'"),
        ([{"prompt": "x", "trajectory": "w*2", "image": "none.png"}], "none.png is neither at"),
        ([{"id": "../x", "prompt": "x", "trajectory": "w*2"}], "id '../x' names files"),
        ([{"id": 1, "prompt": "x", "trajectory": "w*2"}] * 2, "the id '1' is given twice"),
        ([], "holds no request"),
        ([3], "an entry is an object"),
        ([{"prompt": "x", "trajectory": "w*2", "start_poses": "list.json"}], "has start_poses; give an image, or"),
        ([{"prompt": "x", "trajectory": "w*2", "image": 5}], "5 is no path of a file"),
        ([{**WBENCH, "interactions": 5}], "has 5 for 'interactions', where list is expected"),
        ([{**WBENCH, "interactions": ["W"]}], "an interaction is an object"),
        ([{**WBENCH, "settings": None}], "has None for 'settings', where dict is expected"),
        ([{**WBENCH, "environment_prompt": 3}], "has 3 for 'environment_prompt', where str is expected"),
    ],
)
def test_a_bad_list_names_its_entry(entries: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        read_requests(write(tmp_path / "list.json", entries), MOTION)


def test_a_list_is_made_once_by_one_command(tmp_path: Path, line: Callable[[], str]) -> None:
    model = random_model(CONFIG)
    save_model(tmp_path / "model", CONFIG, model.net, model.codec)
    write_image(tmp_path / "x.png", np.full((32, 32, 3), 90, np.uint8))
    common = {"prompt": "a red tower", "image": "x.png"}
    entries = [{"id": "ahead", **common, "trajectory": "w*4"}, {"id": "odd", **common, "trajectory": "l*3", "seed": 5}]
    listed = write(tmp_path / "list.json", entries)
    words = ("generate", "--model", tmp_path / "model", "--list", listed, "--out", tmp_path / "out")
    assert run(*words) == 0
    frames, fps = read_video(tmp_path / "out" / "ahead.mp4")
    image = np.full((1, 32, 32, 3), 90, np.uint8)
    own, other = (generate(model, image, ["a red tower"], ["w*4"], seed)[0].astype(int) for seed in (0, 1))
    assert np.abs(frames - own).mean() < 10 < 30 < np.abs(frames - other).mean(), "noise of seed 0, as mp4"
    assert fps == 16 and len(read_video(tmp_path / "out" / "odd.mp4")[0]) == 13, "3 latents are cut from 4"
    track = CameraTrack.load(tmp_path / "out" / "odd.json")
    commanded = parse("l*3").track(CONFIG.motion, CONFIG.intrinsics)
    np.testing.assert_allclose(track.c2w, commanded.c2w, atol=1e-12)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [(r["name"], r["seed"]) for r in manifest["requests"]] == [("ahead", 0), ("odd", 5)]

    before = (tmp_path / "out" / "ahead.mp4").stat().st_mtime_ns
    (tmp_path / "out" / "odd.json").unlink()
    assert run(*words) == 0 and (tmp_path / "out" / "odd.json").exists()
    assert (tmp_path / "out" / "ahead.mp4").stat().st_mtime_ns == before, "finished videos are kept"
    assert run(*words, "--seed", 3) == 2
    assert "holds videos of another list, with other requests" in line()
    assert run(*words, "--world", 3) == 2 and "give besides only" in line()


def test_an_entry_goes_on_from_a_video(tmp_path: Path, line: Callable[[], str]) -> None:
    """With its cameras; its frames come first in the new one."""
    config = replace(CONFIG, network=replace(CONFIG.network, camera="dual"))
    model = random_model(config)
    save_model(tmp_path / "model", config, model.net, model.codec)
    gray, past = np.full((17, 32, 32, 3), 90, np.uint8), parse("d*4").track(MOTION, CONFIG.intrinsics)
    write_video(tmp_path / "past.mp4", gray, MOTION.fps, crf=0)
    past.save(tmp_path / "cameras.json")
    entry = {"id": "on", "prompt": "a red tower", "start": "past.mp4", "trajectory": "l*2"}
    listed = write(tmp_path / "list.json", {**entry, "start_poses": "cameras.json"})
    words = ("generate", "--model", tmp_path / "model", "--list", listed, "--out", tmp_path / "out")
    assert run(*words) == 0
    track = CameraTrack.load(tmp_path / "out" / "on.json")
    commanded = past.continued(parse("l*2").track(CONFIG.motion, CONFIG.intrinsics))
    np.testing.assert_allclose(track.c2w, commanded.c2w, atol=1e-12)
    frames = read_video(tmp_path / "out" / "on.mp4")[0].astype(int)
    own = generate(model, gray[None], ["a red tower"], [commanded], seed=[0])[0].astype(int)
    other = generate(model, 255 - gray[None], ["a red tower"], [commanded], seed=[0])[0].astype(int)
    assert np.abs(frames - own).mean() < 10 < np.abs(frames - other).mean()
    write(listed, entry)
    assert run(*words) == 2 and "on: " in (said := line()) and "past.json is missing, and cameras are not" in said
    with pytest.raises(UserError, match=r"on goes on from .*past.mp4; training clips are made from images"):
        plan_requests(listed, config, GenerateConfig())


def test_processes_share_a_list_and_nothing_is_made_of_a_bad_one(tmp_path: Path) -> None:
    config = replace(CONFIG, stream=StreamConfig(chunk=2))
    model = random_model(config)
    entries = [{"prompt": "x", "trajectory": keys} for keys in ("w*3", "s*3", "a*3")]
    requests = read_requests(write(tmp_path / "list.json", entries), MOTION)

    def track_of(request: Any) -> CameraTrack:
        return parse(request.trajectory).track(config.motion, config.intrinsics)

    assert generate_all(model, requests, track_of, tmp_path / "out", {}, (0, 2)) == 2
    assert {path.name for path in (tmp_path / "out").glob("*.mp4")} == {"0.mp4", "2.mp4"}
    assert generate_all(model, requests, track_of, tmp_path / "out", {}, (1, 2)) == 1
    spoilt = [*requests, replace(requests[0], name="bad", image=tmp_path / "none.png")]
    with pytest.raises(UserError, match=r"bad: this model starts from its prompt alone"):
        generate_all(model, spoilt, track_of, tmp_path / "other", {})
    with pytest.raises(UserError, match=r"bad: .*none.png"):
        generate_all(random_model(CONFIG), spoilt[-1:], track_of, tmp_path / "other", {})
    assert not (tmp_path / "other").exists()
