"""Training refuses clips that are not those of the model, before it writes anything."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from projects import MODEL, trained_once

from minwm.cameras.track import CameraTrack
from minwm.cameras.trajectory import Motion
from minwm.core.config import ConfigError, from_dict
from minwm.data.clips import ClipRecord, DataError
from minwm.data.encode import encode_clips
from minwm.data.rerender import RenderConfig, render_worlds
from minwm.families.wan.vae import WAN22
from minwm.nets.text import WordText
from minwm.recipes.codec import CodecTraining
from minwm.recipes.ode import OdeConfig
from minwm.store.folder import load_config, save_codec
from minwm.train.build import train
from minwm.train.config import Run


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_once(tmp_path_factory)


def camera_run(project: Path) -> Run:
    return from_dict(Run, json.loads((project / "camera" / "run.json").read_text())["run"])


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "height": ({"height": 64}, "its height is 32, the model's 64"),
    "width": ({"width": 64}, "its width is 32, the model's 64"),
    "frames": ({"latents": 7}, "its frames is 17, the model's 25"),
    "frame rate": ({"motion": replace(MODEL.motion, fps=24.0)}, r"its motion\.fps is 16\.0, the model's 24\.0"),
    "stride": ({"motion": replace(MODEL.motion, stride=2)}, r"its motion\.stride is 4, the model's 2"),
    "speed": ({"motion": replace(MODEL.motion, move=0.25)}, r"its motion\.move is 0\.5, the model's 0\.25"),
    "turn": ({"motion": replace(MODEL.motion, turn=12.0)}, r"its motion\.turn is 24\.0, the model's 12\.0"),
    "focal": ({"focal": (1.0, 1.0)}, r"its focal is \(0\.714.*, the model's \(1\.0, 1\.0\)"),
    "scenes": ({"scenes": "place"}, "its scenes is worlds, the model's place"),
    "channels": (
        {"network": replace(MODEL.network, channels=8), "codec": replace(MODEL.codec, channels=8)},
        r"its network\.channels is 4, the model's 8",
    ),
    "scale": (
        {"codec": replace(WAN22, channels=4, mean=WAN22.mean[:4], std=WAN22.std[:4])},
        r"its codec\.scale is 8, the model's 16",
    ),
    "text": (
        {"text": WordText(dim=16), "network": replace(MODEL.network, text_dim=16)},
        r"its text\.dim is 8, the model's 16",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_clips_of_another_model_are_refused_with_both_values(change: str, project: Path, tmp_path: Path) -> None:
    run, (fields, message) = camera_run(project), CHANGES[change]
    with pytest.raises(DataError, match=f"{message}; give other data, or set model"):
        train(replace(run, model=replace(run.model, **fields)), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("change", ["height", "width", "frames", "frame rate", "focal"])
def test_a_codec_has_clips_of_its_model_too(change: str, project: Path, tmp_path: Path) -> None:
    fields, message = CHANGES[change]
    run = Run(name="codec", model=replace(MODEL, **fields), recipe=CodecTraining(), data=str(project / "raw"))
    with pytest.raises(DataError, match=message):
        train(run, tmp_path / "run")


def test_the_codec_is_the_one_that_made_the_latents(project: Path, tmp_path: Path) -> None:
    run = camera_run(project)
    torch.manual_seed(7)
    save_codec(tmp_path / "codec", MODEL.codec.build())
    with pytest.raises(ConfigError, match=r"was encoded by SmallCodec \w+, init\.codec=.* is SmallCodec \w+; encode"):
        train(replace(run, init=replace(run.init, codec=str(tmp_path / "codec"))), tmp_path / "run")
    codec_run = Run(name="codec", model=MODEL, recipe=CodecTraining(), data=str(project / "raw"), init=run.init)
    with pytest.raises(ConfigError, match=r"a codec continues from init\.student"):
        train(codec_run, tmp_path / "run")


def test_a_model_of_parts_of_clips_is_one_of_short_clips(project: Path, tmp_path: Path) -> None:
    run = camera_run(project)
    train(replace(run, recipe=replace(run.recipe, latents=3)), tmp_path / "run")
    assert run.model.latents == 5 and load_config(tmp_path / "run").latents == 3


def test_a_clip_in_the_middle_is_refused_when_it_is_read(project: Path, tmp_path: Path) -> None:
    """A folder of clips of two sizes: its first clip is right."""
    for height in (32, 64):
        config = RenderConfig(seed=height, motion=MODEL.motion, latents=MODEL.latents, height=height, width=32,
                              focal=MODEL.focal)  # fmt: skip
        render_worlds(tmp_path / f"raw-{height}", config, clips=2)
    for file in (tmp_path / "raw-64" / "clips").iterdir():
        file.rename(tmp_path / "raw-32" / "clips" / file.name)
    run = camera_run(project)
    codec = MODEL.codec.build()
    save_codec(tmp_path / "codec", codec)
    encode_clips(tmp_path / "raw-32", tmp_path / "latents", codec, MODEL.text)
    init = replace(run.init, codec=str(tmp_path / "codec"))
    with pytest.raises(DataError, match=r"record world-.*: its height is 64, the model's 32"):
        train(replace(run, data=str(tmp_path / "latents"), init=init, batch=1, steps=8), tmp_path / "run")


def clip_record(c2w: np.ndarray, fps: float = 16.0) -> ClipRecord:
    K = np.tile(MODEL.intrinsics, (len(c2w), 1))
    return ClipRecord(
        id="a", source="video", source_id="a", source_license="CC0-1.0", split_key="a", caption="a tower",
        caption_source="me", hw=(32, 32), pose_kind="estimated",
        track=CameraTrack(c2w=c2w, K=K, fps=fps, unit="metric"),
    )  # fmt: skip


@given(st.floats(1e-3, 1e3), st.integers(2, 30))
def test_poses_of_another_scale_are_refused(speed: float, frames: int) -> None:
    """A user's clips say nothing of speeds: a mean above ten times the model's is another unit of length."""
    latents = frames + 1
    c2w = np.tile(np.eye(4), (4 * frames + 1, 1, 1))
    c2w[:, 2, 3] = np.arange(len(c2w)) * speed / 16
    check = partial(replace(MODEL, latents=latents).clip_spec.check_clip, clip_record(c2w), "clip a")
    if speed <= 9.99 * MODEL.motion.move:
        check()
    elif speed > 10.01 * MODEL.motion.move:
        with pytest.raises(DataError, match=r"clip a: its motion\.move is .*, the model's 0\.5"):
            check()


def test_rates_that_differ_by_rounding_are_one() -> None:
    still = np.tile(np.eye(4), (MODEL.frames, 1, 1))
    spec = replace(MODEL, motion=Motion(move=0.5, turn=24.0, fps=30.0)).clip_spec
    spec.check_clip(clip_record(still, fps=30000 / 1001), "clip a")
    with pytest.raises(DataError, match="fps is 25"):
        spec.check_clip(clip_record(still, fps=25.0), "clip a")


def test_trajectories_are_compared_too(project: Path, tmp_path: Path) -> None:
    run = replace(camera_run(project), recipe=OdeConfig(ode_steps=4), model=replace(MODEL, height=64))
    with pytest.raises(DataError, match="its height is 32"):
        train(run, tmp_path / "run")
