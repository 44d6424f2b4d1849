"""LoRA through the stages of a project: adapters on one base, from stage to stage, and the model that each makes."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from projects import MODEL, trained_once
from torch import nn

from minwm.core.config import ConfigError, from_dict
from minwm.core.files import read_json
from minwm.core.weights import load_safetensors
from minwm.nets.lora import LoraConfig
from minwm.recipes.dmd import DmdConfig
from minwm.store.adapter import load_adapter
from minwm.store.folder import load_model, save_model
from minwm.train.build import train
from minwm.train.config import Init, OptimConfig, Run
from minwm.train.doctor import examine
from minwm.train.loop import Trainer
from minwm.train.parallel import Parallel
from minwm.train.roles import adapt_role, build_recipe, load_role

LORA = LoraConfig(rank=2, whole=("prope_o",))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A camera stage on a base that has no camera branch."""
    project = trained_once(tmp_path_factory)
    run = from_dict(Run, read_json(project / "camera" / "run.json")["run"])
    model = load_model(project / "camera")
    config, plain = replace(model.config, network=replace(model.config.network, camera="none")), model.net.state_dict()
    net = config.network.build()
    net.load_state_dict({name: x for name, x in plain.items() if "prope_o" not in name})
    base = tmp_path_factory.mktemp("base")
    save_model(base, config, net, model.codec)
    return replace(run, lora=LORA, init=replace(run.init, student=str(base)), steps=2, optim=OptimConfig(lr=0.1))


def loaded(run: Run) -> Any:
    return build_recipe(run, partial(load_role, run, CPU), partial(adapt_role, run))


@torch.no_grad()
def velocity(net: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    clip = DmdConfig().example_batch(MODEL, 1)
    return net(clip.latents, torch.full((1, MODEL.latents), 0.5), clip.cond)


def test_stages_add_to_one_base(run: Run, tmp_path: Path) -> None:
    """Camera, then DMD: its student and critic go on from the camera stage, of which the real score stays."""
    camera, base = tmp_path / "camera", str(run.init.student)
    train(run, camera)
    made = load_adapter(camera / "adapter")
    assert made.base == base and "self_attn.q" in made.config.targets and made.config.whole == ("prope_o",)
    assert any("prope_o.weight" in name and x.any() for name, x in made.tensors.items())
    start = load_safetensors(Path(base) / "model.safetensors")
    merged = load_model(camera).net.state_dict()
    assert torch.equal(merged["blocks.0.norm3.weight"], start["blocks.0.norm3.weight"])
    assert not torch.equal(merged["blocks.0.ffn.0.weight"], start["blocks.0.ffn.0.weight"])

    init = Init(student=str(camera), critic=str(camera), real=str(camera), codec=run.init.codec)
    dmd = replace(run, name="dmd", model=MODEL, recipe=DmdConfig(critic_updates=1), init=init)
    expected, recipe = velocity(load_model(camera).net), loaded(dmd)
    for net in recipe.networks.values():
        torch.testing.assert_close(velocity(net), expected)
    trainer = Trainer(dmd, recipe, Parallel(dmd.parallel, CPU))
    networks = [*recipe.networks.values(), trainer.ema.net]
    frozen = {p for p in recipe.networks["student"].parameters() if not p.requires_grad}
    assert all(len(frozen.intersection(net.parameters())) == len(frozen) for net in networks)
    train(dmd, tmp_path / "dmd")
    last = load_adapter(tmp_path / "dmd" / "adapter")
    assert last.base == base and not torch.equal(*(x.tensors["blocks.0.ffn.0.lora_B.weight"] for x in (last, made)))
    assert not [verdict for verdict in examine(tmp_path / "dmd") if verdict.name == "weights not moving"]


def test_what_shares_no_base_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the base has no blocks\.0\.self_attn\.prope_o\.bias.*lora\.whole"):
        train(replace(run, lora=LoraConfig(rank=2)), tmp_path / "a")
    train(replace(run, steps=1), tmp_path / "camera")
    camera = str(tmp_path / "camera")
    other = str(Path(str(run.init.codec)).parent / "camera")
    init = Init(student=camera, critic=camera, real=other, codec=run.init.codec)
    with pytest.raises(ConfigError, match=r"share one base, but .*init\.real=.* is on "):
        loaded(replace(run, model=MODEL, recipe=DmdConfig(), init=init))
    with pytest.raises(ConfigError, match=r"was trained with LoraConfig\(rank=2.*; go on with the same"):
        loaded(replace(run, init=replace(init, student=camera), lora=replace(LORA, rank=4)))
    with pytest.raises(ConfigError, match=r"init\.real names no model folder, which LoRA needs"):
        loaded(replace(run, model=MODEL, recipe=DmdConfig(), init=replace(init, real=None)))
