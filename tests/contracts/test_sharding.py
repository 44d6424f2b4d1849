"""FSDP2 sees every use of a parameter: sharded networks train and stream as whole ones do."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from contracts.backbones import SMALL, condition, latents, sized, small
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from minwm.nets.backbone import Backbone, Context, teacher_forced
from minwm.nets.chunks import Geometry
from minwm.stream.rollout import sample_noise, self_rollout
from minwm.stream.solvers import FewStepSampler

GEOMETRY = Geometry(tokens=6, chunk=2, first_chunk=1)
SAMPLER = FewStepSampler(steps=3, timesteps=(1.0, 0.9, 0.6))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(net: Backbone) -> Backbone:
    """A copy with every block, and the rest, sharded over one process: parameters are whole only inside of hooks."""
    net, mesh = copy.deepcopy(net), init_device_mesh("cpu", (1,))
    methods = list(net.forward_methods())
    for blocks in net.children():
        for block in blocks if isinstance(blocks, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for module, name in methods:
        register_fsdp_forward_method(module, name)
    return net


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("one_process")
def test_a_sharded_network_is_the_whole_one(name: str) -> None:
    """Teacher forcing, and a self-rollout with gradient at one step: outputs and gradients."""
    whole = small(name)
    geometry = sized(whole, GEOMETRY)
    found = []
    for net in (whole, sharded(whole)):
        clip, cond, noisy = latents(5), condition(5, image=True), latents(5, seed=1)
        t = torch.full((2, 5), 0.7, dtype=torch.float64)
        v = teacher_forced(net, Context(clip, 0 * t), noisy, t, cond, geometry)
        noise = sample_noise((2, *clip.shape[1:]), SAMPLER.steps, clip, torch.Generator().manual_seed(0))
        _, x0 = self_rollout(net, noise, cond, geometry, SAMPLER, exit_step=1)
        (v.square().mean() + x0.square().mean()).backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        found.append([v.detach(), x0.detach(), *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b.full_tensor() if isinstance(b, DTensor) else b, a)
