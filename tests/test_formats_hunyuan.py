"""HunyuanVideo-1.5 in every layout in which it is published: read to the same bits, written back, made a model of."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from releases import State, assert_equal
from safetensors.torch import load_file, save_file
from tiny_codecs import HUNYUAN as VAE

from minwm.cli import main
from minwm.core.weights import CheckpointError
from minwm.experiments import presets
from minwm.families.base import WORLDPLAY
from minwm.families.hunyuan.convert import RELEASES, canonical_name, original_name, to_diffusers
from minwm.families.hunyuan.transformer import HunyuanConfig
from minwm.store.card import card
from minwm.store.folder import load_model, weights_origin
from minwm.store.layouts import describe, open_published, release_name

SMALL = HunyuanConfig(
    dim=32, heads=2, layers=2, ffn=48, refiner_layers=2, channels=4, text_dim=6, glyph_dim=4, glyph_hidden=8,
    image_dim=4, freq_dim=16, rope=(4, 6, 6),
)  # fmt: skip
SEEING = replace(SMALL, camera="dual")
TENCENT = {
    "_class_name": "HunyuanVideo_1_5_DiffusionTransformer", "hidden_size": 32, "heads_num": 2, "rope_theta": 256,
    "mm_double_blocks_depth": 2, "mm_single_blocks_depth": 0, "mlp_width_ratio": 1.5, "rope_dim_list": [4, 6, 6],
    "in_channels": 4, "ideal_resolution": "480p", "ideal_task": "i2v", "attn_mode": "flash",
}  # fmt: skip
DIFFUSERS = {"num_attention_heads": 2, "attention_head_dim": 16, "rope_axes_dim": [4, 6, 6], "task_type": "i2v"}


def state(cfg: HunyuanConfig) -> State:
    """Every parameter random."""
    torch.manual_seed(0)
    return {name: torch.randn_like(x) for name, x in cfg.build().state_dict().items()}


def original(tensors: State) -> State:
    return {original_name(name): x for name, x in tensors.items()}


def module(tensors: State, file: Path) -> None:
    """As tencent's loader unwraps it."""
    torch.save({"module": {f"module.{name}": x for name, x in original(tensors).items()}, "step": 7}, file)


def fsdp(tensors: State, file: Path) -> None:
    wrapped = {f"_fsdp_wrapped_module.{name}": x for name, x in original(tensors).items()}
    torch.save({"generator_ema": wrapped, "generator": {name: 0 * x for name, x in wrapped.items()}}, file)


@dataclass(frozen=True)
class Layout:
    """Whose files they are, by what is in them."""

    config: HunyuanConfig
    config_json: dict[str, Any]
    write: Callable[[State, Path], object]
    file: str = "diffusion_pytorch_model.safetensors"


LAYOUTS = {
    "tencent": Layout(SMALL, TENCENT, lambda tensors, file: save_file(original(tensors), file)),
    "tencent, distilled in steps": Layout(
        replace(SMALL, meanflow=True),
        {**TENCENT, "use_meanflow": True},
        lambda tensors, file: save_file(original(tensors), file),
    ),
    "tencent, wrapped": Layout(SMALL, TENCENT, module, "pytorch_model.pt"),
    "diffusers": Layout(SMALL, DIFFUSERS, lambda tensors, file: save_file(to_diffusers(tensors), file)),
    "minWM": Layout(SEEING, TENCENT, lambda tensors, file: save_file(original(tensors), file)),
    "minWM, wrapped": Layout(SEEING, TENCENT, fsdp, "model.pt"),
    "HY-WorldPlay": Layout(
        replace(SEEING, actions=True), TENCENT, lambda tensors, file: save_file(original(tensors), file)
    ),
}


def written(name: str, folder: Path) -> State:
    layout = LAYOUTS[name]
    folder.mkdir(parents=True)
    tensors = state(layout.config)
    layout.write(tensors, folder / layout.file)
    (folder / "config.json").write_text(json.dumps(layout.config_json))
    return tensors


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("back", ["original", "diffusers"])
def test_every_layout_is_read_to_the_bit_and_written_back(name: str, back: str, tmp_path: Path) -> None:
    tensors = written(name, tmp_path / "x")
    opened = open_published(tmp_path / "x")
    assert opened.layout == ("diffusers" if name == "diffusers" else "original")
    assert opened.config == LAYOUTS[name].config and not opened.mismatches()
    assert_equal(opened.tensors, tensors)
    assert main(["convert", str(tmp_path / "x"), str(tmp_path / "y"), "--to", back]) == 0
    again = open_published(tmp_path / "y")
    assert (again.layout, again.config) == (back, LAYOUTS[name].config)
    assert_equal(again.tensors, tensors)


def test_diffusers_loads_what_is_exported(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    cfg = replace(SMALL, glyph_hidden=2048, freq_dim=256)  # these its class has by itself
    save_file(original(state(cfg)), tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TENCENT))
    assert main(["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "y"), "--to", "diffusers"]) == 0
    theirs = diffusers.HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path / "y")
    assert_equal(dict(theirs.state_dict()), to_diffusers(state(cfg)))


FULL = {
    "hunyuan1.5-8b": (HunyuanConfig(), 1793, 1801),
    "hunyuan1.5-8b-step-distilled": (HunyuanConfig(meanflow=True), 1797, 1805),
    "minWM": (HunyuanConfig(camera="dual"), 1901, 1909),
    "HY-WorldPlay": (HunyuanConfig(camera="dual", actions=True), 1905, 1913),
}


@pytest.mark.parametrize("name", FULL)
def test_full_sizes_have_the_names_of_the_release(name: str) -> None:
    """32 tensors a block and 65 around them; in diffusers 2 blocks x 2 tensors x 2 more; 2 a block of cameras; 4."""
    cfg, originals, theirs = FULL[name]
    with torch.device("meta"):
        ours = cfg.build().state_dict()
    assert len({original_name(key) for key in ours}) == len(ours) == originals
    assert len(to_diffusers(ours)) == theirs
    assert [canonical_name(original_name(key)) for key in ours] == list(ours)
    assert release_name(cfg) == (name if name in RELEASES else "hunyuan1.5-8b")


ORIGINS = {
    "tencent": ((), RELEASES["hunyuan1.5-8b"].origin),
    "HY-WorldPlay": ((), WORLDPLAY),
    "HY-WorldPlay without actions": (("--drop-action",), WORLDPLAY),
}


@pytest.mark.parametrize("name", ORIGINS)
def test_it_becomes_a_model_with_the_licence_of_its_base(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From tencent's folders: the VAE stands beside the variants."""
    (options, origin), layout = ORIGINS[name], name.partition(" without")[0]
    preset = presets.published("hunyuan1.5-8b")
    monkeypatch.setitem(presets.PUBLISHED, "hunyuan1.5-8b", lambda: preset)
    monkeypatch.setitem(RELEASES, "hunyuan1.5-8b", replace(RELEASES["hunyuan1.5-8b"], config=SMALL))
    tensors = written(layout, tmp_path / "transformer" / "480p_i2v")
    (tmp_path / "vae").mkdir()
    save_file(VAE.build().state_dict(), tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    sizes = {"channels": "4", "base": "8", "mult": "1,2,4", "depth": "1", "temporal": "true,true"}
    fields = [word for key, value in sizes.items() for word in (f"--codec.{key}", value)]
    fields += ["--text.dim", "6", "--text.glyph_dim", "4", "--text.image_dim", "4"]
    words = ["convert", str(tmp_path / "transformer" / "480p_i2v"), str(tmp_path / "model"), "--to", "minwm", *fields]
    assert main([*words, *options]) == 0
    said = capsys.readouterr().out
    assert "it was made for 480p, i2v" in said and f"weights of {origin.repo} are under {origin.license}" in said
    model, network = load_model(tmp_path / "model"), LAYOUTS[layout].config
    assert model.config.network == replace(network, principal_point=False, actions=network.actions and not options)
    assert_equal(model.net.state_dict(), {key: tensors[key] for key in model.net.state_dict()})
    text = card(tmp_path / "model")
    assert f"base_model: {origin.repo}" in text and origin.license.limits in text
    assert weights_origin(tmp_path / "model") == origin
    assert main(["convert", str(tmp_path), str(tmp_path / "other"), "--to", "minwm"]) == 2
    assert "name one of its folders: 480p_i2v" in capsys.readouterr().err


BAD = {
    "mlp_width_ratio": (4, "mlp_width_ratio=4, not 1.5"),
    "rope_dim_list": ([8, 4, 4], None),
    "rope_theta": (1e4, "rope_theta=10000.0, not 256"),
}


@pytest.mark.parametrize("key", BAD)
def test_a_config_json_is_believed_where_tensors_say_nothing(key: str, tmp_path: Path) -> None:
    written("tencent", tmp_path / "x")
    value, problem = BAD[key]
    (tmp_path / "x" / "config.json").write_text(json.dumps({**TENCENT, key: value}))
    if problem is None:
        assert open_published(tmp_path / "x").config.rope == tuple(value)
        return
    with pytest.raises(CheckpointError, match=problem):
        open_published(tmp_path / "x")


def test_what_cannot_be_known_or_does_not_fit_is_named(tmp_path: Path) -> None:
    tensors = original(written("tencent", tmp_path / "x"))
    (tmp_path / "x" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json says how heads of 16 channels are rotated"):
        open_published(tmp_path / "x")
    with pytest.raises(CheckpointError, match="has 2 heads by the width of its norms, 16; leave out --heads"):
        open_published(tmp_path / "x", heads=4)
    (tmp_path / "x" / "config.json").write_text(json.dumps(TENCENT))
    save_file({**tensors, "guidance_in.mlp.0.bias": torch.ones(2)}, tmp_path / "x" / LAYOUTS["tencent"].file)
    with pytest.raises(CheckpointError, match=r"not supported: it is told the scale of guidance"):
        open_published(tmp_path / "x")
    assert describe(["transformer_blocks.0.attn.add_q_proj.weight"]).startswith("something unknown"), "of FLUX, too"


def test_actions_are_left_out_when_asked(tmp_path: Path) -> None:
    tensors = written("HY-WorldPlay", tmp_path / "x")
    opened = open_published(tmp_path / "x", drop_action=True)
    assert opened.config == SEEING and len(opened.ignored) == 4 and not opened.mismatches()
    assert_equal(opened.tensors, {name: x for name, x in tensors.items() if not name.startswith("action_in.")})


def test_one_file_says_what_it_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = written("minWM", tmp_path / "x")
    target = tmp_path / "y.safetensors"
    assert main(["convert", str(tmp_path / "x"), str(target), "--to", "original"]) == 0
    said = capsys.readouterr().out
    assert "does not know of the cameras" in said and "heads that are rotated by (4, 6, 6)" in said
    assert_equal(load_file(target), original(tensors))
