"""What is written in a published layout is what others read: names, sizes, and the commands that convert."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from releases import (
    ACTIONS,
    PLAIN,
    SEEING,
    State,
    assert_equal,
    assert_same_function,
    diffusers,
    load_into,
    network,
    plain_state,
    reference,
    seeing_state,
    sharded_everywhere,
    spoilt,
    worldplay,
    write_original,
)
from safetensors.torch import load_file, save_file

from minwm.cameras.trajectory import Motion
from minwm.cli import main
from minwm.core.config import UserError
from minwm.core.weights import CheckpointError
from minwm.families.wan.convert import RELEASES, diffusers_names, export
from minwm.families.wan.transformer import WanConfig
from minwm.nets.chunks import StreamConfig
from minwm.nets.small_codec import SmallCodecConfig
from minwm.nets.text import WordText
from minwm.store.folder import save_model
from minwm.store.layouts import describe, open_published, release_name
from minwm.store.model import ModelConfig
from minwm.stream.solvers import FewStepSampler

state = pytest.fixture(plain_state, scope="module")
seeing = pytest.fixture(seeing_state, scope="module")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("shard", [10**9, 100_000], ids=["one", "sharded"])
def test_export_and_back(layout: Any, shard: int, seeing: State, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    notes = export(seeing, replace(SEEING, text_length=40), out, layout, shard=shard)
    assert len(notes) == 1 and "does not know of the cameras" in notes[0]
    assert all(file.stat().st_size < 200_000 for file in out.glob("*")) == (shard == 100_000)
    opened = open_published(out)
    assert (opened.config, opened.layout) == (replace(SEEING, text_length=40), layout)
    assert_equal(opened.tensors, seeing)
    with pytest.raises(UserError, match="folder exists; delete it, or give another name"):
        export(seeing, SEEING, out, layout)
    assert [path.name for path in out.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("cfg", [PLAIN, SEEING, replace(PLAIN, channels=48)], ids=["plain", "cameras", "48 channels"])
@pytest.mark.parametrize("shard", [10**9, 100_000], ids=["one", "sharded"])
def test_diffusers_loads_what_is_exported(
    cfg: WanConfig, shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network(cfg)
    monkeypatch.setattr(diffusers.WanTransformer3DModel, "_keep_in_fp32_modules", None)  # it needs accelerate
    export(net.state_dict(), cfg, tmp_path / "x", "diffusers", shard=shard)
    theirs, info = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert len(info["unexpected_keys"]) == (4 if cfg.camera == "dual" else 0)
    if cfg.channels == 4:
        plain = PLAIN.build()
        plain.load_state_dict({key: x for key, x in net.state_dict().items() if "prope_o" not in key})
        assert_same_function(plain, theirs)
    else:
        assert theirs.config.in_channels == theirs.config.out_channels == 48


def test_single_branch_cameras_need_their_config(state: State, tmp_path: Path) -> None:
    """Their parameters are those of a network without cameras."""
    cfg = replace(PLAIN, camera="single")
    export(state, cfg, tmp_path / "x", "original")
    opened = open_published(tmp_path / "x")
    assert opened.config == cfg and load_into(opened, cfg.build()) == []
    with pytest.raises(CheckpointError, match="camera=dual, not none"):
        open_published(write_original(tmp_path / "y", state, camera="dual"))


def test_an_interrupted_export_leaves_nothing(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minwm.families.published.write_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        export(state, PLAIN, tmp_path / "x", "original")
    assert not list(tmp_path.iterdir())


def test_actions_survive_export(seeing: State, tmp_path: Path) -> None:
    assert len(export(seeing | ACTIONS, replace(SEEING, actions=True), tmp_path / "x", "diffusers")) == 2
    assert_equal(open_published(tmp_path / "x").tensors, seeing | ACTIONS)
    stored = load_file(tmp_path / "x" / "diffusion_pytorch_model.safetensors")
    assert "condition_embedder.action_embedder.linear_1.bias" in stored


COUNTS = {"wan2.1-1.3b": (825, 1_418_996_800), "wan2.1-14b": (1095, 14_288_491_584)}
COUNTS |= {"wan2.2-ti2v-5b": (825, 4_999_787_712)}


@pytest.mark.parametrize("name", RELEASES)
def test_full_sizes_have_the_names_and_shapes_of_the_release(name: str) -> None:
    config = RELEASES[name].config
    with torch.device("meta"):
        ours, theirs = config.build().state_dict(), reference(config).state_dict()
    names = diffusers_names(config.layers)
    assert {names[key]: value.shape for key, value in ours.items()} == {key: x.shape for key, x in theirs.items()}
    assert (len(ours), sum(x.numel() for x in ours.values())) == COUNTS[name]
    assert release_name(replace(config, camera="dual")) == name and release_name(PLAIN) is None


def test_names_are_one_to_one() -> None:
    names = diffusers_names(30)
    assert len(set(names.values())) == len(names) == 825 + 60 + 4 + 2, "with cameras, an embedding of actions, and rays"
    with torch.device("meta"):
        assert len(replace(WanConfig(), camera="dual").build().state_dict()) == 885
    table = {key: names[key] for key in names if "norm3" in key or "prope" in key or "modulation" in key}
    assert table["blocks.29.norm3.weight"] == "blocks.29.norm2.weight"
    assert table["blocks.7.self_attn.prope_o.weight"] == "blocks.7.attn1.to_out_prope.0.weight"
    assert table["head.modulation"] == "scale_shift_table"


def test_other_files_are_recognised() -> None:
    with torch.device("meta"):
        small = diffusers.AutoencoderKLWan()
        large = diffusers.AutoencoderKLWan(
            base_dim=160, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2
        )
    assert describe(small.state_dict()) == "a Wan2.1 VAE (diffusers names)"
    assert describe(large.state_dict()) == "a Wan2.2 VAE (diffusers names)"
    assert describe(["conv1.bias", "encoder.downsamples.0.residual.0.gamma"]) == "a Wan2.1 VAE (original names)"
    t5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    assert describe(["shared.weight", t5]) == "a UMT5 text encoder (transformers names)"
    assert describe(["token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"]).startswith("a UMT5")
    assert describe(["encoder.0.weight", "decoder.3.conv.0.weight"]) == "a TAEHV tiny autoencoder"
    assert describe(["double_blocks.0.img_attn_q.weight"]).startswith("a HunyuanVideo-1.5 transformer")
    assert describe(["b", "a"]) == "something unknown (a, b)"


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_inspect(state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"generator": worldplay(state | ACTIONS), "critic": state}, tmp_path / "model.pt")
    assert run("inspect", tmp_path, "--heads", 2, "--json", tmp_path / "x.json") == 0
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    assert written["holds"] == "a Wan transformer (diffusers names)" and written["layout"] == "diffusers"
    assert (written["role"], written["roles"]) == ("generator", ["generator", "critic"])
    assert written["wrappers"] == ["model", "_fsdp_wrapped_module"] and written["dtypes"] == {"float32": 73}
    assert written["config"]["dim"] == 64 and written["action_tensors"] == 4 and written["camera_tensors"] == 0
    assert "config.actions: True" in shown and "config.heads: 2" in shown
    save_file(spoilt(state, "missing"), tmp_path / "x.safetensors")
    assert run("inspect", tmp_path / "x.safetensors", "--heads", 2) == 0
    assert "tensors missing: blocks.1.cross_attn.o.bias" in capsys.readouterr().out
    torch.save({"encoder.downsamples.0.residual.0.gamma": torch.ones(3)}, tmp_path / "vae.pth")
    assert run("inspect", tmp_path / "vae.pth") == 0
    assert "holds: a Wan2.1 VAE (original names)" in capsys.readouterr().out
    assert run("convert", tmp_path / "vae.pth", tmp_path / "out", "--to", "original") == 2
    assert "is no transformer of a known family (wan, hunyuan) but a Wan2.1 VAE" in capsys.readouterr().err


def test_convert(seeing: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"generator_ema": sharded_everywhere(seeing)}, tmp_path / "model.pt")
    there, back = tmp_path / "there", tmp_path / "back.safetensors"
    assert run("convert", tmp_path / "model.pt", there, "--to", "diffusers", "--heads", 2) == 0
    assert "diffusers does not know of the cameras" in capsys.readouterr().out
    assert run("convert", there, back, "--to", "original", "--dtype", "bfloat16") == 0
    assert_equal(load_file(back), {key: value.bfloat16() for key, value in seeing.items()})
    assert run("convert", there, back, "--to", "original") == 2
    assert "back.safetensors exists; delete it" in capsys.readouterr().err


def test_a_trained_model_is_converted(seeing: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codec = SmallCodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1)
    config = ModelConfig(
        network=SEEING,
        sampler=FewStepSampler(),
        codec=codec,
        motion=Motion(move=1, turn=9, fps=16),
        text=WordText(dim=SEEING.text_dim, length=SEEING.text_length),
        stream=StreamConfig(chunk=2, first_chunk=1),
    )
    net = SEEING.build()
    net.load_state_dict(seeing)
    save_model(tmp_path / "model", config, net, codec.build())
    assert run("convert", tmp_path / "model", tmp_path / "out", "--to", "diffusers") == 0
    opened = open_published(tmp_path / "out")
    assert opened.config == SEEING
    assert_equal(opened.tensors, seeing)
    assert run("inspect", tmp_path / "model") == 0
    assert "network.camera: dual" in capsys.readouterr().out
