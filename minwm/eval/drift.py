"""A minute without a break: does the picture stay the world, grow soft or strange, and when does it collapse?

Three routes from one place of every world: standing still, turning around, and a walk. Everything is told per second,
at the latent rate. Two numbers say whether a picture still shows such a world: `strangeness` looks at the whole frame,
`foreignness` at its patches. A clip collapses in the first second from which on, for two seconds, one of them is above
its limit, which follows from the worst second of the true pictures, as they are and through the codec. So the truth
never collapses, and a picture that has turned into one colour, into noise, or into shapes that no world has, does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8

from minwm.cameras.track import CameraTrack
from minwm.cameras.trajectory import Action, integrate_actions, parse
from minwm.eval.cases import ANCHORS, HELD_OUT, through
from minwm.eval.image import colour_distance, psnr, sharpness
from minwm.eval.stats import Bootstrap, Interval
from minwm.nets.codec import VideoCodec
from minwm.render.worlds import World
from minwm.session.generate import stream_clips
from minwm.store.model import Model, ModelConfig

Array = np.ndarray
Frames = UInt8[Array, "c n h w 3"]
ROUTES = ("stand still", "turn around", "random walk")
LIMIT = 1.5
"""A clip has collapsed that is so many times as strange as the worst second of the truth, or more foreign than that."""
REFERENCES = 96
"""Views that say what pictures of such worlds look like."""
PATCH, STEP, KNOWN = 4, 2, 8000
"""Patches have 4x4 pixels, every 2 pixels, at half the resolution, where the codec's blur does not count; so many of
the reference views' are kept."""
FLAT = 0.25
"""Contrast below which a patch counts as flat: root of the sum of squares over a patch, colours in [0, 1]."""
PLACES = HELD_OUT * 1_000_000 + 600_000
"""Seed of the first world of the long runs; those of `Normal` follow 100,000 later."""
STROLL = ("w", "w", "w+j", "w+l", "j", "l", "s", "a", "d")
REACH = 3.8
"""World units from the middle beyond which the walk turns back: the plaza is what the worlds are made of."""


@dataclass(frozen=True)
class Curve:
    """One route, second by second, over its clips."""

    psnr: list[Interval]
    """dB to the true view. What the first frame did not show is invented, so no model can keep it high."""
    sharpness: list[float]
    """Gradient energy over that of the truth."""
    colour: list[float]
    """Distance of the colours of a frame to the true ones, 8-bit levels."""
    strangeness: list[float]
    """Distance of the statistics of a frame from those of pictures of such worlds; mean over clips."""
    limit: float
    """Strangeness from which on a clip has collapsed."""
    collapsed: list[int | None]
    """Second in which each clip collapsed."""
    foreignness: list[float] = field(default_factory=list)
    """Distance of patches from those of pictures of such worlds; mean over clips. Older results have none."""
    foreign_limit: float = float("inf")


@dataclass(frozen=True)
class Normal:
    """What pictures of worlds look like: mean and spread of their statistics, and patches that they have."""

    mean: Float[Array, " k"]
    spread: Float[Array, " k"]
    known: Float[torch.Tensor, "m d"]

    @classmethod
    def of(cls, config: ModelConfig, codec: VideoCodec, views: int = REFERENCES) -> "Normal":
        """Of true views from as many held-out worlds, which no clip of the evaluation shows; patches as they are
        and as the codec draws them."""
        look = CameraTrack(np.eye(4)[None], config.intrinsics, config.motion.fps)
        found: list[UInt8[Array, "h w 3"]] = []
        seed = PLACES + 100_000
        while len(found) < views:
            world = World(seed)
            origin = world.spawn(np.random.default_rng(seed), look)
            if origin is not None:
                found.append(world.render(look.transformed(origin), config.height, config.width).frames[0])
            seed += 1
        true = np.stack(found)
        known = patches(np.concatenate([true, through(codec, true[:, None])[:, 0]])).flatten(0, 1)
        some = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[:KNOWN]
        numbers = statistics(true)
        return cls(numbers.mean(0), numbers.std(0), known[some])

    def strangeness(self, frames: UInt8[Array, "*n h w 3"]) -> Float[Array, "*n"]:
        """Root mean square over the statistics of their distance from the mean in standard deviations."""
        return np.sqrt((((statistics(frames) - self.mean) / self.spread) ** 2).mean(-1))

    def foreignness(self, frames: UInt8[Array, "n h w 3"]) -> Float[Array, " n"]:
        """Mean over patches of the distance to the nearest known one, as a share of the patch's own contrast."""
        found = []
        for part in torch.split(patches(frames), 16):
            nearest = torch.cdist(part.flatten(0, 1), self.known).amin(1).view(part.shape[:2])
            found.append((nearest / (part.norm(dim=-1) + FLAT)).mean(1))
        return torch.cat(found).numpy()


def patches(frames: UInt8[Array, "n h w 3"]) -> Float[torch.Tensor, "n p d"]:
    """All patches of every frame at half the resolution, in [0, 1], each without its mean colour."""
    x = F.avg_pool2d(torch.from_numpy(frames).movedim(-1, 1).float() / 255, 2)
    cut = x.unfold(2, PATCH, STEP).unfold(3, PATCH, STEP).flatten(4).flatten(2, 3)  # n 3 p d
    return (cut - cut.mean(-1, keepdim=True)).transpose(1, 2).flatten(2)


def statistics(frames: UInt8[Array, "*n h w 3"]) -> Float[Array, "*n 11"]:
    """Per frame: mean and spread of red, green and blue; brightness of the upper half less that of the lower; and the
    logarithm of the energy of detail at four scales, where flat pictures have least and noise has most."""
    x = frames.astype(np.float32)
    means, spreads, grey = x.mean((-3, -2)), x.std((-3, -2)), x.mean(-1)
    half, energies = grey.shape[-2] // 2, []
    tilt = grey[..., :half, :].mean((-2, -1)) - grey[..., half:, :].mean((-2, -1))
    for _ in range(4):
        across, down = np.diff(grey, axis=-1), np.diff(grey, axis=-2)
        energies.append(np.log((across**2).mean((-2, -1)) + (down**2).mean((-2, -1)) + 0.1))
        h, w = (n // 2 * 2 for n in grey.shape[-2:])
        grey = grey[..., :h, :w].reshape(*grey.shape[:-2], h // 2, 2, w // 2, 2).mean((-3, -1))
    return np.concatenate([means, spreads, np.stack([tilt, *energies], -1)], -1)


@dataclass(frozen=True)
class LongRun:
    """Worlds, a place in each, and where the camera goes; the truth about it at the latent rate."""

    config: ModelConfig
    seconds: int
    captions: list[str]
    first: UInt8[Array, "c h w 3"]
    tracks: Mapping[str, list[CameraTrack]]
    """By route, one per world, anchored at the first frame, at the pixel rate."""
    truth: Mapping[str, Frames]
    coded: Mapping[str, Frames]
    """The truth through the codec."""
    normal: Normal

    @classmethod
    def make(cls, config: ModelConfig, codec: VideoCodec, worlds: int, seconds: int) -> "LongRun":
        latents = _latents(config, seconds)
        places = [place for _, place in zip(range(worlds), _places(config, latents), strict=False)]
        tracks = {route: [paths[route] for _, _, paths in places] for route in ROUTES}
        truth, coded = {}, {}
        for route, paths in tracks.items():
            full = np.stack(
                [_film(config, world, p.transformed(at)) for (world, at, _), p in zip(places, paths, strict=True)]
            )
            truth[route] = full[:, :: config.motion.stride]
            coded[route] = through(codec, full)[:, :: config.motion.stride]
        captions = [world.caption for world, _, _ in places]
        first = truth[ROUTES[0]][:, 0]
        return cls(config, seconds, captions, first, tracks, truth, coded, Normal.of(config, codec))

    def generate(self, model: Model, seed: int) -> dict[str, Frames]:
        """What a streaming model makes of the routes, at the latent rate."""
        stride, videos = self.config.motion.stride, {}
        for route, tracks in self.tracks.items():
            pieces = enumerate(stream_clips(model, self.first, self.captions, tracks, seed))
            videos[route] = np.concatenate([piece[:, stride - 1 if i else 0 :: stride] for i, piece in pieces], 1)
        return videos

    def anchors(self) -> dict[str, Mapping[str, Frames]]:
        """Baselines: the truth, its first frame held, the truth of the next route in the list, and the codec."""
        still = {route: np.repeat(x[:, :1], x.shape[1], 1) for route, x in self.truth.items()}
        wrong = {route: self.truth[other] for route, other in zip(ROUTES, (*ROUTES[1:], ROUTES[0]), strict=True)}
        return dict(zip(ANCHORS, (self.truth, still, wrong, self.coded), strict=True))

    @cached_property
    def limits(self) -> tuple[float, float]:
        """Strangeness and foreignness above which a clip has collapsed."""
        known = [self._unlike(frames) for kind in (self.truth, self.coded) for frames in kind.values()]
        return LIMIT * max(float(x.max()) for x, _ in known), max(float(x.max()) for _, x in known)

    def measure(self, videos: Mapping[str, Frames]) -> dict[str, Curve]:
        return {route: self._curve(videos[route], self.truth[route]) for route in ROUTES}

    def _curve(self, frames: Frames, truth: Frames) -> Curve:
        bootstrap, likeness = Bootstrap(len(frames)), self._per_second(psnr(frames, truth))
        sharp, true_sharp = (self._per_second(sharpness(x)).mean((0, 2)) for x in (frames, truth))
        strange, foreign = self._unlike(frames)
        intervals = [bootstrap.mean(likeness[:, second]) for second in range(self.seconds)]
        limit, foreign_limit = self.limits
        worse = np.maximum(strange / limit, foreign / foreign_limit)
        return Curve(
            psnr=[interval for interval in intervals if interval],
            sharpness=(sharp / np.maximum(true_sharp, 1e-6)).tolist(),
            colour=self._per_second(colour_distance(frames, truth)).mean((0, 2)).tolist(),
            strangeness=strange.mean(0).tolist(),
            limit=limit,
            collapsed=[collapse(row, 1.0) for row in worse],
            foreignness=foreign.mean(0).tolist(),
            foreign_limit=foreign_limit,
        )

    def _unlike(self, frames: Frames) -> tuple[Float[Array, "c s"], Float[Array, "c s"]]:
        """Strangeness and foreignness per second."""
        foreign = np.stack([self.normal.foreignness(clip) for clip in frames])
        strange = self.normal.strangeness(frames)
        return self._per_second(strange).mean(2), self._per_second(foreign).mean(2)

    def _per_second(self, values: Float[Array, "c f"]) -> Float[Array, "c s k"]:
        """Without the first frame, which is given."""
        rate = round(self.config.motion.fps / self.config.motion.stride)
        return values[:, 1 : 1 + self.seconds * rate].reshape(len(values), self.seconds, rate)


def collapse(strangeness: Sequence[float] | Array, limit: float) -> int | None:
    """The first second (from 1) that is above the limit and followed by another such one, or is the last."""
    above = np.asarray(strangeness) > limit
    both = above & np.append(above[1:], True)
    return int(both.argmax()) + 1 if both.any() else None


def _film(config: ModelConfig, world: World, track: CameraTrack) -> UInt8[Array, "n h w 3"]:
    """True frames; a camera that stands still is filmed once."""
    still = bool((track.c2w == track.c2w[0]).all())
    frames = world.render(track.slice(0, 1) if still else track, config.height, config.width).frames
    return np.repeat(frames, len(track), 0) if still else frames


def _latents(config: ModelConfig, seconds: int) -> int:
    """Latents after the first one that fill the seconds, in whole chunks."""
    least, lead = round(seconds * config.motion.fps / config.motion.stride) + 1, config.geometry.first_chunk_frames
    return lead - 1 + -(-(least - lead) // config.stream.chunk) * config.stream.chunk


def _places(config: ModelConfig, latents: int) -> Iterator[tuple[World, Array, dict[str, CameraTrack]]]:
    """Held-out worlds, one after the other, with a place in each and the three routes from there."""
    start = parse("w*4", stride=config.motion.stride).track(config.motion, config.intrinsics)
    fixed = [parse(f"{key}*{latents}", stride=config.motion.stride) for key in ("static", "l")]
    still, turn = (route.track(config.motion, config.intrinsics) for route in fixed)
    for seed in range(PLACES, PLACES + 100_000):
        world, rng = World(seed), np.random.default_rng(seed)
        origin = world.spawn(rng, start)
        if origin is not None:
            yield (
                world,
                origin,
                dict(zip(ROUTES, (still, turn, stroll(world, origin, rng, config, latents)), strict=True)),
            )


def stroll(world: World, origin: Array, rng: np.random.Generator, config: ModelConfig, latents: int) -> CameraTrack:
    """A random walk with keys held for a second or so, which never goes where a camera may not be."""
    motion, poses = config.motion, np.eye(4)[None]
    while len(poses) <= latents * motion.stride:
        hold = motion.stride * int(rng.integers(2, 7))
        keys = str(rng.choice(STROLL)).split("+")
        ahead = integrate_actions(poses[-1], [Action.of(keys)] * hold, motion)
        at = (origin @ ahead)[:, :3, 3]
        if world.free(at).all() and np.hypot(at[-1, 0], at[-1, 2]) < REACH:
            poses = np.concatenate([poses, ahead])
    return CameraTrack(poses[: latents * motion.stride + 1], config.intrinsics, motion.fps)
