"""How fast a causal model plays, and how near that is to what this machine could do.

A steady chunk is measured with the ring full, so nothing about it changes any more however long one plays; stages are
those of the player's own clock (`ModelEngine.timer`):

encode     prompt and image to what the network reads; once per walk
diffuse    noise to latents: all network passes of the chunk
decode     latents to pixels on the device
copy       pixels to uint8 frames on the host
finalize   the pass that writes the finished chunk into the cache; frames do not wait for it

The bound of a stage is the time that its matrix products would take at the rate of one large product measured in the
same run, or its unavoidable reads at the rate of a large copy, whichever is longer. Attention and
small products never run at that rate; convolutions, counted as direct, may pass it, and so may products in FP8: the
rate is that of the network's dtype.

Where the engine overlaps decoding with the commit, stages (and M2) are measured in turn all the same; M3, M4 and M5
are those of the walk as it is played.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minwm.bench.machine import Machine, measure_machine
from minwm.cameras.trajectory import Action, parse
from minwm.core.config import UserError
from minwm.session.engines import ModelEngine, RendererEngine
from minwm.session.generate import sampling_inputs
from minwm.session.session import Session
from minwm.store.model import Model
from minwm.stream import accelerate as engines
from minwm.stream.accelerate import EngineConfig, Fp8Fidelity, Fp8Trial, KernelTimes


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stage, or one metric of performance: milliseconds over all measured chunks."""

    median_ms: float
    p90_ms: float
    p99_ms: float
    gflop: float | None = None
    bound_ms: float | None = None
    percent: float | None = None
    """Of the roofline: 100 x bound / median."""


@dataclass(frozen=True, kw_only=True)
class SpeedResult:
    """All rows of one machine. `rows` holds the stages; M1 to M7 are named as in docs/performance.md."""

    engine: EngineConfig
    machine: Machine
    attention: KernelTimes | None
    fp8: Fp8Fidelity | None
    """What a trial said, before anything was measured; None if nothing is in FP8."""
    passes: int
    """Of the network for a steady chunk: `diffuse` and `finalize`, both branches of guidance counted."""
    chunks: int
    """Steady chunks measured."""
    visible: int
    """Latent frames that a steady chunk sees, itself included."""
    frames: int
    """Pixel frames of a chunk."""
    rows: dict[str, Row]
    m1_first_chunk: Row
    """All passes of the first generated chunk; the clock of the paper's table 1."""
    m2_chunk: Row
    """Diffuse and finalize of a steady chunk."""
    m3_fps: float
    """Frames over the time of a walk from its start, everything included, until the ring was filled twice."""
    m4_first_pixel_ms: float
    """From the prompt's states to the first generated frames on the host, warm."""
    m5_action_to_pixel: Row
    """From an action to its frames on the host, when the chunk before has been finalized."""
    m6_allocated_gb: float | None
    m6_reserved_gb: float | None
    m7_cold_start_s: float
    """From the model in memory to a stream that has visited every regime."""
    m7_recompiles: int
    """Graphs compiled after that; the promise is 0."""
    seed: int = 0


@torch.no_grad()
def measure_speed(model: Model, cfg: EngineConfig, chunks: int = 20, seed: int = 0) -> SpeedResult:
    """Play a model on its device with its camera turning; `chunks` steady ones are measured."""
    if not model.config.sampler.causal:
        raise UserError("a bidirectional model makes whole clips: there is no stream to measure")
    geometry, device = model.config.geometry, next(model.net.parameters()).device
    like, began = next(model.net.parameters()), time.perf_counter()
    before = measure_machine(like)
    chosen, raced, fp8 = make_ready(model, cfg)
    image = (
        np.zeros((model.config.height, model.config.width, 3), np.uint8) if geometry.first_chunk_frames == 1 else None
    )
    engine = ModelEngine(model, image, "a room", seed, chosen)
    session = Session(engine, history=0)
    engine.warm_up()
    cold = time.perf_counter() - began
    graphs = _compiled()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, filled = [_first(session, image is not None) for _ in range(5)], _walk(session, 2 * geometry.slots)
    played = [_step(session) for _ in range(chunks)]
    engine.side_task = None  # a stage by itself has a time, stages at once have none
    alone = [_step(session) for _ in range(chunks)] if cfg.overlap else played
    spent = {name: [lap[name] for lap, _ in alone] for name in alone[0][0]}
    after = measure_machine(like)
    machine = replace(after, tflops=max(before.tflops, after.tflops), gbytes=max(before.gbytes, after.gbytes))
    bounds = _bounds(model, machine)
    rows = {
        name: _row(spent[name], *bounds.get(name, (None, None))) for name in ("diffuse", "decode", "copy", "finalize")
    }
    rows = {"encode": _row([lap["encode"] for lap, _ in first])} | rows
    per_chunk = [a + b for a, b in zip(spent["diffuse"], spent["finalize"], strict=True)]
    frames, cuda = model.config.stream.chunk * model.config.motion.stride, device.type == "cuda"
    return SpeedResult(
        engine=cfg,
        machine=machine,
        attention=raced,
        fp8=fp8,
        passes=model.config.sampler.passes + (0 if geometry.merged_refresh else _branches(model)),
        chunks=chunks,
        visible=geometry.start(geometry.slots),
        frames=frames,
        rows=rows,
        m1_first_chunk=_row([lap["diffuse"] for lap, _ in first], *bounds["first"]),
        m2_chunk=_row(per_chunk, *(_sum(bounds["diffuse"], bounds["finalize"]))),
        m3_fps=2 * geometry.slots * frames / filled,
        m4_first_pixel_ms=1000 * float(np.median([seconds for _, seconds in first])),
        m5_action_to_pixel=_row([seconds for _, seconds in played], *_sum(bounds["diffuse"], bounds["first pixel"])),
        m6_allocated_gb=torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None,
        m6_reserved_gb=torch.cuda.max_memory_reserved(device) / 1e9 if cuda else None,
        m7_cold_start_s=cold,
        m7_recompiles=_compiled() - graphs,
        seed=seed,
    )


def make_ready(model: Model, cfg: EngineConfig) -> tuple[EngineConfig, KernelTimes | None, Fp8Fidelity | None]:
    """`engine.ready`, with a trial if there is anything to judge."""
    return engines.prepare_network(cfg, model.net, model.config.geometry, trial(model) if cfg.fp8 != "none" else None)


def trial(model: Model, seed: int = 0) -> Fp8Trial:
    """Three chunks beyond the sinks, ahead and turning; from a procedural world if the model starts from an image."""
    cfg, sampler, image, prompt = model.config, model.config.sampler, None, "a room"
    latents = cfg.geometry.start(cfg.geometry.sink + 3)
    track, turn = (
        parse(f"{keys}*{latents - 1}", stride=cfg.motion.stride).track(cfg.motion, cfg.intrinsics)
        for keys in ("w+l", "l")
    )
    if cfg.geometry.first_chunk_frames == 1:
        place = RendererEngine.spawn(seed, turn, cfg)  # whatever is ahead of it: nothing is judged but a difference
        image, prompt = place.start(), place.world.caption
    noise, cond = sampling_inputs(model, image, [prompt], [track], seed)
    return Fp8Trial(cond, noise, sampler, model.codec.decode)


def _first(session: Session, image: bool) -> tuple[dict[str, float], float]:
    """Laps of the start and of the first generated chunk, and the seconds until its first frames."""
    start = time.perf_counter()
    session.start()
    laps, seconds = dict(session.engine.timer.seconds), time.perf_counter() - start
    if image:  # which was the start
        more, after = _step(session)
        laps, seconds = laps | more, seconds + after
    return laps, seconds


def _walk(session: Session, chunks: int) -> float:
    start = time.perf_counter()
    for _ in range(chunks):
        session.step(Action.of("l"))
    session.engine.update_cache()
    session.engine.timer.record("finalize")  # all of it
    return time.perf_counter() - start


def _step(session: Session) -> tuple[dict[str, float], float]:
    """Laps of a chunk, and the seconds until its first frames."""
    start = time.perf_counter()
    parts = session.step_by_latent(Action.of("l"))
    next(parts)
    seconds = time.perf_counter() - start
    for _ in parts:
        pass
    session.engine.update_cache()
    return dict(session.engine.timer.seconds), seconds


def _compiled() -> int:
    from torch._dynamo.utils import counters  # it takes a second to import

    return counters["stats"]["unique_graphs"]


def _branches(model: Model) -> int:
    return 1 if model.config.sampler.guidance == 1 else 2


Bound = tuple[float, float]
"""FLOPs, and seconds that they need at least."""


def _bounds(model: Model, machine: Machine) -> dict[str, Bound]:
    """Of the passes of a steady chunk, of its commit, of its decoding, of that of its first latent, and of the passes
    of the first chunk."""
    cfg, geometry, net = model.config, model.config.geometry, model.net
    branches = _branches(model)
    weights = sum(p.nbytes for p in net.parameters())

    def network(seen: int, passes: int) -> Bound:
        rows = 2 * net.layers * net.cache_heads * seen * net.head_width * next(net.parameters()).itemsize
        flops = passes * branches * net.flops(geometry.chunk, geometry.tokens, seen)
        read = passes * (weights + branches * rows)
        return flops, max(flops / machine.tflops / 1e12, read / machine.gbytes / 1e9)

    decoding = _decoder_flops(model)
    first = geometry.first_chunk_frames + (geometry.chunk if geometry.first_chunk_frames != geometry.chunk else 0)
    steps = cfg.sampler.steps
    return {
        "diffuse": network(geometry.rows, steps),
        "finalize": network(geometry.rows, 0 if geometry.merged_refresh else 1),
        "decode": (decoding, decoding / machine.tflops / 1e12),
        "first pixel": (decoding // geometry.chunk, decoding / geometry.chunk / machine.tflops / 1e12),
        "first": network(first * geometry.tokens, steps),
    }


def _decoder_flops(model: Model) -> float:
    latents = torch.zeros(
        model.config.latent_shape(1, model.config.stream.chunk), device=next(model.net.parameters()).device
    )
    _, state = model.codec.decode_next(latents)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model.codec.decode_next(latents, state)
    return counter.get_total_flops()


def _sum(*bounds: Bound) -> Bound:
    return sum(flops for flops, _ in bounds), sum(seconds for _, seconds in bounds)


def _row(seconds: list[float], flops: float | None = None, bound: float | None = None) -> Row:
    median, p90, p99 = (1000 * float(x) for x in np.percentile(seconds, (50, 90, 99)))
    return Row(
        median_ms=median,
        p90_ms=p90,
        p99_ms=p99,
        gflop=flops and flops / 1e9,
        bound_ms=bound and 1000 * bound,
        percent=bound and 1e5 * bound / median,
    )


# ------------------------------------------------------------------------------------------------ showing it


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Lines that set two files of `minwm bench --json` side by side; more than 1 means that the second is faster."""
    one, two = a["speed"], b["speed"]
    names = [*one["rows"], "m1_first_chunk", "m2_chunk", "m5_action_to_pixel"]
    pairs = ((name, *({**x["rows"], **x}[name]["median_ms"] for x in (one, two))) for name in names)
    lines = [f"{name}: {x:.3g} ms -> {y:.3g} ms, {x / y:.2f}x" for name, x, y in pairs]
    for name in ("engine", "machine"):
        x, y = one[name], two[name]  # an older file may have fewer fields
        lines += [f"{name}.{k}: {x.get(k)} -> {y.get(k)}" for k in {**x, **y} if x.get(k) != y.get(k)]
    if a["versions"] != b["versions"]:
        lines.append("measured on different machines or versions: ratios say nothing about the code alone")
    return lines


def plot(result: SpeedResult) -> str:
    """An SVG: every stage of a chunk as a bar, the part that the roofline demands dark."""
    rows = {**result.rows, "chunk": result.m2_chunk, "action to pixel": result.m5_action_to_pixel}
    ends = [max(row.median_ms, row.bound_ms or 0) for row in rows.values()]
    longest, step = max(ends), 26
    width, left, height = 640, 120, step * len(rows) + 34
    size = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for i, (name, row) in enumerate(rows.items()):
        y, scale = 8 + step * i, (width - left - 200) / longest
        share = f", {row.percent:.0f}% of the roofline" if row.percent else ""
        parts += [
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{name}</text>',
            f'<rect x="{left}" y="{y}" width="{row.median_ms * scale:.1f}" height="18" fill="#9ecae1"/>',
            f'<rect x="{left}" y="{y}" width="{(row.bound_ms or 0) * scale:.1f}" height="18" fill="#08519c"/>',
            f'<text x="{left + ends[i] * scale + 6:.1f}" y="{y + 14}">{row.median_ms:.3g} ms{share}</text>',
        ]
    note = f"dark: {result.machine.tflops:.3g} TFLOP/s, {result.machine.gbytes:.3g} GB/s, measured in the same run"
    return "\n".join([*parts, f'<text x="{left}" y="{height - 8}">{note}</text>', "</svg>"]) + "\n"
