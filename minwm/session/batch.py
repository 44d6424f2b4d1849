"""Many videos from one list of requests: `read_requests` and `generate_all`.

A folder of finished videos has, of each request, NAME.mp4 and NAME.json (its cameras, a `CameraTrack` per frame), and
one manifest.json that says what made them. A video without a pose file is unfinished.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from minwm.cameras.track import CameraTrack
from minwm.cameras.trajectory import Motion, parse
from minwm.core.config import UserError, parse_json, to_dict
from minwm.core.files import check_shape, locked, read_json, read_text, write_json
from minwm.core.media import read_first_frame, resize_and_crop, write_video
from minwm.core.runtime import git_commit, rank, versions
from minwm.session.generate import check_start, generate_pieces, whole_chunks
from minwm.session.start import StartVideo, open_start_video
from minwm.session.views import Viewpoint, known_views
from minwm.store.model import Model

MANIFEST, TURNS = "manifest.json", "turns.json"
TURN_SECONDS = 4.0
"""Length of a turn of WBench."""
ARROWS = {"→": "right", "←": "left", "↑": "up", "↓": "down", "stop": "static"}
"""What WBench calls keys, where the grammar of trajectories has another word."""
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
FIELDS = {"id", "prompt", "caption", "image", "start", "start_poses", "trajectory", "seed"}
"""Of an entry; `caption` is minWM's word for the prompt."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One video to be made."""

    name: str
    """Of its files, without suffix."""
    prompt: str
    image: Path | None = None
    """A picture, or a video whose first frame is meant; None: from the prompt alone, or from `start`."""
    start: Path | None = None
    """A video to go on from, whose frames come first in the one that is made."""
    start_poses: Path | None = None
    """Its cameras; None: those of START.json."""
    trajectory: str
    """Keys, or the path of a pose file."""
    seed: int
    """Of the noise."""
    viewpoint: Viewpoint | None = field(default=None, compare=False)
    """Of the image, where it is known: for models that remember views."""
    turns: tuple[int, ...] = ()
    """First pixel frame of each turn, and the number of frames; empty: not a benchmark of turns."""


def read_requests(path: Path, motion: Motion, seed: int = 0) -> list[Request]:
    """Requests of a JSON file, or of all JSON files in a folder.

    A file holds one entry or a list of them: {"id", "prompt", "image" or "start" and "start_poses", "trajectory",
    "seed"}, of which only prompt and trajectory must be there (the seed of entry i is else `seed + i`); minWM's
    benchmark, which says "caption" for the prompt; or cases of WBench, whose turns last `TURN_SECONDS` each. Cases of
    WBench without any navigation are left out: they are not for models that are steered by cameras. Files are looked
    for beside the list, then in the folder above. Raises UserError, naming file and entry, for anything else.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    requests = list[Request]()
    for file in files:
        for entry in _entries(file):
            where = f"{file}: entry {entry.get('id', len(requests))}"
            own_seed = seed + len(requests)
            if "interactions" not in entry:
                requests.append(_plain(entry, file.parent, own_seed, where))
            elif (case := _wbench(entry, file.parent, motion, own_seed, where)) is not None:
                requests.append(case)
    names = [request.name for request in requests]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: the id {twice[0]!r} is given twice; give every video its own")
    if not requests:
        raise UserError(f"{path} holds no request that a camera can follow; see docs/evaluation.md for the formats")
    return requests


def _entries(file: Path) -> list[dict[str, Any]]:
    try:
        content = parse_json(read_text(file))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error})") from error
    entries = content if isinstance(content, list) else [content]
    if not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{file}: an entry is an object with at least prompt and trajectory")
    return entries


def _plain(entry: Mapping[str, Any], folder: Path, seed: int, where: str) -> Request:
    if unknown := sorted(set(entry) - FIELDS):
        raise UserError(f"{where} has the unknown field {unknown[0]!r}; known are {', '.join(sorted(FIELDS))}")
    prompt, trajectory = entry.get("prompt", entry.get("caption")), entry.get("trajectory")
    if not isinstance(prompt, str) or not isinstance(trajectory, str):
        raise UserError(f"{where} needs a prompt and a trajectory, as texts; it has {prompt!r} and {trajectory!r}")
    if not isinstance(given := entry.get("seed", seed), int):
        raise UserError(f"{where}: seed {given!r} is no whole number")
    if trajectory.lower().endswith(".json"):
        trajectory = str(_beside(trajectory, folder, where))
    files = {x: _beside(entry[x], folder, where) for x in ("image", "start", "start_poses") if entry.get(x)}
    if files.keys() not in (set(), {"image"}, {"start"}, {"start", "start_poses"}):
        raise UserError(
            f"{where} has {', '.join(files)}; give an image, or the video start, with start_poses or without"
        )
    name = _file_name(entry.get("id", seed), where)
    image, start, poses = map(files.get, ("image", "start", "start_poses"))
    return Request(
        name=name, prompt=prompt, image=image, start=start, start_poses=poses, trajectory=trajectory, seed=given
    )


def _wbench(entry: Mapping[str, Any], folder: Path, motion: Motion, seed: int, where: str) -> Request | None:
    """A case of WBench: a key, or a chord, per turn. Turns that are no navigation stand still."""
    check_shape(entry, {"interactions": list}, where)
    if not all(isinstance(turn, dict) and isinstance(turn.get("action", ""), str) for turn in entry["interactions"]):
        raise UserError(f"{where}: an interaction is an object whose action is a text")
    check_shape({"settings": {}, **entry}, {"settings": dict}, where)
    texts = {name: entry.get(name, "") for name in ("environment_prompt", "character_prompt", "description")}
    check_shape(texts, dict.fromkeys(texts, str), where)
    latents = round(TURN_SECONDS * motion.fps / motion.stride)
    turns = [_turn_keys(turn.get("action", "stop"), motion.stride) for turn in entry["interactions"]]
    if not any(keys and keys != "static" for keys in turns):
        return None
    settings = entry.get("settings", {})
    prompts = [texts[f"{part}_prompt"].strip() for part in ("environment", "character")]
    starts = [0, *(1 + motion.stride * latents * (i + 1) for i in range(len(turns)))]
    return Request(
        name=f"case_{_file_name(entry.get('id'), where)}_combined",
        prompt=" ".join(filter(None, prompts)) or texts["description"],
        image=_beside(settings["initial_image"], folder, where) if settings.get("initial_image") else None,
        trajectory=",".join(f"{keys or 'static'}*{latents}" for keys in turns),
        seed=seed,
        turns=tuple(starts),
    )


def _turn_keys(action: str, stride: int) -> str | None:
    """The keys of a turn; None for one that is no navigation."""
    keys = "+".join(ARROWS.get(part.strip(), part.strip()) for part in action.split("+"))
    try:
        return "+".join(parse(keys, stride=stride).segments[0].keys)
    except UserError:
        return None


def _file_name(name: Any, where: str) -> str:
    text = str(name)
    if not isinstance(name, str | int) or not FILE_NAME.fullmatch(text):
        raise UserError(f"{where}: id {name!r} names files; use letters, digits, '.', '_' and '-'")
    return text


def _beside(name: Any, folder: Path, where: str) -> Path:
    """An existing file, looked for in the folder of the list and in the one above."""
    if not isinstance(name, str):
        raise UserError(f"{where}: {name!r} is no path of a file")
    places = [folder / name, folder.parent / name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(f"{where}: {name} is neither at {places[0]} nor at {places[1]}")
    return found


@contextmanager
def naming(request: Request) -> Iterator[None]:
    """Name the request in errors."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{request.name}: {error}") from error


def plan_tracks(
    model: Model, requests: Sequence[Request], track_of: Callable[[Request], CameraTrack]
) -> list[CameraTrack]:
    """The pixel-rate tracks of requests, from the first frame of a video that one goes on from; UserError, naming it,
    for one that the model cannot fulfil, whatever its image holds."""
    tracks = list[CameraTrack]()
    for request in requests:
        with naming(request):
            track, video = track_of(request), start_video(model, request)
            tracks.append(video.track.continued(track) if video else track)
            _padded(model, tracks[-1])
            if video is None:
                check_start(model.config, request.image is not None)
    return tracks


def generate_all(
    model: Model,
    requests: Sequence[Request],
    track_of: Callable[[Request], CameraTrack],
    folder: Path,
    about: Mapping[str, Any],
    part: tuple[int, int] = (0, 1),
) -> int:
    """Make the videos of all requests that `folder` does not hold yet; how many these were.

    `track_of` gives the pixel-rate track of a request. A path that ends inside a chunk is continued by standing still,
    and its video cut. `part` (i, n): of n processes, this one makes every n-th video, from i on. `about` is what else
    the manifest says, such as the model's name.

    Raises UserError before any work for a request that the model cannot fulfil, and if the folder holds videos of
    others.
    """
    tracks = plan_tracks(model, requests, track_of)
    for request in requests:
        with naming(request):
            start_image(model, request)
    _claim(folder, {**about, "fps": model.config.motion.fps, "requests": [_described(r) for r in requests]})
    model.config.encode_prompts([request.prompt for request in requests])  # at once: a large encoder is loaded once
    index, count = part
    made = 0
    for request, track in [*zip(requests, tracks, strict=True)][index::count]:
        poses = folder / f"{request.name}.json"
        if not poses.exists():
            start = video.frames if (video := start_video(model, request)) else start_image(model, request)
            pieces = generate_batch(model, [request], [track], [start])
            video = (frame for (piece,) in pieces for frame in piece)
            write_video(folder / f"{request.name}.mp4", video, model.config.motion.fps)
            track.save(poses)
            made += 1
    return made


def _claim(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, or raise UserError if the folder's one is of other requests; of several processes the first
    writes it."""
    path, plan = folder / MANIFEST, json.loads(json.dumps(manifest))
    if path.exists():
        before = read_json(path)
        if different := [name for name in plan if plan[name] != before.get(name)]:
            raise UserError(f"{folder} holds videos of another list, with other {', '.join(different)}; give another")
    elif rank() == 0:
        with locked(folder):
            write_json(path, {**plan, "commit": git_commit(), "versions": versions()})
            turns = {r["name"]: r["turns"] for r in plan["requests"] if r["turns"]}
            if turns:
                write_json(folder / TURNS, _wbench_turns(plan["fps"], turns))


def _wbench_turns(fps: float, turns: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """WBench's file of the first frames of turns."""
    names = {name: name.removeprefix("case_").removesuffix("_combined") for name in turns}
    return {"fps": fps, "cases": {names[name]: {"turn_frames": list(frames)} for name, frames in turns.items()}}


def read_turns(folder: Path) -> dict[str, tuple[int, ...]]:
    """`Request.turns` of the videos of a folder by name; of a folder that holds no benchmark of turns, nothing."""
    if not (path := folder / TURNS).exists():
        return {}
    found = dict[str, tuple[int, ...]]()
    for case, about in read_json(path, {"cases": dict})["cases"].items():
        check_shape(about, {"turn_frames": list}, f"{path}: case {case}")
        found[f"case_{case}_combined"] = tuple(about["turn_frames"])
    return found


def generate_batch(
    model: Model, requests: Sequence[Request], tracks: Sequence[CameraTrack], starts: Sequence[np.ndarray | None]
) -> Iterator[UInt8[np.ndarray, "b n H W 3"]]:
    """Frames of requests whose tracks are equally long, all at once, as they are finished.

    A video is the same in any batch. `starts` are images of `start_image` or frames of `start_video`: of one shape for
    all requests, or None for all.
    """
    first = np.stack([start for start in starts if start is not None]) if starts[0] is not None else None
    prompts, seeds = [request.prompt for request in requests], [request.seed for request in requests]
    left = len(tracks[0])
    views = known_views(model, [request.viewpoint for request in requests])
    for piece in generate_pieces(model, first, prompts, [_padded(model, track) for track in tracks], seeds, views):
        yield piece[:, :left]
        if (left := left - piece.shape[1]) <= 0:
            return


def _described(request: Request) -> dict[str, Any]:
    """As JSON values; from where its image is seen is no part of what was asked for."""
    values = to_dict(replace(request, viewpoint=None))
    del values["viewpoint"]
    return values


def start_image(model: Model, request: Request) -> UInt8[np.ndarray, "h w 3"] | None:
    """The image that a request starts from, as large as the model's; UserError if it cannot be read."""
    size = model.config.height, model.config.width
    return None if request.image is None else resize_and_crop(read_first_frame(request.image), *size)


def start_video(model: Model, request: Request) -> StartVideo | None:
    """The video that a request goes on from; UserError as `open_start_video`."""
    return None if request.start is None else open_start_video(request.start, request.start_poses, model.config)


def _padded(model: Model, track: CameraTrack) -> CameraTrack:
    """The track, with its last pose held until the model can make its length."""
    cfg = model.config
    least = 1 + math.ceil((len(track) - 1) / cfg.motion.stride)
    beyond_first = max(least, cfg.geometry.first_chunk_frames + 1)
    latents = whole_chunks(cfg, beyond_first) if cfg.sampler.causal else cfg.latents
    missing = 1 + cfg.motion.stride * (latents - 1) - len(track)
    if missing < 0:
        raise UserError(
            f"its path has {len(track)} frames, and this model makes whole clips of {cfg.frames} only; give a shorter "
            "path, or an autoregressive model"
        )
    c2w, K = (np.concatenate([x, x[-1:].repeat(missing, 0)]) for x in (track.c2w, track.K))
    return CameraTrack(c2w, K, track.fps, track.unit)
