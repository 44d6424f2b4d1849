"""Walking around: an engine turns the camera's next poses into frames, and a session steers it with actions.

An engine looks the same whether learned or rendered, so player, evaluation and recordings cannot tell them apart.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minwm.checkpoint import Model, ModelConfig, Prompts
from minwm.core.camera import CameraTrack, se3_inverse, views
from minwm.core.config import UserError
from minwm.core.flow import Latents
from minwm.core.media import fit, levels, pixels, read_image
from minwm.core.media import frames as to_frames
from minwm.core.runtime import Laps, generator
from minwm.core.trajectory import Action, Motion, drive
from minwm.core.types import Condition
from minwm.engine import PLAIN, Beside, EngineConfig, SideStream, attention, decoder, open_stream, warm_up
from minwm.render.worlds import World
from minwm.sampling import Bidirectional, Noise, Stream, draw, draws_of, generate, image_chunk, stream

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
    laps: Laps
    """Seconds of the newest chunk by stage: encode (at the start), diffuse (or render), decode, copy to the host; then
    finalize."""

    def start(self) -> Frames:
        """The first frame, seen from the identity pose."""
        ...

    def advance(self, c2w: Float[np.ndarray, "n 4 4"]) -> Iterator[Frames]:
        """Frames for the next `chunk * stride` camera poses, relative to the first frame: latent by latent, so that
        none waits for the next. All must be taken before anything else is asked of the engine."""
        ...

    def settle(self) -> None:
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
        self.laps = Laps()

    @classmethod
    def spawn(cls, seed: int, track: CameraTrack, cfg: ModelConfig, kind: type[World] = World) -> "RendererEngine":
        """A world, and a place in it from which the whole anchored track is free, seen as a model would see it."""
        if seed < 0:
            raise UserError(f"world {seed}: worlds are numbered from 0")
        world = kind(seed)
        origin = world.spawn(np.random.default_rng(seed), track)
        if origin is None:
            raise UserError(f"world {seed} has no free path for this trajectory; try another world or a shorter one")
        return cls(world, origin, track.K[0], cfg.motion, cfg.chunk, (cfg.height, cfg.width))

    def start(self) -> Frames:
        self.laps.restart()
        return self._render(np.eye(4)[None])

    def advance(self, c2w: Float[np.ndarray, "n 4 4"]) -> Iterator[Frames]:
        self.laps.restart()
        for part in np.split(c2w, range(self.motion.stride, len(c2w), self.motion.stride)):
            self.laps.skip()
            yield self._render(part)

    def _render(self, c2w: Float[np.ndarray, "n 4 4"]) -> Frames:
        track = CameraTrack(c2w, self.K, self.motion.fps).moved(self.origin)
        frames = self.world.render(track, *self.size).frames
        self.laps.lap("diffuse")
        return frames

    def settle(self) -> None: ...

    def snapshot(self) -> None:
        """A world has no memory."""

    def restore(self, snapshot: None) -> None: ...


class ModelEngine:
    """A causal model, streamed chunk by chunk from an image, or from the prompt alone; deterministic for a seed.

    A model that is to be compiled, or to use kernels, must have been made `ready` for it (engine.py).

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
        if isinstance(cfg.sampler, Bidirectional):
            raise UserError("a bidirectional model makes whole clips and cannot be steered; take an autoregressive one")
        self.model, self.motion, self.chunk, self.sampler = model, cfg.motion, cfg.chunk, cfg.sampler
        self.device = next(model.net.parameters()).device
        self.engine, self.opened, self.decode = engine, None, decoder(engine, model.codec)
        self.beside: Beside | None = SideStream(self.device) if engine.overlap else None
        self.begin(self.read(image, prompt, seed))
        self.K = torch.tensor(cfg.intrinsics, dtype=torch.float32)
        self.laps = Laps(self.device)

    def read(self, image: UInt8[np.ndarray, "h w 3"] | None, prompt: str, seed: int) -> Beginning:
        """What `begin` takes. Raises UserError for an image of another size, or a prompt that cannot be read."""
        if image is not None:
            check_image(self.model.config, image)
        return self.model.config.read([prompt]), image, seed

    def begin(self, beginning: Beginning) -> None:
        """What the next `start` begins with, in the memory that there is."""
        self.text, self.image, self.seed = beginning

    @torch.no_grad()
    def start(self) -> Frames:
        """The image; without one, the first chunk, in which the camera stands still."""
        self.noise, self.decoding, self.uncommitted = generator(self.seed, "session"), None, None
        self.laps.restart()
        geometry, first = self.model.config.geometry, None
        still = np.eye(4)[None].repeat(geometry.lead, 0)
        if self.opened is None:
            self.opened = open_stream(self.engine, self.model.net, self.look(still), geometry, self.sampler.guidance)
        else:
            self.opened.restart(self.look(still))
        if self.image is not None:
            first = self.model.codec.encode(pixels(self.image)[None, None].to(self.device))
            first = image_chunk(first, geometry)
        self.laps.lap("encode")
        return np.concatenate(list(self._chunk(still, first)))

    @torch.no_grad()
    def advance(self, c2w: Float[np.ndarray, "n 4 4"]) -> Iterator[Frames]:
        self.settle()
        self.laps.restart()
        yield from self._chunk(c2w[self.motion.stride - 1 :: self.motion.stride])

    def reword(self, prompt: str) -> None:
        """Another prompt, from the next chunk on."""
        self.text = self.model.config.read([prompt])
        self.stream.reword(self.look(np.eye(4)[None]))

    @torch.no_grad()
    def warm_up(self) -> list[float]:
        """Start, decode and visit every regime, so that nothing is compiled, recorded or chosen during a walk.

        Returns seconds: of the start with the decoder, then of each regime. What follows is another `start`.
        """
        began, cfg = time.perf_counter(), self.model.config
        self.start()
        noise = torch.zeros(draws_of(self.sampler, cfg.geometry), *cfg.latent_shape(1, self.chunk), device=self.device)
        list(self._frames(noise[0, :, :1]))  # a later latent than the first
        self.settle()
        cond = self.look(np.eye(4)[None].repeat(self.chunk, 0))
        cond = replace(cond, first=None if self.image is None else noise[0, :, :1])
        with attention(self.engine):
            return [time.perf_counter() - began, *warm_up(self.stream, cond, noise, self.sampler)]

    @property
    def stream(self) -> Stream:
        if self.opened is None:
            raise UserError("the walk has not begun; call start() first")
        return self.opened

    def _chunk(self, c2w: Float[np.ndarray, "f 4 4"], latents: Latents | None = None) -> Iterator[Frames]:
        bound, hidden = self.stream.look(self.look(c2w)), None
        if latents is None:
            draws = draws_of(self.sampler, self.stream.geometry)
            shape = (draws, *self.model.config.latent_shape(1, len(c2w)))
            noise = torch.randn(shape, generator=self.noise).to(self.device)
            with attention(self.engine):
                latents, hidden = self.stream.next_chunk(bound, noise, self.sampler), noise[-1]
        self.laps.lap("diffuse")
        self.uncommitted = bound, latents, hidden
        return self._frames(latents)

    def _frames(self, latents: Latents) -> Iterator[Frames]:
        """Frames of each of the next latents, on the host."""
        alone = latents.split(1, dim=1)
        if self.beside is None:
            for latent in alone:
                self.laps.skip()
                drawn = self._draw(latent)
                self.laps.lap("decode")
                frames = drawn.cpu().numpy()
                self.laps.lap("copy")
                yield frames
        else:
            begun = [self.beside(self._draw, latent) for latent in alone]
            self._commit()
            for wait in begun:
                frames = wait().numpy()
                self.laps.lap("decode", wait=False)  # and copied; the commit may still be under way
                yield frames
                self.laps.skip()

    def _draw(self, latent: Latents) -> UInt8[Tensor, "n H W 3"]:
        """Frames of the next latent, on the device."""
        alone = latent.clone(memory_format=torch.contiguous_format)  # a graph is for one layout of memory
        decoded, self.decoding = self.decode(alone, self.decoding)
        return levels(decoded[0])

    def _commit(self) -> None:
        if self.uncommitted:
            with attention(self.engine):
                self.stream.commit(*self.uncommitted)
            self.uncommitted = None

    def settle(self) -> None:
        """Write the newest chunk into the cache, if that has not been begun: its frames need not wait for this pass."""
        if self.uncommitted:
            self._commit()
            self.laps.lap("finalize")

    def look(self, c2w: Float[np.ndarray, "f 4 4"]) -> Condition:
        """The prompt, and cameras at these poses."""
        w2c = torch.from_numpy(se3_inverse(c2w)).float()[None]
        return Condition(**self.text, w2c=w2c, K=self.K.expand(1, len(c2w), 4)).to(self.device)

    def snapshot(self) -> tuple[Any, ...]:
        self.settle()
        return self.stream.snapshot(), self.decoding, self.noise.get_state()

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        stream, self.decoding, state = snapshot
        self.uncommitted = None  # of a step that is undone
        self.stream.restore(stream)
        self.noise.set_state(state)


@dataclass
class Session:
    """An engine and where its camera is. `step` blocks for one chunk; `rewind` goes back to any earlier one."""

    engine: Engine
    pose: Pose = field(default_factory=lambda: np.eye(4))
    """Camera-to-world relative to the first frame, float64."""
    history: int | None = None
    """Steps that can be undone; None: all of them, whatever memory their snapshots take."""
    past: deque[tuple[Pose, Any]] = field(default_factory=deque, init=False)
    """Pose and engine snapshot before each of those steps."""

    def start(self) -> Frames:
        """The first frame; a session that has walked begins anew."""
        self.pose, self.past = np.eye(4), deque(maxlen=self.history)
        return self.engine.start()

    def step(self, action: Action) -> Frames:
        """Hold an action for one chunk: chunk * stride frames."""
        return np.concatenate(list(self.parts(action)))

    def parts(self, action: Action) -> Iterator[Frames]:
        """The same, latent by latent: the first frames can be shown before the last are drawn. Take all."""
        self.past.append((self.pose, self.engine.snapshot()))
        frames = self.engine.chunk * self.engine.motion.stride
        c2w = drive(self.pose, [action] * frames, self.engine.motion)
        self.pose = c2w[-1]
        yield from self.engine.advance(c2w)

    def play(self, actions: list[Action]) -> Iterator[Frames]:
        """The first frame, then the frames of every action."""
        yield self.start()
        for action in actions:
            yield self.step(action)

    def rewind(self, steps: int = 1) -> None:
        """Undo steps; what follows may take another way."""
        if not 1 <= steps <= len(self.past):
            kept = "were made" if self.history is None else f"are kept (history={self.history})"
            raise UserError(f"cannot rewind {steps} steps: {len(self.past)} {kept}")
        for _ in range(steps):
            self.pose, snapshot = self.past.pop()
            self.engine.restore(snapshot)


def walk(
    model: Model,
    prompt: str,
    image: UInt8[np.ndarray, "h w 3"] | Path | str | None = None,
    seed: int = 0,
    history: int | None = None,
) -> Session:
    """A walk through what a model makes of a picture (an array or a file, cropped to its size) and a prompt.

    >>> model = minwm.load("runs/demo/dmd")
    >>> session = minwm.walk(model, "a red tower and a blue dome on a stone plaza", "start.png")
    >>> first = session.start()                          # 1 64 64 3 uint8
    >>> frames = session.step(minwm.Action.of("wl"))     # 8 64 64 3: ahead and to the right for half a second
    >>> session.rewind()                                 # and another way from there
    """
    if isinstance(image, str | Path):
        image = read_image(image)
    cfg = model.config
    fitted = image if image is None else fit(image, cfg.height, cfg.width)
    return Session(ModelEngine(model, fitted, prompt, seed), history=history)


@torch.no_grad()
def generate_clips(
    model: Model, images: UInt8[np.ndarray, "b h w 3"] | None, prompts: Prompts, tracks: list[CameraTrack], seed: int
) -> UInt8[np.ndarray, "b n h w 3"]:
    """Videos along camera tracks (pixel rate), with whatever sampler the model has, on its device.

    They begin with the images; without any, with what the prompts say.
    Raises UserError for images of another size, or a length that the model cannot make.
    """
    noise, cond = given(model, images, prompts, tracks, seed)
    return to_frames(model.codec.decode(generate(model.net, model.config.sampler, noise, cond, model.config.geometry)))


@torch.no_grad()
def stream_clips(
    model: Model, images: UInt8[np.ndarray, "b h w 3"], prompts: Prompts, tracks: list[CameraTrack], seed: int
) -> Iterator[UInt8[np.ndarray, "b n h w 3"]]:
    """The same of a causal model, as frames chunk by chunk, the images first: pixels of long videos fill no memory."""
    sampler, decoding = model.config.sampler, None
    if isinstance(sampler, Bidirectional):
        raise UserError("a bidirectional model makes whole clips and cannot stream; take an autoregressive one")
    noise, cond = given(model, images, prompts, tracks, seed)
    for latents in stream(model.net, sampler, noise, cond, model.config.geometry):
        decoded, decoding = model.codec.decode_next(latents, decoding)
        yield to_frames(decoded)


def given(
    model: Model, images: UInt8[np.ndarray, "b H W 3"] | None, prompts: Prompts, tracks: list[CameraTrack], seed: int
) -> tuple[Noise, Condition]:
    """What a sampler starts from, on the model's device."""
    cfg, device = model.config, next(model.net.parameters()).device
    w2c, K = views(tracks, cfg.motion.stride)
    check_length(cfg, w2c.shape[1])
    first = None
    if images is not None:
        check_image(cfg, images[0])
        first = model.codec.encode(pixels(images)[:, None].to(device))
    cond = Condition(**cfg.read(prompts), w2c=w2c, K=K, first=first).to(device)
    shape = cfg.latent_shape(len(prompts), w2c.shape[1])
    noise = draw(shape, draws_of(cfg.sampler, cfg.geometry), torch.empty(0, device=device), generator(seed, "generate"))
    return noise, cond


def check_image(cfg: ModelConfig, image: UInt8[np.ndarray, "h w 3"]) -> None:
    if image.shape[:2] != (cfg.height, cfg.width):
        size, want = (f"{w}x{h}" for h, w in (image.shape[:2], (cfg.height, cfg.width)))
        raise UserError(f"the first image is {size} pixels, this model sees {want}; crop and resize it")


def check_length(cfg: ModelConfig, latents: int) -> None:
    """Raise UserError, naming lengths that fit, unless the model can make a clip of that many latents."""
    stride, lead, chunk = cfg.motion.stride, cfg.geometry.lead, cfg.chunk
    if isinstance(cfg.sampler, Bidirectional):
        kind, fit = "makes whole clips only", [cfg.latents]
    else:
        below = lead + max(0, (latents - lead) // chunk) * chunk
        kind = f"goes on by {chunk} latents"
        fit = [latents] if below == latents > lead else [n for n in (below, below + chunk) if n > lead]
    if latents not in fit:
        ways = " or ".join(f"{n - 1} latents ({stride * (n - 1) + 1} frames)" for n in fit)
        raise UserError(
            f"a trajectory of {latents - 1} latents ({stride * (latents - 1) + 1} frames) does not fit: "
            f"this model {kind}; give {ways}"
        )
