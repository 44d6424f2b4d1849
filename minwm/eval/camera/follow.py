"""Does the video obey the commanded camera? Measured from pixels alone, in worlds that can be rendered
exactly.

Three answers, from coarse to fine:
- retrieval: among true renders of the commanded, the static and other cameras, is the commanded one nearest?
- tracking: the camera that the video shows (`align.track`), against the commanded one, in degrees and world
units;
- confusion: one first frame, several actions; which action's true video does each generated one resemble?

Every number has anchors that go through the same measurement: `HeldOut.anchors` in suite.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8

from minwm.cameras.track import CameraTrack, se3_inverse, se3_log
from minwm.core.config import UserError
from minwm.eval.camera.align import AlignConfig, FirstView, track
from minwm.eval.camera.motion import Motions, motions
from minwm.eval.image import psnr
from minwm.eval.stats import Bootstrap, Interval
from minwm.render.base import Scene

Array = np.ndarray
MIN_SEEN = 0.12
"""Frames count only where the commanded camera still sees this share of what the first frame shows."""


class FollowError(UserError):
    """A camera-following measurement that cannot be made."""


@dataclass(frozen=True)
class Case:
    """A held-out clip: its world and the commanded camera at the pixel rate, in world coordinates."""

    scene: Scene
    track: CameraTrack
    command: str = ""
    """The trajectory in keys, where there is one: measurements are then told per key, too."""


@dataclass(frozen=True)
class FollowResult:
    """Camera following of one set of videos."""

    clips: int
    candidates: int
    """Videos to choose from in the retrieval: commanded, static and the distractors."""
    retrieval: Interval
    """Share of clips whose nearest candidate is the commanded one; chance is 1 / candidates."""
    psnr_gap: Interval
    """PSNR to the commanded render minus the best PSNR to any other candidate, dB."""
    rot_err_deg: Interval
    """Angle between shown and commanded orientation, mean over scored frames and clips."""
    trans_err_u: Interval
    """Distance between shown and commanded position, world units."""
    score: Interval
    """1 - error / (error of a camera that never moves), mean of rotation and translation: 1 obeys, 0 stands
    still, negative moves the wrong way."""
    score_rot: float | None
    """The rotation half of the score; None when no command turns."""
    score_trans: float | None
    speed_ratio: float | None
    """Least-squares ratio of shown to commanded displacement: 1 right speed, 0 still, -1 backwards."""
    turn_ratio: float | None
    static_rot_deg: float
    """Error of a camera that never moves, on the same frames: what the score divides by."""
    static_trans_u: float
    valid_frac: float
    """Mean share of the pixels that took part in the tracking."""
    lost_frac: float
    """Share of scored frames where tracking failed; they are charged at least the error of standing still."""
    rot_err_per_clip: list[float]
    trans_err_per_clip: list[float]
    motion: Motions
    """The same second by second and key by key."""

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Suite:
    """True renders to compare with, made once and shared by all models (see `prepare`)."""

    cases: tuple[Case, ...]
    stride: int
    commanded: Float[Array, "c f 4 4"]
    """Commanded c2w at the latent rate, world coordinates."""
    K: Float[Array, "c f 4"]
    candidates: UInt8[Array, "c m f h w 3"]
    """True renders at the latent rate: 0 commanded, 1 static, 2.. other clips' cameras in this world."""
    scored: Bool[Array, "c f"]

    @property
    def per_second(self) -> int:
        """Latents that are one second."""
        return max(1, round(self.cases[0].track.fps / self.stride))

    @property
    def names(self) -> list[str]:
        return ["commanded", "static", *(f"distractor {i + 1}" for i in range(self.candidates.shape[1] - 2))]

    def latent_rate(self, videos: UInt8[Array, "..."]) -> UInt8[Array, "c f h w 3"]:
        """The frames at which latents have poses. Takes videos at either rate; raises FollowError
        otherwise."""
        count, length, *size = self.candidates[:, 0].shape[:4]
        if videos.shape[0] == count and list(videos.shape[2:4]) == size:
            if videos.shape[1] == length:
                return videos
            if videos.shape[1] == self.stride * (length - 1) + 1:
                return videos[:, :: self.stride]
        raise FollowError(
            f"videos of shape {videos.shape}; this suite needs ({count}, {self.stride * (length - 1) + 1}, "
            f"{size[0]}, {size[1]}, 3), or {length} frames at the latent rate"
        )


def prepare(
    cases: Sequence[Case],
    height: int,
    width: int,
    *,
    stride: int = 4,
    choices: int = 5,
    config: AlignConfig | None = None,
) -> Suite:
    """Render all candidates at the latent rate. Distractors are other clips' cameras, started at this clip's
    first pose, that differ clearly from the command. Raises FollowError when no other clip has a different
    camera."""
    config = config or AlignConfig()
    lengths = sorted({len(case.track) for case in cases})
    if len(lengths) != 1:
        raise FollowError(f"clips of lengths {lengths}; camera following needs at least one clip, all of one length")
    tracks = [case.track.at_latent_rate(stride) for case in cases]
    others = [distractors(i, tracks, choices) for i in range(len(cases))]
    count = min(map(len, others))
    if not count:
        lonely = next(i for i, found in enumerate(others) if not found)
        raise FollowError(f"clip {lonely}: no other clip moves differently; add clips with other trajectories")
    candidates = np.stack(
        [
            np.stack(
                [
                    case.scene.render(path, height, width, config.supersample).frames
                    for path in (own, _static(own), *found[:count])
                ]
            )
            for case, own, found in zip(cases, tracks, others, strict=True)
        ]
    )
    commanded, K = np.stack([t.c2w for t in tracks]), np.stack([t.K for t in tracks])
    first = FirstView([case.scene for case in cases], commanded[:, 0], K[:, 0], (height, width), config)
    seen = [first.view(commanded[:, i], K[:, i]).seen.mean((1, 2)).numpy() for i in range(commanded.shape[1])]
    scored = np.logical_and.accumulate(np.stack(seen, 1) >= MIN_SEEN, axis=1)
    scored[:, 0] = False  # the first frame is given
    return Suite(tuple(cases), stride, commanded, K, candidates, scored)


def evaluate(
    suite: Suite, videos: UInt8[Array, "c n h w 3"], config: AlignConfig | None = None, *, seed: int = 0
) -> FollowResult:
    """Measure videos that were generated for the suite's clips, in the same order."""
    frames = suite.latent_rate(videos)
    likeness = psnr(
        np.broadcast_to(frames[:, None], suite.candidates.shape)[:, :, 1:], suite.candidates[:, :, 1:]
    ).mean(-1)
    hit = (likeness.argmax(1) == 0).astype(float)
    gap = likeness[:, 0] - likeness[:, 1:].max(1)

    shown = track([case.scene for case in suite.cases], suite.commanded[:, 0], suite.K, frames, config or AlignConfig())
    motion, wanted = _anchored(shown.c2w), _anchored(suite.commanded)
    still_rot, still_trans = _differences(np.broadcast_to(np.eye(4), wanted.shape), wanted)
    rot, trans = _differences(motion, wanted)
    rot = np.where(shown.lost, np.maximum(rot, still_rot), rot)
    trans = np.where(shown.lost, np.maximum(trans, still_trans), trans)

    weight = suite.scored.astype(float)
    total = weight.sum(1)
    if not total.any():
        raise FollowError("no frame can be scored: every command turns away from the first view at once")
    sums = {"rot": rot, "trans": trans, "still_rot": still_rot, "still_trans": still_trans}
    per_clip = {name: (value * weight).sum(1) for name, value in sums.items()} | {"frames": total}
    interval = Bootstrap(len(frames), seed)
    used = np.maximum(total, 1)
    log_shown, log_wanted = se3_log(motion)[..., 3:], se3_log(wanted)[..., 3:]
    mask = weight * ~shown.lost
    return FollowResult(
        clips=len(frames),
        candidates=suite.candidates.shape[1],
        retrieval=interval(lambda i: hit[i].mean()),
        psnr_gap=interval(lambda i: gap[i].mean()),
        rot_err_deg=interval(lambda i: _ratio(per_clip["rot"][i], total[i])),
        trans_err_u=interval(lambda i: _ratio(per_clip["trans"][i], total[i])),
        score=interval(lambda i: _score({name: value[i] for name, value in per_clip.items()})),
        score_rot=_half(per_clip, "rot"),
        score_trans=_half(per_clip, "trans"),
        speed_ratio=_speed(motion[..., :3, 3], wanted[..., :3, 3], mask),
        turn_ratio=_speed(log_shown, log_wanted, mask),
        static_rot_deg=_ratio(per_clip["still_rot"], total),
        static_trans_u=_ratio(per_clip["still_trans"], total),
        valid_frac=float((shown.valid * weight).sum() / total.sum()),
        lost_frac=float((shown.lost * weight).sum() / total.sum()),
        rot_err_per_clip=(per_clip["rot"] / used).tolist(),
        trans_err_per_clip=(per_clip["trans"] / used).tolist(),
        motion=motions(
            motion, wanted, suite.scored, shown.lost, [c.command for c in suite.cases], suite.per_second, interval
        ),
    )


@dataclass(frozen=True)
class Confusion:
    """Counterfactual control: row = the action given, column = the action whose true video it is compared
    with."""

    actions: list[str]
    psnr: list[list[float]]
    """dB, mean over all frames but the first."""
    accuracy: float
    """Share of rows whose highest entry is on the diagonal."""


def confusion(
    generated: UInt8[Array, "a n h w 3"], truth: UInt8[Array, "a n h w 3"], actions: Sequence[str]
) -> Confusion:
    """Compare each action's generated video with every action's true one, all from one first frame."""
    if not len(generated) == len(truth) == len(actions):
        raise FollowError(f"{len(generated)} generated and {len(truth)} true videos for {len(actions)} actions")
    table = np.stack([psnr(np.broadcast_to(one, truth.shape)[:, 1:], truth[:, 1:]).mean(-1) for one in generated])
    accuracy = float((table.argmax(1) == np.arange(len(table))).mean())
    return Confusion(list(actions), table.tolist(), accuracy)


DISTINCT_DEGREES, DISTINCT_UNITS = 3.0, 0.06
"""Two cameras differ clearly when their mean difference exceeds one of these (half a latent step)."""
MIN_DEGREES, MIN_UNITS = 0.1, 2e-3
"""Below these mean errors of a static camera the commands count as not turning, or not moving."""


def _ratio(a: Array, b: Array) -> float:
    return float(a.sum() / max(b.sum(), 1e-9))


def _half(sums: dict[str, Array], name: str) -> float | None:
    static = _ratio(sums[f"still_{name}"], sums["frames"])
    if static < {"rot": MIN_DEGREES, "trans": MIN_UNITS}[name]:
        return None
    return 1 - _ratio(sums[name], sums["frames"]) / static


def _score(sums: dict[str, Array]) -> float:
    halves = [half for half in (_half(sums, "rot"), _half(sums, "trans")) if half is not None]
    return sum(halves) / max(len(halves), 1)


def _speed(shown: Array, wanted: Array, weight: Array) -> float | None:
    energy = ((wanted**2).sum(-1) * weight).sum()
    return float(((shown * wanted).sum(-1) * weight).sum() / energy) if energy > 1e-6 else None


def _anchored(c2w: Float[Array, "c f 4 4"]) -> Float[Array, "c f 4 4"]:
    return se3_inverse(c2w[:, :1]) @ c2w


def _differences(a: Float[Array, "*n 4 4"], b: Float[Array, "*n 4 4"]) -> tuple[Array, Array]:
    """Angle in degrees and distance between poses."""
    turn = se3_log(se3_inverse(a) @ b)[..., 3:]
    return np.degrees(np.linalg.norm(turn, axis=-1)), np.linalg.norm(a[..., :3, 3] - b[..., :3, 3], axis=-1)


def _static(path: CameraTrack) -> CameraTrack:
    return CameraTrack(np.repeat(path.c2w[:1], len(path), 0), path.K, path.fps, path.unit)


def distractors(index: int, tracks: Sequence[CameraTrack], count: int) -> list[CameraTrack]:
    """The next clips' cameras moved to this clip's start, skipping those that nearly coincide with its
    command, with standing still or with one another."""
    own = tracks[index]
    kept = [own, _static(own)]
    for offset in range(1, len(tracks)):
        other = tracks[(index + offset) % len(tracks)]
        path = CameraTrack(own.c2w[0] @ other.relative_to_first().c2w, own.K, own.fps, own.unit)
        if all(_distinct(path, known) for known in kept):
            kept.append(path)
        if len(kept) == count + 2:
            break
    return kept[2:]


def _distinct(a: CameraTrack, b: CameraTrack) -> bool:
    rot, trans = _differences(a.c2w, b.c2w)
    return bool(rot.mean() > DISTINCT_DEGREES or trans.mean() > DISTINCT_UNITS)
