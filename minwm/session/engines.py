"""Engines: frames for a camera that moves on, from a causal model or from a rendered scene.

Both have one interface, so the player, the evaluation and recordings take either.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minwm.cameras.track import CameraTrack, se3_inverse
from minwm.cameras.trajectory import Motion
from minwm.control.action import action_labels
from minwm.core.config import UserError
from minwm.core.flow import FirstLatents, Latents
from minwm.core.media import to_pixels, to_uint8
from minwm.core.runtime import StageTimer, generator
from minwm.core.types import Condition, Views
from minwm.render.base import Scene, Scenes
from minwm.session.generate import check_finite, check_image, check_start
from minwm.session.start import StartVideo
from minwm.session.views import Viewpoint
from minwm.store.model import Model, ModelConfig
from minwm.stream.accelerate import (
    PLAIN,
    CudaSideStream,
    EngineConfig,
    Submit,
    attention_kernel,
    decoder,
    open_stream,
    warm_up,
)
from minwm.stream.rollout import Stream

Pose = Float[np.ndarray, "4 4"]
Frames = UInt8[np.ndarray, "n H W 3"]
Start = UInt8[np.ndarray, "h w 3"] | StartVideo | None
"""An image, a video to go on from, or the prompt alone."""


@runtime_checkable
class Engine(Protocol):
    """Makes frames chunk by chunk, as the camera moves on."""

    motion: Motion
    chunk: int
    """Latents per step."""
    timer: StageTimer
    """Seconds of the newest chunk by stage: encode (at the start), diffuse (or render), decode, copy (to the host) and
    cache_update."""

    def start(self) -> Frames:
        """The frames of the first chunk, seen from the identity pose; often a single one."""
        ...

    def advance(self, c2w: Float[np.ndarray, "n 4 4"]) -> Iterator[Frames]:
        """Frames for the next `chunk * stride` camera-to-world poses, relative to the first frame; yielded latent by
        latent. The iterator must be exhausted before any other call."""
        ...

    def update_cache(self) -> None:
        """Finish the newest step: what its frames need not wait for. Call it once they are shown; the next step does
        it otherwise."""
        ...

    def snapshot(self) -> Any:
        """State that `restore` needs to undo the next step: only what that step will overwrite."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Undo the step made after `snapshot`; several steps are undone newest first."""
        ...


class SceneEngine:
    """Ground truth: a scene seen from a placed camera."""

    def __init__(
        self,
        scene: Scene,
        origin: Pose,
        K: Float[np.ndarray, "4"],
        motion: Motion,
        chunk: int,
        size: tuple[int, int],
        first_chunk: int = 1,
    ) -> None:
        """`first_chunk` latents form the start, as those of a model beside it do."""
        self.scene, self.origin, self.K, self.first_chunk = scene, origin, K, first_chunk
        self.motion, self.chunk, self.size = motion, chunk, size
        self.timer = StageTimer()

    @classmethod
    def spawn(cls, seed: int, track: CameraTrack, cfg: ModelConfig, scenes: Scenes | None = None) -> "SceneEngine":
        """The scene of a seed, from a pose from which the whole track is free, as large as a model would see it.

        `scenes`: others than the model's.
        """
        if seed < 0:
            raise UserError(f"world {seed}: worlds are numbered from 0")
        scene = (scenes or cfg.scene)(seed)
        origin = scene.spawn(np.random.default_rng(seed), track)
        if origin is None:
            raise UserError(f"world {seed} has no free path for this trajectory; try another world or a shorter one")
        size, stream = (cfg.height, cfg.width), cfg.stream
        return cls(scene, origin, track.K[0], cfg.motion, stream.chunk, size, stream.first_chunk_frames)

    @property
    def viewpoint(self) -> Viewpoint:
        return Viewpoint(self.scene, self.origin)

    def start(self) -> Frames:
        self.timer.restart()
        return self._render(np.eye(4)[None]).repeat(1 + self.motion.stride * (self.first_chunk - 1), axis=0)

    def advance(self, c2w: Float[np.ndarray, "n 4 4"]) -> Iterator[Frames]:
        self.timer.restart()
        for part in np.split(c2w, range(self.motion.stride, len(c2w), self.motion.stride)):
            self.timer.skip()
            yield self._render(part)

    def _render(self, c2w: Float[np.ndarray, "n 4 4"]) -> Frames:
        track = CameraTrack(c2w, self.K, self.motion.fps).transformed(self.origin)
        frames = self.scene.render(track, *self.size).frames
        self.timer.record("diffuse")
        return frames

    def update_cache(self) -> None: ...

    def snapshot(self) -> None:
        """A scene has no memory."""

    def restore(self, snapshot: None) -> None: ...


@dataclass(frozen=True)
class StartInputs:
    """What a model starts from, encoded."""

    states: dict[str, Tensor]
    """Of the prompt and the image: parts of a `Condition`."""
    start: StartVideo | None
    """The first frame, or the video to go on from; None for the prompt alone."""
    seed: int
    """Of the noise."""


class ModelEngine:
    """A causal model, streamed chunk by chunk from an image, a video or the prompt alone; deterministic for a seed.

    With engine options, the model must have gone through `session.prepare.prepare_model`.

    Frames never wait for the cache update of their chunk: by default `update_cache` does it after they were yielded;
    with `overlap` it starts once decoding was submitted to a second CUDA stream, and both run at once.
    """

    def __init__(
        self,
        model: Model,
        start: Start,
        prompt: str,
        seed: int = 0,
        engine: EngineConfig = PLAIN,
        views: Sequence[Views] = (),
    ) -> None:
        """`views` are known of the world, in the frame of the start; one of them or none."""
        cfg, self.views = model.config, views
        if not cfg.sampler.causal:
            raise UserError("a bidirectional model makes whole clips and cannot be steered; take an autoregressive one")
        self.model, self.motion, self.chunk, self.sampler = model, cfg.motion, cfg.stream.chunk, cfg.sampler
        self.device = next(model.net.parameters()).device
        self.engine, self.decode_next = engine, decoder(engine, model.codec)
        self.submit: Submit | None = CudaSideStream(self.device) if engine.overlap else None
        self.timer = StageTimer(self.device)
        self.K = torch.tensor(cfg.intrinsics, dtype=torch.float32)
        self.inputs = self.encode_inputs(start, prompt, seed)
        self._stream: Stream | None = None
        self.newest_pose: Pose | None = None
        """Of the camera, at the newest latent."""
        self.newest_step: Pose = np.eye(4)
        """From the pose of the chunk before to that."""
        self.origin: Pose = np.eye(4)
        """From where poses count, relative to the first frame: the last pose of a video start."""
        self.pending_update: tuple[Any, ...] | None = None

    def encode_inputs(self, start: Start, prompt: str, seed: int) -> StartInputs:
        """What `inputs` may be set to before the next `start`.

        Raises UserError for a start of another size, for one that is missing or too much, or for a prompt that the
        text encoder does not take.
        """
        cfg, states = self.model.config, {}
        if isinstance(start, np.ndarray):
            start = StartVideo(start[None], CameraTrack(np.eye(4)[None], cfg.intrinsics, cfg.motion.fps))
        check_start(cfg, 0 if start is None else len(start.frames))
        if start is not None:
            check_image(cfg, start.frames[0])
            states = cfg.text.encode_images([start.frames[0]]) if cfg.image_start else {}
        return StartInputs({**states, **cfg.encode_prompts([prompt])}, start, seed)

    @torch.no_grad()
    def start(self) -> Frames:
        """The first chunk, in which the camera stands still; it may be the image and nothing else. Of a video, its last
        frame."""
        self.generator = generator(self.inputs.seed, "session")
        self.decoder_state = self.pending_update = self.newest_pose = None
        self.origin = np.eye(4)
        self.timer.restart()
        geometry, first = self.model.config.geometry, None
        still = np.eye(4)[None].repeat(geometry.first_chunk_frames, 0)
        if self._stream is None:
            cond, guidance = self.condition(still), self.sampler.guidance
            self._stream = open_stream(self.engine, self.model.net, cond, geometry, guidance, self.views)
        else:
            self._stream.restart(self.condition(still))
        if (start := self.inputs.start) is not None:
            first = self.model.codec.encode(to_pixels(start.frames)[None].to(self.device))
        self.timer.record("encode")
        if start is None or first is None or len(start.frames) == 1:
            return np.concatenate(list(self._generate(still, first)))
        return self._go_on_from(start, first)

    def _go_on_from(self, start: StartVideo, latents: Latents) -> Frames:
        """Put the chunks of a video into the cache; its last frame, from which poses then count."""
        cameras, frames = start.track.at_latent_rate(self.motion.stride), np.zeros(0)
        for a, b in self.stream.geometry.chunks(len(cameras)):
            self.update_cache()
            frames = [*self._generate(cameras.c2w[a:b], latents[:, a:b], torch.from_numpy(cameras.K[a:b]).float())][-1]
        self.origin, self.newest_pose = cameras.c2w[-1], np.eye(4)
        return frames[-1:]

    @torch.no_grad()
    def advance(self, c2w: Float[np.ndarray, "n 4 4"]) -> Iterator[Frames]:
        self.update_cache()
        self.timer.restart()
        yield from self._generate(c2w[self.motion.stride - 1 :: self.motion.stride])

    def set_prompt(self, prompt: str) -> None:
        """Another prompt, from the next chunk on."""
        states = self.model.config.encode_prompts([prompt])
        self.inputs = replace(self.inputs, states={**self.inputs.states, **states})
        self.stream.set_prompt(self.condition(np.eye(4)[None]))

    @torch.no_grad()
    def warm_up(self) -> list[float]:
        """Start, decode and run every graph shape, so that nothing is compiled, recorded or chosen during a walk.

        Returns seconds: of the start with the decoder, then of each graph shape. `start` has to follow.
        """
        begin, cfg = time.perf_counter(), self.model.config
        self.start()
        samples = self.sampler.num_noise_samples(cfg.geometry)
        frames = max(self.chunk, cfg.geometry.first_chunk_frames)
        noise = torch.zeros(samples, *cfg.latent_shape(1, frames), device=self.device)
        list(self._decode(noise[0, :, :1]))  # a latent that is not the first has a graph of its own
        self.update_cache()
        cond = self.condition(np.eye(4)[None].repeat(frames, 0))
        cond = replace(cond, first_latents=noise[0, :, :1] if cfg.image_start else None)
        with attention_kernel(self.engine):
            return [time.perf_counter() - begin, *warm_up(self.stream, cond, noise, self.sampler)]

    @property
    def stream(self) -> Stream:
        if self._stream is None:
            raise UserError("the engine has no stream yet; call start() first")
        return self._stream

    def _generate(
        self, c2w: Float[np.ndarray, "f 4 4"], first: FirstLatents | None = None, K: Float[Tensor, "f 4"] | None = None
    ) -> Iterator[Frames]:
        """Frames of the next chunk; `first` is what is given of it: the image, or all. K: the model's if not given."""
        prepared = self.stream.prepare_chunk(replace(self.condition(c2w, K), first_latents=first))
        before = c2w[0] if self.newest_pose is None else self.newest_pose
        self.newest_pose, self.newest_step = c2w[-1], se3_inverse(before) @ c2w[-1]
        samples = self.sampler.num_noise_samples(self.stream.geometry)
        shape = (samples, *self.model.config.latent_shape(1, len(c2w)))
        drawn = prepared.given is None
        noise = (torch.randn(shape, generator=self.generator) if drawn else torch.zeros(shape)).to(self.device)
        with attention_kernel(self.engine):
            latents = self.stream.next_chunk(prepared, noise, self.sampler)
        self.timer.record("diffuse")
        check_finite(latents)
        self.pending_update = prepared, latents, noise[-1]
        return self._decode(latents)

    def _decode(self, latents: Latents) -> Iterator[Frames]:
        """Frames of each of the next latents, on the host."""
        if self.submit is None:
            for latent in latents.split(1, dim=1):
                self.timer.skip()
                decoded = self._decode_latent(latent)
                self.timer.record("decode")
                frames = decoded.cpu().numpy()
                self.timer.record("copy")
                yield frames
        else:
            pending = [self.submit(self._decode_latent, latent) for latent in latents.split(1, dim=1)]
            self._run_pending_update()
            for wait in pending:
                frames = wait().numpy()
                self.timer.record("decode", wait=False)  # with the copy; the cache update may still be running
                yield frames
                self.timer.skip()

    def _decode_latent(self, latent: Latents) -> UInt8[Tensor, "n H W 3"]:
        """Frames of the next latent, on the device."""
        contiguous = latent.clone(memory_format=torch.contiguous_format)  # compiled for one memory layout
        decoded, self.decoder_state = self.decode_next(contiguous, self.decoder_state)
        return to_uint8(decoded[0])

    def _run_pending_update(self) -> None:
        if self.pending_update:
            with attention_kernel(self.engine):
                self.stream.update_cache(*self.pending_update)
                if self.newest_pose is not None:  # most often the camera goes on as it does
                    self.stream.read_ahead(self.condition((self.newest_pose @ self.newest_step)[None]))
            self.pending_update = None

    def update_cache(self) -> None:
        """Write the newest chunk into the cache, unless that was done."""
        if self.pending_update:
            self._run_pending_update()
            self.timer.record("cache_update")

    def condition(self, c2w: Float[np.ndarray, "f 4 4"], K: Float[Tensor, "f 4"] | None = None) -> Condition:
        """Prompt and image, and cameras at these poses, to which they have moved from that of the newest latent."""
        before = c2w[:1] if self.newest_pose is None else self.newest_pose[None]
        w2c = torch.from_numpy(se3_inverse(self.origin @ np.concatenate([before, c2w])))[None]
        K = (self.K if K is None else K).expand(1, len(c2w), 4)
        cameras = {"w2c": w2c[:, 1:].float(), "K": K, "actions": action_labels(w2c)[:, 1:]}
        return Condition(**self.inputs.states, **cameras).to(self.device)

    def snapshot(self) -> tuple[Any, ...]:
        self.update_cache()
        return self.stream.snapshot(), self.decoder_state, self.generator.get_state(), self.newest_pose

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        stream, self.decoder_state, state, self.newest_pose = snapshot
        self.pending_update = None  # of a step that is undone
        self.stream.restore(stream)
        self.generator.set_state(state)
