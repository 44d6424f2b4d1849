"""Held-out cases: commanded cameras in scenes that no model was trained on, and the clips made along them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, UInt8

from minwm.cameras.track import CameraTrack, se3_inverse, se3_log
from minwm.cameras.trajectory import parse
from minwm.core.config import UserError
from minwm.core.media import to_frames, to_pixels
from minwm.nets.codec import VideoCodec
from minwm.render.base import Scene, Scenes
from minwm.session.generate import generate
from minwm.session.views import Viewpoint, known_views
from minwm.store.model import Model, ModelConfig

Array = np.ndarray
Videos = UInt8[Array, "c n h w 3"]
HELD_OUT = 9_000
"""Seed of the scenes that are only ever evaluated; training data takes smaller ones."""
SCENES_PER_SEED = 1_000_000
TRIES = 100
"""Spawns tried before a scene is given up."""
PATTERNS = (
    "w*{n}", "l*{n}", "a*{n}", "w+j*{n}", "s*{n}", "j*{n}", "d*{n}", "w+l*{n}", "w*{a},l*{b}", "d+j*{n}",
    "j*{a},w*{b}", "a+l*{n}", "i*{c},w*{d}", "l*{a},j*{b}", "s+l*{n}", "a*{a},w*{b}",
)  # fmt: skip
BASELINES = ("ground truth", "static camera", "another clip's camera", "codec")
"""Rows of every table: the truth, its first frame held, another path in the same scene, the truth encoded and
decoded."""
DISTINCT_DEGREES, DISTINCT_UNITS = 3.0, 0.06
"""Two cameras differ clearly when their mean difference exceeds one of these (half a latent step)."""


class EvalError(UserError):
    """A measurement that cannot be made."""


@dataclass(frozen=True)
class Case:
    """A commanded camera in a scene."""

    scene: Scene
    track: CameraTrack
    """At the pixel rate, relative to the first frame."""
    origin: Float[Array, "4 4"] = field(default_factory=lambda: np.eye(4))
    """Pose of the first frame in the scene."""
    trajectory: str = ""
    """The command in keys; "" if there is none."""

    @property
    def start(self) -> Viewpoint:
        return Viewpoint(self.scene, self.origin)

    @property
    def camera(self) -> CameraTrack:
        """The track in scene coordinates."""
        return self.track.transformed(self.origin)


@dataclass(frozen=True)
class Clips:
    """Clips to be generated, one per case, and the true ones."""

    config: ModelConfig
    cases: list[Case]

    @classmethod
    def make(cls, config: ModelConfig, trajectories: Sequence[str], scenes: Scenes, seed: int = HELD_OUT) -> "Clips":
        """Case i follows trajectory i in scene `seed * SCENES_PER_SEED + i`. The trajectories have one length."""
        cases = []
        for i, trajectory in enumerate(trajectories):
            track = parse(trajectory, stride=config.motion.stride).track(config.motion, config.intrinsics)
            scene, rng = scenes(seed * SCENES_PER_SEED + i), np.random.default_rng([seed, i])
            spawns = (scene.spawn(rng, track) for _ in range(TRIES))
            origin = next((pose for pose in spawns if pose is not None), None)
            if origin is None:
                raise EvalError(
                    f"case {i}: scene {seed * SCENES_PER_SEED + i} has no free path for {trajectory!r} in {TRIES} "
                    "tries; use fewer latents or a slower motion"
                )
            cases.append(Case(scene, track, origin, trajectory))
        return cls(config, cases)

    @property
    def captions(self) -> list[str]:
        return [case.scene.caption for case in self.cases]

    @cached_property
    def truth(self) -> Videos:
        """Rendered once, when first asked for."""
        size = self.config.height, self.config.width
        return np.stack([case.scene.render(case.camera, *size).frames for case in self.cases])

    def generate(self, model: Model, seed: int, captions: list[str] | None = None) -> Videos:
        """Along the tracks, from the true first frames if the model takes images; `captions` in place of the
        scenes'."""
        images = self.truth[:, 0] if model.config.image_start else None
        tracks, views = [case.track for case in self.cases], known_views(model, [case.start for case in self.cases])
        return generate(model, images, captions or self.captions, tracks, seed, views)

    def baseline(self, name: str, codec: VideoCodec) -> Videos:
        """The videos of one of `BASELINES`."""
        match name:
            case "static camera":
                return np.repeat(self.truth[:, :1], self.truth.shape[1], 1)
            case "another clip's camera":
                cameras, size = [case.camera for case in self.cases], self.truth.shape[2:4]
                wrong = [distractors(i, cameras, 1)[0] for i in range(len(cameras))]
                return np.stack([c.scene.render(path, *size).frames for c, path in zip(self.cases, wrong, strict=True)])
            case "codec":
                return reconstruct(codec, self.truth)
        return self.truth


def held_out(config: ModelConfig, count: int, scenes: Scenes) -> Clips:
    """As long as a training clip, along `PATTERNS` in turn."""
    n = config.latents - 1
    a, c = n // 2, max(1, n // 4)
    patterns = [PATTERNS[i % len(PATTERNS)] for i in range(count)]
    return Clips.make(config, [p.format(n=n, a=a, b=n - a, c=c, d=n - c) for p in patterns], scenes)


@torch.no_grad()
def reconstruct(codec: VideoCodec, videos: Videos, latents: int = 20) -> Videos:
    """Videos encoded and decoded, streamed in pieces of that many latents: no model on these latents can look
    better."""
    piece, decoded, device = latents * codec.stride, np.empty_like(videos), next(codec.parameters()).device
    for clip, out in zip(videos, decoded, strict=True):
        encoder_state = decoder_state = None
        for start, stop in pairwise([0, *range(1 + piece, len(clip), piece), len(clip)]):
            encoded, encoder_state = codec.encode_next(to_pixels(clip[None, start:stop]).to(device), encoder_state)
            pixels, decoder_state = codec.decode_next(encoded, decoder_state)
            out[start:stop] = to_frames(pixels)[0]
    return decoded


def distractors(index: int, cameras: Sequence[CameraTrack], count: int) -> list[CameraTrack]:
    """Up to `count` of the next clips' cameras, moved to this clip's first pose; without those that nearly coincide
    with its command, with a static camera or with one another. EvalError if none is left."""
    own = cameras[index]
    kept = [own, static(own)]
    for offset in range(1, len(cameras)):
        other = cameras[(index + offset) % len(cameras)]
        path = CameraTrack(own.c2w[0] @ other.relative_to_first().c2w, own.K, own.fps, own.unit)
        if all(_distinct(path, known) for known in kept):
            kept.append(path)
        if len(kept) == count + 2:
            break
    if len(kept) == 2:
        raise EvalError(f"clip {index}: no other clip moves differently; add clips with other trajectories")
    return kept[2:]


def static(camera: CameraTrack) -> CameraTrack:
    """A camera that stays at the first pose."""
    return CameraTrack(np.repeat(camera.c2w[:1], len(camera), 0), camera.K, camera.fps, camera.unit)


def pose_distance(a: Float[Array, "*n 4 4"], b: Float[Array, "*n 4 4"]) -> tuple[Array, Array]:
    """Angle in degrees and distance in world units between poses."""
    turn = se3_log(se3_inverse(a) @ b)[..., 3:]
    return np.degrees(np.linalg.norm(turn, axis=-1)), np.linalg.norm(a[..., :3, 3] - b[..., :3, 3], axis=-1)


def _distinct(a: CameraTrack, b: CameraTrack) -> bool:
    degrees, units = pose_distance(a.c2w, b.c2w)
    return bool(degrees.mean() > DISTINCT_DEGREES or units.mean() > DISTINCT_UNITS)
