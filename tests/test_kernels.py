"""The Triton kernel equals its plain form; on a CPU triton interprets it."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from contracts.backbones import small

from minwm.core.config import ConfigError

SCRIPT = """
import torch
from contracts.backbones import condition, small
from minwm.nets.chunks import Geometry
from minwm.stream.accelerate import EngineConfig, prepare_network
from minwm.stream.rollout import Stream
from minwm.stream.solvers import AutoregressiveSampler

geometry = Geometry(tokens=6, chunk=2, first_chunk=1, window=2, sink=1)
device = "cuda" if torch.cuda.is_available() else "cpu"

@torch.no_grad()
def walk(net):
    cond = condition(geometry.start(6), batch=2).to(device)
    cond.w2c[..., :3, 3] += 1.0
    stream, made = Stream(net, cond, geometry, 2.0), []
    for i in range(6):
        a, b = geometry.start(i), geometry.start(i + 1)
        bound = stream.prepare_chunk(cond.frames(a, b))
        noise = torch.randn(1, 2, b - a, 4, 4, 6, generator=torch.Generator().manual_seed(i)).to(device)
        made.append(stream.next_chunk(bound, noise, AutoregressiveSampler(steps=1, guidance=2.0)))
        stream.update_cache(bound, made[-1])
    return torch.cat(made, 1), stream.arena.kv

net = small("wan-dual").float().to(device)
plain = walk(net)
prepare_network(EngineConfig(kernels=True), net, geometry)
assert net.blocks[0].self_attn.kernel
for with_kernel, without in zip(walk(net), plain, strict=True):
    torch.testing.assert_close(with_kernel, without, atol=2e-5, rtol=2e-5)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (minwm[fast])")
def test_a_stream_with_the_kernel_equals_the_plain_one() -> None:
    """Two clips with guidance, heads of 24, six chunks past a full ring: pictures and every row of the arena."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command, folder = [sys.executable, "-c", textwrap.dedent(SCRIPT)], Path(__file__).parent
    subprocess.run(command, check=True, cwd=folder, env=environment)


def test_the_kernel_is_for_stacked_branches() -> None:
    with pytest.raises(ConfigError, match="for camera=dual"):
        small("wan-none").use_kernels()
