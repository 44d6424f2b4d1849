"""Raw clips that a model generates along prescribed cameras, with exact poses: data for another model."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from minwm.cameras.random_paths import random_track
from minwm.cameras.track import CameraTrack
from minwm.cameras.trajectory import parse
from minwm.core.config import ConfigError, UserError, to_dict
from minwm.core.files import find_files, read_text
from minwm.core.media import PICTURE_SUFFIXES, VIDEO_SUFFIXES
from minwm.core.runtime import git_commit, progress, rank, world_size
from minwm.data.clips import ClipFolder, ClipRecord, readable_id
from minwm.session.batch import Request, generate_batch, plan_tracks, read_requests, start_image
from minwm.store.folder import weights_origin
from minwm.store.model import Model, ModelConfig

Planned = tuple[str, Request, CameraTrack]
"""Id of a clip, what is wanted of the model, and the cameras."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Which clips a model generates from pictures, videos or prompts. Lists of requests say it themselves."""

    clips: int = 1
    """Clips from each start."""
    trajectories: tuple[str, ...] = ()
    """Keys, or pose files (.json). Clips from one start follow them in turn, the first by chance; else random keys."""
    latents: int | None = None
    """Latents of random trajectories, the first included; None: as many as the model was trained on."""
    seed: int = 0
    """Of trajectories and noise."""

    def __post_init__(self) -> None:
        if self.clips < 1 or (self.latents is not None and self.latents < 2):
            raise ConfigError(f"generate: clips={self.clips}, latents={self.latents}; clips from 1, latents from 2")


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Under which terms generated clips are, and what made them."""

    license: str
    """Of what the clips start from, and of the model's outputs."""
    parent: str
    """The model."""

    @classmethod
    def of(cls, folder: Path, source_license: str, accept_limits: bool) -> "Terms":
        """Those of a model folder's clips from starts under `source_license`.

        Raises UserError if the model's weights come from published ones whose licence limits what may be done with
        their outputs, unless that is accepted; and for a missing licence.
        """
        if not source_license.strip():
            raise UserError("source_license is empty: name the licence of the pictures and prompts, such as CC-BY-4.0")
        origin = weights_origin(folder)
        if origin is None:
            return cls(license=source_license, parent=str(folder))
        outputs = f"outputs of {origin.repo} under {origin.license}"
        if origin.license.limits and not accept_limits:
            raise UserError(
                f"{folder}: {outputs}: whatever is trained on them is bound by it. Take a model of other weights, or "
                "accept it with --accept-limits; every clip then says so"
            )
        return cls(license=f"{source_license}; {outputs}", parent=f"{folder}, from {origin.repo}")


@dataclass
class Generated:
    """What became of the requests."""

    wanted: int
    made: int = 0
    """Clips that were not there yet."""
    refused: list[str] = field(default_factory=list)
    """Starts that cannot be read, with the reason."""


def plan_requests(starts: Path, model: ModelConfig, cfg: GenerateConfig) -> list[Request]:
    """Requests of a .json list (`read_requests`), of a .txt of prompts, or of a folder.

    A folder holds pictures and videos, whose first frames are taken, each with its caption beside it (x.png, x.txt).
    What is made of a start depends on its name and the config alone, so that others may be added.
    """
    if starts.suffix == ".json":
        requests = read_requests(starts, model.motion, cfg.seed)
        if given := next((request for request in requests if request.start), None):
            raise UserError(f"{starts}: {given.name} goes on from {given.start}; training clips are made from images")
        return requests
    if starts.suffix == ".txt":
        prompts = [line.strip() for line in read_text(starts).splitlines() if line.strip()]
        return [request for prompt in prompts for request in _from_start(prompt, prompt, None, model, cfg)]
    requests = list[Request]()
    for path in find_files(starts, PICTURE_SUFFIXES + VIDEO_SUFFIXES, "pictures or videos"):
        if not (caption := path.with_suffix(".txt")).exists():
            raise UserError(f"{path} has no caption: write what is seen into {caption.name} beside it")
        name = path.relative_to(starts).as_posix()
        requests += _from_start(name, read_text(caption).strip(), path, model, cfg)
    return requests


def _from_start(
    name: str, prompt: str, image: Path | None, model: ModelConfig, cfg: GenerateConfig
) -> Iterator[Request]:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    rng = np.random.default_rng([cfg.seed, *digest])
    first = int(rng.integers(len(cfg.trajectories) or 1))
    for clip in range(cfg.clips):
        if cfg.trajectories:
            trajectory = cfg.trajectories[(first + clip) % len(cfg.trajectories)]
        else:
            frames = model.motion.stride * ((cfg.latents or model.latents) - 1) + 1
            trajectory = random_track(rng, frames, model.motion, model.intrinsics)[1].canonical()
        yield Request(name=name, prompt=prompt, image=image, trajectory=trajectory, seed=int(rng.integers(2**31)))


def generate_clips(
    model: Model,
    weights: Path,
    requests: Sequence[Request],
    track_of: Callable[[Request], CameraTrack],
    terms: Terms,
    out: Path,
    batch: int = 8,
) -> Generated:
    """Make the clips of all requests that `out` does not hold yet, `batch` at once.

    `weights` is the model's file. Under torchrun every process makes its part. A start that cannot be read is noted,
    and the rest goes on. Raises UserError before any work for a request that the model cannot fulfil, and if the folder
    holds clips of other weights, settings or terms.
    """
    tracks = plan_tracks(model, requests, track_of)
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    config = {"weights": digest, "license": terms.license, "model": to_dict(model.config)}
    folder = ClipFolder.create(out, "generated", {**config, "motion": to_dict(model.config.motion)})
    plan = {_clip_id(r): (r, track) for r, track in zip(requests, tracks, strict=True)}
    done = set(folder.ids())
    mine = [(clip, *plan[clip]) for clip in list(plan)[rank() :: world_size()] if clip not in done]
    if mine:
        model.config.encode_prompts(sorted({r.prompt for _, r, _ in mine}))  # at once: a large encoder is loaded once
    result = Generated(len(plan))
    with progress(len(mine), "clips") as bar:
        for group in _batches(mine, batch):
            _make(model, group, terms, folder, result)
            bar.advance(len(group))
    folder.finish()
    return result


def _clip_id(request: Request) -> str:
    return readable_id(request.name, repr((request.name, request.prompt, request.trajectory, request.seed)))


def _batches(planned: Sequence[Planned], size: int) -> Iterator[list[Planned]]:
    """Clips of one length each."""
    for _, group in groupby(sorted(planned, key=lambda one: len(one[2])), lambda one: len(one[2])):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _make(model: Model, planned: Sequence[Planned], terms: Terms, folder: ClipFolder, result: Generated) -> None:
    readable, images = list[Planned](), list[np.ndarray | None]()
    for clip, request, track in planned:
        try:
            images.append(start_image(model, request))
            readable.append((clip, request, track))
        except (UserError, OSError) as error:
            result.refused.append(f"{request.name}: {error}")
    if not readable:
        return
    _, requests, tracks = zip(*readable, strict=True)
    videos = np.concatenate(list(generate_batch(model, requests, tracks, images)), axis=1)
    for (clip, request, track), frames in zip(readable, videos, strict=True):
        folder.write(_record(clip, request, track, model.config, terms), frames)
        result.made += 1


def _record(clip: str, request: Request, track: CameraTrack, model: ModelConfig, terms: Terms) -> ClipRecord:
    poses = request.trajectory.lower().endswith(".json")
    return ClipRecord(
        id=clip,
        source="generated",
        source_id=request.name,
        source_license=terms.license,
        split_key=request.image.name if request.image else request.prompt,
        track=track,
        caption=request.prompt,
        caption_source="given",
        hw=(model.height, model.width),
        pose_kind="commanded",
        seed=request.seed,
        generator=f"minwm {git_commit() or 'unknown'}",
        parent_model=terms.parent,
        trajectory="" if poses else parse(request.trajectory, stride=model.motion.stride).canonical(),
    )
