"""Walking around: an engine turns the camera's next poses into frames, and a session steers it with actions.

An engine looks the same whether learned or rendered, so player, evaluation and recordings cannot tell them apart.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minwm.cameras.track import CameraTrack, se3_inverse
from minwm.cameras.trajectory import Motion
from minwm.core.config import UserError
from minwm.core.flow import Latents
from minwm.core.media import to_pixels, to_uint8
from minwm.core.runtime import StageTimer, generator
from minwm.core.types import Condition
from minwm.render.worlds import World
from minwm.session.generate import check_image
from minwm.store.model import Model, ModelConfig
from minwm.stream.accelerate import (
    PLAIN,
    CudaSideStream,
    EngineConfig,
    SideTask,
    attention_kernel,
    decoder,
    open_stream,
    warm_up,
)
from minwm.stream.rollout import Stream, image_chunk

Pose = Float[np.ndarray, "4 4"]
Frames = UInt8[np.ndarray, "n H W 3"]
Beginning = tuple[dict[str, Tensor], UInt8[np.ndarray, "h w 3"] | None, int]
"""Text states, image and seed of a walk."""


@runtime_checkable
class Engine(Protocol):
    """Frames for a camera that moves on."""

    motion: Motion
    chunk: int
    """Latents per step."""
    timer: StageTimer
    """Seconds of the newest chunk by stage: encode (at the start), diffuse (or render), decode, copy to the host; then
    cache_update."""

    def start(self) -> Frames:
        """The first frame, seen from the identity pose."""
        ...

    def advance(self, c2w: Float[np.ndarray, "n 4 4"]) -> Iterator[Frames]:
        """Frames for the next `chunk * stride` camera poses, relative to the first frame: latent by latent, so that
        none waits for the next. All must be taken before anything else is asked of the engine."""
        ...

    def update_cache(self) -> None:
        """Do what frames need not wait for. Who shows them calls this afterwards; else the next step does it."""
        ...

    def snapshot(self) -> Any:
        """What undoes the next step. Cheap: only what that step will overwrite."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Undo the step made after `snapshot`; several steps are undone newest first."""
        ...


class RendererEngine:
    """Ground truth: a procedural world seen from a placed camera."""

    def __init__(
        self, world: World, origin: Pose, K: Float[np.ndarray, "4"], motion: Motion, chunk: int, size: tuple[int, int]
    ) -> None:
        self.world, self.origin, self.K = world, origin, K
        self.motion, self.chunk, self.size = motion, chunk, size
        self.timer = StageTimer()

    @classmethod
    def spawn(cls, seed: int, track: CameraTrack, cfg: ModelConfig) -> "RendererEngine":
        """A world, and a place in it from which the whole anchored track is free, seen as a model would see it."""
        if seed < 0:
            raise UserError(f"world {seed}: worlds are numbered from 0")
        world = World(seed)
        origin = world.spawn(np.random.default_rng(seed), track)
        if origin is None:
            raise UserError(f"world {seed} has no free path for this trajectory; try another world or a shorter one")
        return cls(world, origin, track.K[0], cfg.motion, cfg.stream.chunk, (cfg.height, cfg.width))

    def start(self) -> Frames:
        self.timer.restart()
        return self._render(np.eye(4)[None])

    def advance(self, c2w: Float[np.ndarray, "n 4 4"]) -> Iterator[Frames]:
        self.timer.restart()
        for part in np.split(c2w, range(self.motion.stride, len(c2w), self.motion.stride)):
            self.timer.skip()
            yield self._render(part)

    def _render(self, c2w: Float[np.ndarray, "n 4 4"]) -> Frames:
        track = CameraTrack(c2w, self.K, self.motion.fps).transformed(self.origin)
        frames = self.world.render(track, *self.size).frames
        self.timer.record("diffuse")
        return frames

    def update_cache(self) -> None: ...

    def snapshot(self) -> None:
        """A world has no memory."""

    def restore(self, snapshot: None) -> None: ...


class ModelEngine:
    """A causal model, streamed chunk by chunk from an image, or from the prompt alone; deterministic for a seed.

    A model that is to be compiled, or to use kernels, must have been made `ready` for it (stream/accelerate.py).

    Frames never wait for the commit of their chunk: in turn (the default) `settle` does it after they were handed out;
    with `beside` it is begun right after the decoder, and both run at once.
    """

    def __init__(
        self,
        model: Model,
        image: UInt8[np.ndarray, "h w 3"] | None,
        prompt: str,
        seed: int = 0,
        engine: EngineConfig = PLAIN,
    ) -> None:
        cfg = model.config
        if not cfg.sampler.causal:
            raise UserError("a bidirectional model makes whole clips and cannot be steered; take an autoregressive one")
        self.model, self.motion, self.chunk, self.sampler = model, cfg.motion, cfg.stream.chunk, cfg.sampler
        self.device = next(model.net.parameters()).device
        self.engine, self.opened, self.decode = engine, None, decoder(engine, model.codec)
        self.side_task: SideTask | None = CudaSideStream(self.device) if engine.overlap else None
        self.uncommitted: tuple[Any, ...] | None = None
        self.begin(self.read(image, prompt, seed))
        self.K = torch.tensor(cfg.intrinsics, dtype=torch.float32)
        self.timer = StageTimer(self.device)

    def read(self, image: UInt8[np.ndarray, "h w 3"] | None, prompt: str, seed: int) -> Beginning:
        """What `begin` takes. Raises UserError for an image of another size, or a prompt that cannot be read."""
        if image is not None:
            check_image(self.model.config, image)
        return self.model.config.encode_prompts([prompt]), image, seed

    def begin(self, beginning: Beginning) -> None:
        """What the next `start` begins with, in the memory that there is."""
        self.text, self.image, self.seed = beginning

    @torch.no_grad()
    def start(self) -> Frames:
        """The image; without one, the first chunk, in which the camera stands still."""
        self.noise, self.decoding, self.uncommitted = generator(self.seed, "session"), None, None
        self.timer.restart()
        geometry, first = self.model.config.geometry, None
        still = np.eye(4)[None].repeat(geometry.first_chunk_frames, 0)
        if self.opened is None:
            self.opened = open_stream(
                self.engine, self.model.net, self.condition(still), geometry, self.sampler.guidance
            )
        else:
            self.opened.restart(self.condition(still))
        if self.image is not None:
            first = self.model.codec.encode(to_pixels(self.image)[None, None].to(self.device))
            first = image_chunk(first, geometry)
        self.timer.record("encode")
        return np.concatenate(list(self._chunk(still, first)))

    @torch.no_grad()
    def advance(self, c2w: Float[np.ndarray, "n 4 4"]) -> Iterator[Frames]:
        self.update_cache()
        self.timer.restart()
        yield from self._chunk(c2w[self.motion.stride - 1 :: self.motion.stride])

    def set_prompt(self, prompt: str) -> None:
        """Another prompt, from the next chunk on."""
        self.text = self.model.config.encode_prompts([prompt])
        self.stream.set_prompt(self.condition(np.eye(4)[None]))

    @torch.no_grad()
    def warm_up(self) -> list[float]:
        """Start, decode and visit every regime, so that nothing is compiled, recorded or chosen during a walk.

        Returns seconds: of the start with the decoder, then of each regime. What follows is another `start`.
        """
        began, cfg = time.perf_counter(), self.model.config
        self.start()
        samples = self.sampler.num_noise_samples(cfg.geometry)
        noise = torch.zeros(samples, *cfg.latent_shape(1, self.chunk), device=self.device)
        list(self._frames(noise[0, :, :1]))  # a later latent than the first
        self.update_cache()
        cond = self.condition(np.eye(4)[None].repeat(self.chunk, 0))
        cond = replace(cond, first_latent=None if self.image is None else noise[0, :, :1])
        with attention_kernel(self.engine):
            return [time.perf_counter() - began, *warm_up(self.stream, cond, noise, self.sampler)]

    @property
    def stream(self) -> Stream:
        if self.opened is None:
            raise UserError("the engine has no first frame yet: call start() before step()")
        return self.opened

    def _chunk(self, c2w: Float[np.ndarray, "f 4 4"], latents: Latents | None = None) -> Iterator[Frames]:
        bound, hidden = self.stream.prepare_chunk(self.condition(c2w)), None
        if latents is None:
            samples = self.sampler.num_noise_samples(self.stream.geometry)
            shape = (samples, *self.model.config.latent_shape(1, len(c2w)))
            noise = torch.randn(shape, generator=self.noise).to(self.device)
            with attention_kernel(self.engine):
                latents, hidden = self.stream.next_chunk(bound, noise, self.sampler), noise[-1]
        self.timer.record("diffuse")
        self.uncommitted = bound, latents, hidden
        return self._frames(latents)

    def _frames(self, latents: Latents) -> Iterator[Frames]:
        """Frames of each of the next latents, on the host."""
        alone = latents.split(1, dim=1)
        if self.side_task is None:
            for latent in alone:
                self.timer.skip()
                drawn = self._draw(latent)
                self.timer.record("decode")
                frames = drawn.cpu().numpy()
                self.timer.record("copy")
                yield frames
        else:
            begun = [self.side_task(self._draw, latent) for latent in alone]
            self._commit()
            for wait in begun:
                frames = wait().numpy()
                self.timer.record("decode", wait=False)  # and copied; the commit may still be under way
                yield frames
                self.timer.skip()

    def _draw(self, latent: Latents) -> UInt8[Tensor, "n H W 3"]:
        """Frames of the next latent, on the device."""
        alone = latent.clone(memory_format=torch.contiguous_format)  # a graph is for one layout of memory
        decoded, self.decoding = self.decode(alone, self.decoding)
        return to_uint8(decoded[0])

    def _commit(self) -> None:
        if self.uncommitted:
            with attention_kernel(self.engine):
                self.stream.update_cache(*self.uncommitted)
            self.uncommitted = None

    def update_cache(self) -> None:
        """Write the newest chunk into the cache, if that has not been begun: its frames need not wait for this pass."""
        if self.uncommitted:
            self._commit()
            self.timer.record("cache_update")

    def condition(self, c2w: Float[np.ndarray, "f 4 4"]) -> Condition:
        """The prompt, and cameras at these poses."""
        w2c = torch.from_numpy(se3_inverse(c2w)).float()[None]
        return Condition(**self.text, w2c=w2c, K=self.K.expand(1, len(c2w), 4)).to(self.device)

    def snapshot(self) -> tuple[Any, ...]:
        self.update_cache()
        return self.stream.snapshot(), self.decoding, self.noise.get_state()

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        stream, self.decoding, state = snapshot
        self.uncommitted = None  # of a step that is undone
        self.stream.restore(stream)
        self.noise.set_state(state)
