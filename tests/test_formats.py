"""Whatever was published loads as the same network, and what does not is one clear error."""

import json
import os
import re
import resource
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minwm.checkpoint import ModelConfig, save_model
from minwm.cli import main
from minwm.core.trajectory import Motion
from minwm.core.types import Condition
from minwm.core.weights import CheckpointError, read_weights, write_shards
from minwm.formats import (
    PROPE,
    SIZES,
    diffusers_names,
    export,
    identify,
    open_published,
    size_name,
)
from minwm.nets.codec import CodecConfig
from minwm.nets.wan import Wan, WanConfig
from minwm.sampling import FewStep

diffusers = pytest.importorskip("diffusers")

PLAIN = WanConfig(dim=64, heads=2, layers=2, ffn=96, channels=4, text_dim=16, freq_dim=32)
SEEING = replace(PLAIN, camera="dual")
ACTIONS = {f"action_embedding.{i}.{leaf}": torch.ones(64) for i in (0, 2) for leaf in ("weight", "bias")}
State = dict[str, Tensor]


def network(cfg: WanConfig) -> Wan:
    """With every parameter random."""
    net = cfg.build()
    for name, parameter in net.named_parameters():  # norms scale near 1, or attention would be uniform
        nn.init.normal_(parameter, mean=float(name.endswith(("norm_q.weight", "norm_k.weight"))), std=0.2)
    return net


def reference(cfg: WanConfig) -> nn.Module:
    """diffusers' class of the same size."""
    return diffusers.WanTransformer3DModel(
        num_attention_heads=cfg.heads,
        attention_head_dim=cfg.dim // cfg.heads,
        in_channels=cfg.channels,
        out_channels=cfg.channels,
        text_dim=cfg.text_dim,
        freq_dim=cfg.freq_dim,
        ffn_dim=cfg.ffn,
        num_layers=cfg.layers,
    )


@torch.no_grad()
def assert_same_function(ours: Wan, theirs: nn.Module) -> None:
    x, t, text = torch.randn(1, 3, 4, 4, 6), torch.rand(1), torch.randn(1, 512, 16)
    want = theirs(x.transpose(1, 2), 1000 * t, text).sample.transpose(1, 2)
    assert want.abs().max() > 0.5
    torch.testing.assert_close(ours(x, t[:, None].expand(1, 3), Condition(text=text)), want, atol=1e-4, rtol=1e-4)


def assert_equal(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    return network(PLAIN).state_dict()


@pytest.fixture(scope="module")
def seeing() -> State:
    torch.manual_seed(1)
    return network(SEEING).state_dict()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def sharded_everywhere(state: State) -> State:
    """FSDP around the network and every block, checkpointing around every attention."""
    new = {}
    for key, value in state.items():
        inner = key.replace(".self_attn.", ".self_attn._checkpoint_wrapped_module.")
        inner = re.sub(r"^blocks\.\d+\.", r"\g<0>_fsdp_wrapped_module.", inner)
        new[f"model._fsdp_wrapped_module.{inner}"] = value
    return new


def halves(state: State) -> State:
    return {key: value / 2 for key, value in state.items()}


PICKLED: dict[str, Callable[[State], dict[str, Any]]] = {
    "generator": lambda state: {"generator": prefixed(state, "model.")},
    "generator_ema": lambda state: {"generator_ema": prefixed(state, "model."), "step": 1000},
    "ema_of_both": lambda state: {"generator": halves(state), "generator_ema": state, "critic": halves(state)},
    "bare": lambda state: state,
    "bare_wrapped": lambda state: prefixed(state, "model."),
    "fsdp": lambda state: {"generator_ema": sharded_everywhere(state)},
    "compiled": lambda state: {"model": prefixed(state, "_orig_mod.module.model._orig_mod.")},
    "distributed": lambda state: {"module": prefixed(state, "module."), "optimizer": {"state": {0: {"step": 3}}}},
    "ema": lambda state: {"ema": state, "module": halves(state)},
    "state_dict": lambda state: {"state_dict": state, "epoch": torch.tensor(3)},
    "discriminator": lambda state: {
        "generator": prefixed({**state, "_gan_ca_blocks.0.weight": torch.ones(3)}, "model.")
        | {"_cls_pred_branch.0.weight": torch.ones(2), "_register_tokens.register_tokens": torch.ones(2)}
    },
}


@pytest.mark.parametrize("form", PICKLED)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_pickles(form: str, suffix: str, state: State, tmp_path: Path) -> None:
    torch.save(PICKLED[form](state), tmp_path / f"model{suffix}", _use_new_zipfile_serialization=suffix != ".ckpt")
    for path in (tmp_path, tmp_path / f"model{suffix}"):
        opened = open_published(path, heads=2)
        assert (opened.config, opened.layout) == (PLAIN, "original")
        assert_equal(opened.tensors, state)
    gan = {"_gan_ca_blocks.0.weight", "_cls_pred_branch.0.weight", "_register_tokens.register_tokens"}
    assert set(opened.ignored) == (gan if form == "discriminator" else set())
    net = PLAIN.build()
    assert opened.load_into(net) == []
    assert_equal(net.state_dict(), state)


def test_roles_and_wrappers_are_reported(state: State, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(PICKLED["ema_of_both"](sharded_everywhere(state)), path)
    weights = read_weights(path)
    assert weights.roles == ("generator", "generator_ema", "critic") and weights.role == "generator_ema"
    assert set(weights.wrappers) == {"model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
    assert_equal(open_published(path, role="critic", heads=2).tensors, halves(state))
    with pytest.raises(CheckpointError, match=r"holds no 'ema'; it holds generator, generator_ema, critic"):
        open_published(path, role="ema")
    torch.save({"critic": state, "fake": state}, path)
    with pytest.raises(CheckpointError, match=r"holds critic, fake; choose one with --role"):
        open_published(path)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"holds no 'ema'; it holds one network without a name"):
        open_published(path, role="ema")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_safetensors_of_any_type(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    rounded = {key: value.to(dtype) for key, value in state.items()}
    save_file(rounded, tmp_path / "model.safetensors")
    opened = open_published(tmp_path, heads=2)
    assert_equal(opened.tensors, rounded)
    net = PLAIN.build()
    opened.load_into(net)
    assert_equal(net.state_dict(), {key: value.float() for key, value in rounded.items()})


def write_original(folder: Path, state: State, **changes: object) -> Path:
    """As Wan-AI publishes, with a VAE and a text encoder beside it."""
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 64, "eps": 1e-06, "ffn_dim": 96}
    config |= {"freq_dim": 32, "in_dim": 4, "model_type": "t2v", "num_heads": 2, "num_layers": 2, "out_dim": 4}
    (folder / "config.json").write_text(json.dumps({**config, "text_len": 512, **changes}))
    for other in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        torch.save({"x": torch.ones(1)}, folder / other)
    return folder


def test_original_folder(state: State, tmp_path: Path) -> None:
    opened = open_published(write_original(tmp_path, state))
    assert (opened.config, opened.layout, opened.notes) == (PLAIN, "original", ())
    assert_equal(opened.tensors, state)
    assert open_published(write_original(tmp_path, state, text_len=77)).config.text_length == 77
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json says into how many heads 64 channels part"):
        open_published(tmp_path)
    assert open_published(tmp_path, heads=2).config == PLAIN


def test_heads_are_assumed_and_said(tmp_path: Path) -> None:
    net = network(WanConfig(dim=256, heads=2, layers=1, ffn=8, channels=4, text_dim=8, freq_dim=8))
    save_file(net.state_dict(), tmp_path / "x.safetensors")
    opened = open_published(tmp_path)
    assert opened.config == net.config and "heads=2 is assumed" in opened.notes[0]
    other = open_published(tmp_path, heads=4)
    assert other.config.heads == 4 and not other.notes
    with pytest.raises(CheckpointError, match="is read as 4 heads, and the network has 2"):
        other.load_into(net)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [("num_layers", 30, "num_layers=30, not 2"), ("eps", 1e-5, "eps=1e-05, not 1e-06"), ("in_dim", 36, "in_dim=36")],
)
def test_a_config_that_contradicts_is_refused(key: str, value: float, shown: str, state: State, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"config.json contradicts .*safetensors beside it: it has {shown}"):
        open_published(write_original(tmp_path, state, **{key: value}))


@pytest.mark.parametrize("limit", ["10GB", "100KB"], ids=["one", "sharded"])
@pytest.mark.parametrize("place", ["transformer", "."], ids=["repository", "folder"])
def test_what_diffusers_saves(place: str, limit: str, tmp_path: Path) -> None:
    theirs = reference(PLAIN)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / place, max_shard_size=limit)  # pyright: ignore[reportCallIssue]
    assert (len(list((tmp_path / place).glob("*.safetensors"))) > 1) == (limit == "100KB")
    opened = open_published(tmp_path)
    assert (opened.config, opened.layout, opened.notes) == (PLAIN, "diffusers", ())
    net = PLAIN.build()
    assert opened.load_into(net) == []
    assert_same_function(net, theirs)


def worldplay(state: State) -> State:
    names = diffusers_names(2)
    return {f"model._fsdp_wrapped_module.{names[key]}": value for key, value in state.items()}


def test_worldplay(seeing: State, tmp_path: Path) -> None:
    """diffusers names, cameras and actions under names of their own, and `generator` is what its authors load."""
    path = tmp_path / "model.pt"
    saved = worldplay(seeing | ACTIONS)
    prefix = "model._fsdp_wrapped_module."
    assert f"{prefix}blocks.1.attn1.to_out_prope.0.bias" in saved
    assert f"{prefix}condition_embedder.action_embedder.linear_2.weight" in saved
    torch.save({"generator": saved, "generator_ema": worldplay(halves(seeing))}, path)
    opened = open_published(path, heads=2)
    assert (opened.weights.role, opened.layout, opened.config) == ("generator", "diffusers", SEEING)
    assert_equal(opened.tensors, seeing | ACTIONS)
    assert sorted(opened.action) == sorted(ACTIONS) and not opened.mismatches()
    net = SEEING.build()
    with pytest.raises(CheckpointError, match=r"4 trained parameters of discrete actions .* drop_action=True"):
        opened.load_into(net)
    dropped = open_published(path, heads=2, drop_action=True)
    assert set(dropped.ignored) == set(ACTIONS) and any("left out" in note for note in dropped.notes)
    assert dropped.load_into(net) == []
    assert_equal(net.state_dict(), seeing)


def test_cameras_may_be_new_and_nothing_else(state: State, seeing: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "plain.safetensors")
    save_file(seeing, tmp_path / "seeing.safetensors")
    plain, cameras = (open_published(tmp_path / f"{name}.safetensors", heads=2) for name in ("plain", "seeing"))
    net = SEEING.build()
    assert sorted(plain.load_into(net)) == sorted(f"blocks.{i}.self_attn.{leaf}" for i in range(2) for leaf in PROPE)
    assert not net.state_dict()["blocks.1.self_attn.prope_o.weight"].any()
    with pytest.raises(CheckpointError, match=r"another architecture than Wan: 4 unexpected: blocks\.0.*prope_o"):
        cameras.load_into(PLAIN.build())
    partial = {key: x for key, x in seeing.items() if key != "blocks.1.self_attn.prope_o.bias"}
    save_file(partial, tmp_path / "seeing.safetensors")
    with pytest.raises(CheckpointError, match=r"than Wan: 1 missing: blocks\.1\.self_attn\.prope_o\.bias"):
        open_published(tmp_path / "seeing.safetensors", heads=2).load_into(net)


def spoilt(state: State, change: str) -> State:
    key = "blocks.1.cross_attn.o.bias"
    match change:
        case "missing":
            return {name: value for name, value in state.items() if name != key}
        case "unexpected":
            return state | {"blocks.1.cross_attn.extra.bias": torch.ones(3)}
        case _:
            return state | {key: torch.ones(63)}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("missing", r"1 missing: blocks\.1\.cross_attn\.o\.bias"),
        ("unexpected", r"1 unexpected: blocks\.1\.cross_attn\.extra\.bias"),
        ("of another shape", r"1 of another shape: blocks\.1\.cross_attn\.o\.bias is \(63,\), not \(64,\)"),
    ],
)
def test_other_weights_are_refused(change: str, problem: str, state: State, tmp_path: Path) -> None:
    save_file(spoilt(state, change), tmp_path / "x.safetensors")
    opened = open_published(tmp_path / "x.safetensors", heads=2)
    assert list(opened.mismatches()) == [change]
    net = PLAIN.build()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"another architecture than Wan: {problem}"):
        opened.load_into(net)
    assert_equal(net.state_dict(), before)
    with pytest.raises(CheckpointError, match=f"is not written, as this is no whole network: {problem}"):
        export(opened.tensors, opened.config, tmp_path / "out", "original")
    assert not (tmp_path / "out").exists()


def test_layouts_are_not_mixed(state: State, tmp_path: Path) -> None:
    save_file(state | {"proj_out.bias": torch.ones(16)}, tmp_path / "x.safetensors")
    assert open_published(tmp_path, heads=2).mismatches() == {"unexpected": ["proj_out.bias"]}
    both = {diffusers_names(2)[key]: value for key, value in state.items()} | {"head.head.bias": torch.ones(16)}
    save_file(both, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="mixes original and diffusers names"):
        open_published(tmp_path, heads=2)


@pytest.mark.parametrize("key", ["img_emb.proj.1.weight", "blocks.0.cross_attn.k_img.weight"])
def test_image_variants_are_named(key: str, state: State, tmp_path: Path) -> None:
    save_file(state | {key: torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"attends to an image \(.*\): such variants are not supported"):
        open_published(tmp_path)


def test_more_channels_in_than_out_are_named(state: State, tmp_path: Path) -> None:
    save_file(state | {"patch_embedding.weight": torch.ones(64, 9, 1, 2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"takes 9 channels in patches of \[1, 2, 2\] and gives 4"):
        open_published(tmp_path, heads=2)


class Malicious:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_a_pickle_cannot_run_code(state: State, tmp_path: Path) -> None:
    path, proof = tmp_path / "x.pt", tmp_path / "proof"
    for zipped in (True, False):
        torch.save({"generator": state, "config": Malicious(proof)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"is not opened: besides tensors it holds \w+\.mkdir") as error:
            open_published(path)
        assert "\n" not in str(error.value) and not proof.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_truncated_files_are_refused(suffix: str, keep: int, state: State, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pt")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"x\.\w+ is damaged.*download it again") as error:
        open_published(path)
    assert "\n" not in str(error.value)


def test_places_without_weights_are_named(state: State, tmp_path: Path) -> None:
    def refused(path: Path, problem: str) -> None:
        with pytest.raises(CheckpointError, match=problem):
            open_published(path)

    refused(tmp_path / "nowhere", "nowhere does not exist")
    refused(tmp_path, r"holds no weights \(\.safetensors \.pt")
    (tmp_path / "README.md").write_text("x")
    refused(tmp_path / "README.md", "is no checkpoint by its name")
    for name in ("a.pt", "b.pt"):
        torch.save([state], tmp_path / name)
    refused(tmp_path, r"several files of weights; name one: a\.pt, b\.pt")
    refused(tmp_path / "a.pt", "holds a list, not tensors by name")
    torch.save({"step": 3}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "holds no tensors, but step")
    write_shards(tmp_path / "x", "model", state, None, 100_000)
    first, *_ = (tmp_path / "x").glob("*.safetensors")
    save_file({"other": torch.ones(1)}, first)
    refused(tmp_path / "x", r"lists \d+ tensors that its files lack")
    first.unlink()
    refused(tmp_path / "x", rf"index\.json lists {first.name}, which is not in .*x; download it too")
    (tmp_path / "x" / "model.safetensors.index.json").write_text("{")
    refused(tmp_path / "x", r"index\.json is not JSON")


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
    with pytest.raises(CheckpointError, match="folder exists; delete it, or give another name"):
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
    assert opened.config == cfg and opened.load_into(cfg.build()) == []
    with pytest.raises(CheckpointError, match="has camera=single, and the network camera=none"):
        opened.load_into(PLAIN.build())
    with pytest.raises(CheckpointError, match="camera=dual, not none"):
        open_published(write_original(tmp_path / "y", state, camera="dual"))


def test_an_interrupted_export_leaves_nothing(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minwm.formats.write_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        export(state, PLAIN, tmp_path / "x", "original")
    assert not list(tmp_path.iterdir())


def test_actions_survive_export(seeing: State, tmp_path: Path) -> None:
    assert len(export(seeing | ACTIONS, SEEING, tmp_path / "x", "diffusers")) == 2
    assert_equal(open_published(tmp_path / "x").tensors, seeing | ACTIONS)
    stored = load_file(tmp_path / "x" / "diffusion_pytorch_model.safetensors")
    assert "condition_embedder.action_embedder.linear_1.bias" in stored


COUNTS = {"wan2.1-1.3b": (825, 1_418_996_800), "wan2.1-14b": (1095, 14_288_491_584)}
COUNTS |= {"wan2.2-ti2v-5b": (825, 4_999_787_712)}


@pytest.mark.parametrize("name", SIZES)
def test_full_sizes_have_the_names_and_shapes_of_the_release(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = SIZES[name].build().state_dict(), reference(SIZES[name]).state_dict()
    names = diffusers_names(SIZES[name].layers)
    assert {names[key]: value.shape for key, value in ours.items()} == {key: x.shape for key, x in theirs.items()}
    assert (len(ours), sum(x.numel() for x in ours.values())) == COUNTS[name]
    assert size_name(replace(SIZES[name], camera="dual")) == name and size_name(PLAIN) is None


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
    assert identify(small.state_dict()) == "a Wan2.1 VAE (diffusers names)"
    assert identify(large.state_dict()) == "a Wan2.2 VAE (diffusers names)"
    assert identify(["conv1.bias", "encoder.downsamples.0.residual.0.gamma"]) == "a Wan2.1 VAE (original names)"
    t5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    assert identify(["shared.weight", t5]) == "a UMT5 text encoder (transformers names)"
    assert identify(["token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"]).startswith("a UMT5")
    assert identify(["encoder.0.weight", "decoder.3.conv.0.weight"]) == "a TAEHV tiny autoencoder"
    assert identify(["double_blocks.0.img_attn_q.weight"]).startswith("a HunyuanVideo-1.5 transformer")
    assert identify(["b", "a"]) == "something unknown (a, b)"


def hollow(path: Path, net: nn.Module) -> Path:
    """A safetensors file of the right size without a single byte of data on the disk."""
    header, end = {}, 0
    for name, x in net.state_dict().items():
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [end, end := end + 4 * x.numel()]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    with torch.device("meta"):
        path = hollow(tmp_path / "x.safetensors", replace(WanConfig(), camera="dual").build())
    assert path.stat().st_size > 5.9e9
    before = resource.getrusage(resource.RUSAGE_SELF)
    opened = open_published(path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt < 10_000  # of 1.5 million pages
    assert opened.config == replace(WanConfig(), camera="dual") and not opened.mismatches()
    assert len(opened.tensors) == 885 and "heads=12 is assumed" in opened.notes[0]


def test_a_file_beyond_memory_is_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        path = hollow(tmp_path / "x.safetensors", nn.Linear(2**20, 2**20))
    with pytest.raises(CheckpointError, match=r"4398\.1 GB, cannot be mapped into the memory of this machine"):
        read_weights(path)


@pytest.mark.parametrize("padding", range(4))
def test_unaligned_and_empty_tensors(padding: int, tmp_path: Path) -> None:
    header = {"a": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [0, 4]}}
    header["b"] = {"dtype": "F32", "shape": [], "data_offsets": [4, 8]}
    header["c"] = {"dtype": "F16", "shape": [0, 3], "data_offsets": [8, 8]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode() + b" " * padding
    data = torch.tensor([1.5, 2]).bfloat16().view(torch.uint8).numpy().tobytes() + struct.pack("<f", 0.1)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    tensors = read_weights(tmp_path).tensors
    assert_equal(tensors, load_file(tmp_path / "x.safetensors"))
    assert tensors["b"] == torch.tensor(0.1) and tensors["c"].shape == (0, 3)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.replace(b'"F16"', b'"U16"') + data)
    with pytest.raises(CheckpointError, match="holds numbers of type U16, which are not supported"):
        read_weights(tmp_path)


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
    assert "4 trained parameters of discrete actions" in shown and "config.heads: 2" in shown
    save_file(spoilt(state, "missing"), tmp_path / "x.safetensors")
    assert run("inspect", tmp_path / "x.safetensors", "--heads", 2) == 0
    assert "tensors missing: blocks.1.cross_attn.o.bias" in capsys.readouterr().out
    torch.save({"encoder.downsamples.0.residual.0.gamma": torch.ones(3)}, tmp_path / "vae.pth")
    assert run("inspect", tmp_path / "vae.pth") == 0
    assert "holds: a Wan2.1 VAE (original names)" in capsys.readouterr().out
    assert run("convert", tmp_path / "vae.pth", tmp_path / "out", "--to", "original") == 2
    assert "is no Wan transformer but a Wan2.1 VAE" in capsys.readouterr().err


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
    codec = CodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1)
    config = ModelConfig(network=SEEING, sampler=FewStep(), codec=codec, motion=Motion(move=1, turn=9, fps=16))
    net = SEEING.build()
    net.load_state_dict(seeing)
    save_model(tmp_path / "model", config, net, codec.build())
    assert run("convert", tmp_path / "model", tmp_path / "out", "--to", "diffusers") == 0
    opened = open_published(tmp_path / "out")
    assert opened.config == SEEING
    assert_equal(opened.tensors, seeing)
    assert run("inspect", tmp_path / "model") == 0
    assert "network.camera: dual" in capsys.readouterr().out
