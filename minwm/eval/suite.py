"""Held-out worlds, what a model makes of them, and all measurements of one model in one result."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8

from minwm.checkpoint import Model, ModelConfig
from minwm.core.camera import CameraTrack
from minwm.core.media import frames as to_frames
from minwm.core.media import pixels
from minwm.core.trajectory import parse
from minwm.data.rerender import RenderConfig, WorldSource
from minwm.eval.follow import Case, Confusion, FollowError, FollowResult, Suite, confusion, evaluate, prepare
from minwm.eval.quality import Quality, chunk_spans, quality
from minwm.render.worlds import World
from minwm.session import generate_clips

Videos = UInt8[np.ndarray, "c n h w 3"]
HELD_OUT = 9_000
"""Seed of the worlds that are only ever evaluated; training data takes smaller ones."""
PATTERNS = (
    "w*{n}", "l*{n}", "a*{n}", "w+j*{n}", "s*{n}", "j*{n}", "d*{n}", "w+l*{n}", "w*{a},l*{b}", "d+j*{n}",
    "j*{a},w*{b}", "a+l*{n}", "i*{c},w*{d}", "l*{a},j*{b}", "s+l*{n}", "a*{a},w*{b}",
)  # fmt: skip
ACTIONS = ("w", "s", "a", "d", "j", "l", "i", "k")


@dataclass(frozen=True)
class HeldOut:
    """Clips to be generated, and the truth about them."""

    trajectories: list[str]
    captions: list[str]
    tracks: list[CameraTrack]
    """At pixel rate, anchored at the first frame."""
    truth: Videos
    suite: Suite

    @classmethod
    def make(cls, config: ModelConfig, clips: int) -> "HeldOut":
        """One clip per world, over a fixed list of trajectories, as long as the model's training clips."""
        names = [trajectory(PATTERNS[i % len(PATTERNS)], config.latents - 1) for i in range(clips)]
        source = _source(config, names)
        made = [source.make(i) for i in range(clips)]
        records = [record for record, _ in made]
        cases = [Case(World(int(r.seed or 0)), r.track.moved(np.asarray(r.origin))) for r in records]
        suite = prepare(cases, config.height, config.width, stride=config.motion.stride)
        truth = np.stack([frames for _, frames in made])
        return cls(names, [r.caption for r in records], [r.track for r in records], truth, suite)

    @staticmethod
    def labels(config: ModelConfig, clips: int) -> list[tuple[str, str]]:
        """(trajectory, caption) of every clip, without rendering."""
        names = [trajectory(PATTERNS[i % len(PATTERNS)], config.latents - 1) for i in range(clips)]
        source = _source(config, names)
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


def generate_held_out(model: Model, held: HeldOut, seed: int) -> Videos:
    return generate_clips(model, held.truth[:, 0], held.captions, held.tracks, seed)


def measure(config: ModelConfig, held: HeldOut, videos: Videos) -> Measured:
    """Videos at the pixel rate, or at the latent rate (one frame per latent, as the anchors are rendered)."""
    rate = config.motion.stride if videos.shape[1] == held.truth.shape[1] else 1
    truth = held.truth[:, :: config.motion.stride // rate]
    first = config.first or config.chunk
    spans = chunk_spans(videos.shape[1], first, config.chunk, rate)
    return Measured(evaluate(held.suite, videos), quality(videos, truth, spans))


def counterfactual(model: Model, seed: int, latents: int | None = None) -> tuple[Videos, Videos, Confusion]:
    """One first frame, one noise, every action: generated videos, true ones, and which resembles which."""
    config = model.config
    names = [f"{action}*{(latents or config.latents) - 1}" for action in ACTIONS]
    tracks = [parse(name, stride=config.motion.stride).track(config.motion, config.intrinsics) for name in names]
    world, origin, caption = _open_place(tracks)
    truth = np.stack([world.render(t.moved(origin), config.height, config.width).frames for t in tracks])
    same = [generate_clips(model, truth[:1, 0], [caption], [track], seed)[0] for track in tracks]
    videos = np.stack(same)
    return videos, truth, confusion(videos, truth, ACTIONS)


def codec_bound(model: Model, held: HeldOut) -> Videos:
    """The truth through the codec: no model on these latents can look better."""
    with torch.no_grad():
        return to_frames(model.codec.decode(model.codec.encode(pixels(held.truth))))


def _source(config: ModelConfig, names: Sequence[str]) -> WorldSource:
    render = RenderConfig(
        latents=config.latents, height=config.height, width=config.width, focal=config.focal, motion=config.motion,
        clips_per_world=1, trajectories=tuple(names), seed=HELD_OUT,
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
