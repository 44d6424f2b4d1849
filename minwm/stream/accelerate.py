"""What a stream may do to be fast on a GPU, each by an explicit choice and each beside its plain form.

compile    what is before and after attention in a block becomes a few fused kernels (`Backbone.compile_blocks`)
graphs     all passes of a chunk are launched at once, from a CUDA graph per regime (`GraphedStream`)
kernels    norm, RoPE, PRoPE and the arena's rows in one Triton kernel (`Backbone.use_kernels`)
attention  the kernel that was fastest on this machine, in a race whose times are kept (`race`)
fp8        products of the blocks, or the cache, in 8 bits: another result, which has to pass a gate (`judge`)
decode     the codec in channels-last memory, or so and compiled: one graph for a first latent, one for all others
overlap    latents become frames on the host on a second CUDA stream, beside what follows them (`SideStream`)

A regime is a slot of the arena with the rows in use: there is one for every chunk until the ring is full, and then
one for every slot of the window. Nothing else about a chunk is an integer of the host, so nothing else is recorded.
"""

import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minwm.control.plucker import Rays
from minwm.control.prope import Projection
from minwm.core.config import ConfigError
from minwm.core.flow import Latents
from minwm.core.types import Condition
from minwm.nets.attention import Cached, Geometry, KVArena
from minwm.nets.backbone import Backbone, PreparedCondition
from minwm.nets.codec import Decode, VideoCodec, channels_last
from minwm.nets.fp8 import Fp8Arena
from minwm.stream.rollout import Stream, generate_latents
from minwm.stream.solvers import Noise, Sampler

Function = Callable[..., Tensor | None]
Capture = Callable[[Function, list[Tensor]], Function]
"""capture(function, inputs) -> the same function, recorded: whatever is not an input is now a constant."""
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Kernel = Literal["torch", "race", "cudnn", "flash", "efficient", "math"]
Fp8 = Literal["none", "linears", "cache", "all"]
Decoding = Literal["plain", "channels_last", "compile"]
PendingResult = Callable[[], Tensor]
"""Waits for work that has begun, and gives its result on the host."""
SideTask = Callable[[Callable[[Tensor], Tensor], Tensor], PendingResult]
"""beside(work, input) begins work(input) beside whatever the device is given next."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How streams run. The default is the plain form, which runs anywhere."""

    compile: bool = False
    kernels: bool = False
    """Needs triton, and CUDA unless triton interprets."""
    graphs: bool = False
    """Needs CUDA."""
    attention: Kernel = "torch"
    """torch's own choice, the winner of a race on this machine, or a kernel by name. For the network alone."""
    decode: Decoding = "plain"
    """The codec as it is, with its weights and pictures channels-last in memory, or so and compiled."""
    overlap: bool = False
    """Needs CUDA."""
    fp8: Fp8 = "none"
    """What is held in FP8 (nets/fp8.py): the weights and inputs of the large products, the cache, or both."""
    fp8_limit: float = 0.1
    """Relative error of a trial's latents beyond which FP8 is refused."""


PLAIN = EngineConfig()


class CudaGraphs:
    """Records functions as CUDA graphs in one pool of memory: they run one at a time, and each owns its result."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("engine.graphs needs a CUDA device, and there is none; leave it off")
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Function, inputs: list[Tensor]) -> Function:
        held, side = [x.clone() for x in inputs], torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are chosen and tables made before anything is recorded
            for _ in range(2):
                function(*held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = function(*held)

        def replay(*given: Tensor) -> Tensor | None:
            for mine, x in zip(held, given, strict=True):
                mine.copy_(x)
            graph.replay()
            return result if result is None else result.clone()

        return replay


class GraphedStream(Stream):
    """A stream whose chunk functions are recorded, once per regime, and then replayed."""

    def __init__(self, *args: Any, capture: Capture, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.capture = capture
        self.recorded: dict[Hashable, Function] = {}

    @torch.no_grad()
    def set_prompt(self, cond: Condition) -> None:
        """In place: recordings know where the prompt lies."""
        kept = self.text
        super().set_prompt(cond)
        for mine, new in zip(kept, self.text, strict=True):
            for to, x in zip(mine, new, strict=True):
                to.copy_(x)
        self.text = kept

    def next_chunk(self, bound: PreparedCondition, noise: Noise, sampler: Sampler) -> Latents:
        plain = super().next_chunk
        result = self._replay(sampler, lambda bound, noise: plain(bound, noise, sampler), bound, noise)
        assert result is not None
        return result

    def cache_update_pass(self, bound: PreparedCondition, x: Latents, t: float = 0.0) -> None:
        self._replay(("keep", t), partial(super().cache_update_pass, t=t), bound, x)

    def _replay(
        self, what: Hashable, run: Callable[..., Tensor | None], bound: PreparedCondition, x: Tensor
    ) -> Tensor | None:
        geometry, scope = self.geometry, Cached(self.arena, self.chunk)
        places = self.net.rope_table(x if x.ndim == 5 else x[0], scope)
        if isinstance(bound.camera, Rays):
            raise ConfigError("engine.graphs records projective cameras only, not Plücker rays; leave it off")
        parts = {"x": x, "places": places, "camera": bound.camera and bound.camera.matrices}
        inputs = {name: part for name, part in parts.items() if part is not None}
        key = what, tuple(x.shape), geometry.slot(self.chunk), geometry.valid_rows(self.chunk)
        if key not in self.recorded:

            def function(*given: Tensor) -> Tensor | None:
                part = dict(zip(inputs, given, strict=True))
                camera = Projection(part["camera"]) if "camera" in part else None
                return run(PreparedCondition(self.text, camera, part.get("places")), part["x"])

            self.recorded[key] = self.capture(function, list(inputs.values()))
        return self.recorded[key](*inputs.values())


class CudaSideStream:
    """A second CUDA stream, on which latents become frames on the host while the first one commits them.

    Its work goes first wherever both want the device: frames are waited for, the commit is not.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(f"engine.overlap needs a CUDA device, and the model is on {device}; leave it off")
        self.stream = torch.cuda.Stream(device, priority=-1)

    def __call__(self, work: Callable[[Tensor], Tensor], x: Tensor) -> PendingResult:
        side = self.stream
        side.wait_stream(torch.cuda.current_stream(x.device))  # x is being made there
        x.record_stream(side)  # so that its memory is not given away there while it is read here
        with torch.cuda.stream(side):
            # what `work` makes and keeps belongs to this stream, which is the only one to read it
            made = work(x).to("cpu", non_blocking=True)  # page-locked, for this is a copy from the device
            done = side.record_event()

        def wait() -> Tensor:
            done.synchronize()
            return made.clone()  # page-locked memory is scarce: it is given back for the next chunk

        return wait


def open_stream(cfg: EngineConfig, net: Backbone, cond: Condition, geometry: Geometry, guidance: float = 1.0) -> Stream:
    """A stream that runs as the config says; the network must have been made `ready`."""
    if cfg.graphs:
        return GraphedStream(net, cond, geometry, guidance, capture=CudaGraphs())
    return Stream(net, cond, geometry, guidance)


@torch.no_grad()
def warm_up(stream: Stream, cond: Condition, noise: Noise, sampler: Sampler) -> list[float]:
    """Visit every regime, so that nothing is compiled, recorded or chosen later; then start anew.

    Returns seconds per regime. cond: of one chunk. noise: of one chunk, as `next_chunk` takes it.
    """
    geometry, seconds = stream.geometry, []
    for chunk in range(geometry.distinct_graph_shapes):
        start, stream.chunk = time.perf_counter(), chunk
        frames = geometry.start(chunk + 1) - geometry.start(chunk)
        part = cond.frames(0, frames)
        bound, drawn = stream.prepare_chunk(part), noise[:, :, :frames]
        if chunk or cond.first_latent is None:
            stream.update_cache(bound, stream.next_chunk(bound, drawn, sampler), drawn[-1])
        else:
            stream.update_cache(bound, cond.first_latent)
        if noise.is_cuda:
            torch.cuda.synchronize(noise.device)
        seconds.append(time.perf_counter() - start)
    stream.restart(cond)
    return seconds


@dataclass(frozen=True, kw_only=True)
class KernelTimes:
    """Milliseconds of one attention of a steady chunk, by kernel; None where it cannot run here."""

    shape: tuple[int, ...]
    """Heads, query rows, key rows, head width."""
    ms: dict[str, float | None]

    @property
    def winner(self) -> str:
        return min((ms, name) for name, ms in self.ms.items() if ms is not None)[1]


@torch.no_grad()
def time_attention_kernels(net: Backbone, geometry: Geometry, repeats: int = 10) -> KernelTimes:
    """Time every attention kernel on the shape of a steady chunk."""
    weight = next(net.parameters())
    rows = geometry.chunk * geometry.tokens
    q = torch.randn(1, net.cache_heads, rows, net.head_width, dtype=weight.dtype, device=weight.device)
    k, v = torch.randn(2, 1, net.cache_heads, geometry.rows, net.head_width, dtype=weight.dtype, device=weight.device)
    shape = net.cache_heads, rows, geometry.rows, net.head_width
    return KernelTimes(shape=shape, ms={name: _ms(kernel, (q, k, v), repeats) for name, kernel in KERNELS.items()})


def _ms(kernel: SDPBackend, inputs: tuple[Tensor, Tensor, Tensor], repeats: int) -> float | None:
    best = float("inf")
    try:
        with sdpa_kernel(kernel):
            for _ in range(repeats + 2):
                start = time.perf_counter()
                F.scaled_dot_product_attention(*inputs)
                if inputs[0].is_cuda:
                    torch.cuda.synchronize(inputs[0].device)
                best = min(best, time.perf_counter() - start)
    except RuntimeError:  # torch's word for a kernel that this device, dtype or shape does not have
        return None
    return 1000 * best


def attention_kernel(cfg: EngineConfig) -> AbstractContextManager[object]:
    """A context in which attention runs as the config says."""
    if cfg.attention == "race":
        raise ConfigError("engine.attention=race: the race has not been run; take the config that `ready` returns")
    return nullcontext() if cfg.attention == "torch" else sdpa_kernel(KERNELS[cfg.attention])


@dataclass(frozen=True)
class Fp8Trial:
    """A short stream on fixed noise, by which FP8 is judged: longer than the sinks, which are never in FP8."""

    cond: Condition
    noise: Noise
    sampler: Sampler
    decode: Callable[[Latents], Tensor] | None = None
    """Latents to pixels in [-1, 1], where a codec is at hand."""


@dataclass(frozen=True, kw_only=True)
class Fp8Fidelity:
    """How far the latents of a trial in FP8 are from those of the plain form."""

    error: float
    """|fp8 - plain| / |plain|, over all chunks."""
    limit: float
    psnr: float | None
    """Of the decoded frames, in dB; None without a codec."""


@torch.no_grad()
def check_fp8(cfg: EngineConfig, net: Backbone, geometry: Geometry, trial: Fp8Trial) -> Fp8Fidelity:
    """Put a network into FP8, in place; but if its trial misses the limit, raise ConfigError and leave it plain."""

    def made() -> Latents:
        return generate_latents(net, trial.sampler, trial.noise, trial.cond, geometry).float()

    plain = made()
    if cfg.fp8 in ("linears", "all"):
        net.use_fp8()
    if cfg.fp8 in ("cache", "all"):
        net.arena_type = Fp8Arena
    fp8 = made()
    error, psnr = float((fp8 - plain).norm() / plain.norm()), None
    if trial.decode:
        a, b = (trial.decode(x.to(trial.noise)).float().clamp(-1, 1) for x in (fp8, plain))
        psnr = float(-10 * ((a - b) / 2).square().mean().clamp(min=1e-12).log10())
    if not error <= cfg.fp8_limit:  # also if it is no number
        if cfg.fp8 in ("linears", "all"):
            net.use_fp8(False)
        net.arena_type = KVArena
        seen = "" if psnr is None else f" (frames: {psnr:.1f} dB)"
        raise ConfigError(
            f"engine.fp8={cfg.fp8} changes the latents of a trial by {error:.3g} of their norm{seen}, and the limit is "
            f"engine.fp8_limit={cfg.fp8_limit:g}; leave FP8 off, take less of it, or raise the limit if you accept that"
        )
    return Fp8Fidelity(error=error, limit=cfg.fp8_limit, psnr=psnr)


def decoder(cfg: EngineConfig, codec: VideoCodec, backend: str | Callable = "inductor") -> Decode:
    """The codec's `decode_next` as the config says, to be given one latent at a time; weights change their layout.

    Compiled, it must be whole graphs, or it fails: one for the first latent of a stream, one for all others.
    """
    if cfg.decode == "plain":
        return codec.decode_next
    channels_last(codec)
    if cfg.decode == "channels_last":
        return codec.decode_next
    return torch.compile(codec.decode_next, backend=backend, fullgraph=True, dynamic=False)


def prepare_network(
    cfg: EngineConfig, net: Backbone, geometry: Geometry, trial: Fp8Trial | None = None
) -> tuple[EngineConfig, KernelTimes | None, Fp8Fidelity | None]:
    """Make a network ready for streams, in place: in FP8, compiled, with kernels.

    Returns the config with the winner in place of a race, the race, and what the trial said.
    """
    kept = raced = None
    if cfg.fp8 != "none":
        if trial is None:
            raise ConfigError(f"engine.fp8={cfg.fp8} has to be judged by a trial, and none was given")
        kept = check_fp8(cfg, net, geometry, trial)
    if cfg.compile:
        net.compile_blocks()
    if cfg.kernels:
        net.use_kernels()
    if cfg.attention == "race":
        raced = time_attention_kernels(net, geometry)
        cfg = replace(cfg, attention=raced.winner)
    return cfg, raced, kept
