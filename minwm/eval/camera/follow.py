"""Camera following: does a video show the commanded camera? Measured on pixels, in scenes that can be rendered.

- Retrieval: among true renders of the commanded, the static and other cameras, is the commanded one nearest?
- Tracking: the camera that the video shows (`align.track`) against the commanded one, in degrees and world units.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8

from minwm.cameras.track import se3_inverse, se3_log
from minwm.eval.camera.align import AlignConfig, FirstView, track
from minwm.eval.camera.motion import MotionResult, measure_motion
from minwm.eval.cases import Case, EvalError, distractors, pose_distance, static
from minwm.eval.image import psnr
from minwm.eval.stats import Bootstrap, Interval

Array = np.ndarray
MIN_SEEN = 0.12
"""Frames count only where the commanded camera still sees this share of what the first frame shows."""
MIN_DEGREES, MIN_UNITS = 0.1, 2e-3
"""Below these mean errors of a static camera the commands count as not turning, or not moving."""


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
    """1 - error / (error of a camera that never moves), mean of rotation and translation: 1 follows, 0 stands
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
    motion: MotionResult
    """The same second by second and key by key."""


@dataclass(frozen=True)
class FollowReference:
    """True renders to compare with, made once for all models."""

    cases: tuple[Case, ...]
    stride: int
    commanded: Float[Array, "c f 4 4"]
    """Commanded c2w at the latent rate, scene coordinates."""
    K: Float[Array, "c f 4"]
    candidates: UInt8[Array, "c m f h w 3"]
    """True renders at the latent rate: 0 commanded, 1 static, 2.. other clips' cameras in this scene."""
    scored: Bool[Array, "c f"]

    @classmethod
    def render(
        cls,
        cases: Sequence[Case],
        height: int,
        width: int,
        *,
        stride: int = 4,
        choices: int = 5,
        config: AlignConfig | None = None,
    ) -> "FollowReference":
        """Render all candidates, up to `choices` of them distractors. Raises EvalError for clips of several lengths,
        and when no other clip has a different camera."""
        config = config or AlignConfig()
        lengths = sorted({len(case.track) for case in cases})
        if len(lengths) != 1:
            raise EvalError(f"clips of lengths {lengths}; camera following needs at least one clip, all of one length")
        cameras = [case.camera.at_latent_rate(stride) for case in cases]
        others = [distractors(i, cameras, choices) for i in range(len(cases))]
        count = min(map(len, others))
        candidates = [
            [
                case.scene.render(path, height, width, config.supersample).frames
                for path in (own, static(own), *found[:count])
            ]
            for case, own, found in zip(cases, cameras, others, strict=True)
        ]
        commanded, K = np.stack([t.c2w for t in cameras]), np.stack([t.K for t in cameras])
        first = FirstView([case.scene for case in cases], commanded[:, 0], K[:, 0], (height, width), config)
        seen = [first.view(commanded[:, i], K[:, i]).seen.mean((1, 2)).numpy() for i in range(commanded.shape[1])]
        scored = np.logical_and.accumulate(np.stack(seen, 1) >= MIN_SEEN, axis=1)
        scored[:, 0] = False  # the first frame is given
        return cls(tuple(cases), stride, commanded, K, np.array(candidates), scored)

    def latent_rate(self, videos: UInt8[Array, "..."]) -> UInt8[Array, "c f h w 3"]:
        """Videos at the pixel or the latent rate, at the latter. Raises EvalError for any other shape."""
        count, length, *size = self.candidates[:, 0].shape[:4]
        if videos.shape[0] == count and list(videos.shape[2:4]) == size:
            if videos.shape[1] == length:
                return videos
            if videos.shape[1] == self.stride * (length - 1) + 1:
                return videos[:, :: self.stride]
        raise EvalError(
            f"videos of shape {videos.shape}; camera following needs ({count}, {self.stride * (length - 1) + 1}, "
            f"{size[0]}, {size[1]}, 3), or {length} frames at the latent rate"
        )


def measure_following(
    reference: FollowReference, videos: UInt8[Array, "c n h w 3"], config: AlignConfig | None = None
) -> FollowResult:
    """Measure videos that were generated for the reference's cases, in the same order."""
    frames, candidates = reference.latent_rate(videos), reference.candidates
    likeness = psnr(np.broadcast_to(frames[:, None], candidates.shape)[:, :, 1:], candidates[:, :, 1:]).mean(-1)
    hit = (likeness.argmax(1) == 0).astype(float)
    gap = likeness[:, 0] - likeness[:, 1:].max(1)

    scenes = [case.scene for case in reference.cases]
    shown = track(scenes, reference.commanded[:, 0], reference.K, frames, config or AlignConfig())
    motion, commanded = _relative(shown.c2w), _relative(reference.commanded)
    still_rot, still_trans = pose_distance(np.broadcast_to(np.eye(4), commanded.shape), commanded)
    rot, trans = pose_distance(motion, commanded)
    rot = np.where(shown.lost, np.maximum(rot, still_rot), rot)
    trans = np.where(shown.lost, np.maximum(trans, still_trans), trans)

    weight = reference.scored.astype(float)
    total = weight.sum(1)
    if not total.any():
        raise EvalError("no frame can be scored: every command turns away from the first view at once")
    sums = {"rot": rot, "trans": trans, "still_rot": still_rot, "still_trans": still_trans}
    per_clip = {name: (value * weight).sum(1) for name, value in sums.items()} | {"frames": total}
    interval = Bootstrap(len(frames))
    per_second = max(1, round(reference.cases[0].track.fps / reference.stride))
    trajectories = [case.trajectory for case in reference.cases]
    used = np.maximum(total, 1)
    log_shown, log_commanded = se3_log(motion)[..., 3:], se3_log(commanded)[..., 3:]
    mask = weight * ~shown.lost
    return FollowResult(
        clips=len(frames),
        candidates=candidates.shape[1],
        retrieval=interval(lambda i: hit[i].mean()),
        psnr_gap=interval(lambda i: gap[i].mean()),
        rot_err_deg=interval(lambda i: _ratio(per_clip["rot"][i], total[i])),
        trans_err_u=interval(lambda i: _ratio(per_clip["trans"][i], total[i])),
        score=interval(lambda i: _score({name: value[i] for name, value in per_clip.items()})),
        score_rot=_half(per_clip, "rot"),
        score_trans=_half(per_clip, "trans"),
        speed_ratio=_speed(motion[..., :3, 3], commanded[..., :3, 3], mask),
        turn_ratio=_speed(log_shown, log_commanded, mask),
        static_rot_deg=_ratio(per_clip["still_rot"], total),
        static_trans_u=_ratio(per_clip["still_trans"], total),
        valid_frac=float((shown.valid * weight).sum() / total.sum()),
        lost_frac=float((shown.lost * weight).sum() / total.sum()),
        rot_err_per_clip=(per_clip["rot"] / used).tolist(),
        trans_err_per_clip=(per_clip["trans"] / used).tolist(),
        motion=measure_motion(motion, commanded, reference.scored, shown.lost, trajectories, per_second, interval),
    )


def _ratio(a: Array, b: Array) -> float:
    return float(a.sum() / max(b.sum(), 1e-9))


def _half(sums: dict[str, Array], name: str) -> float | None:
    still = _ratio(sums[f"still_{name}"], sums["frames"])
    if still < {"rot": MIN_DEGREES, "trans": MIN_UNITS}[name]:
        return None
    return 1 - _ratio(sums[name], sums["frames"]) / still


def _score(sums: dict[str, Array]) -> float:
    halves = [half for half in (_half(sums, "rot"), _half(sums, "trans")) if half is not None]
    return sum(halves) / max(len(halves), 1)


def _speed(shown: Array, commanded: Array, weight: Array) -> float | None:
    energy = ((commanded**2).sum(-1) * weight).sum()
    return float(((shown * commanded).sum(-1) * weight).sum() / energy) if energy > 1e-6 else None


def _relative(c2w: Float[Array, "c f 4 4"]) -> Float[Array, "c f 4 4"]:
    return se3_inverse(c2w[:, :1]) @ c2w
