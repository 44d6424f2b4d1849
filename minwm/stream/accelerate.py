"""Options that make a stream fast on a GPU. Each is chosen explicitly and has a plain form with the same result.

compile    the parts of a block before and after attention become a few fused kernels (`Backbone.compile_blocks`)
graphs     all passes of a chunk are one CUDA graph, recorded once per graph shape (`GraphedStream`)
kernels    norm, RoPE, PRoPE and the write into the cache in one Triton kernel (`Backbone.use_kernels`)
attention  a kernel of attention by name, or the fastest of all on this machine (`time_attention_kernels`)
fp8        matrix products of the blocks, or the cache, in 8 bits; refused if the result differs too much (`check_fp8`)
decode     the codec in channels-last memory, also compiled: one graph for a first latent, one for all others
overlap    decoding and the copy to the host on a second CUDA stream, while the cache is updated (`CudaSideStream`)

A graph shape is a slot of the cache with the number of valid rows: one for every chunk until the cache is full, then
one for every slot of the window. Nothing else about a chunk is an integer on the host.
"""

import time
from collections.abc import Callable, Hashable, Sequence
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
from minwm.core.types import Condition, Views
from minwm.nets.attention import Cached, KVArena, all_visible
from minwm.nets.backbone import Backbone, PreparedCondition
from minwm.nets.chunks import Geometry
from minwm.nets.codec import Decode, VideoCodec, channels_last
from minwm.nets.fp8 import Fp8Arena
from minwm.stream.rollout import Stream, generate_latents
from minwm.stream.solvers import Noise, Sampler

Function = Callable[..., Tensor | None]
Capture = Callable[[Function, list[Tensor]], Function]
"""capture(function, inputs) -> the same function, recorded: all that is not an input becomes a constant."""
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
AttentionKernel = Literal["torch", "fastest", "cudnn", "flash", "efficient", "math"]
Fp8 = Literal["none", "linears", "cache", "all"]
DecodeMode = Literal["plain", "channels_last", "compile"]
PendingResult = Callable[[], Tensor]
"""Waits for submitted work and returns its result on the host."""
Submit = Callable[[Callable[[Tensor], Tensor], Tensor], PendingResult]
"""submit(work, input) starts work(input), to run concurrently with what the device is given next."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How streams run. The default is the plain form, which runs on any device."""

    compile: bool = False
    kernels: bool = False
    """Needs triton, and CUDA unless TRITON_INTERPRET=1."""
    graphs: bool = False
    """Needs CUDA."""
    attention: AttentionKernel = "torch"
    """torch's own choice, the fastest kernel on this machine, or a kernel by name. For the network only."""
    decode: DecodeMode = "plain"
    """The codec as it is, with weights and activations channels-last in memory, or channels-last and compiled."""
    overlap: bool = False
    """Needs CUDA."""
    fp8: Fp8 = "none"
    """In FP8 (nets/fp8.py): weights and inputs of the large matrix products, the cache, or both."""
    fp8_limit: float = 0.1
    """Relative error of the trial's latents above which FP8 is refused."""


PLAIN = EngineConfig()


class CudaGraphs:
    """Records functions as CUDA graphs in one memory pool: they run one at a time, and results are copied out."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("engine.graphs needs a CUDA device, and there is none; leave it off")
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Function, inputs: list[Tensor]) -> Function:
        static, side = [x.clone() for x in inputs], torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up: kernels are chosen and tables made before recording
            for _ in range(2):
                function(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = function(*static)

        def replay(*given: Tensor) -> Tensor | None:
            for place, x in zip(static, given, strict=True):
                place.copy_(x)
            graph.replay()
            return result if result is None else result.clone()

        return replay


class GraphedStream(Stream):
    """A stream whose passes are recorded, once per graph shape, and then replayed."""

    def __init__(self, *args: Any, capture: Capture, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.capture = capture
        self.recorded: dict[Hashable, Function] = {}

    @torch.no_grad()
    def set_prompt(self, cond: Condition) -> None:
        """In place: recorded graphs read the prompt at its address."""
        static = self.text
        super().set_prompt(cond)
        for old, new in zip(static, self.text, strict=True):
            for place, x in zip(old, new, strict=True):
                if place is not None and x is not None:
                    place.copy_(x)
        self.text = static

    def denoise(self, cond: PreparedCondition, noise: Noise, sampler: Sampler) -> Latents:
        run, sampler = super().denoise, sampler.at_chunk(self.chunk)
        result = self._replay(sampler, lambda cond, noise: run(cond, noise, sampler), cond, noise)
        assert result is not None
        return result

    def cache_update_pass(
        self, cond: PreparedCondition, x: Latents, times: tuple[float, ...] = (0.0,), parts: tuple[int, ...] = ()
    ) -> None:
        run = partial(super().cache_update_pass, times=times, parts=parts)
        self._replay(("cache_update", times, parts), run, cond, x)

    def _replay(
        self, name: Hashable, run: Callable[..., Tensor | None], cond: PreparedCondition, x: Tensor
    ) -> Tensor | None:
        """run(cond, x) as a recorded graph; the tensors of `cond` that differ between chunks are its inputs too."""
        if isinstance(cond.camera, Rays):
            raise ConfigError("engine.graphs records projective cameras only, not Plücker rays; leave it off")
        rope = self.net.rope_table(x if x.ndim == 5 else x[0], Cached(self.arena, self.chunk))
        camera = cond.camera and cond.camera.matrices
        tensors = {"x": x, "rope": rope, "camera": camera, "first_latent": cond.first_latent, "actions": cond.actions}
        inputs = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        geometry = self.arena.geometry
        slot, rows = geometry.slot(self.chunk), geometry.valid_rows(self.chunk)
        key = name, tuple(x.shape), slot, rows, *inputs
        if key not in self.recorded:

            def function(*args: Tensor) -> Tensor | None:
                given = dict(zip(inputs, args, strict=True))
                x, camera = given.pop("x"), Projection(given.pop("camera")) if "camera" in given else None
                return run(PreparedCondition(self.text, camera, **given), x)

            self.recorded[key] = self.capture(function, list(inputs.values()))
        return self.recorded[key](*inputs.values())


class CudaSideStream:
    """A second CUDA stream, on which latents become frames on the host while the cache is updated on the first one.

    Its work has priority: frames are waited for, the cache update is not.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(f"engine.overlap needs a CUDA device, and the model is on {device}; leave it off")
        self.stream = torch.cuda.Stream(device, priority=-1)

    def __call__(self, work: Callable[[Tensor], Tensor], x: Tensor) -> PendingResult:
        """Submit work(x); its input may still be computed on the current stream."""
        side = self.stream
        side.wait_stream(torch.cuda.current_stream(x.device))
        x.record_stream(side)  # so that its memory is not reused before this stream has read it
        with torch.cuda.stream(side):
            # state that `work` keeps belongs to this stream, which is the only one to read it
            result = work(x).to("cpu", non_blocking=True)  # into page-locked memory
            done = side.record_event()

        def wait() -> Tensor:
            done.synchronize()
            return result.clone()  # page-locked memory is scarce: it is released for the next chunk

        return wait


def open_stream(
    cfg: EngineConfig,
    net: Backbone,
    cond: Condition,
    geometry: Geometry,
    guidance: float = 1.0,
    views: Sequence[Views] = (),
) -> Stream:
    """A stream that runs as the config says, of a network that went through `prepare_network`."""
    if cfg.graphs:
        return GraphedStream(net, cond, geometry, guidance, views=views, capture=CudaGraphs())
    return Stream(net, cond, geometry, guidance, views=views)


@torch.no_grad()
def warm_up(stream: Stream, cond: Condition, noise: Noise, sampler: Sampler) -> list[float]:
    """Run every graph shape once, so that nothing is compiled, recorded or chosen later; then restart the stream.

    Returns seconds per graph shape. cond: of the longest chunk. noise: of that chunk, as `next_chunk` takes it.
    """
    geometry, seconds = stream.geometry, []
    for chunk in range(geometry.distinct_graph_shapes):
        start, stream.chunk = time.perf_counter(), chunk
        frames = geometry.start(chunk + 1) - geometry.start(chunk)
        part = replace(cond.frames(0, frames), first_latents=None if chunk else cond.first_latents)
        prepared, chunk_noise = stream.prepare_chunk(part), noise[:, :, :frames]
        stream.update_cache(prepared, stream.next_chunk(prepared, chunk_noise, sampler), chunk_noise[-1])
        if noise.is_cuda:
            torch.cuda.synchronize(noise.device)
        seconds.append(time.perf_counter() - start)
    stream.restart(cond)
    return seconds


@dataclass(frozen=True, kw_only=True)
class KernelTimes:
    """Milliseconds of one attention call of a steady chunk, by kernel; None where a kernel cannot run."""

    shape: tuple[int, ...]
    """Heads, query rows, key rows, head width."""
    ms: dict[str, float | None]

    @property
    def fastest(self) -> str:
        return min((ms, name) for name, ms in self.ms.items() if ms is not None)[1]


@torch.no_grad()
def time_attention_kernels(net: Backbone, geometry: Geometry, repeats: int = 10) -> KernelTimes:
    """Time every attention kernel on the shape of a steady chunk."""
    weight, geometry = next(net.parameters()), replace(geometry, text_rows=net.text_rows)
    queries = geometry.chunk * geometry.tokens
    q = torch.randn(1, net.cache_heads, queries, net.head_width, dtype=weight.dtype, device=weight.device)
    k, v = torch.randn(2, 1, net.cache_heads, geometry.rows, net.head_width, dtype=weight.dtype, device=weight.device)
    shape, visible = (net.cache_heads, queries, geometry.rows, net.head_width), all_visible(geometry, 1, weight.device)
    inputs = q, k, v, visible  # not every kernel can hide the padding of text
    return KernelTimes(
        shape=shape, ms={name: _attention_ms(kernel, inputs, repeats) for name, kernel in KERNELS.items()}
    )


def _attention_ms(
    kernel: SDPBackend, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], repeats: int
) -> float | None:
    best = float("inf")
    try:
        with sdpa_kernel(kernel):
            for _ in range(repeats + 2):
                start = time.perf_counter()
                F.scaled_dot_product_attention(*inputs)
                if inputs[0].is_cuda:
                    torch.cuda.synchronize(inputs[0].device)
                best = min(best, time.perf_counter() - start)
    except RuntimeError:  # torch raises it where a kernel does not support the device, dtype or shape
        return None
    return 1000 * best


def attention_kernel(cfg: EngineConfig) -> AbstractContextManager[object]:
    """A context in which attention runs as the config says."""
    if cfg.attention == "fastest":
        raise ConfigError("engine.attention=fastest: no kernel was timed; take the config that prepare_network returns")
    return nullcontext() if cfg.attention == "torch" else sdpa_kernel(KERNELS[cfg.attention])


@dataclass(frozen=True)
class Fp8Trial:
    """A short stream on fixed noise, made with and without FP8; longer than the sinks, which are never in FP8."""

    cond: Condition
    noise: Noise
    sampler: Sampler
    decode: Callable[[Latents], Tensor] | None = None
    """Latents to pixels in [-1, 1], to report a PSNR too."""


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
    """Put a network into FP8, in place. If its trial exceeds the limit, undo that and raise ConfigError."""

    def generate() -> Latents:
        return generate_latents(net, trial.sampler, trial.noise, trial.cond, geometry).float()

    plain = generate()
    if cfg.fp8 in ("linears", "all"):
        net.use_fp8()
    if cfg.fp8 in ("cache", "all"):
        net.arena_type = Fp8Arena
    fp8 = generate()
    error, psnr = float((fp8 - plain).norm() / plain.norm()), None
    if trial.decode:
        a, b = (trial.decode(x.to(trial.noise)).float().clamp(-1, 1) for x in (fp8, plain))
        psnr = float(-10 * ((a - b) / 2).square().mean().clamp(min=1e-12).log10())
    if not error <= cfg.fp8_limit:  # also if it is NaN
        if cfg.fp8 in ("linears", "all"):
            net.use_fp8(False)
        net.arena_type = KVArena
        frames = "" if psnr is None else f" (frames: {psnr:.1f} dB)"
        raise ConfigError(
            f"engine.fp8={cfg.fp8}: relative error {error:.3g} of the trial's latents{frames} is above "
            f"engine.fp8_limit={cfg.fp8_limit:g}; leave FP8 off, use less of it, or raise the limit if you accept that"
        )
    return Fp8Fidelity(error=error, limit=cfg.fp8_limit, psnr=psnr)


def decoder(cfg: EngineConfig, codec: VideoCodec, backend: str | Callable = "inductor") -> Decode:
    """The codec's `decode_next` as the config says, for one latent at a time; the codec's weights change their layout.

    Compiled, it is two whole graphs, or an error: one for the first latent of a stream, one for all others. Raises
    ConfigError if that is asked of a codec whose state grows.
    """
    if cfg.decode == "plain":
        return codec.decode_next
    if cfg.decode == "compile" and codec.grows:
        raise ConfigError(
            f"engine.decode=compile: one graph cannot hold the steps of {type(codec).__name__}, whose state grows "
            "with the stream; give it a window (codec.window), or take engine.decode=channels_last"
        )
    channels_last(codec)
    if cfg.decode == "channels_last":
        return codec.decode_next
    return torch.compile(codec.decode_next, backend=backend, fullgraph=True, dynamic=False)


def prepare_network(
    cfg: EngineConfig, net: Backbone, geometry: Geometry, trial: Fp8Trial | None = None
) -> tuple[EngineConfig, KernelTimes | None, Fp8Fidelity | None]:
    """Make a network ready for streams, in place: in FP8, compiled, with kernels.

    Returns the config with the fastest attention kernel by name, the kernels' times, and the fidelity of FP8; None for
    what the config does not ask for. Raises ConfigError for FP8 without a trial, or with one that exceeds the limit.
    """
    kernel_times = fidelity = None
    if cfg.fp8 != "none":
        if trial is None:
            raise ConfigError(f"engine.fp8={cfg.fp8} has to be checked with a trial, and none was given")
        fidelity = check_fp8(cfg, net, geometry, trial)
    if cfg.compile:
        # a pass reads what a chunk sees, up to all other slots; each number of them is a form of the blocks
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 + geometry.slots)
        net.compile_blocks()
    if cfg.kernels:
        net.use_kernels()
    if cfg.attention == "fastest":
        kernel_times = time_attention_kernels(net, geometry)
        cfg = replace(cfg, attention=kernel_times.fastest)
    return cfg, kernel_times, fidelity
