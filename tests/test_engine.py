"""The engine: what it does not do on the way, and that each of its fast forms equals the plain one."""

import time
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from compiling import run_script, traced
from contracts.backbones import CHANNELS, HEIGHT, WIDTH, condition, sized, small
from plain import PlainStream
from torch.utils._python_dispatch import TorchDispatchMode

from minwm.core.config import ConfigError
from minwm.core.memory import MemoryMeter
from minwm.core.types import Condition
from minwm.families.wan.transformer import Wan
from minwm.nets.attention import Cached
from minwm.nets.chunks import Geometry
from minwm.stream.accelerate import (
    EngineConfig,
    GraphedStream,
    KernelTimes,
    attention_kernel,
    open_stream,
    time_attention_kernels,
    warm_up,
)
from minwm.stream.rollout import Stream
from minwm.stream.solvers import AutoregressiveSampler, FewStepSampler

RING = Geometry(tokens=6, chunk=2, first_chunk=1, window=2, sink=1)
GUIDED = AutoregressiveSampler(steps=2, guidance=3.0, solver="euler")


def noise_of(frames: int, seed: int, draws: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(draws, 1, frames, CHANNELS, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)


def walk(stream: Stream, cond: Condition, chunks: int, sampler: Any) -> list[torch.Tensor]:
    made = []
    for i in range(chunks):
        a, b = stream.geometry.start(i), stream.geometry.start(i + 1)
        bound = stream.prepare_chunk(cond.frames(a, b))
        noise = noise_of(b - a, i)
        made.append(stream.next_chunk(bound, noise, sampler))
        stream.update_cache(bound, made[-1], noise[-1])
    return made


class Names(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan-none", "wan-dual"])
def test_a_chunk_joins_clones_and_reads_nothing(name: str) -> None:
    """Nor does it run more operators than it has to: a budget per layer and per pass."""
    net, cond, noise = small(name).float(), condition(9, batch=1), noise_of(2, 0).float()
    stream, sampler = Stream(net, cond, RING), FewStepSampler(steps=2)
    walk(stream, cond, 4, sampler)
    bound = stream.prepare_chunk(cond.frames(7, 9))
    bound = replace(bound, rope=net.rope_table(noise[0], Cached(stream.arena, stream.chunk)))
    with Names() as ran:
        x = stream.next_chunk(bound, noise, sampler)
        stream.update_cache(bound, x)
    assert not {"cat", "clone", "_local_scalar_dense", "stack", "index_select"} & ran.counts.keys()
    passes, layers = 3, 2
    views = {"view", "transpose", "t", "select", "unsqueeze", "slice", "split", "expand", "permute", "alias", "detach"}
    views |= {"_unsafe_view", "view_as_complex", "view_as_real", "unbind", "as_strided", "split_with_sizes"}
    kernels = sum(count for op, count in ran.counts.items() if op not in views and "view" not in op)
    assert kernels <= passes * (layers * 56 + 16), ran.counts.most_common()


@torch.no_grad()
def test_memory_stays_where_it_is_over_fifty_chunks() -> None:
    cond = condition(2, batch=1)
    stream, sampler = Stream(small("wan-dual"), cond, replace(RING, first_chunk=None)), FewStepSampler(steps=2)
    pointer, live = stream.arena.kv.data_ptr(), []
    with MemoryMeter() as memory:
        for i in range(50):
            bound = stream.prepare_chunk(cond)
            stream.update_cache(bound, stream.next_chunk(bound, noise_of(2, i), sampler))
            live.append(memory.live)
    assert stream.arena.kv.data_ptr() == pointer
    assert len(set(live[25:])) == 1, live


@torch.no_grad()
def test_chunk_500_takes_no_longer_than_chunk_10() -> None:
    """Fifty chunks from each, interleaved, so that a busy machine slows both; the medians may differ by a quarter."""
    cond = condition(2, batch=1)
    geometry = replace(RING, first_chunk=None, rolling_sink=True)
    early, late = (Stream(small("wan-dual"), cond, geometry) for _ in range(2))
    times: dict[int, list[float]] = {0: [], 1: []}
    for i in range(550):
        for which, stream in enumerate((early, late)):
            if which == 0 and i < 500:
                continue
            start = time.perf_counter()
            bound = stream.prepare_chunk(cond)
            stream.update_cache(bound, stream.next_chunk(bound, noise_of(2, i), FewStepSampler(steps=1)))
            if i >= 500 and early.chunk > 10:
                times[which].append(time.perf_counter() - start)
    young, old = (sorted(x)[len(x) // 2] for x in times.values())
    assert old < 1.25 * young, (young, old)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "sampler", "level"),
    [
        ("wan-dual", FewStepSampler(steps=2), 0.3),
        ("wan-single", FewStepSampler(steps=1), 0.0),
        ("wan-none", GUIDED, 0.0),
        ("hunyuan-dual", GUIDED, 0.3),
    ],
)
def test_replayed_chunks_equal_plain_ones_and_are_recorded_once_per_regime(
    name: str, sampler: Any, level: float
) -> None:
    chunks = RING.distinct_graph_shapes + 3
    cond = condition(RING.start(chunks), batch=1)
    net = small(name)
    geometry = replace(sized(net, RING), context_noise=level)
    plain = Stream(net, cond, geometry, sampler.guidance)
    graphed = GraphedStream(net, cond, geometry, sampler.guidance, capture=traced)
    for a, b in zip(*(walk(s, cond, chunks, sampler) for s in (plain, graphed)), strict=True):
        torch.testing.assert_close(a, b)
    assert len(graphed.recorded) == 2 * RING.distinct_graph_shapes  # making a chunk, and committing it
    graphed.restart(replace(cond, text=cond.text.flip(1)))
    plain = Stream(net, replace(cond, text=cond.text.flip(1)), geometry, sampler.guidance)
    for a, b in zip(*(walk(s, cond, 6, sampler) for s in (plain, graphed)), strict=True):
        torch.testing.assert_close(a, b)
    assert len(graphed.recorded) == 2 * RING.distinct_graph_shapes


@torch.no_grad()
def test_a_recorded_stream_starts_from_another_image() -> None:
    """The image is an input of the graph of its chunk, and no constant."""
    geometry, sampler = replace(RING, first_chunk=2, image_start=True), FewStepSampler(steps=1)
    cond, recorded = condition(geometry.start(2), batch=1, image=True), set[Any]()
    graphed = GraphedStream(small("wan-none"), cond, geometry, capture=lambda function, _: function)
    assert cond.first_latent is not None
    for image in (cond.first_latent, -cond.first_latent):
        one = replace(cond, first_latents=image)
        graphed.restart(one)
        plain = Stream(graphed.net, one, geometry)
        for a, b in zip(*(walk(s, one, 2, sampler) for s in (plain, graphed)), strict=True):
            torch.testing.assert_close(a, b)
        assert not recorded or recorded == set(graphed.recorded)
        recorded = set(graphed.recorded)


@torch.no_grad()
@pytest.mark.parametrize("level", [0.0, 0.3])
def test_warm_up_visits_every_regime(level: float) -> None:
    cond, sampler = condition(2, batch=1), FewStepSampler(steps=2)
    geometry = replace(RING, context_noise=level)
    stream = GraphedStream(small("wan-dual"), cond, geometry, capture=lambda function, _: function)
    seconds = warm_up(stream, cond, noise_of(2, 0), sampler)
    assert len(seconds) == RING.distinct_graph_shapes and all(s > 0 for s in seconds)
    before = set(stream.recorded)
    walk(stream, condition(RING.start(12), batch=1), 12, sampler)
    assert set(stream.recorded) == before


def test_blocks_compile_to_one_graph_for_all_layers_and_chunks() -> None:
    run_script("""
    import torch
    from compiling import backend, graphs, walk
    from contracts.backbones import small

    for name in ("wan-none", "wan-dual", "wan-single", "hunyuan-none", "hunyuan-dual"):
        net = small(name)
        plain = walk(net, chunks=12, steps=2, window=3)
        graphs.clear()
        torch._dynamo.reset()
        net.compile_blocks(backend)
        torch.testing.assert_close(walk(net, chunks=12, steps=2, window=3), plain, atol=1e-6, rtol=1e-6)
        assert len(graphs) == 2, (name, len(graphs))
    """)


def test_kernels_race_and_choices_are_never_silent() -> None:
    result = time_attention_kernels(small("wan-dual"), RING, repeats=2)
    assert result.shape == (4, 12, RING.rows, 24)
    assert result.ms["math"] and result.ms["cudnn"] is None
    assert result.fastest in {"math", "flash"}
    joint = small("hunyuan-dual")
    assert time_attention_kernels(joint, RING, repeats=2).shape == (4, 12, RING.rows + joint.text_rows, 16)
    assert KernelTimes(shape=(1, 1, 1, 1), ms={"math": 2.0, "flash": 1.0, "cudnn": None}).fastest == "flash"
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    for name in ("torch", "math", "flash"):
        with attention_kernel(EngineConfig(attention=name)):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            torch.testing.assert_close(out, ((q @ k.mT) / 8**0.5).softmax(-1) @ v)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="needs a CUDA device"):
            open_stream(EngineConfig(graphs=True), small("wan-none"), condition(1), RING)


@torch.no_grad()
def test_the_engine_equals_the_straightforward_form() -> None:
    """Which is written anew, without scopes, arena, tables or stacked branches; the ring is full half of the way."""
    net, cond = small("wan-dual"), condition(RING.start(8), batch=1)
    sampler, noise = FewStepSampler(steps=2), [noise_of(1 if i == 0 else 2, i) for i in range(8)]
    engine = walk(Stream(net, cond, RING), cond, 8, sampler)
    plain = PlainStream(cast(Wan, net), cond, RING)
    for i, made in enumerate(engine):
        part = cond.frames(RING.start(i), RING.start(i + 1))
        torch.testing.assert_close(plain.step(part, noise[i], sampler), made, atol=2e-5, rtol=2e-5)
