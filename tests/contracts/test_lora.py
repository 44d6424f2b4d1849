"""LoRA: additions that start at nothing, and PEFT's files, read and written as PEFT itself does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import SMALL, condition, latents, small
from commands import error_line, run
from recipes import MODEL
from torch import nn

from minwm.core.config import ConfigError
from minwm.core.weights import CheckpointError, load_safetensors, write_safetensors
from minwm.nets.attention import FULL
from minwm.nets.lora import LoraConfig, copy_network
from minwm.store.adapter import Adapter, load_adapter, save_adapter
from minwm.store.folder import save_model
from minwm.store.layouts import open_published

CAMERA_BRANCH = {"wan": "prope_o", "hunyuan": "img_attn_prope_proj"}


def adapted(name: str, **changes: object) -> tuple[nn.Module, nn.Module, LoraConfig]:
    """A network, a copy with additions on the same base, and their config."""
    cfg = LoraConfig(**{"rank": 4, "alpha": 8.0, **changes})  # pyright: ignore[reportArgumentType]
    base = small(name).requires_grad_(False)
    return base, cfg.add_to(copy_network(base)), cfg


def trained(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def moved(net: nn.Module) -> nn.Module:
    """As if it had been trained."""
    torch.manual_seed(5)
    for parameter in trained(net).values():
        nn.init.normal_(parameter, std=0.2)
    return net


@pytest.mark.parametrize("name", SMALL)
def test_an_adapted_network_is_its_base_to_the_bit(name: str) -> None:
    base, net, _ = adapted(name)
    x, t, cond = latents(3), torch.full((2, 3), 0.4, dtype=torch.float64), condition(3, image=True)
    assert torch.equal(net(x, t, cond, FULL), base(x, t, cond, FULL))
    with torch.no_grad():
        assert torch.equal(net(x, t, cond, FULL), base(x, t, cond, FULL))


@pytest.mark.parametrize("name", ["wan-dual", "hunyuan-dual"])
def test_only_additions_are_trained_and_kept(name: str) -> None:
    branch = CAMERA_BRANCH[name.partition("-")[0]]
    base, net, _ = adapted(name, whole=(branch,))
    x, t, cond = latents(3), torch.full((2, 3), 0.4, dtype=torch.float64), condition(3, image=True)
    net(x, t, cond, FULL).square().mean().backward()
    found = trained(net)
    assert found.keys() == net.state_dict().keys()
    assert all(".lora_" in key or branch in key for key in found)
    assert any(p.grad is not None and p.grad.any() for key, p in found.items() if key.endswith("lora_B.weight"))
    shared = dict(base.named_parameters())
    frozen = {key: p for key, p in net.named_parameters() if not p.requires_grad}
    assert all(p is shared[key] and p.grad is None for key, p in frozen.items())
    again = dict(copy_network(net).named_parameters())
    assert all((again[key] is p) != p.requires_grad for key, p in net.named_parameters())


@pytest.mark.parametrize("name", ["wan-none", "wan-dual", "hunyuan-none", "hunyuan-dual"])
@pytest.mark.parametrize("targets", [(), ("q", "attn_q", "attn_k", "ffn.0", "cross_attn.v", "prope_o", "mlp.fc2")])
def test_merged_is_adapted(name: str, targets: tuple[str, ...]) -> None:
    base, net, cfg = adapted(name, targets=tuple(t for t in targets if f".{t}." in " ".join(small(name).state_dict())))
    moved(net)
    merged = small(name)
    merged.load_state_dict(Adapter(cfg, "", net.state_dict()).merge_into(base.state_dict()))
    x, t, cond = latents(3), torch.full((2, 3), 0.4, dtype=torch.float64), condition(3, image=True)
    v, before = net(x, t, cond, FULL), base(x, t, cond, FULL)
    assert (v - before).abs().max() > 1e-3
    torch.testing.assert_close(merged(x, t, cond, FULL), v)
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, cond, FULL), v)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["wan-dual", "hunyuan-dual"])
def test_peft_merges_our_files_as_we_do_and_we_its(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    branch = CAMERA_BRANCH[name.partition("-")[0]]
    base, net, cfg = adapted(name, whole=(branch,))
    ours = Adapter(
        LoraConfig(rank=cfg.rank, alpha=cfg.alpha, targets=tuple(cfg.target_names(base)), whole=cfg.whole),
        "base",
        moved(net).state_dict(),
    )
    save_adapter(tmp_path / "ours", ours)
    theirs: Any = peft.PeftModel.from_pretrained(small(name), str(tmp_path / "ours"))
    merged = theirs.merge_and_unload().state_dict()
    found = load_adapter(tmp_path / "ours")
    assert found.config == ours.config and found.base == "base"
    expected = found.merge_into(base.state_dict())
    assert merged.keys() == expected.keys()
    for key, tensor in merged.items():
        torch.testing.assert_close(expected[key], tensor, rtol=1e-6, atol=1e-6, msg=key)

    given = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q", "attn_q", "fc1", "ffn.2"], modules_to_save=[branch])
    made: Any = moved(peft.get_peft_model(small(name), given))
    made.save_pretrained(tmp_path / "theirs")
    expected = load_adapter(tmp_path / "theirs").merge_into(base.state_dict())
    for key, tensor in made.merge_and_unload().state_dict().items():
        torch.testing.assert_close(expected[key], tensor, rtol=1e-6, atol=1e-6, msg=key)


def test_convert_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Into a model folder, and on the way to another layout."""
    base, net, cfg = adapted("wan-dual")
    lora = Adapter(
        LoraConfig(rank=4, alpha=8.0, targets=tuple(cfg.target_names(base))), "base", moved(net).state_dict()
    )
    save_adapter(tmp_path / "lora", lora)
    save_model(tmp_path / "base", MODEL, base, MODEL.codec.build())
    expected = lora.merge_into(base.state_dict())
    assert run("convert", tmp_path / "base", tmp_path / "merged", "--to", "minwm", "--adapter", tmp_path / "lora") == 0
    assert run("convert", tmp_path / "base", tmp_path / "x", "--to", "diffusers", "--adapter", tmp_path / "lora") == 0
    found = load_safetensors(tmp_path / "merged" / "model.safetensors")
    assert open_published(tmp_path / "x").tensors.keys() == found.keys() == expected.keys()
    for tensors in (found, open_published(tmp_path / "x").tensors):
        for key, tensor in expected.items():
            torch.testing.assert_close(tensors[key], tensor.float(), msg=key)
    assert run("convert", tmp_path / "base", tmp_path / "again", "--to", "minwm") == 2
    assert "is a model folder already" in error_line(capsys)()


def test_what_fits_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora.targets=attn_q: no such module in Wan; its linears: .*self_attn.q"):
        adapted("wan-dual", targets=("attn_q",))
    with pytest.raises(ConfigError, match=r"lora\.rank=0: must be more than 0"):
        LoraConfig(rank=0)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        load_adapter(tmp_path)
    _, net, _ = adapted("wan-dual")
    save_adapter(tmp_path, Adapter(LoraConfig(rank=4, targets=("q",)), "base", net.state_dict()))
    with pytest.raises(ConfigError, match=r"of another base: blocks\.0.* is not there"):
        load_adapter(tmp_path).merge_into(small("hunyuan-dual").state_dict())
    tensors = load_safetensors(tmp_path / "adapter_model.safetensors")
    write_safetensors(tmp_path / "adapter_model.safetensors", {key: x for key, x in tensors.items() if "lora_A" in key})
    with pytest.raises(CheckpointError, match=r"lora_A.weight without .*lora_B.weight"):
        load_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora=True is no plain LoRA"):
        load_adapter(tmp_path)
