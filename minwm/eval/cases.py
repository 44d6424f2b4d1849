"""Held-out worlds, what a model makes of them, and all measurements of one model in one result."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import UInt8

from minwm.cameras.track import CameraTrack
from minwm.cameras.trajectory import parse
from minwm.core.media import to_frames as to_frames
from minwm.core.media import to_pixels
from minwm.data.rerender import RenderConfig, WorldSource
from minwm.eval.camera.follow import (
    Case,
    Confusion,
    FollowError,
    FollowResult,
    Suite,
    confusion,
    distractors,
    evaluate,
    prepare,
)
from minwm.eval.image import Quality, chunk_spans, quality
from minwm.nets.codec import VideoCodec
from minwm.render.worlds import World
from minwm.session.generate import generate_clips
from minwm.store.model import Model, ModelConfig

Videos = UInt8[np.ndarray, "c n h w 3"]
HELD_OUT = 9_000
"""Seed of the worlds that are only ever evaluated; training data takes smaller ones."""
PATTERNS = (
    "w*{n}", "l*{n}", "a*{n}", "w+j*{n}", "s*{n}", "j*{n}", "d*{n}", "w+l*{n}", "w*{a},l*{b}", "d+j*{n}",
    "j*{a},w*{b}", "a+l*{n}", "i*{c},w*{d}", "l*{a},j*{b}", "s+l*{n}", "a*{a},w*{b}",
)  # fmt: skip
ACTIONS = ("w", "s", "a", "d", "j", "l", "i", "k")
ANCHORS = ("ground truth", "static camera", "another clip's camera", "codec")
"""Baselines of every table: the truth, its first frame held, another path in the same world, the truth through the
codec."""


@dataclass(frozen=True)
class Clips:
    """Clips to be generated, one per world, and the truth about them."""

    trajectories: list[str]
    captions: list[str]
    tracks: list[CameraTrack]
    """At pixel rate, anchored at the first frame."""
    truth: Videos
    cases: list[Case]

    @classmethod
    def make(cls, config: ModelConfig, trajectories: Sequence[str], seed: int = HELD_OUT) -> "Clips":
        """Along trajectories of one length, in worlds of that seed."""
        source = _source(config, trajectories, seed)
        made = [source.make(i) for i in range(len(trajectories))]
        records = [record for record, _ in made]
        cases = [
            Case(World(int(r.seed or 0)), r.track.transformed(np.asarray(r.origin)), name)
            for r, name in zip(records, trajectories, strict=True)
        ]
        truth = np.stack([frames for _, frames in made])
        return cls(list(trajectories), [r.caption for r in records], [r.track for r in records], truth, cases)

    def generate(self, model: Model, seed: int, captions: list[str] | None = None) -> Videos:
        """From the first frames, along the tracks; other captions than the true ones if given."""
        return generate_clips(model, self.truth[:, 0], captions or self.captions, self.tracks, seed)

    def anchors(self, codec: VideoCodec) -> dict[str, Videos]:
        """Videos whose score is known in advance, or bounds that of any model on these latents."""
        size = self.truth.shape[2:4]
        tracks = [case.track for case in self.cases]
        wrong = [distractors(i, tracks, 1)[0] for i in range(len(tracks))]
        elsewhere = [case.scene.render(path, *size).frames for case, path in zip(self.cases, wrong, strict=True)]
        still = np.repeat(self.truth[:, :1], self.truth.shape[1], 1)
        return dict(zip(ANCHORS, (self.truth, still, np.stack(elsewhere), through(codec, self.truth)), strict=True))


@dataclass(frozen=True)
class HeldOut(Clips):
    """Clips for camera following, as long as those of the model's training."""

    suite: Suite

    @classmethod
    def of(cls, config: ModelConfig, clips: int) -> "HeldOut":
        """Over a fixed list of trajectories."""
        made = Clips.make(config, patterns(config, clips))
        suite = prepare(made.cases, config.height, config.width, stride=config.motion.stride)
        return cls(**vars(made), suite=suite)

    @staticmethod
    def labels(config: ModelConfig, clips: int) -> list[tuple[str, str]]:
        """(trajectory, caption) of every clip, without rendering."""
        names = patterns(config, clips)
        source = _source(config, names, HELD_OUT)
        return [(name, World(source.seed(i)).caption) for i, name in enumerate(names)]


@dataclass(frozen=True)
class Measured:
    """All that is known of a model's videos."""

    follow: FollowResult
    quality: Quality
    confusion: Confusion | None = None


def trajectory(pattern: str, latents: int) -> str:
    """A pattern filled in for a number of latents: n all of them, a + b and c + d two parts."""
    half, short = latents // 2, max(1, latents // 4)
    return pattern.format(n=latents, a=half, b=latents - half, c=short, d=latents - short)


def patterns(config: ModelConfig, clips: int) -> list[str]:
    """The trajectories of that many held-out clips."""
    return [trajectory(PATTERNS[i % len(PATTERNS)], config.latents - 1) for i in range(clips)]


def measure(config: ModelConfig, held: HeldOut, videos: Videos) -> Measured:
    """Videos at the pixel rate."""
    stream, stride = config.stream, config.motion.stride
    spans = chunk_spans(videos.shape[1], stream.first_chunk_frames, stream.chunk, stride)
    return Measured(
        evaluate(held.suite, videos), quality(videos, held.truth, spans, fps=config.motion.fps, stride=stride)
    )


def counterfactual(model: Model, seed: int, latents: int | None = None) -> tuple[Videos, Videos, Confusion]:
    """One first frame, one noise, every action: generated videos, true ones, and which resembles which."""
    config = model.config
    names = [f"{action}*{(latents or config.latents) - 1}" for action in ACTIONS]
    tracks = [parse(name, stride=config.motion.stride).track(config.motion, config.intrinsics) for name in names]
    world, origin, caption = _open_place(tracks)
    truth = np.stack([world.render(t.transformed(origin), config.height, config.width).frames for t in tracks])
    same = [generate_clips(model, truth[:1, 0], [caption], [track], seed)[0] for track in tracks]
    videos = np.stack(same)
    return videos, truth, confusion(videos, truth, ACTIONS)


@torch.no_grad()
def through(codec: VideoCodec, videos: Videos, latents: int = 20) -> Videos:
    """Videos through the codec, streamed clip by clip in pieces of that many latents: no model on its latents can look
    better."""
    piece, done, device = latents * codec.stride, np.empty_like(videos), next(codec.parameters()).device
    for clip, out in zip(videos, done, strict=True):
        encoding = decoding = None
        for start, stop in pairwise([0, *range(1 + piece, len(clip), piece), len(clip)]):
            encoded, encoding = codec.encode_next(to_pixels(clip[None, start:stop]).to(device), encoding)
            decoded, decoding = codec.decode_next(encoded, decoding)
            out[start:stop] = to_frames(decoded)[0]
    return done


def _source(config: ModelConfig, names: Sequence[str], seed: int) -> WorldSource:
    latents = parse(names[0], stride=config.motion.stride).latents + 1
    render = RenderConfig(
        latents=latents, height=config.height, width=config.width, focal=config.focal, motion=config.motion,
        clips_per_world=1, trajectories=tuple(names), seed=seed,
    )  # fmt: skip
    return WorldSource(render)


def _open_place(tracks: Sequence[CameraTrack]) -> tuple[World, np.ndarray, str]:
    """A held-out world with a spot from which every one of the tracks is free."""
    longest = CameraTrack(
        np.concatenate([track.c2w for track in tracks]), tracks[0].K[0], fps=tracks[0].fps
    )  # one path that visits all of them
    for seed in range(HELD_OUT * 1_000_000 + 500_000, HELD_OUT * 1_000_000 + 500_100):
        world = World(seed)
        origin = world.spawn(np.random.default_rng(seed), longest)
        if origin is not None:
            return world, origin, world.caption
    raise FollowError("no held-out world has room for every action; use a slower motion")
