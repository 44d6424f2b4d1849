"""Checkpoints as people have them: ComfyUI's files, quantised ones, LoRAs, and variants that are only described."""

import json
from pathlib import Path

import pytest
import torch
from releases import PLAIN, State, assert_equal, plain_state, prefixed
from safetensors.torch import save_file

from minwm.cli import main
from minwm.core.weights import CheckpointError, read_weights
from minwm.families.wan.vae import WanVaeConfig
from minwm.store.folder import load_model
from minwm.store.layouts import open_published

state = pytest.fixture(plain_state, scope="module")
VAE = WanVaeConfig(base=8, decoder_base=8, channels=4, depth=1, mean=(0.0,) * 4, std=(1.0,) * 4)
VARIANTS = {
    "img_emb.proj.1.weight": "it attends to an image (I2V)",
    "blocks.0.cross_attn.k_img.weight": "it attends to an image (I2V)",
    "control_adapter.conv.weight": "it takes cameras through an adapter (Fun-Camera)",
    "vace_blocks.0.after_proj.weight": "it takes videos to edit (VACE)",
}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_comfyui_names(prefix: str, state: State, tmp_path: Path) -> None:
    save_file(prefixed(state, prefix), tmp_path / "x.safetensors")
    opened = open_published(tmp_path, heads=2)
    assert opened.config == PLAIN
    assert_equal(opened.tensors, state)


def test_a_comfyui_file_with_its_vae_becomes_a_model(state: State, tmp_path: Path) -> None:
    vae, file = VAE.build().state_dict(), tmp_path / "all.safetensors"
    parts = (("model.diffusion_model.", state), ("vae.", vae), ("text_encoders.umt5xxl.", {"x": torch.ones(1)}))
    save_file({prefix + key: x for prefix, part in parts for key, x in part.items()}, file)
    assert read_weights(file).roles == ("diffusion_model", "text_encoders", "vae")
    fields = ("base", "8", "decoder_base", "8", "channels", "4", "depth", "1", "mean", "0,0,0,0", "std", "1,1,1,1")
    codec = [f"--codec.{word}" if i % 2 == 0 else word for i, word in enumerate(fields)]
    words = ["convert", str(file), str(tmp_path / "model"), "--to", "minwm", "--preset", "wan2.1-1.3b", "--heads", "2"]
    assert main([*words, *codec, "--text.dim", "16"]) == 0
    model = load_model(tmp_path / "model")
    assert_equal(model.net.state_dict(), state)
    assert_equal(model.codec.state_dict(), vae)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("names", [("scale_weight", "scale_input"), ("weight_scale", "comfy_quant")])
@pytest.mark.parametrize("by_channel", [False, True])
def test_scaled_weights_are_multiplied_by_their_scales(
    dtype: torch.dtype, names: tuple[str, str], by_channel: bool, state: State, tmp_path: Path
) -> None:
    scale_name, other = names
    saved, want = {**state, "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, {**state}
    for key in [key for key, x in state.items() if key.endswith(".q.weight")]:
        scale = state[key].abs().amax(dim=1 if by_channel else (0, 1), keepdim=by_channel) / 100
        saved[key] = (state[key] / scale).to(dtype)
        saved[key.replace("weight", scale_name)] = scale
        saved[key.replace("weight", other)] = torch.ones(1)
        want[key] = (saved[key].float() * scale).bfloat16()
        assert (want[key] - state[key]).norm() < 0.1 * state[key].norm()
    save_file(saved, tmp_path / "x.safetensors")
    opened = open_published(tmp_path, heads=2)
    assert_equal(opened.tensors, want)
    assert not opened.mismatches() and "4 weights are quantised and are read as bfloat16" in opened.notes


def test_other_quantisation_is_refused_by_name(state: State, tmp_path: Path) -> None:
    key = "blocks.0.self_attn.q.weight"
    packed = {key: torch.zeros(64, 32, dtype=torch.uint8), f"{key}_scale": torch.ones(64, 4)}
    save_file({**state, **packed}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"is quantised: {key} is uint8 with 256 scales.*take the bfloat16 file"):
        open_published(tmp_path, heads=2)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "x.gguf").write_bytes(b"GGUF")
    for path in (tmp_path / "gguf", tmp_path / "gguf" / "x.gguf"):
        with pytest.raises(CheckpointError, match=r"x\.gguf is GGUF, a quantised format that is not read; take"):
            open_published(path)


@pytest.mark.parametrize(
    "name", ["diffusion_model.blocks.0.ffn.0.lora_A.weight", "lora_unet_blocks_0.lora_down.weight"]
)
def test_a_lora_is_named(name: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"but a LoRA, of use only once it is merged into its base model"):
        open_published(tmp_path)


@pytest.mark.parametrize("key", VARIANTS)
def test_variants_are_described_and_refused(
    key: str, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with more channels in than out, as in their releases, and with a config.json that says so."""
    wide = torch.ones(64, 9, 1, 2, 2)
    save_file({**state, key: torch.ones(2), "patch_embedding.weight": wide}, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2, "in_dim": 9, "out_dim": 4}))
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"holds: a Wan transformer (original names); {VARIANTS[key]}" in shown and "config.layers: 2" in shown
    assert "not supported: it takes 9 channels in patches of [1, 2, 2] and gives 4" in shown
    assert main(["convert", str(tmp_path), str(tmp_path / "out"), "--to", "diffusers"]) == 2
    assert f"is a variant that is not supported: {VARIANTS[key]}; it takes 9 channels" in capsys.readouterr().err
