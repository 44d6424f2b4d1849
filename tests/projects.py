"""A small project with all its stages trained, a published model adopted, and what is read in their cards."""

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import pytest
from safetensors.torch import save_file

from minwm.cameras.trajectory import Motion
from minwm.data.encode import encode_clips
from minwm.data.rerender import RenderConfig, render_worlds
from minwm.families.wan.convert import RELEASES
from minwm.families.wan.text import Umt5Text
from minwm.families.wan.transformer import WanConfig
from minwm.families.wan.vae import WanVaeConfig
from minwm.nets.chunks import StreamConfig
from minwm.nets.small_codec import SmallCodecConfig
from minwm.nets.text import WordText
from minwm.recipes.codec import CodecTraining
from minwm.recipes.diffusion import BidirectionalConfig
from minwm.recipes.dmd import DmdConfig
from minwm.store.folder import load_codec, save_published
from minwm.store.layouts import open_published
from minwm.store.model import ModelConfig
from minwm.stream.solvers import BidirectionalSampler, FewStepSampler
from minwm.train.build import train
from minwm.train.config import Init, OptimConfig, Run

NETWORK = WanConfig(
    dim=32, heads=2, layers=1, ffn=32, channels=4, text_dim=8, text_length=24, freq_dim=8, camera="dual"
)
MODEL = ModelConfig(
    network=NETWORK,
    sampler=FewStepSampler(steps=2),
    codec=SmallCodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1),
    motion=Motion(move=0.5, turn=24.0, fps=16.0),
    text=WordText(dim=8),
    latents=5,
    stream=StreamConfig(chunk=2, first_chunk=1),
    height=32,
    width=32,
)
VAE = WanVaeConfig(base=8, decoder_base=8, channels=4, depth=1, mean=(0.0,) * 4, std=(1.0,) * 4)


@cache
def trained(out: Path) -> Path:
    """A codec, a bidirectional model and a few-step one made from it."""
    render = RenderConfig(seed=5, motion=MODEL.motion, latents=MODEL.latents, height=32, width=32)
    render_worlds(out / "raw", render, clips=6, workers=1)

    def run(name: str, model: ModelConfig, recipe: Any, data: str, init: Init) -> None:
        known = Run(name=name, model=model, recipe=recipe, init=init, data=str(out / data), tensorboard=False)
        optim, critic = OptimConfig(lr=3e-4), OptimConfig(lr=7e-5)
        train(replace(known, steps=1, batch=2, accumulate=3, optim=optim, critic=critic), out / name)

    run("codec", MODEL, CodecTraining(fit_clips=2), "raw", Init())
    encode_clips(out / "raw", out / "latents", load_codec(out / "codec"), MODEL.text)
    folders = {name: str(out / name) for name in ("codec", "camera")}
    whole = replace(MODEL, sampler=BidirectionalSampler(steps=3))
    run("camera", whole, BidirectionalConfig(), "latents", Init(codec=folders["codec"]))
    init = Init(student=folders["camera"], critic=folders["camera"], real=folders["camera"], codec=folders["codec"])
    run("dmd", MODEL, DmdConfig(), "latents", init)
    return out


def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all files of tests."""
    return trained(tmp_path_factory.getbasetemp() / "project")


def copied(project: Path, tmp_path: Path) -> Path:
    """The few-step model, alone in another place."""
    return shutil.copytree(project / "dmd", tmp_path / "dmd")


def adopting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published transformer, of a size that counts as Wan's for once, with its VAE."""
    plain = replace(NETWORK, camera="none", text_length=512)
    monkeypatch.setitem(RELEASES, "wan2.1-1.3b", replace(RELEASES["wan2.1-1.3b"], config=plain))
    files = {"transformer": plain, "vae": VAE}
    for name, config in files.items():
        save_file(config.build().state_dict(), tmp_path / f"{name}.safetensors")
    text = Umt5Text(source="weights/Wan", dim=8)
    config = replace(
        MODEL,
        network=plain,
        codec=VAE,
        text=text,
        sampler=BidirectionalSampler(steps=5, guidance=8.0),
        stream=StreamConfig(chunk=2),
        latents=8,
    )
    published = open_published(tmp_path / "transformer.safetensors", heads=2)
    save_published(tmp_path / "model", config, published, tmp_path / "vae.safetensors")
    return tmp_path / "model"


def metadata(text: str) -> dict[str, Any]:
    """The front matter, read by the Hub's own library."""
    return hub.ModelCard(text).data.to_dict()


def row(text: str, start: str) -> list[str]:
    """Cells of the one line of a table that begins with a cell."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]
