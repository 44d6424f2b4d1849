"""The benchmark: its clocks fit together, and its FLOPs are those of the closed form."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from tiny_presets import tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minwm.bench.report import check_latency, compare, plot
from minwm.bench.stream import BenchResult, bench_model, random_model
from minwm.cameras.trajectory import Motion
from minwm.cli import main
from minwm.control.prope import Mode
from minwm.core.config import UserError, dumps, loads, to_dict
from minwm.core.types import Condition
from minwm.experiments import presets
from minwm.families.wan.transformer import WanConfig
from minwm.nets.chunks import StreamConfig
from minwm.nets.small_codec import SmallCodecConfig
from minwm.nets.text import WordText
from minwm.store.model import ModelConfig
from minwm.stream.accelerate import EngineConfig
from minwm.stream.rollout import Stream
from minwm.stream.solvers import AutoregressiveSampler, BidirectionalSampler, FewStepSampler, Sampler

CONFIG = ModelConfig(
    network=WanConfig(
        dim=32, heads=2, layers=2, ffn=48, channels=4, text_dim=8, text_length=24, freq_dim=8, camera="dual"
    ),
    sampler=FewStepSampler(),
    codec=SmallCodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1),
    motion=Motion(move=0.5, turn=24.0, fps=16.0),
    text=WordText(dim=8),
    latents=7,
    stream=StreamConfig(chunk=2, first_chunk=1),
    height=32,
    width=32,
)
SAMPLERS = [BidirectionalSampler(steps=3), AutoregressiveSampler(steps=3), FewStepSampler(steps=2)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.kind)
def test_clocks_fit_together(sampler: Sampler) -> None:
    result = bench_model(random_model(replace(CONFIG, sampler=sampler)), repeats=2)
    assert (result.sampler, result.repeats) == (sampler.kind, 2)
    assert result.passes == {"bidirectional": 6, "autoregressive": 6, "few_step": 2}[sampler.kind]
    assert (result.chunk_frames, result.allocated_gb, result.recompiles, result.machine) == (8, None, 0, None)
    assert list(result.stages) == ["encode", "diffuse", "decode", "copy", "cache_update"][: 5 if sampler.causal else 4]
    for timing in (*result.stages.values(), result.first_chunk, result.chunk, result.first_pixel):
        assert timing.p90_ms and timing.p99_ms and 0 < timing.median_ms <= timing.p90_ms <= timing.p99_ms
    assert result.first_pixel.median_ms > result.first_chunk.median_ms
    if sampler.causal:
        assert (result.frames, result.chunks, result.visible) == (2 * 9 * 8, 8, 17)
        assert result.action_to_pixel and result.action_to_pixel.median_ms > result.stages["diffuse"].median_ms
    else:
        assert (result.frames, result.chunks, result.visible) == (24, None, 7)
        assert result.chunk.median_ms == pytest.approx(result.first_chunk.median_ms / 3)
        assert result.action_to_pixel is None and result.fps < 1000 * result.frames / result.first_chunk.median_ms
    assert loads(BenchResult, dumps(result)) == result
    if not sampler.causal:
        with pytest.raises(UserError, match="--latency is about actions"):
            check_latency(result, 1000.0)


@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("camera", ["none", "dual", "single"])
@torch.no_grad()
def test_flops_are_those_of_the_closed_form_and_of_the_operators(camera: Mode, image: bool) -> None:
    """Linears 2 N (4 d^2 + 2 d^2 + 2 d ffn [+ d^2]), attention 4 N L d [twice], and the prompt 4 N l d; per layer."""
    stream = StreamConfig(chunk=2, first_chunk=1 if image else 2)
    config = replace(CONFIG, stream=stream, sampler=FewStepSampler(steps=1))
    config = replace(config, network=replace(config.network, camera=camera))
    cfg, geometry = config.network, config.geometry
    d, query, seen = cfg.dim, 2 * geometry.tokens, geometry.start(geometry.slots) * geometry.tokens
    linear = 2 * query * ((7 if camera == "dual" else 6) * d**2 + 2 * d * cfg.ffn)
    attention = (2 if camera == "dual" else 1) * 4 * query * seen * d + 4 * query * cfg.text_length * d
    ends = 2 * query * 2 * (4 * cfg.channels) * d  # patches in, patches out
    cameras = {"none": 0, "dual": 1, "single": 0.5}[camera] * 4 * 2 * query * 4 * d  # on q, k, v and output
    want = cfg.layers * (linear + attention + cameras) + ends
    model = random_model(config)
    assert round(1e9 * bench_model(model, repeats=1, chunks=1).pass_gflop) == want
    K = torch.tensor(config.intrinsics, dtype=torch.float32).expand(1, 2, 4)
    cond = Condition(**config.encode_prompts(["a room"]), w2c=torch.eye(4).expand(1, 2, 4, 4), K=K)
    stream = Stream(model.net, cond, geometry)
    stream.chunk = geometry.slots
    bound, x = stream.prepare_chunk(cond), torch.zeros(config.latent_shape(1, 2))
    stream.modulation(0.0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stream.cache_update_pass(bound, x)
    assert counter.get_total_flops() == want


def test_a_pass_of_the_published_network_costs_what_is_known_of_it() -> None:
    """17.1 TFLOP + 2.30e-3 per visible token, for 4 latents of 1560 tokens and both branches."""
    with torch.device("meta"):
        net = replace(WanConfig(), camera="dual").build()
    for frames in (4, 12, 20):
        seen = 1560 * frames
        assert net.flops(4, 1560, seen) / 1e12 == pytest.approx(17.1 + 2.30e-3 * seen, rel=0.005)


def test_a_result_has_the_roofline_and_compares() -> None:
    result = bench_model(random_model(CONFIG), EngineConfig(attention="fastest"), chunks=3, roofline=True)
    assert (result.chunks, result.machine and result.machine.dtype) == (3, "float32")
    assert result.attention and result.attention.ms[result.attention.fastest]
    assert result.action_to_pixel
    for timing in (result.first_chunk, result.chunk, result.action_to_pixel, result.stages["cache_update"]):
        assert timing.bound_ms and timing.percent == pytest.approx(100 * timing.bound_ms / timing.median_ms)
    first, steady = result.first_chunk.gflop, result.stages["diffuse"].gflop
    assert first and steady and first < steady  # it sees three latents, not seventeen
    assert loads(BenchResult, dumps(result)) == result
    drawn = ElementTree.fromstring(plot(result))
    assert {"diffuse", "cache update", "action to pixel"} <= {text.text for text in drawn.iter() if text.text}
    lines = compare(to_dict(result), to_dict(result))
    assert len(lines) == 8 and all(line.endswith("1.00x") for line in lines)
    other = to_dict(replace(result, engine=EngineConfig(), versions={"torch": "9"}))
    assert compare(to_dict(result), other)[-2:] == [
        "engine.attention: fastest -> torch",
        "measured on different machines or versions: ratios say nothing about the code alone",
    ]
    with pytest.raises(UserError, match="makes whole clips"):
        whole = random_model(replace(CONFIG, sampler=BidirectionalSampler(steps=1)))
        bench_model(whole, EngineConfig(attention="fastest"))


def test_fp8_and_a_merged_refresh_are_measured_beside_what_they_cost() -> None:
    config = replace(CONFIG, stream=replace(CONFIG.stream, merged_refresh=True), sampler=FewStepSampler(steps=2))
    fp8 = EngineConfig(fp8="all", fp8_limit=0.05)
    result = bench_model(random_model(config), fp8, repeats=1, chunks=2, roofline=True)
    assert result.passes == 2 and result.stages["cache_update"].gflop == 0
    assert result.fp8 and result.fp8.limit == 0.05 and result.engine.fp8 == "all"
    assert loads(BenchResult, dumps(result)) == result


def test_the_second_family_is_measured_as_the_first() -> None:
    """The preset's few-step student at reduced depth and width, its text at the head of the cache."""
    model = tiny_model(presets.stage("hunyuan1.5-8b/dmd", Path()).model, Path())
    result = bench_model(random_model(model), repeats=1, chunks=1, roofline=True)
    assert (result.passes, result.visible) == (4, model.stream.chunk * model.stream.slots)
    assert result.stages["diffuse"].gflop == pytest.approx(4 * result.pass_gflop)


def test_the_command_measures_draws_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, drawing = tmp_path / "bench.json", tmp_path / "bench.svg"
    quick = ["--repeats", "1", "--chunks", "2", "--window", "2"]
    command = ["bench", "--preset", "smoke", "--random-weights", *quick, "--json", str(file), "--plot", str(drawing)]
    assert main(command) == 0
    found = json.loads(file.read_text())
    assert found["visible"] == 5 and found["passes"] == 4
    ElementTree.parse(drawing)
    assert main(["bench", "--compare", str(file), str(file)]) == 0
    assert "first_chunk" in capsys.readouterr().out
    assert main([*command, "--steps", "2", "--merged-refresh", "--fp8", "all"]) == 0
    found = json.loads(file.read_text())
    assert found["passes"] == 2 and found["fp8"]["limit"] == 0.1
    assert "no evidence" in capsys.readouterr().out
    assert main([*command, "--latency", "1e6"]) == 0
    assert main([*command, "--latency", "1e-6"]) == 2
    assert "has a 90th percentile of" in capsys.readouterr().err
    assert (
        main([*command, "--stream.chunk", "4", "--latents", "9"]) == 0
        and json.loads(file.read_text())["chunk_frames"] == 16
    )
    assert main([*command, "--stream.chunks", "4"]) == 2
    assert main([*command, "--steps", "0"]) == 2
    assert main([*command, "--attention", "chess"]) == 2
    assert "'chess'" in capsys.readouterr().err
