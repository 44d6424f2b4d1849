"""How fast a model makes video, and how near that is to what this machine could do: one stream, batch 1, warm.

A causal model walks with its camera turning. Its stages are those of the player's own clock (`ModelEngine.timer`):

encode         prompt and image to what the network reads; once per walk
diffuse        noise to latents: all network passes of the chunk
decode         latents to pixels on the device
copy           pixels to uint8 frames on the host
cache_update   the pass that writes the finished chunk into the cache; frames do not wait for it

A chunk is steady when the cache is full: nothing about it changes any more however long one walks. A bidirectional
model makes whole clips, with the first four stages.

The bound of a stage is the time that its matrix products would take at the rate of one large product measured in the
same run, or its unavoidable reads at the rate of a large copy, whichever is longer. Attention and
small products never run at that rate; convolutions, counted as direct, may pass it, and so may products in FP8: the
rate is that of the network's dtype.

Where the engine overlaps decoding with the cache update, stages (and M2) are measured in turn all the same; M3, M4 and
M5 are those of the walk as it is played.
"""

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import torch
from jaxtyping import UInt8
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minwm.bench.machine import Machine, Work, compiled_graphs, faster, measure_machine, peak_memory, reset_peak_memory
from minwm.cameras.trajectory import Action
from minwm.core.config import UserError
from minwm.core.media import to_uint8
from minwm.core.runtime import StageTimer, git_commit, versions
from minwm.nets.text import WordText
from minwm.session.engines import ModelEngine
from minwm.session.generate import sampling_inputs
from minwm.session.prepare import prepare_model
from minwm.session.session import Session
from minwm.session.views import Viewpoint, known_views
from minwm.store.model import Model, ModelConfig
from minwm.stream.accelerate import PLAIN, EngineConfig, Fp8Fidelity, KernelTimes
from minwm.stream.rollout import generate_latents


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of a stage or a metric, over all repeats or chunks."""

    median_ms: float
    p90_ms: float | None = None
    p99_ms: float | None = None
    gflop: float | None = None
    bound_ms: float | None = None
    """The least time by the roofline; None where it was not measured."""
    percent: float | None = None
    """Of the roofline: 100 x bound / median."""


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What a model costs on one machine. M1 to M7 are the metrics of docs/performance.md."""

    sampler: str
    passes: int
    """Network passes per chunk (bidirectional: per clip), both branches of guidance counted; no cache update."""
    parameters: int
    """Of the network."""
    pass_gflop: float
    """One network pass without guidance, of a steady chunk or a clip; a multiply-add is two."""
    chunk_frames: int
    """Frames that a chunk adds."""
    frames: int
    """Generated frames over which `fps` was measured; a given first frame does not count."""
    visible: int | None = None
    """Latent frames that a steady chunk (or a clip) sees, itself included."""
    stages: dict[str, Timing]
    """Of a steady chunk (bidirectional: of a clip); `encode` of a start."""
    first_chunk: Timing
    """M1, the clock of the paper's table 1: all network passes from noise to the first generated latents. Those of a
    bidirectional model are the whole clip."""
    chunk: Timing
    """M2: `diffuse` and `cache_update` of a steady chunk; if bidirectional, those of the clip divided by its chunks."""
    fps: float
    """M3: frames per second of a walk until the cache was filled twice, or of a clip, everything included."""
    first_pixel: Timing
    """M4: from the prompt's states to the first generated frames on the host."""
    action_to_pixel: Timing | None = None
    """M5: from an action to its first frames on the host, the cache being up to date; None if bidirectional."""
    allocated_gb: float | None
    """M6: peak of allocated GPU memory; None on a CPU."""
    reserved_gb: float | None = None
    cold_start_s: float | None = None
    """M7: from the model in memory to a stream that has run every graph shape, or to a clip of one step."""
    recompiles: int | None = None
    """M7: graphs compiled after that; the promise is 0."""
    engine: EngineConfig = PLAIN
    attention: KernelTimes | None = None
    """Where the fastest kernel was to be chosen."""
    fp8: Fp8Fidelity | None = None
    """Found before anything was measured; None if nothing is in FP8."""
    machine: Machine | None = None
    """The roofline; None if it was not measured."""
    threads: int
    """CPU threads that torch uses."""
    repeats: int
    """Starts, or clips."""
    chunks: int | None = None
    """Steady chunks measured; None if bidirectional."""
    date: str
    commit: str | None
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Seconds; a list has an entry per repeat or chunk."""

    stages: dict[str, list[float]]
    first_chunk: list[float]
    chunk: list[float]
    first_pixel: list[float]
    action_to_pixel: list[float] | None = None
    frames: int
    frames_s: float
    """To make so many frames."""
    cold_start_s: float
    graphs_before: int
    """Compiled when the cold start was over."""
    attention: KernelTimes | None = None
    fp8: Fp8Fidelity | None = None


def random_model(config: ModelConfig, seed: int = 0) -> Model:
    """A model with fresh weights: as fast as a trained one. Its prompts are words: no text encoder has to be there."""
    torch.manual_seed(seed)
    words = WordText(dim=config.text.dim, length=config.text.length)
    config = replace(config, text=words, negative=None)
    net, codec = config.network.build(), config.codec.build()
    return Model(config, net.eval().requires_grad_(False), codec.eval().requires_grad_(False))


@torch.no_grad()
def bench_model(
    model: Model, engine: EngineConfig = PLAIN, repeats: int = 5, chunks: int | None = None, roofline: bool = False
) -> BenchResult:
    """Measure a model on its device: `repeats` starts, and `chunks` steady chunks (four per repeat if not given).

    What is seen does not change the speed: the image is black, the prompt any. With `roofline` the machine is measured
    before and after. Raises UserError for engine options with a bidirectional model, which has no stream.
    """
    cfg, net, repeats = model.config, model.net, max(1, repeats)
    weight, causal = next(net.parameters()), cfg.sampler.causal
    machine = measure_machine(weight) if roofline else None
    if causal:
        found = _measure_walk(model, engine, repeats, chunks or 4 * repeats)
    elif engine == PLAIN:
        found = _measure_clips(model, repeats)
    else:
        raise UserError("engine options are for streams, and a bidirectional model makes whole clips: leave them out")
    (allocated, reserved), recompiles = peak_memory(weight.device), compiled_graphs() - found.graphs_before
    machine = machine and faster(machine, measure_machine(weight))
    work = _work(model) if machine and causal else {}

    def timing(name: str, seconds: list[float]) -> Timing:
        return _timing(seconds, machine, work.get(name))

    geometry = cfg.geometry
    size, visible = (geometry.chunk, geometry.start(geometry.slots)) if causal else (cfg.latents, cfg.latents)
    text = 0 if causal else net.text_flops(visible * geometry.tokens)
    return BenchResult(
        sampler=cfg.sampler.kind,
        passes=cfg.sampler.passes,
        parameters=sum(p.numel() for p in net.parameters()),
        pass_gflop=(net.flops(size, geometry.tokens, visible * geometry.tokens) + text) / 1e9,
        chunk_frames=geometry.chunk * cfg.motion.stride,
        frames=found.frames,
        visible=visible,
        stages={name: timing(name, seconds) for name, seconds in found.stages.items()},
        first_chunk=timing("first_chunk", found.first_chunk),
        chunk=timing("chunk", found.chunk),
        fps=found.frames / found.frames_s,
        first_pixel=timing("first_pixel", found.first_pixel),
        action_to_pixel=timing("action_to_pixel", found.action_to_pixel) if found.action_to_pixel else None,
        allocated_gb=allocated,
        reserved_gb=reserved,
        cold_start_s=found.cold_start_s,
        recompiles=recompiles,
        engine=engine,
        attention=found.attention,
        fp8=found.fp8,
        machine=machine,
        threads=torch.get_num_threads(),
        repeats=repeats,
        chunks=len(found.chunk) if causal else None,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=git_commit(),
        versions=versions(),
    )


# ------------------------------------------------------------------------------------------------ the clock


@dataclass(frozen=True)
class _Step:
    stages: dict[str, float]
    first_pixel: float
    """Seconds until the first frames are on the host."""


def _measure_walk(model: Model, cfg: EngineConfig, repeats: int, chunks: int) -> _Measured:
    """Start a walk several times; then go on until the cache was filled twice and `chunks` steady chunks are made."""
    views = known_views(model, [Viewpoint(model.config.scene(0), np.eye(4))])
    start, slots = time.perf_counter(), model.config.geometry.slots
    prepared, attention, fp8 = prepare_model(model, cfg)
    engine = ModelEngine(model, _image(model.config), "a room", engine=prepared, views=views)
    engine.warm_up()
    cold_start, graphs = time.perf_counter() - start, compiled_graphs()
    reset_peak_memory(engine.device)
    session = Session(engine, history=0)
    starts = [_start(session) for _ in range(repeats)]
    begun = time.perf_counter()
    steps = [_step(session) for _ in range(2 * slots)]
    engine.timer.record("cache_update")  # where it overlaps with decoding, it may still be under way
    frames_s = time.perf_counter() - begun
    steady = [*steps[slots:], *(_step(session) for _ in range(chunks - slots))][:chunks]
    engine.submit = None  # stages that overlap have no times of their own
    alone = [_step(session) for _ in range(chunks)] if cfg.overlap else steady
    stages = {name: [step.stages[name] for step in alone] for name in ("diffuse", "decode", "copy", "cache_update")}
    return _Measured(
        stages={"encode": [step.stages["encode"] for step in starts]} | stages,
        first_chunk=[step.stages["diffuse"] for step in starts],
        chunk=[a + b for a, b in zip(stages["diffuse"], stages["cache_update"], strict=True)],
        first_pixel=[step.first_pixel for step in starts],
        action_to_pixel=[step.first_pixel for step in steady],
        frames=2 * slots * model.config.stream.chunk * model.config.motion.stride,
        frames_s=frames_s,
        cold_start_s=cold_start,
        graphs_before=graphs,
        attention=attention,
        fp8=fp8,
    )


def _start(session: Session) -> _Step:
    """Begin anew, up to the first generated chunk."""
    start = time.perf_counter()
    first = session.start()
    stages, seconds = dict(session.engine.timer.seconds), time.perf_counter() - start
    if len(first) > 1:
        return _Step(stages, seconds)
    step = _step(session)  # one frame is the image
    return _Step(stages | step.stages, seconds + step.first_pixel)


def _step(session: Session) -> _Step:
    """Make a chunk, and write it into the cache."""
    start = time.perf_counter()
    parts = session.step_by_latent(Action.of("l"))
    next(parts)
    seconds = time.perf_counter() - start
    for _ in parts:
        pass
    session.engine.update_cache()
    return _Step(dict(session.engine.timer.seconds), seconds)


def _measure_clips(model: Model, repeats: int) -> _Measured:
    """Make whole clips of the length of training."""
    cfg, start = model.config, time.perf_counter()
    _time_clip(replace(model, config=replace(cfg, sampler=replace(cfg.sampler, steps=1))))
    cold_start, graphs = time.perf_counter() - start, compiled_graphs()
    reset_peak_memory(next(model.net.parameters()).device)
    clips = [_time_clip(model) for _ in range(repeats)]
    stages = {name: [clip[name] for clip in clips] for name in clips[0]}
    generated = len(cfg.geometry.chunks(cfg.latents)) - cfg.geometry.image_alone
    totals = [sum(clip.values()) for clip in clips]
    return _Measured(
        stages=stages,
        first_chunk=stages["diffuse"],
        chunk=[seconds / generated for seconds in stages["diffuse"]],
        first_pixel=totals,
        frames=cfg.motion.stride * (cfg.latents - 1) + 1 - cfg.image_start,
        frames_s=float(np.median(totals)),
        cold_start_s=cold_start,
        graphs_before=graphs,
    )


def _time_clip(model: Model) -> dict[str, float]:
    """Seconds by stage."""
    cfg, image = model.config, _image(model.config)
    trajectory, prompt = f"l*{cfg.latents - 1}", cfg.text.encode(["a room"])
    timer = StageTimer(next(model.net.parameters()).device)
    noise, cond = sampling_inputs(model, image if image is None else image[None], prompt, [trajectory], seed=0)
    timer.record("encode")
    latents = generate_latents(model.net, cfg.sampler, noise, cond, cfg.geometry)
    timer.record("diffuse")
    frames = to_uint8(model.codec.decode(latents))
    timer.record("decode")
    frames.cpu()
    timer.record("copy")
    return timer.seconds


def _image(cfg: ModelConfig) -> UInt8[np.ndarray, "h w 3"] | None:
    """A black one, if the model starts from an image."""
    return np.zeros((cfg.height, cfg.width, 3), np.uint8) if cfg.image_start else None


# ------------------------------------------------------------------------------------------------ the roofline


def _timing(seconds: list[float], machine: Machine | None, work: list[Work] | None) -> Timing:
    median, p90, p99 = (1000 * float(x) for x in np.percentile(seconds, (50, 90, 99)))
    if not machine or not work:
        return Timing(median_ms=median, p90_ms=p90, p99_ms=p99)
    bound = 1000 * sum(machine.seconds(part) for part in work)
    gflop = sum(part.flops for part in work) / 1e9
    return Timing(median_ms=median, p90_ms=p90, p99_ms=p99, gflop=gflop, bound_ms=bound, percent=100 * bound / median)


def _work(model: Model) -> dict[str, list[Work]]:
    """Of the stages and metrics of a stream."""
    cfg, geometry, net = model.config, model.config.geometry, model.net
    branches = 1 if cfg.sampler.guidance == 1 else 2
    weights, itemsize = sum(p.nbytes for p in net.parameters()), next(net.parameters()).itemsize

    def network(rows: int, passes: int, frames: int = geometry.chunk) -> Work:
        """Passes of one chunk that sees so many rows of the cache."""
        flops = passes * branches * net.flops(frames, geometry.tokens, rows)
        cache = 2 * net.layers * net.cache_heads * rows * net.head_width * itemsize
        return Work(flops, passes * (weights + branches * cache))

    decode, sampler = _decoder_flops(model), cfg.sampler
    index = int(geometry.image_alone)
    frames, rows = geometry.start(index + 1) - geometry.start(index), geometry.start(index + 1) * geometry.tokens
    parts = [network(seen * geometry.tokens, 1, made) for made, seen in geometry.context_parts]
    context = Work(sum(part.flops for part in parts), max((part.bytes for part in parts), default=0))
    diffuse = [context, network(geometry.rows, sampler.steps)]
    cache_update = network(geometry.rows, 0 if geometry.merged_refresh or parts else 1)
    return {
        "diffuse": diffuse,
        "decode": [Work(decode)],
        "cache_update": [cache_update],
        "first_chunk": [network(rows, sampler.at_chunk(index).steps, frames)],
        "chunk": [*diffuse, cache_update],
        "action_to_pixel": [*diffuse, Work(decode / geometry.chunk)],
    }


def _decoder_flops(model: Model) -> float:
    """Of a chunk that is not the first."""
    shape = model.config.latent_shape(1, model.config.stream.chunk)
    latents = torch.zeros(shape, device=next(model.net.parameters()).device)
    _, state = model.codec.decode_next(latents)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.codec.decode_next(latents, state)
    return counter.get_total_flops()
