"""How long a model takes, by definitions that go with every number; batch 1, warm, nothing but the model running.

network   noise to latents: every pass of the chunk, codec excluded
commit    the pass that writes a clean chunk into the cache; a steady chunk pays it, the first one does not
decode    latents to uint8 frames on the host
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import torch
from jaxtyping import UInt8

from minwm.core.flow import Latents
from minwm.core.media import to_frames as to_frames
from minwm.core.media import to_pixels
from minwm.core.runtime import StageTimer, generator, git_commit, versions
from minwm.core.types import Condition
from minwm.nets.text import WordText
from minwm.session.generate import check_image, check_length
from minwm.store.model import Model, ModelConfig
from minwm.stream.rollout import Stream, generate_latents, sample_noise, stream_latents
from minwm.stream.solvers import Noise

Image = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Times are medians over repeats (or over all their chunks), in milliseconds."""

    sampler: str
    passes: int
    """Network passes per chunk (bidirectional: per clip), both branches of guidance counted, commit excluded."""
    first_ms: float
    """Network alone, from noise to the first finished latents; for a bidirectional model those of the whole clip."""
    chunk_ms: float
    """Network and commit of a later chunk; for a bidirectional model its one time divided by its chunks."""
    chunk_p90_ms: float
    decode_ms: float
    """Codec, per chunk."""
    first_pixel_ms: float
    """From the encoded prompt and image to the first generated frames on the host."""
    fps: float
    """Generated frames over the time from noise to the last pixel, decoding included."""
    frames: int
    """Generated frames of the clip; a given first frame does not count."""
    chunk_frames: int
    """Frames that a chunk adds."""
    pass_gflop: float
    """One network pass, no guidance, the last chunk of the clip with all its context; a multiply-add is two."""
    parameters: int
    memory_gb: float | None
    """Peak of allocated GPU memory; None on a CPU."""
    threads: int
    """CPU threads that torch uses."""
    repeats: int
    date: str
    commit: str | None
    versions: dict[str, str]


@dataclass(frozen=True)
class _Clip:
    """Seconds of one clip: per chunk for the network (the commit of the chunk before it included) and the codec."""

    network: list[float]
    decode: list[float]


def random_model(config: ModelConfig, seed: int = 0) -> Model:
    """A model with fresh weights: as fast as a trained one. Its prompts are words: no text encoder has to be there."""
    torch.manual_seed(seed)
    words = WordText(dim=config.text.dim, length=config.text.length)
    config = replace(config, text=words, negative=None)
    net, codec = config.network.build(), config.codec.build()
    return Model(config, net.eval().requires_grad_(False), codec.eval().requires_grad_(False))


@torch.no_grad()
def bench_model(model: Model, image: Image | None = None, repeats: int = 5, latents: int | None = None) -> BenchResult:
    """Measure a model on its device, over clips of `latents` (those of training unless told).

    What is seen does not change the speed, so the camera stands still and the image may be left out.
    """
    cfg, device = model.config, next(model.net.parameters()).device
    count = latents or cfg.latents
    check_length(cfg, count)
    cond = _condition(model, image, count, device)
    like = torch.empty(0, device=device)
    samples = cfg.sampler.num_noise_samples(cfg.geometry)
    noise = sample_noise(cfg.latent_shape(1, count), samples, like, generator(0, "bench"))
    given = 0 if cond.first_latent is None else 1
    quick = replace(model, config=replace(cfg, sampler=replace(cfg.sampler, steps=1)))
    _clip(quick, noise, cond)  # warm-up: kernels are chosen, memory is taken
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clips = [_clip(model, noise, cond) for _ in range(max(1, repeats))]
    first = [sum(c.network) for c in clips] if _whole(model) else _first_chunks(model, noise, cond, len(clips))
    generated = len(clips[0].network) - given
    later = [t / generated for t in first] if _whole(model) else [t for c in clips for t in c.network[given + 1 :]]
    pixels_at = [sum(c.network[: given + 1]) + sum(c.decode[: given + 1]) for c in clips]
    totals = [sum(c.network) + sum(c.decode) for c in clips]
    frames = cfg.motion.stride * (count - 1) + 1 - given
    return BenchResult(
        sampler=cfg.sampler.kind,
        passes=cfg.sampler.passes,
        first_ms=_ms(first),
        chunk_ms=_ms(later or first),
        chunk_p90_ms=_ms(later or first, 90),
        decode_ms=_ms([t for c in clips for t in c.decode[given:]]),
        first_pixel_ms=_ms(pixels_at),
        fps=1000 * frames / _ms(totals),
        frames=frames,
        chunk_frames=cfg.stream.chunk * cfg.motion.stride,
        pass_gflop=_pass_flop(replace(model, config=replace(cfg, latents=count))) / 1e9,
        parameters=sum(p.numel() for p in model.net.parameters()),
        memory_gb=torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        threads=torch.get_num_threads(),
        repeats=len(clips),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=git_commit(),
        versions=versions(),
    )


def _whole(model: Model) -> bool:
    return not model.config.sampler.causal


def _condition(model: Model, image: Image | None, count: int, device: torch.device) -> Condition:
    """A camera that stands still, a prompt, and an image if the model starts from one."""
    cfg = model.config
    image = np.zeros((cfg.height, cfg.width, 3), np.uint8) if image is None else image
    check_image(cfg, image)
    first = (
        model.codec.encode(to_pixels(image)[None, None].to(device)) if cfg.geometry.first_chunk_frames == 1 else None
    )
    w2c = torch.eye(4).expand(1, count, 4, 4)
    K = torch.tensor(cfg.intrinsics, dtype=torch.float32).expand(1, count, 4)
    return Condition(**cfg.encode_prompts(["a room"]), w2c=w2c, K=K, first_latent=first).to(device)


def _clip(model: Model, noise: Noise, cond: Condition) -> _Clip:
    """Make and decode a clip, and say when each chunk was there."""
    clock, decoding = StageTimer(noise.device), None
    times = _Clip([], [])
    for latents in _chunks(model, noise, cond):
        times.network.append(clock.record("diffuse"))
        drawn, decoding = model.codec.decode_next(latents, decoding)
        to_frames(drawn[0])
        times.decode.append(clock.record("decode"))
    return times


def _chunks(model: Model, noise: Noise, cond: Condition) -> Iterator[Latents]:
    sampler, geometry = model.config.sampler, model.config.geometry
    if sampler.causal:
        yield from stream_latents(model.net, sampler, noise, cond, geometry)
        return
    clip = generate_latents(model.net, sampler, noise, cond, geometry)
    yield from (clip[:, a:b] for a, b in geometry.chunks(clip.shape[1]))


def _first_chunks(model: Model, noise: Noise, cond: Condition, repeats: int) -> list[float]:
    """Seconds of the first generated chunk alone: the prompt is read and the image is in the cache."""
    times, clock, sampler = [], StageTimer(noise.device), model.config.sampler
    for _ in range(repeats):
        state, (a, b) = _started(model, cond, sampler.guidance)
        bound = state.prepare_chunk(cond.frames(a, b))
        clock.restart()
        state.next_chunk(bound, noise[:, :, a:b], sampler)
        times.append(clock.record("diffuse"))
    return times


def _started(model: Model, cond: Condition, guidance: float) -> tuple[Stream, tuple[int, int]]:
    """A stream before its first generated chunk, and the frames of that chunk."""
    geometry = model.config.geometry
    state = Stream(model.net, cond, geometry, guidance)
    if cond.first_latent is not None:
        state.update_cache(state.prepare_chunk(cond.frames(0, 1)), cond.first_latent)
    return state, (geometry.start(state.chunk), geometry.start(state.chunk + 1))


def _pass_flop(model: Model) -> int:
    """FLOPs of one network pass: of the last chunk of a clip with all its context, or of the whole clip."""
    cfg, geometry = model.config, model.config.geometry
    frames = cfg.latents if _whole(model) else geometry.chunk
    seen = cfg.latents if _whole(model) else min(cfg.latents, geometry.start(geometry.slots))
    return model.net.flops(frames, geometry.tokens, seen * geometry.tokens)


def _ms(seconds: list[float], percentile: float = 50) -> float:
    return 1000 * float(np.percentile(seconds, percentile))
