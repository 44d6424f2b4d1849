"""Camera control learnt from COLMAP's poses against that learnt from true ones, for `results/estimated-poses.json`.

    python benchmarks/estimated_poses.py results/estimated-poses.json FOLDER --clips 120 --seeds 1
    python benchmarks/estimated_poses.py results/estimated-poses.json FOLDER --footage game --clips 105 --seeds 1

Clips of 256 rows are posed by COLMAP, its scale set by the median depth as `minwm data ingest` does, and by ingest's
rules kept or dropped. The demo's camera model, whose camera branch was taken away, then relearns control from these
clips: with COLMAP's poses and with the true ones, equally long and with the same seeds. What FOLDER holds is kept, and
results of other footage stay as they are.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import STANDS, pose_errors

from minwm.cameras.estimate.base import EstimateError
from minwm.cameras.estimate.colmap import Colmap
from minwm.cameras.track import CameraTrack
from minwm.cameras.trajectory import parse
from minwm.core.files import read_json, write_json, write_text
from minwm.core.media import resize_and_crop
from minwm.core.runtime import git_commit, versions
from minwm.data.clips import ClipFolder, DataError
from minwm.data.doom import DoomConfig
from minwm.data.encode import EncodeConfig, encode_clips
from minwm.data.ingest import IngestConfig
from minwm.data.quality import Candidate, QualityConfig, failures
from minwm.data.record import record
from minwm.data.rerender import RenderConfig, render_worlds
from minwm.eval.image import psnr
from minwm.eval.metrics import measure
from minwm.eval.recorded import RECORDING, baselines, recorded_source, recordings
from minwm.eval.run import EvalConfig, HeldOut, measure_model
from minwm.eval.source import VideoSource
from minwm.eval.stats import Bootstrap
from minwm.experiments.ablate import camera_losses, camera_start
from minwm.experiments.ablations import camera_run, shipped
from minwm.experiments.presets.demo import tiny_model
from minwm.store.folder import load_codec, load_model
from minwm.store.model import Model
from minwm.train.build import train
from minwm.train.config import Run

PIXELS, SEED, BATCH = 256, 12, 8
UNITS = 128.0
"""Of the map per world unit."""
TRUE, COLMAP = "true poses", "poses by COLMAP"
Scores = dict[str, np.ndarray]
"""A value per clip, by quantity."""


@dataclass(frozen=True, kw_only=True)
class Footage:
    """Clips whose cameras are known, and what is measured of a model that learnt from them."""

    make: Callable[[Path, int], ClipFolder]
    """Makes so many clips in a folder."""
    depth: float
    """Median depth of the pictures in world units, to which COLMAP's poses are scaled."""
    steps: int
    """Of training."""
    judge: Callable[[Path, Mapping[str, Sequence[Run]]], dict[str, Any]]
    """Given FOLDER and the trained runs by arm, one per seed."""


# ---------------------------------------------------------------------------------------------- poses


def estimates(large: ClipFolder, clips: Sequence[str], out: Path) -> dict[str, CameraTrack]:
    """COLMAP's poses by clip, in units of the median depth; `out` keeps them, and why other clips have none."""
    for clip in clips:
        if (out / f"{clip}.json").exists() or (out / f"{clip}.txt").exists():
            continue
        true = large.record(clip).track
        try:
            found = Colmap(focal=float(true.K[0, 0]))(large.frames(clip), np.arange(len(true)) / true.fps, true.fps)
            found.track.relative_to_first().scaled(found.scale(1.0)).save(out / f"{clip}.json")
        except EstimateError as error:
            write_text(out / f"{clip}.txt", f"{error}\n")
    return {clip: CameraTrack.load(out / f"{clip}.json") for clip in clips if (out / f"{clip}.json").exists()}


def write_arms(
    large: ClipFolder, found: Mapping[str, CameraTrack], folders: Mapping[str, ClipFolder]
) -> dict[str, Any]:
    """Write the clips that COLMAP places and that ingest and the model take, reduced to its size, with each kind of
    poses; returns counts, and quartiles over clips of `pose_errors` and of the path's length over the true one."""
    errors, model = list[tuple[float, ...]](), tiny_model()
    for clip, track in found.items():
        one, frames = large.record(clip), large.frames(clip)
        small = replace(one, hw=(model.height, model.width))
        posed = replace(small, track=track, pose_kind="estimated")
        try:
            model.clip_spec.check_clip(posed, clip)
        except DataError:
            continue
        if not failures(Candidate(frames, track), QualityConfig()):
            length = track.path_length() / one.track.path_length()
            errors.append((*pose_errors(track, one.track), length))
            frames = np.stack([resize_and_crop(frame, *small.hw) for frame in frames])
            folders[TRUE].write(small, frames)
            folders[COLMAP].write(posed, frames)
    for folder in folders.values():
        folder.finish()
    quartiles = np.percentile(np.array(errors), (25, 50, 75), axis=0).T.tolist()
    names = ("rotation_deg", "path_share", "length_ratio")
    return {
        "placed": len(found),
        "kept": len(errors),
        **dict(zip(names, quartiles, strict=True)),
    }


# ---------------------------------------------------------------------------------------------- control


def trained(run: Run, folder: Path) -> Run:
    """What trains on from the run's weights."""
    train(run, folder)
    return replace(run, init=replace(run.init, student=str(folder)))


def ready(run: Run) -> Model:
    """The model of a trained run, as `minwm ablate` measures it."""
    assert run.init.student
    model = load_model(Path(run.init.student)).ready()
    sampler = replace(model.config.sampler, steps=12, guidance=1.0)
    return replace(model, config=replace(model.config, sampler=sampler))


def summary(arms: Mapping[str, Sequence[Scores]]) -> dict[str, Any]:
    """Mean and interval over clips of each quantity, by arm, and of the paired difference; seeds are averaged."""
    means = {arm: {name: np.mean([s[name] for s in seeds], 0) for name in seeds[0]} for arm, seeds in arms.items()}
    differences = {name: values - means[COLMAP][name] for name, values in means[TRUE].items()}
    return {
        "scores": {name: {arm: over_clips(of[name]) for arm, of in means.items()} for name in differences},
        "true_minus_colmap": {name: over_clips(values) for name, values in differences.items()},
        "by_seed": {
            arm: [{name: float(values.mean()) for name, values in scores.items()} for scores in seeds]
            for arm, seeds in arms.items()
        },
    }


def over_clips(values: np.ndarray) -> dict[str, float]:
    """The mean of one value per clip, with its interval."""
    return asdict(Bootstrap(len(values))(lambda drawn: float(values[drawn].mean())))


def judge_worlds(_out: Path, arms: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Camera following on held-out worlds."""
    cfg, model = EvalConfig(clips=16, counterfactual=(), revisits=0, walks=0, seeds=0, bench_repeats=0), tiny_model()
    held = HeldOut(model, load_codec(shipped("codec")), cfg, model.scene)

    def scores(run: Run) -> Scores:
        _, row = measure_model(run.name, ready(run), held)
        assert row.follow
        rotation = np.array(row.follow.rot_err_per_clip) / row.follow.static_rot_deg
        translation = np.array(row.follow.trans_err_per_clip) / row.follow.static_trans_u
        return {"camera score": 1 - (rotation + translation) / 2}

    return {"evaluated_clips": cfg.clips, **summary({arm: [scores(run) for run in runs] for arm, runs in arms.items()})}


COMMANDS, PLACES, OPEN = ("w*8", "s*8", "a*8", "d*8", "j*8", "l*8"), 24, 0.5
"""What is commanded from each place; places that are tried, and the share of the way that must be free in all."""


def held_out(out: Path) -> tuple[ClipFolder, int]:
    """Recorded clips of the map, one along each of `COMMANDS` from every place where none of them is blocked at once,
    sorted by place, all in the split `train`; and the number of places."""
    cfg = DoomConfig(latents=9, units=UNITS, seed=SEED + 1, moved=0.0)
    made = [record(out / key[0], replace(cfg, trajectories=(key,)), clips=PLACES) for key in COMMANDS]
    held, places = ClipFolder.create(out / "clips", "vizdoom", {"places": PLACES}), 0
    ways = [parse(key).track(cfg.motion, cfg.intrinsics).path_length() for key in COMMANDS]
    for clip in made[0].ids():
        records = [folder.record(clip) for folder in made]
        if any(one.track.path_length() < OPEN * way for one, way in zip(records, ways, strict=True)):
            continue
        for key, one, folder in zip(COMMANDS, records, made, strict=True):
            held.write(replace(one, id=f"{places:03d}-{key[0]}", split_key="held out"), folder.frames(clip))
        places += 1
    held.finish()
    return held, places


def likenesses(videos: np.ndarray, recordings: np.ndarray) -> np.ndarray:
    """PSNR of each of some videos to each of some recordings, over all frames but the given first one."""
    shape = len(videos), *recordings.shape
    return psnr(np.broadcast_to(videos[:, None], shape), np.broadcast_to(recordings, shape))[..., 1:].mean(-1)


def judge_game(out: Path, arms: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Videos along the true cameras of recorded clips of other places, as `minwm eval --data` makes them: which of the
    recordings from the same place is most like each, and by how much. Reliance is that of `minwm ablate`: the part of
    the loss on these clips that depends on their cameras. And in how many seconds the tracker finds no camera."""
    held, places = held_out(out / "held")
    latents, codec, text = out / "held" / "latents", load_codec(shipped("codec")), tiny_model().text
    encode_clips(held.path, latents, codec, text, cfg=EncodeConfig(val=0))
    first = ready(arms[TRUE][0])
    recorded = recordings(held.path, first, "train")

    def by_place(source: VideoSource) -> np.ndarray:
        frames = np.stack([video.frames for video in source])
        return frames.reshape(places, len(COMMANDS), *frames.shape[1:])

    truth = by_place(recorded)

    def scores(source: VideoSource) -> Scores:
        likeness = np.stack([likenesses(*pair) for pair in zip(by_place(source), truth, strict=True)])
        own = likeness.diagonal(0, 1, 2)
        others = np.where(np.eye(len(COMMANDS), dtype=bool), -np.inf, likeness).max(2)
        found = {"retrieval": own > others, "psnr_gap": own - others, "psnr": own}
        return {name: values.mean(1) for name, values in found.items()}

    def videos(arm: str, seed: int, run: Run) -> VideoSource:
        folder = out / "videos" / f"{arm}, seed {seed}"
        return recorded_source(ready(run), recorded, folder, {"arm": arm, "data": str(held.path)})

    made = {arm: [videos(arm, seed, run) for seed, run in enumerate(runs)] for arm, runs in arms.items()}
    losses = {
        arm: [camera_losses(replace(run, data=str(latents)), "train") for run in runs] for arm, runs in arms.items()
    }
    known = baselines(held.path, recorded, first)
    tracked = {RECORDING: recorded, **{arm: sources[0] for arm, sources in made.items()}}
    lost = {name: measure(source, ("camera",)).scores["camera"]["lost"] for name, source in tracked.items()}
    return {
        "places": places,
        "commands": COMMANDS,
        **summary({arm: [scores(source) for source in sources] for arm, sources in made.items()}),
        "reliance": {arm: [1 - own / other for own, other in pairs] for arm, pairs in losses.items()},
        "baselines": {name: {k: float(x.mean()) for k, x in scores(source).items()} for name, source in known.items()},
        "lost_by_tracker": {name: asdict(score.mean) for name, score in lost.items()},
    }


def worlds(out: Path, clips: int) -> ClipFolder:
    return render_worlds(out, RenderConfig(latents=9, height=PIXELS, width=PIXELS, seed=SEED), clips=clips)


def game(out: Path, clips: int) -> ClipFolder:
    return record(out, DoomConfig(latents=9, height=PIXELS, width=PIXELS, units=UNITS, seed=SEED), clips=clips)


FOOTAGE = {
    "worlds": Footage(make=worlds, depth=IngestConfig.depth, steps=200, judge=judge_worlds),
    # of the first 21 clips, the median of the depths with which COLMAP's paths are as long as the true ones
    "game": Footage(make=game, depth=0.9, steps=300, judge=judge_game),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--footage", choices=FOOTAGE, default="worlds")
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    out, footage, codec, text = given.out, FOOTAGE[given.footage], load_codec(shipped("codec")), tiny_model().text
    large = footage.make(out / "large", given.clips)
    clips = large.ids()[: given.clips]
    moving = [clip for clip in clips if large.record(clip).track.path_length() > STANDS]
    found = {clip: track.scaled(footage.depth) for clip, track in estimates(large, moving, out / "poses").items()}
    folders = {arm: ClipFolder.create(out / arm / "raw", arm, {"clips": given.clips}) for arm in (TRUE, COLMAP)}
    if not (out / "poses.json").exists():
        counts = {"clips": len(clips), "moving": len(moving), "lost": [clip for clip in moving if clip not in found]}
        write_json(out / "poses.json", {**counts, **write_arms(large, found, folders)})
    camera_start(out / "start")
    arms = dict[str, list[Run]]()
    for arm, folder in folders.items():
        latents = out / arm / "latents"
        encode_clips(folder.path, latents, codec, text, cfg=EncodeConfig(val=0))
        run = replace(camera_run(out, arm, steps=footage.steps, batch=BATCH), data=str(latents))
        arms[arm] = [trained(replace(run, seed=seed), out / arm / f"seed-{seed}") for seed in range(given.seeds)]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": versions(),
        "poses": read_json(out / "poses.json"),
        "training": {"steps": footage.steps, "batch": BATCH, "seeds": given.seeds},
        **footage.judge(out, arms),
    }
    before = read_json(given.json) if given.json.exists() else {}
    write_json(given.json, {**before, given.footage: result})


if __name__ == "__main__":
    main()
