"""Drift of long rollouts: does a stream that is never restarted stay sharp and in distribution, and when does it
collapse?

Three routes from one pose of every scene: standing still, turning around, and a random walk. Everything is measured
per second, at the latent rate. A clip collapses in the first second from which on, for two seconds, it is not like the
truth (`LIKE_TRUTH`) and one of its out-of-distribution distances (`ood`) is above its limit, which follows from the
worst second of the true pictures, as they are and reconstructed by the codec. So the truth never collapses, and a
picture that has turned into one colour, into noise, or into shapes that no scene has, does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import numpy as np
from jaxtyping import Float, UInt8

from minwm.cameras.track import CameraTrack
from minwm.cameras.trajectory import Action, integrate_actions, parse
from minwm.eval.cases import HELD_OUT, SCENES_PER_SEED, Case, reconstruct
from minwm.eval.image import colour_distance, psnr, sharpness
from minwm.eval.ood import ReferenceStatistics
from minwm.eval.stats import Bootstrap, Interval
from minwm.nets.codec import VideoCodec
from minwm.render.base import Scene, Scenes
from minwm.session.generate import generate_by_chunk, whole_chunks
from minwm.session.views import known_views
from minwm.store.model import Model, ModelConfig

Array = np.ndarray
Frames = UInt8[Array, "c n h w 3"]
ROUTES = ("stand still", "turn around", "random walk")
FEATURE_LIMIT = 1.5
"""A clip collapses at so many times the feature distance of the worst second of the truth; at its patch distance."""
LIKE_TRUTH = 20.0
"""dB to the truth from which on a second has not collapsed: reference views are from afar, and patches of what is near
are unlike theirs."""
FIRST_SCENE = HELD_OUT * SCENES_PER_SEED + 610_000
WALK_KEYS = ("w", "w", "w+j", "w+l", "j", "l", "s", "a", "d")
REACH = 3.8
"""World units from the scene's origin, beyond which the random walk goes no further away."""


@dataclass(frozen=True)
class DriftCurves:
    """One route, second by second, over its clips."""

    psnr: list[Interval]
    """dB to the true view, empty for text starts. What the first frame did not show is invented, so no model can keep
    it high."""
    sharpness: list[float]
    """Gradient energy over that of the truth."""
    colour: list[float]
    """Distance of the colours of a frame to the true ones, 8-bit levels; empty for text starts."""
    feature_distance: list[float]
    """See `ReferenceStatistics`; mean over clips."""
    feature_limit: float
    """Feature distance from which on a clip that is not like the truth has collapsed."""
    collapsed: list[int | None]
    """Second in which each clip collapsed."""
    patch_distance: list[float] = field(default_factory=list)
    """See `ReferenceStatistics`; mean over clips. Older results have none."""
    patch_limit: float = float("inf")
    first_look: Interval | None = None
    """PSNR to the first frame of the first one, a second or more later, that is seen from its pose: after a full turn,
    or of a camera that stands still. None for routes that do not come back."""


@dataclass(frozen=True)
class LongRollouts:
    """Cases by route, the true frames at the latent rate, and the reference of the distances."""

    config: ModelConfig
    seconds: int
    cases: Mapping[str, list[Case]]
    truth: Mapping[str, Frames]
    reconstructed: Mapping[str, Frames]
    """The truth, encoded and decoded."""
    reference: ReferenceStatistics

    @classmethod
    def make(cls, config: ModelConfig, codec: VideoCodec, scenes: Scenes, count: int, seconds: int) -> "LongRollouts":
        """In the first `count` scenes that have room."""
        latents = whole_chunks(config, round(seconds * config.motion.fps / config.motion.stride) + 1) - 1
        by_scene = [*islice(_routes(config, scenes, latents), count)]
        cases = {route: [routes[route] for routes in by_scene] for route in ROUTES}
        truth, reconstructed = {}, {}
        for route, commanded in cases.items():
            full = np.stack([_render(config, case) for case in commanded])
            truth[route] = full[:, :: config.motion.stride]
            reconstructed[route] = reconstruct(codec, full)[:, :: config.motion.stride]
        reference = ReferenceStatistics.of(config, codec, scenes)
        return cls(config, seconds, cases, truth, reconstructed, reference)

    def generate(self, model: Model, seed: int) -> dict[str, Frames]:
        """The routes by a streaming model, at the latent rate."""
        stride, videos = self.config.motion.stride, {}
        first = self.truth[ROUTES[0]][:, 0] if model.config.image_start else None
        for route, cases in self.cases.items():
            captions, tracks = [case.scene.caption for case in cases], [case.track for case in cases]
            views = known_views(model, [case.start for case in cases])
            pieces = enumerate(generate_by_chunk(model, first, captions, tracks, seed, views))
            videos[route] = np.concatenate([piece[:, stride - 1 if i else 0 :: stride] for i, piece in pieces], 1)
        return videos

    def baseline(self, name: str) -> Mapping[str, Frames]:
        """One of `BASELINES`; the wrong camera is that of the next route."""
        match name:
            case "static camera":
                return {route: np.repeat(x[:, :1], x.shape[1], 1) for route, x in self.truth.items()}
            case "another clip's camera":
                return {route: self.truth[other] for route, other in zip(ROUTES, (*ROUTES[1:], ROUTES[0]), strict=True)}
            case "codec":
                return self.reconstructed
        return self.truth

    @cached_property
    def limits(self) -> tuple[float, float]:
        """Feature and patch distance above which a clip has collapsed."""
        true = [self._distances(frames) for kind in (self.truth, self.reconstructed) for frames in kind.values()]
        return FEATURE_LIMIT * max(float(x.max()) for x, _ in true), max(float(x.max()) for _, x in true)

    def measure(self, videos: Mapping[str, Frames]) -> dict[str, DriftCurves]:
        return {route: self._curves(route, videos[route], self.truth[route]) for route in ROUTES}

    def _first_look(self, route: str, frames: Frames) -> Interval | None:
        """See `DriftCurves`."""
        tracks = [case.track.at_latent_rate(self.config.motion.stride) for case in self.cases[route]]
        returns = [_return(track, round(track.fps)) for track in tracks]
        pairs = [(clip, i) for clip, i in zip(frames, returns, strict=True) if i is not None]
        if len(pairs) < len(frames):
            return None
        alike = np.stack([psnr(clip[None, i : i + 1], clip[None, :1])[0] for clip, i in pairs])
        return Bootstrap(len(frames)).mean(alike)

    def _curves(self, route: str, frames: Frames, truth: Frames) -> DriftCurves:
        bootstrap, likeness = Bootstrap(len(frames)), self._per_second(psnr(frames, truth))
        sharp, true_sharp = (self._per_second(sharpness(x)).mean((0, 2)) for x in (frames, truth))
        features, patches = self._distances(frames)
        intervals = [bootstrap.mean(likeness[:, second]) for second in range(self.seconds)]
        feature_limit, patch_limit = self.limits
        worse = np.maximum(features / feature_limit, patches / patch_limit)
        worse[likeness.mean(2) >= LIKE_TRUTH] = 0
        colour = self._per_second(colour_distance(frames, truth)).mean((0, 2)).tolist()
        return DriftCurves(
            psnr=[interval for interval in intervals if interval] if self.config.image_start else [],
            sharpness=(sharp / np.maximum(true_sharp, 1e-6)).tolist(),
            colour=colour if self.config.image_start else [],
            feature_distance=features.mean(0).tolist(),
            feature_limit=feature_limit,
            collapsed=[collapse(row, 1.0) for row in worse],
            patch_distance=patches.mean(0).tolist(),
            patch_limit=patch_limit,
            first_look=self._first_look(route, frames),
        )

    def _distances(self, frames: Frames) -> tuple[Float[Array, "c s"], Float[Array, "c s"]]:
        """Feature and patch distance per second: the mean, and that of its last frame, which costs most."""
        last = frames[:, self._rate :: self._rate][:, : self.seconds]
        patches = np.stack([self.reference.patch_distance(clip) for clip in last])
        return self._per_second(self.reference.feature_distance(frames)).mean(2), patches

    def _per_second(self, values: Float[Array, "c f"]) -> Float[Array, "c s k"]:
        """Without the first frame, which may be given."""
        return values[:, 1 : 1 + self.seconds * self._rate].reshape(len(values), self.seconds, self._rate)

    @property
    def _rate(self) -> int:
        """Latents per second."""
        return round(self.config.motion.fps / self.config.motion.stride)


def _return(track: CameraTrack, least: int) -> int | None:
    """The first pose from `least` on that is the first one again, up to a thousandth; None if there is none."""
    back = np.abs(track.c2w[least:] - track.c2w[0]).max((1, 2)) < 1e-3
    return least + int(back.argmax()) if back.any() else None


def collapse(distance: Sequence[float] | Array, limit: float) -> int | None:
    """The first second (from 1) that is above the limit and followed by another such one, or is the last."""
    above = np.asarray(distance) > limit
    both = above & np.append(above[1:], True)
    return int(both.argmax()) + 1 if both.any() else None


def _render(config: ModelConfig, case: Case) -> UInt8[Array, "n h w 3"]:
    """True frames; a static camera is rendered once."""
    camera = case.camera
    still = bool((case.track.c2w == case.track.c2w[0]).all())
    frames = case.scene.render(camera.slice(0, 1) if still else camera, config.height, config.width).frames
    return np.repeat(frames, len(camera), 0) if still else frames


def _routes(config: ModelConfig, scenes: Scenes, latents: int) -> Iterator[dict[str, Case]]:
    """The routes in held-out scenes, one scene after the other."""
    start = parse("w*4", stride=config.motion.stride).track(config.motion, config.intrinsics)
    fixed = [parse(f"{key}*{latents}", stride=config.motion.stride) for key in ("static", "l")]
    still, turn = (trajectory.track(config.motion, config.intrinsics) for trajectory in fixed)
    for seed in range(FIRST_SCENE, FIRST_SCENE + 100_000):
        scene, rng = scenes(seed), np.random.default_rng(seed)
        origin = scene.spawn(rng, start)
        if origin is not None:
            tracks = still, turn, random_walk(scene, origin, rng, config, latents)
            yield {route: Case(scene, track, origin) for route, track in zip(ROUTES, tracks, strict=True)}


def random_walk(
    scene: Scene, origin: Array, rng: np.random.Generator, config: ModelConfig, latents: int
) -> CameraTrack:
    """Keys at random, each held for a second or so, which never lead where a camera may not be."""
    motion, poses = config.motion, np.eye(4)[None]
    while len(poses) <= latents * motion.stride:
        hold = motion.stride * int(rng.integers(2, 7))
        keys = str(rng.choice(WALK_KEYS)).split("+")
        ahead = integrate_actions(poses[-1], [Action.of(keys)] * hold, motion)
        at = (origin @ ahead)[:, :3, 3]
        far, before = (np.hypot(*pose[(0, 2), 3]) for pose in (origin @ ahead[-1], origin @ poses[-1]))
        if scene.free(at).all() and far <= max(REACH, before):
            poses = np.concatenate([poses, ahead])
    return CameraTrack(poses[: latents * motion.stride + 1], config.intrinsics, motion.fps)
