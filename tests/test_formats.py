"""Whatever was published loads as the same network, and what does not is one clear error."""

import json
import os
import resource
import struct
from collections.abc import Callable
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
    halves,
    load_into,
    network,
    plain_state,
    prefixed,
    reference,
    seeing_state,
    sharded_everywhere,
    spoilt,
    worldplay,
    write_original,
)
from safetensors.torch import load_file, save_file
from torch import nn

from minwm.core.config import UserError
from minwm.core.weights import CheckpointError, read_weights, write_shards
from minwm.families.wan.convert import PROPE, diffusers_names, export
from minwm.families.wan.transformer import WanConfig
from minwm.store.layouts import open_published

state = pytest.fixture(plain_state, scope="module")
seeing = pytest.fixture(seeing_state, scope="module")
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
    assert load_into(opened, net) == []
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
    load_into(opened, net)
    assert_equal(net.state_dict(), {key: value.float() for key, value in rounded.items()})


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
    assert load_into(opened, net) == []
    assert_same_function(net, theirs)


def test_worldplay(seeing: State, tmp_path: Path) -> None:
    """diffusers names, cameras and actions under names of their own, and `generator` is what its authors load."""
    path = tmp_path / "model.pt"
    saved = worldplay(seeing | ACTIONS)
    prefix = "model._fsdp_wrapped_module."
    assert f"{prefix}blocks.1.attn1.to_out_prope.0.bias" in saved
    assert f"{prefix}condition_embedder.action_embedder.linear_2.weight" in saved
    torch.save({"generator": saved, "generator_ema": worldplay(halves(seeing))}, path)
    opened = open_published(path, heads=2)
    assert (opened.weights.role, opened.layout) == ("generator", "diffusers")
    assert opened.config == replace(SEEING, actions=True)
    assert_equal(opened.tensors, seeing | ACTIONS)
    assert not opened.mismatches()
    net = SEEING.build()
    dropped = open_published(path, heads=2, drop_action=True)
    assert set(dropped.ignored) == set(ACTIONS) and any("left out" in note for note in dropped.notes)
    assert load_into(dropped, net) == []
    assert_equal(net.state_dict(), seeing)


def test_cameras_may_be_new_and_nothing_else(state: State, seeing: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "plain.safetensors")
    save_file(seeing, tmp_path / "seeing.safetensors")
    plain, cameras = (open_published(tmp_path / f"{name}.safetensors", heads=2) for name in ("plain", "seeing"))
    net = SEEING.build()
    assert sorted(load_into(plain, net)) == sorted(f"blocks.{i}.self_attn.{leaf}" for i in range(2) for leaf in PROPE)
    assert not net.state_dict()["blocks.1.self_attn.prope_o.weight"].any()
    with pytest.raises(CheckpointError, match=r"another architecture than Wan: 4 unexpected: blocks\.0.*prope_o"):
        load_into(cameras, PLAIN.build())
    partial = {key: x for key, x in seeing.items() if key != "blocks.1.self_attn.prope_o.bias"}
    save_file(partial, tmp_path / "seeing.safetensors")
    with pytest.raises(CheckpointError, match=r"than Wan: 1 missing: blocks\.1\.self_attn\.prope_o\.bias"):
        load_into(open_published(tmp_path / "seeing.safetensors", heads=2), net)


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
        load_into(opened, net)
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
        with pytest.raises(UserError, match=problem):
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
