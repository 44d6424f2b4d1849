"""What is saved is what is loaded, and nothing wrong is loaded silently."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minwm.cameras.trajectory import Motion
from minwm.core.config import ConfigError, UserError
from minwm.core.types import Condition
from minwm.core.weights import CheckpointError
from minwm.families.wan.convert import CAMERA_PARAMETERS
from minwm.families.wan.transformer import WanConfig
from minwm.nets.chunks import StreamConfig
from minwm.nets.small_codec import SmallCodec, SmallCodecConfig
from minwm.nets.text import WordText
from minwm.store.folder import load_codec, load_model, load_weights, save_codec, save_model
from minwm.store.model import Model, ModelConfig
from minwm.stream.solvers import AutoregressiveSampler, BidirectionalSampler, FewStepSampler, Sampler
from minwm.train.state import States

CONFIG = ModelConfig(
    network=WanConfig(
        dim=32, heads=2, layers=2, ffn=48, channels=4, text_dim=8, text_length=24, freq_dim=8, camera="dual"
    ),
    sampler=FewStepSampler(steps=2),
    codec=SmallCodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1),
    motion=Motion(move=0.5, turn=24.0, fps=16.0),
    stream=StreamConfig(chunk=2, first_chunk=1),
    text=WordText(dim=8),
    height=32,
    width=32,
)
PLAIN = replace(CONFIG.network, camera="none")


@pytest.fixture
def model() -> Model:
    """With random statistics in the codec, which are buffers and no parameters."""
    codec = CONFIG.codec.build()
    assert isinstance(codec, SmallCodec)
    codec.mean.normal_()
    codec.std.uniform_(0.5, 1.5)
    net = CONFIG.network.build()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Model(CONFIG, net, codec)


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    save_model(tmp_path, model.config, model.net, model.codec)
    return tmp_path


@torch.no_grad()
def test_round_trip(model: Model, saved: Path) -> None:
    loaded = load_model(saved)
    assert loaded.config == CONFIG
    for name in ("net", "codec"):
        before, after = getattr(model, name).state_dict(), getattr(loaded, name)
        assert before.keys() == after.state_dict().keys()
        assert all(torch.equal(before[key], value) for key, value in after.state_dict().items())
        assert not after.training and not any(p.requires_grad for p in after.parameters())
    x, t = torch.randn(CONFIG.latent_shape(1, 2)), torch.rand(1, 2)
    cond = Condition(CONFIG.text.encode(["a room"])["text"], torch.eye(4).expand(1, 2, 4, 4), torch.ones(1, 2, 4) / 2)
    assert torch.equal(model.net(x, t, cond), loaded.net(x, t, cond))
    assert torch.equal(model.codec.decode(x), loaded.codec.decode(x))


@pytest.mark.parametrize(
    "sampler",
    [BidirectionalSampler(guidance=1.5), AutoregressiveSampler(steps=7), FewStepSampler(steps=3)],
    ids=lambda s: s.kind,
)
def test_the_config_says_everything(model: Model, tmp_path: Path, sampler: Sampler) -> None:
    config = replace(
        CONFIG,
        sampler=sampler,
        motion=Motion(move=0.1, turn=9.0, fps=8.0),
        stream=StreamConfig(window=3),
        focal=(0.6, 0.7),
    )
    save_model(tmp_path, config, model.net, model.codec)
    assert load_model(tmp_path).config == config


def test_codec_round_trip(model: Model, tmp_path: Path) -> None:
    assert isinstance(model.codec, SmallCodec)
    save_codec(tmp_path, model.codec)
    pixels = torch.rand(1, 5, 3, 32, 32)
    assert torch.equal(load_codec(tmp_path).encode(pixels), model.codec.encode(pixels))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no model \(no model\.json\)"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="holds no codec"):
        load_codec(tmp_path)


def test_weights_that_are_gone_are_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        load_model(saved)


def test_an_interrupted_save_is_no_model(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("minwm.store.folder.write_text", stopped)
        save_model(tmp_path, CONFIG, model.net, model.codec)
    with pytest.raises(CheckpointError, match="holds no model"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(saved: Path, keep: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_model(saved)


def test_another_architecture_is_refused_with_its_keys(saved: Path) -> None:
    path = saved / "model.safetensors"
    deeper = replace(CONFIG.network, layers=3).build()
    with pytest.raises(CheckpointError, match=r"another architecture than Wan: 29 missing: blocks\.2\.cross_attn"):
        load_weights(deeper, path)
    shallower = replace(CONFIG.network, layers=1).build()
    with pytest.raises(CheckpointError, match=r"29 unexpected: blocks\.1\."):
        load_weights(shallower, path)
    wider = replace(CONFIG.network, ffn=56).build()
    with pytest.raises(CheckpointError, match=r"of another shape: blocks\.0\.ffn\.0\.\w+ is \(48.*, not \(56"):
        load_weights(wider, path)


def test_a_refused_checkpoint_changes_nothing(saved: Path) -> None:
    net = replace(CONFIG.network, ffn=56).build()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(CheckpointError):
        load_weights(net, saved / "model.safetensors")
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def test_only_the_camera_branch_may_be_new_and_it_is_listed(tmp_path: Path) -> None:
    path, plain = tmp_path / "model.safetensors", PLAIN.build()
    save_file(plain.state_dict(), path)
    net = CONFIG.network.build()
    new = load_weights(net, path, allow_missing=CAMERA_PARAMETERS)
    assert new == [f"blocks.{i}.self_attn.prope_o.{part}" for i in range(2) for part in ("bias", "weight")]
    assert all(net.state_dict()[key].abs().max() == 0 for key in new)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in plain.state_dict().items())
    with pytest.raises(CheckpointError, match=r"4 missing: blocks\.0\.self_attn\.prope_o\.bias"):
        load_weights(net, path)
    lacking = {key: value for key, value in plain.state_dict().items() if not key.startswith("head.")}
    save_file(lacking, path)
    with pytest.raises(CheckpointError, match=r"3 missing: head\.head\.bias"):
        load_weights(net, path, allow_missing=CAMERA_PARAMETERS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_load_into_float32(saved: Path, model: Model, dtype: torch.dtype) -> None:
    path = saved / "model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
    net = load_model(saved).net
    for key, value in net.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.net.state_dict()[key].to(dtype).float())


def test_a_misspelt_config_is_refused(saved: Path) -> None:
    path = saved / "model.json"
    path.write_text(path.read_text().replace('"chunk"', '"chunks"'))
    with pytest.raises(ConfigError, match="did you mean 'chunk'"):
        load_model(saved)


def test_training_states_restore_everything(tmp_path: Path) -> None:
    def fresh(seed: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        net = nn.Linear(3, 2)
        return net, torch.optim.AdamW(net.parameters(), 0.1)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        net(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, states = fresh(1), States(tmp_path)
    assert states.latest() is None
    step(*one)
    states.save(1, {"student": one[0]}, [one[1]], {"seconds": 1.5, "data": {"position": 3}})
    two = fresh(2)
    assert states.load(1, {"student": two[0]}, [two[1]])["data"] == {"position": 3}
    for part in (one, two):
        step(*part)
    assert torch.equal(one[0].weight, two[0].weight)
    states.save(2, {"student": one[0]}, [one[1]], {"seconds": 2.0, "data": {}})
    assert states.latest() == 2 and [path.name for path in (tmp_path / "state").iterdir()] == ["000002"]
    States(tmp_path, keep=2).save(3, {"student": one[0]}, [one[1]], {"seconds": 3.0, "data": {}})
    assert states.steps() == [2, 3]
    part = tmp_path / "state" / "000003" / "__0_0.distcp"
    damaged = bytearray(part.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    part.write_bytes(damaged)
    with pytest.raises(UserError, match=r"000003 is damaged; delete it.* \(__0_0.distcp: another\)"):
        states.load(3, {"student": two[0]}, [two[1]])
    part.unlink()
    with pytest.raises(UserError, match=r"__0_0.distcp: gone"):
        states.load(3, {"student": two[0]}, [two[1]])
