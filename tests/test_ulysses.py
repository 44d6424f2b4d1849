"""Two processes that share one stream make what one makes."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

SCRIPT = """
import copy
import os
from itertools import product

import torch
import torch.distributed as dist
from contracts.backbones import SMALL, condition, latents, sized, small
from minwm.nets.attention import FULL, Masked, chunk_causal
from minwm.nets.chunks import Geometry
from minwm.nets.ulysses import Ulysses
from minwm.stream.rollout import Stream
from minwm.stream.solvers import AutoregressiveSampler, FewStepSampler

torch.set_num_threads(1)
other = os.fork()  # after the imports, which take longer than the rest
meeting = "file://" + os.environ["MEETING"]
dist.init_process_group("gloo", init_method=meeting, rank=int(other > 0), world_size=2)
geometry = Geometry(tokens=6, chunk=2, first_chunk=1, window=2, sink=1, rolling_sink=True)

@torch.no_grad()
def walk(net, sampler):
    cond = condition(geometry.start(8), batch=1)
    cond.w2c[:, :, :3, 3] += torch.arange(geometry.start(8))[:, None] * torch.tensor([0.3, 0.1, 0.5])
    stream, made = Stream(net, cond, sized(net, geometry), sampler.guidance, reach=1.0), []
    for i in range(8):
        a, b = geometry.start(i), geometry.start(i + 1)
        bound = stream.prepare_chunk(cond.frames(a, b))
        noise = torch.randn(2, 1, b - a, 4, 4, 6, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        made.append(stream.next_chunk(bound, noise, sampler))
        stream.update_cache(bound, made[-1])
    assert stream.sink_shift and not torch.equal(stream.origin[0], torch.eye(4).double())
    return torch.cat(made, 1), stream.arena.kv.numel()

for name in ("hunyuan-none", "hunyuan-null", "wan-none", "wan-dual", "wan-single", "wan-actions"):
    net = small(name)
    for sampler in (FewStepSampler(steps=2), AutoregressiveSampler(steps=2, guidance=2.0)):
        (one, whole), (both, half) = walk(net, sampler), walk(Ulysses(net, dist.group.WORLD), sampler)
        torch.testing.assert_close(both, one, atol=1e-5, rtol=1e-5)  # norms are float32 whatever the network
        assert 2 * half == whole
for net in map(small, SMALL):
    for image, scope in product((False, True), (FULL, Masked(chunk_causal(geometry), 3))):
        cond, x, t = condition(3, batch=1, image=image), latents(3, 1), torch.tensor([[0.1, 0.5, 0.9]])
        one, both = net, Ulysses(copy.deepcopy(net), dist.group.WORLD)
        v, v_both = one(x, t, cond, scope), both(x, t, cond, scope)
        torch.testing.assert_close(v_both, v, atol=1e-5, rtol=1e-5)
        for out in (v, v_both):
            out.square().mean().backward()
        for whole, part in zip(one.parameters(), both.parameters(), strict=True):
            if whole.grad is not None:
                dist.all_reduce(part.grad)
                torch.testing.assert_close(part.grad / 2, whole.grad, atol=1e-5, rtol=1e-5)
        net.zero_grad()
dist.destroy_process_group()
if other:
    assert os.waitpid(other, 0)[1] == 0
"""


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Every camera mode, text of either kind, guidance or none, a full ring, a cache that moves, sinks that roll."""
    command, folder = [sys.executable, "-c", textwrap.dedent(SCRIPT)], Path(__file__).parent
    meeting = {"MEETING": str(tmp_path / "meeting")}
    subprocess.run(command, cwd=folder, env={**os.environ, **meeting}, check=True, timeout=300)
