"""Recorded clips as the truth: raw ones and latent shards, for models that start from images and from text; and what
docs/evaluation.md has a user type in any scene."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import error_line, run
from test_batch import CONFIG
from test_wbench import LEADER, report
from torch import Tensor, nn

from minwm.bench.stream import random_model
from minwm.cameras.trajectory import parse
from minwm.core.config import parse_json
from minwm.core.media import write_image, write_video
from minwm.data.clips import ClipFolder
from minwm.data.encode import EncodeConfig, encode_clips
from minwm.data.rerender import RenderConfig, render_worlds
from minwm.eval.recorded import Recordings, recorded_source, recordings
from minwm.nets.chunks import StreamConfig
from minwm.store.folder import load_model, save_model
from minwm.stream.solvers import BidirectionalSampler

line = pytest.fixture(error_line)
NETWORKS = {"lpips", "dreamsim", "fvd"}
PAGE = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
TYPED = re.findall(r"^minwm .*(?:runs/mine|runs/wan|runs/wbench|others_videos|before|--hub).*", PAGE, re.MULTILINE)
SECTIONS = ("scores", "time", "keys", "gallery", "skipped", "reproduce", "caveats")


class Brightness(nn.Module):
    """Called as the file of StyleGAN-V is."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        return x.mean([3, 4]).flatten(1)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw clips, shards of half of their scenes for validation, and models of either start with one codec."""
    out = tmp_path_factory.mktemp("recorded")
    render = RenderConfig(seed=5, motion=CONFIG.motion, latents=5, height=32, width=32)
    render_worlds(out / "raw", render, clips=6, workers=1)
    model = random_model(CONFIG)
    encode_clips(out / "raw", out / "latents", model.codec, CONFIG.text, cfg=EncodeConfig(val=0.5))
    whole = replace(CONFIG, stream=StreamConfig(chunk=4), sampler=BidirectionalSampler(steps=1))
    for name, config in {"image": CONFIG, "text": whole}.items():
        save_model(out / name, config, random_model(config).net, model.codec)
    return out


def scored(project: Path, data: str, model: str, *words: object) -> dict[str, Any]:
    file = project / f"{data}-{model}.json"
    folder = project / f"{data}-{model}"
    command = ("eval", "--model", project / model, "--data", project / data, "--json", file, "--out", folder)
    assert run(*command, *words) == 0
    return parse_json(file.read_text())


def test_raw_clips_are_the_truth_of_models_that_start_from_their_frames(project: Path) -> None:
    html = project / "page.html"
    found = scored(project, "raw", "image", "--split", "train", "--limit", "2", "--html", html)
    page = html.read_text()
    assert not [key for key in SECTIONS if f'<section id="{key}">' not in page]
    assert "static (a path, not a video)" in page and page.count("data:video/mp4;base64,") == 4, "2 clips, 2 truths"
    ids = ClipFolder(project / "raw").ids()
    model, rows = found["videos"]["image"], found["baselines"]
    assert [*model["tasks"]] == [ids[0], ids[-1]] and rows.keys() == {"recording", "static camera", "codec"}
    assert model["scores"].keys() >= {"camera", "likeness", "flip"} and model["skipped"].keys() >= NETWORKS
    cameras = [row["scores"]["camera"].keys() for row in (model, rows["recording"])]
    assert all("speed_ratio" in found and "relative_speed" not in found for found in cameras), "depth can be rendered"
    assert model["tasks"] == rows["codec"]["tasks"]
    assert rows["recording"]["scores"].keys() == {"camera", "published", "texture"}
    still = rows["static camera"]["scores"]["likeness"]["psnr@1"]["videos"]
    frames = ClipFolder(project / "raw").frames(ids[0]).astype(float)
    error = ((frames[13:17] - frames[0]) ** 2).mean((1, 2, 3))
    assert still[ids[0]] == pytest.approx((10 * np.log10(255**2 / error)).mean(), abs=1e-3)


def test_latent_shards_are_decoded_and_text_starts_have_no_reference(project: Path) -> None:
    image = scored(project, "latents", "image", "--metrics", "likeness")
    assert image["baselines"].keys() == {"recording", "static camera"}, "the truth has gone through the codec"
    torch.jit.script(Brightness()).save(str(project / "i3d.pt"))
    weights = f"fvd={project / 'i3d.pt'}"
    text = scored(project, "latents", "text", "--weights", weights, "--metrics", "camera", "likeness", "fvd")
    model = text["videos"]["text"]
    count = len(model["tasks"])
    assert model["tasks"].keys() == image["videos"]["image"]["tasks"].keys() and 0 < count < 6
    assert model["skipped"] == {"likeness": f"skipped: {count} of {count} videos have no reference"}
    assert model["scores"].keys() == {"camera", "fvd"} and model["scores"]["fvd"]["fvd"]["mean"]["value"] > 0
    assert text["baselines"]["recording"]["scores"].keys() == {"camera"}


def test_clips_that_do_not_fit_are_refused(project: Path, tmp_path: Path, line: Callable[[], str]) -> None:
    save_model(tmp_path / "other", CONFIG, random_model(CONFIG).net, random_model(CONFIG, seed=1).codec)
    small = replace(CONFIG, height=16, width=16)
    save_model(tmp_path / "small", small, random_model(small).net, random_model(small).codec)
    words = ("eval", "--data", project / "latents", "--model")
    assert run(*words, tmp_path / "other") == 2 and "was encoded by the codec" in line()
    words = ("eval", "--data", project / "raw", "--split", "train", "--model")
    assert run(*words, tmp_path / "small") == 2 and "its height is 32, the model's 16" in line()
    assert run(*words, project / "image", "--suite") == 2 and "leave out those of the suite" in line()
    assert run(*words, project / "image", "--limit", "0") == 2 and "--limit 0" in line()


def test_processes_share_what_they_make(
    project: Path, line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they share is compared with one process in tests/ranks.py and tests/test_slurm.py."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ("eval", "--model", project / "image")
    for alone in (["--videos", project], ["--compare", "a.json", "b.json"]):
        assert run(*words, *alone) == 2 and "2 processes cannot share --videos, --compare or --hub" in line()
    for shared in ("--quick", "--suite"):
        assert run(*words, shared) == 2 and "give --out DIR" in line()


def test_the_first_process_alone_reads_the_truth(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that share the videos; here one after the other."""
    for module in ("train.parallel", "eval.recorded"):
        monkeypatch.setattr(f"minwm.{module}.wait_for_all", lambda _: None)
    model, read = load_model(project / "image").ready(), list[str]()
    truth = recordings(project / "raw", model, "train")
    seen = Recordings(truth.names, lambda name: (read.append(name), truth.video(name))[1], truth.record)
    sources = [recorded_source(model, seen, tmp_path / "shared", {}, (i, 2)) for i in range(2)]
    assert read == truth.names and len(read) > 2
    alone = recorded_source(model, truth, tmp_path / "alone", {})
    for name in truth.names:
        assert np.array_equal(sources[1].video(name).frames, alone.video(name).frames)


@pytest.fixture(scope="module")
def here(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the page's commands name."""
    out, raw = tmp_path_factory.mktemp("page"), ClipFolder(project / "raw")
    frames, turns = raw.frames(raw.ids()[0]), {"7": {"turn_frames": [0, 5, 9, 13, 17]}}
    track = parse("w*1,d*1,a*1,static*1").track(replace(CONFIG.motion, fps=4.0), CONFIG.intrinsics)
    for name, made in {"runs/mine": "image", "runs/wan": "text", "data/latents": "latents"}.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).symlink_to(project / made)
    for name in ("others_videos/a", "runs/wbench/case_7_combined"):
        write_video(out / f"{name}.mp4", frames, track.fps)
        track.save(out / f"{name}.json")
    (out / "runs" / "wbench" / "turns.json").write_text(json.dumps({"fps": track.fps, "cases": turns}))
    report(out / "work_dirs" / "mine" / "evaluation" / "report.json", LEADER)
    for image in ("first_frames/a.png", "bridge.png"):
        write_image(out / image, frames[0])
    (requests,) = re.findall(r"^\[\{\"id\".*", PAGE, re.MULTILINE)
    texts = {"prompts.txt": "a red tower", "first_frames/a.txt": "a red tower", "paths.txt": "w*4"}
    for file, text in {**texts, "requests.json": requests}.items():
        (out / file).write_text(text)
    before = out / "before.json"
    assert run("eval", "--videos", out / "others_videos", "--metrics", "texture", "--json", before) == 0
    shutil.copy(before, out / "after.json")
    return out


@pytest.mark.parametrize("command", TYPED)
def test_the_page_can_be_typed_as_it_stands(command: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the length of the suite."""
    monkeypatch.chdir(here)
    monkeypatch.setattr("minwm.eval.suite.suite", lambda _: ["w*4", "l*4"])
    assert run(*shlex.split(command)[1:]) == 0
