"""Day one with a published Wan: its folder becomes ours, and makes videos with every sampler."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from releases import save_text_encoder
from safetensors.torch import save_file
from torch import nn

from minwm.cameras.trajectory import Action
from minwm.cli import main
from minwm.core.media import read_video, write_image
from minwm.experiments.presets.wan import RELEASE_FOCAL, WAN_FOCAL
from minwm.families.wan.convert import diffusers_names as transformer_names
from minwm.families.wan.transformer import WanConfig
from minwm.families.wan.vae import WanVaeConfig, diffusers_names
from minwm.session.session import walk
from minwm.store.folder import load_model

NETWORK = WanConfig(
    dim=48, heads=2, layers=2, ffn=64, channels=4, text_dim=32, text_length=12, freq_dim=16, camera="dual"
)
VAE = WanVaeConfig(base=8, decoder_base=8, channels=4, depth=1, mean=(0.0,) * 4, std=(1.0,) * 4)
FIELDS = [
    *("--height", "32", "--width", "48", "--latents", "8", "--sampler.steps", "2", "--negative", "the dome"),
    *("--text.dim", "32", "--text.length", "12", "--codec.base", "8", "--codec.decoder_base", "8"),
    *("--codec.channels", "4", "--codec.depth", "1", "--codec.mean", "0,0,0,0", "--codec.std", "1,1,1,1"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINWM_CACHE", str(tmp_path / "cache"))


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        name: 0.1 * torch.randn_like(p) + ("norm" in name or "gamma" in name) for name, p in net.state_dict().items()
    }


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A repository in the layout of the original release: config.json, transformer, VAE; and a text encoder."""
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    save_text_encoder(folder)
    save_file(state(NETWORK.build()), folder / "diffusion_pytorch_model.safetensors")
    sizes = {"dim": 48, "num_heads": 2, "num_layers": 2, "ffn_dim": 64, "text_len": 12, "freq_dim": 16}
    (folder / "config.json").write_text(json.dumps(sizes))
    torch.save(state(VAE.build()), folder / "Wan2.1_VAE.pth")
    return folder


def convert(source: Path, target: Path, preset: str, *fields: str) -> int:
    return main(["convert", str(source), str(target), "--to", "minwm", "--preset", preset, *FIELDS, *fields])


def generate(model: Path, out: Path, trajectory: str, *more: str) -> int:
    words = ["generate", "--model", str(model), "--out", str(out), "--trajectory", trajectory]
    return main([*words, "--prompt", "a red tower", *more])


@pytest.mark.parametrize(("preset", "steps"), [("wan2.1-1.3b", 7), ("wan2.1-1.3b/ar", 11), ("wan2.1-1.3b/dmd", 31)])
def test_from_release_to_video(preset: str, steps: int, release: Path, tmp_path: Path) -> None:
    """Few steps also past the end of the ring: 8 chunks through a cache of 5."""
    assert convert(release, tmp_path / "model", preset) == 0
    assert generate(tmp_path / "model", tmp_path / "a.mp4", f"w*{steps}") == 0
    video = read_video(tmp_path / "a.mp4")[0]
    assert video.shape == (4 * steps + 1, 32, 48, 3) and video.std() > 1
    assert generate(tmp_path / "model", tmp_path / "b.mp4", f"j*{steps}") == 0
    assert np.abs(read_video(tmp_path / "b.mp4")[0].astype(int) - video).mean() > 0.5, "cameras matter"


def test_one_walks_through_it_from_the_prompt_alone(release: Path, tmp_path: Path) -> None:
    """What `minwm play` does: chunk by chunk, past the end of the ring, and back."""
    assert convert(release, tmp_path / "model", "wan2.1-1.3b/dmd") == 0
    session = walk(load_model(tmp_path / "model"), "a red tower")
    assert session.start().shape == (13, 32, 48, 3), "a first chunk of 4 latents"
    parts = [session.step(Action.of("wl")) for _ in range(7)]
    assert {part.shape for part in parts} == {(16, 32, 48, 3)}
    session.rewind(2)
    again = session.step(Action.of("wl")).astype(int)
    assert np.abs(again - parts[5]).max() <= 1, "the ring, its sink (but for its rounding) and the decoder went back"
    assert np.abs(again - parts[4]).max() > 20


def test_an_image_of_any_size_starts_it(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(release, tmp_path / "model", "wan2.1-1.3b/dmd", "--stream.first_chunk", "1", "--latents", "9") == 0
    write_image(tmp_path / "x.png", np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    assert generate(tmp_path / "model", tmp_path / "a.mp4", "w*8", "--start", str(tmp_path / "x.png")) == 0
    assert "40x40 pixels, cropped in the middle and resized to the model's 48x32" in capsys.readouterr().out


def test_compatibility_is_asked_for_by_name(release: Path, tmp_path: Path) -> None:
    switches = ("--focal", "0.5,0.5", "--network.rounded", "true")
    assert convert(release, tmp_path / "a", "wan2.1-1.3b/dmd") == 0
    assert convert(release, tmp_path / "b", "wan2.1-1.3b/dmd", *switches) == 0
    plain, ours = (load_model(tmp_path / name).config for name in "ab")
    assert isinstance(plain.network, WanConfig) and plain.focal == WAN_FOCAL and not plain.network.rounded
    assert ours == replace(plain, focal=RELEASE_FOCAL, network=replace(plain.network, rounded=True))


def test_every_naming_gives_the_same_model(release: Path, tmp_path: Path) -> None:
    """minWM's model.pt with its wrappers, and the folders of diffusers, beside the release."""
    assert convert(release, tmp_path / "a", "wan2.1-1.3b/dmd") == 0
    network, vae = state(NETWORK.build()), state(VAE.build())
    wrapped = {f"model._fsdp_wrapped_module.{name}": value for name, value in network.items()}
    torch.save({"generator": {k: 0 * v for k, v in wrapped.items()}, "generator_ema": wrapped}, release / "model.pt")
    minwm = ("--codec", str(release / "Wan2.1_VAE.pth"), "--heads", "2", "--text.source", str(release))
    (release / "config.json").write_text(json.dumps({"text_len": NETWORK.text_length}))
    assert convert(release / "model.pt", tmp_path / "b", "wan2.1-1.3b/dmd", *minwm) == 0
    theirs, names = tmp_path / "diffusers", transformer_names(2)
    save_text_encoder(theirs)
    for part in ("transformer", "vae"):
        (theirs / part).mkdir()
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "text_len": 12}
    (theirs / "transformer" / "config.json").write_text(json.dumps(sizes))
    file = "diffusion_pytorch_model.safetensors"
    save_file({names[name]: value for name, value in network.items()}, theirs / "transformer" / file)
    save_file({diffusers_names(VAE)[name]: value for name, value in vae.items()}, theirs / "vae" / file)
    assert convert(theirs, tmp_path / "c", "wan2.1-1.3b/dmd") == 0
    models = [load_model(tmp_path / name) for name in "abc"]
    for part in ("net", "codec"):
        first, *others = (getattr(model, part).state_dict() for model in models)
        for other in others:
            assert first.keys() == other.keys() and all(torch.equal(first[k], other[k]) for k in first)
    assert models[0].config.text.length == models[2].config.text.length == 12


def test_actions_are_left_out_when_asked(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = release / "diffusion_pytorch_model.safetensors"
    save_file(state(replace(NETWORK, actions=True).build()), file)
    assert convert(release, tmp_path / "with", "wan2.1-1.3b/dmd") == 0
    assert load_model(tmp_path / "with").config.network.actions
    assert convert(release, tmp_path / "without", "wan2.1-1.3b/dmd", "--drop-action") == 0
    assert "4 trained parameters are left out" in capsys.readouterr().out
    assert not load_model(tmp_path / "without").config.network.actions


BAD = {
    "no VAE": (["Wan2.1_VAE.pth"], [], "no VAE (Wan2.1_VAE.pth, Wan2.2_VAE.pth, vae) beside"),
    "another VAE": (
        [],
        ["--codec.channels", "3", "--codec.mean", "0,0,0", "--codec.std", "1,1,1"],
        "codec.channels=3 of wan_vae, network.channels=4 of wan: latents of one do not fit",
    ),
    "another preset": ([], ["--preset", "wan2.1-1.3b/foundation"], "there is no stage 'foundation'"),
    "unknown field": ([], ["--focle", "0.5,0.5"], "did you mean 'focal'"),
}


@pytest.mark.parametrize(("lost", "fields", "problem"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_one_line(
    lost: list[str], fields: list[str], problem: str, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in lost:
        (release / name).unlink()
    assert convert(release, tmp_path / "model", "wan2.1-1.3b/dmd", *fields) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob("**/*.tmp"))
