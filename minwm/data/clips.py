"""Raw clips: pixels, cameras and a caption, each with provenance and licence; their checks and report.

    folder/manifest.json        what made the folder: config, command, commit, counts, licences
    folder/clips/{id}.mp4       pixels, near-lossless
    folder/clips/{id}.txt       caption, for other tools
    folder/clips/{id}.json      record; written last: a clip without one is unfinished

Every source (procedural worlds, ingested videos, generated clips) writes this format.
"""

import hashlib
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minwm.cameras.check import speeds
from minwm.cameras.track import CameraTrack, so3_log
from minwm.core.config import UserError
from minwm.core.files import check_shape, read_json, read_text, write_json, write_text
from minwm.core.media import contact_sheet, read_video, reduced, write_video
from minwm.core.runtime import git_commit, versions
from minwm.render.place import SceneKind

SCHEMA = 1
CRF = 4
"""x264 quality of the stored pixels (4:4:4, near-lossless)."""
CLIP_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
MOTION_WORDS = re.compile(
    r"\b(camera|pans?|panning|zoom(s|ing)?|dolly|tilt(s|ing)|rotat(es|ing)|turn(s|ing)|mov(es|ing)"
    r"|walk(s|ing)|(for|back)wards?|orbit(s|ing)?)\b",
    re.IGNORECASE,
)
"""Words that a caption must not hold: it describes the scene; camera motion in it would leak control into the text."""
SHEET_PIXELS = 96
"""On the shorter side of the pictures of a contact sheet, at most."""
PIXELS_PER_LATENT = 8
"""The least of all codecs."""
MAX_MOVE = 30.0
"""Units per second of a clip's camera; a car's in metres. Faster ones have another scale."""
MAX_TURN = 360.0
"""Degrees per second of a clip's camera."""
RENDERED: dict[str, SceneKind] = {"procedural": "worlds", "place": "place"}
"""What can be rendered again, by `ClipRecord.source`."""
LATENT_SHARDS = "latent shards"
"""Kind of a folder that `minwm data encode` made."""
CLIP_MANIFEST = {"kind": str, "config": dict, "complete": bool, "command": str}
SHARD_MANIFEST = {
    "kind": str,
    "complete": bool,
    "command": str,
    "codec": {"id": str, "hash": str, "stride": int, "scale": int, "channels": int},
    "text": {"id": str, "hash": str, "dim": int, "length": int},
    "raw": {"kind": str, "config": dict},
}
HINT = "delete the clip's .json and run the command that made the folder again"


class DataError(UserError):
    """Data on disk is missing, damaged or inconsistent; the message names the file, the record and a remedy."""


PoseKind = Literal["ground_truth", "commanded", "estimated"]


@dataclass(frozen=True, kw_only=True)
class ClipRecord:
    """Everything known about one clip except its pixels."""

    id: str
    """Unique in its dataset: letters, digits, `-` and `_`."""
    source: str
    """What made the pixels: `procedural`, `splat`, `generated` or the name of an ingested dataset."""
    source_id: str
    """Name of the scene, video or world inside that source."""
    source_license: str
    """SPDX name, or the name of the terms that came with the source."""
    split_key: str
    """Clips with one key are all in train or all in val, so that no scene is in both."""
    track: CameraTrack
    """One camera per pixel frame, camera-to-world, OpenCV axes, relative to frame 0."""
    caption: str
    """What is in the scene, never how the camera moves."""
    caption_source: str
    """Who or what wrote the caption."""
    hw: tuple[int, int]
    """Height and width in pixels."""
    pose_kind: PoseKind
    """Where the poses come from: a renderer, the input of a generative model, or an estimator."""
    origin: np.ndarray | None = None
    """4 4 float64: world pose of frame 0, where the world is known (procedural, splat)."""
    seed: int | None = None
    """Seed of a procedural world, or of a generated clip's noise."""
    generator: str = ""
    """Name and version of the code that made the pixels of a procedural or generated clip."""
    parent_model: str = ""
    """The model that made a generated clip, whose terms the clip inherits."""
    trajectory: str = ""
    """The commanded trajectory in canonical form, if there was one."""
    metric_scale: float | None = None
    """Metres per unit, where known."""
    quality: dict[str, float] = field(default_factory=dict)
    """Measurements of the clip by name."""

    def __post_init__(self) -> None:
        if not CLIP_ID.fullmatch(self.id):
            raise DataError(f"clip id {self.id!r}: use up to 80 letters, digits, '-' and '_'")

    @property
    def world(self) -> str:
        """Clips with the same one, and with an `origin`, have one world frame."""
        return f"{self.source} {self.source_id if self.seed is None else self.seed}"

    def meta(self) -> dict[str, Any]:
        """The record without its cameras, as JSON values."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "track"}
        values["origin"] = None if self.origin is None else self.origin.tolist()
        return {"schema": SCHEMA, **values, "fps": self.track.fps, "unit": self.track.unit}

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {**self.meta(), "c2w": self.track.c2w.tolist(), "K": self.track.K.tolist()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> "ClipRecord":
        """The inverse of `to_json`; raises DataError or CameraError. `where` names the file in errors."""
        if values.get("schema") != SCHEMA:
            raise DataError(
                f"{where}: record schema {values.get('schema')!r}, this version reads {SCHEMA}; "
                "make the dataset again with this version"
            )
        names = {f.name for f in fields(cls)} - {"track"}
        expected = names | {"schema", "fps", "unit", "c2w", "K"}
        if set(values) != expected:
            missing, unknown = sorted(expected - set(values)), sorted(set(values) - expected)
            raise DataError(f"{where}: missing fields {missing}, unknown fields {unknown}; make the dataset again")
        if wrong := [f.name for f in fields(cls) if f.type is str and not isinstance(values[f.name], str)]:
            raise DataError(f"{where}: {wrong[0]} = {values[wrong[0]]!r} is no text; make the dataset again")
        try:
            track = CameraTrack(
                c2w=np.array(values["c2w"], np.float64),
                K=np.array(values["K"], np.float64),
                fps=float(values["fps"]),
                unit=values["unit"],
            )
            known = {name: values[name] for name in names}
            known["hw"] = (int(values["hw"][0]), int(values["hw"][1]))
            known["origin"] = None if values["origin"] is None else np.array(values["origin"], np.float64)
        except (TypeError, ValueError, LookupError, OverflowError) as error:
            raise DataError(f"{where}: {error}; make the dataset again") from error
        return cls(track=track, **known)


def readable_id(name: str, key: str) -> str:
    """Letters and digits of a name, and a hash of `key`, which keeps names in other scripts apart: at most 49."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40]
    return f"{plain}-{digest}".lstrip("-")


def split_of(split_key: str, val: float) -> Literal["train", "val"]:
    """Train or val by a hash of the key, the same in every dataset; `val` is the share of validation keys."""
    digest = hashlib.sha256(split_key.encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val * 2**64 else "train"


class ClipFolder:
    """A folder of raw clips. Writes are atomic: an interrupted run leaves only whole clips."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clips = path / "clips"
        if not self.clips.is_dir():
            raise DataError(f"{path}: no clip folder (it lacks clips/); make one with `minwm data render`")

    @classmethod
    def create(cls, path: Path, kind: str, config: Mapping[str, Any]) -> "ClipFolder":
        """Open for writing. Raises DataError if the folder was made with another kind or config."""
        (path / "clips").mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        config = json.loads(json.dumps(config))
        if not (path / "manifest.json").exists():
            folder._write_manifest(kind, config, {"complete": False})
        before = folder.manifest()
        if before["kind"] != kind or before["config"] != config:
            old, new = {"kind": before["kind"], **before["config"]}, {"kind": kind, **config}
            names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
            changes = ", ".join(f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names)
            raise DataError(f"{path} has other settings ({changes}); choose another folder or delete this one")
        return folder

    def ids(self) -> list[str]:
        """Ids of all finished clips, sorted."""
        return sorted(p.stem for p in self.clips.glob("*.json") if CLIP_ID.fullmatch(p.stem))

    def record(self, clip: str) -> ClipRecord:
        """The record of one clip; DataError if it is missing or damaged."""
        path = self.clips / f"{clip}.json"
        try:
            values = read_json(path)
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such clip; {len(self.ids())} others are there") from error
        except UserError as error:
            raise DataError(f"{error}; {HINT}") from error
        return ClipRecord.from_json(values, str(path))

    def frames(self, clip: str) -> np.ndarray:
        """Pixels of one clip, n h w 3 uint8; DataError if they do not match the record."""
        path, record = self.clips / f"{clip}.mp4", self.record(clip)
        if not path.exists():
            raise DataError(f"{path}: missing; {HINT}")
        frames, _ = read_video(path)
        expected = (len(record.track), *record.hw, 3)
        if frames.shape != expected:
            raise DataError(f"{path}: frames {frames.shape}, the record says {expected}; {HINT}")
        return frames

    def write(self, record: ClipRecord, frames: np.ndarray) -> None:
        """Write one clip; `frames` is n h w 3 uint8, one per camera."""
        expected = (len(record.track), *record.hw, 3)
        if frames.shape != expected or frames.dtype != np.uint8:
            got = f"{frames.shape} {frames.dtype}"
            raise DataError(f"clip {record.id}: frames {got}, its cameras need {expected} uint8")
        base = self.clips / record.id
        write_video(base.with_suffix(".mp4"), frames, record.track.fps, crf=CRF)
        write_text(base.with_suffix(".txt"), record.caption + "\n")
        write_json(base.with_suffix(".json"), record.to_json(), indent=None)

    def manifest(self) -> dict[str, Any]:
        """What made the folder, and its counts."""
        return read_manifest(self.path, "minwm data render")

    def finish(self) -> None:
        """Write the counts of all clips into the manifest. Every rank calls it; the last one counts everything."""
        records = [self.record(clip) for clip in self.ids()]
        before = self.manifest()
        counts = {
            "complete": True,
            "clips": len(records),
            "frames": sum(len(r.track) for r in records),
            "licences": dict(Counter(r.source_license for r in records)),
            "sources": dict(Counter(r.source for r in records)),
        }
        self._write_manifest(before["kind"], before["config"], counts)

    def _write_manifest(self, kind: str, config: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        write_manifest(self.path, {"kind": kind, "config": config, **extra})


def write_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    """Write `manifest.json`: `values` with schema, command, commit and versions."""
    command = shlex.join(["minwm", *sys.argv[1:]])
    stamp = {"schema": SCHEMA, "command": command, "commit": git_commit(), "versions": versions()}
    write_json(folder / "manifest.json", {**stamp, **values})


def read_manifest(folder: Path, maker: str) -> dict[str, Any]:
    """Read `manifest.json`; errors name `maker`, the command that writes such a folder."""
    path = folder / "manifest.json"
    try:
        values = read_json(path)
        if values.get("schema") != SCHEMA:
            raise UserError(f"{path}: schema {values.get('schema')!r}, this version reads {SCHEMA}")
        shards = values.get("kind") == LATENT_SHARDS
        check_shape(values, SHARD_MANIFEST if shards else CLIP_MANIFEST, str(path))
        if values["complete"]:
            check_shape(values, {"counts": dict, "codec_psnr": float} if shards else {"clips": int}, str(path))
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; make the dataset with `{maker}`") from error
    except UserError as error:
        raise DataError(f"{error}; delete it and run `{maker}` again") from error
    return values


# ---------------------------------------------------------------------------------------------
# Checks


def check(path: Path, stride: int = 4) -> list[str]:
    """The problems of a clip folder, one line each with the clip's id; empty if there are none."""
    folder = ClipFolder(path)
    problems = [] if folder.ids() else ["no finished clips"]
    keys: dict[tuple[str, str], str] = {}
    for clip in folder.ids():
        try:
            record = folder.record(clip)
            frames = folder.frames(clip)
        except UserError as error:
            problems.append(f"{clip}: {error}")
            continue
        found = [*_record_problems(record, clip), *_camera_problems(record, stride), *_pixel_problems(frames)]
        text = folder.clips / f"{clip}.txt"
        if not text.exists() or read_text(text).strip() != record.caption:
            found.append(f"{text.name} does not hold the caption of the record")
        key = keys.setdefault((record.source, record.source_id), record.split_key)
        if key != record.split_key:
            found.append(f"{record.source_id} has split keys {key!r} and {record.split_key!r}: it would leak")
        problems += [f"{clip}: {problem}" for problem in found]
    counted = folder.manifest().get("clips", 0)
    if counted > len(folder.ids()):
        problems.append(f"manifest: {counted} clips were made, {len(folder.ids())} are there; run it again")
    return problems


def _record_problems(record: ClipRecord, clip: str) -> list[str]:
    problems = []
    if record.id != clip:
        problems.append(f"the record calls itself {record.id!r}")
    if not record.source_license.strip():
        problems.append("no licence")
    if not record.caption.strip():
        problems.append("empty caption")
    if match := MOTION_WORDS.search(record.caption):
        problems.append(f"the caption speaks of motion ({match[0]!r}), which would leak the control")
    return problems


def _camera_problems(record: ClipRecord, stride: int) -> list[str]:
    """Problems beyond those that CameraTrack refuses itself."""
    problems = []
    track, (height, width) = record.track, record.hw
    anchor = float(np.abs(track.c2w[0] - np.eye(4)).max())
    if anchor > 1e-5:
        problems.append(f"frame 0 is {anchor:.2g} away from the identity")
    if len(track) % stride != 1:
        problems.append(f"{len(track)} frames; latents of {stride} frames need {stride}*k+1")
    if height % PIXELS_PER_LATENT or width % PIXELS_PER_LATENT:
        problems.append(f"{width}x{height} pixels; codecs need multiples of {PIXELS_PER_LATENT}, most models of 16")
    f, c = track.K[:, :2], track.K[:, 2:]
    if f.min() < 0.2 or f.max() > 3 or c.min() < 0.2 or c.max() > 0.8:
        problems.append(f"unusual intrinsics {track.K[0].tolist()}: expected f in 0.2..3, c in 0.2..0.8")
    ratio = track.K[:, 0] * width / (track.K[:, 1] * height)
    if np.abs(ratio - 1).max() > 0.05:
        problems.append(f"pixels are not square: fx/fy = {ratio[np.abs(ratio - 1).argmax()]:.3f} in pixels")
    relative = track.relative()
    problems += _jumps("step", np.linalg.norm(relative[:, :3, 3], axis=-1))
    problems += _jumps("turn", np.linalg.norm(so3_log(relative[:, :3, :3]), axis=-1))
    move, turn = speeds(track)
    if move > MAX_MOVE:
        problems.append(f"it moves {move:.3g} units ({track.unit}) per second: scale the poses to below {MAX_MOVE:g}")
    if turn > MAX_TURN:
        problems.append(f"it turns {turn:.3g} degrees per second: are {track.fps:g} poses per second true?")
    return problems


def _jumps(name: str, size: np.ndarray) -> list[str]:
    """Jumps: steps over 5 times the median step and over 5 times both of their neighbours.

    A player who starts or stops makes a step that differs from one neighbour only.
    """
    moving = size[size > 1e-6]
    padded = np.pad(size, 1)
    isolated = size * (size > 5 * np.maximum(padded[:-2], padded[2:]))
    if not len(moving) or isolated.max() <= 5 * np.median(moving):
        return []
    frame, times = int(isolated.argmax()) + 1, isolated.max() / np.median(moving)
    return [f"frame {frame}: a {name} {times:.0f} times the median looks like a jump"]


def _pixel_problems(frames: np.ndarray) -> list[str]:
    flat = np.flatnonzero(frames.reshape(len(frames), -1).std(axis=1) < 1)
    return [f"frame {flat[0]} is one flat colour"] if len(flat) else []


# ---------------------------------------------------------------------------------------------
# Report


def actions(track: CameraTrack, stride: int = 4) -> list[str]:
    """The camera motion of each latent step in words, derived from the poses: `forward+turn right`, `still`, ..."""
    relative = track.at_latent_rate(stride).relative()
    steps, turns = relative[:, :3, 3], so3_log(relative[:, :3, :3])
    moves = _axes(steps, 1e-4, (("left", "right"), ("up", "down"), ("back", "forward")))
    # OpenCV axes: a positive turn about x looks up, about y turns right.
    names = (("look down", "look up"), ("turn left", "turn right"), ("roll left", "roll right"))
    looks = _axes(turns, np.radians(0.05), names)
    return ["+".join([*m, *look]) or "still" for m, look in zip(moves, looks, strict=True)]


def _axes(vectors: np.ndarray, least: float, names: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Names of the axes within 60 degrees of each vector; none where it is shorter than `least`."""
    labels = []
    for vector in vectors:
        size = float(np.linalg.norm(vector))
        strong = [a for a in range(3) if size > least and abs(vector[a]) > 0.5 * size]
        labels.append([names[a][int(vector[a] > 0)] for a in strong])
    return labels


def report(path: Path, stride: int = 4, val: float = 0.1) -> dict[str, Any]:
    """Counts and distributions of a clip folder, as JSON values."""
    folder = ClipFolder(path)
    records = [folder.record(clip) for clip in folder.ids()]
    if not records:
        raise DataError(f"{path}: no finished clips; run `minwm data render` again")
    histogram = Counter(a for r in records for a in actions(r.track, stride))
    return {
        "clips": len(records),
        "frames": sum(len(r.track) for r in records),
        "seconds": sum(len(r.track) / r.track.fps for r in records),
        "sizes": dict(Counter(f"{r.hw[1]}x{r.hw[0]}" for r in records)),
        "splits": dict(Counter(split_of(r.split_key, val) for r in records)),
        "scenes": len({r.split_key for r in records}),
        "path_length": _spread([r.track.path_length() for r in records]),
        "actions": dict(histogram.most_common()),
        "captions": len({r.caption for r in records}),
        "caption_words": _spread([float(len(r.caption.split())) for r in records]),
        "sources": dict(Counter(r.source for r in records)),
        "licences": dict(Counter(r.source_license for r in records)),
        "parent_models": dict(Counter(r.parent_model for r in records if r.parent_model)),
        "pose_kinds": dict(Counter(r.pose_kind for r in records)),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


def sheet(path: Path, rows: int = 8, every: int = 4) -> np.ndarray:
    """Contact sheet (h w 3 uint8) of `rows` clips spread over the folder: every `every`-th frame of each."""
    folder = ClipFolder(path)
    ids = folder.ids()
    if not ids:
        raise DataError(f"{path}: no finished clips; run `minwm data render` again")
    chosen = [ids[i] for i in np.unique(np.linspace(0, len(ids) - 1, min(rows, len(ids))).astype(int))]
    frames = [np.stack([reduced(frame, SHEET_PIXELS) for frame in folder.frames(clip)[::every]]) for clip in chosen]
    return contact_sheet(frames, every=1, labels=chosen)
