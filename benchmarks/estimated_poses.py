"""Camera control learnt from COLMAP's poses against that learnt from true ones, for `results/estimated-poses.json`.

    python benchmarks/estimated_poses.py results/estimated-poses.json FOLDER --clips 120 --seeds 2

Procedural clips are posed by COLMAP from pictures of 256 rows, its scale set by the median depth as `minwm data ingest`
does, and by ingest's rules kept or dropped. The demo's camera model, whose camera branch was taken away, then relearns
control from these clips: with COLMAP's poses and with the true ones, equally long and with the same seeds. What FOLDER
holds is kept.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import STANDS, pose_errors

from minwm.cameras.estimate.base import EstimateError
from minwm.cameras.estimate.colmap import Colmap
from minwm.core.files import read_json, write_json
from minwm.core.media import resize_and_crop
from minwm.core.runtime import git_commit, versions
from minwm.data.clips import ClipFolder, DataError
from minwm.data.encode import EncodeConfig, encode_clips
from minwm.data.ingest import IngestConfig
from minwm.data.quality import Candidate, QualityConfig, failures
from minwm.data.rerender import RenderConfig, render_worlds
from minwm.eval.camera.follow import FollowResult
from minwm.eval.run import EvalConfig, HeldOut, measure_model
from minwm.eval.stats import Bootstrap
from minwm.experiments.ablate import camera_start
from minwm.experiments.ablations import camera_run, shipped
from minwm.experiments.presets.demo import tiny_model
from minwm.store.folder import load_codec, load_model
from minwm.train.build import train

PIXELS, SEED = 256, 12
STEPS, BATCH = 200, 8
EVALUATION = EvalConfig(clips=16, counterfactual=(), revisits=0, walks=0, seeds=0, bench_repeats=0)
TRUE, COLMAP = "true poses", "poses by COLMAP"


def pose_clips(large: ClipFolder, folders: dict[str, ClipFolder]) -> dict[str, Any]:
    """Write the clips that COLMAP places and that ingest and the model take, reduced to its size, with each kind of
    poses; returns counts, and quartiles over clips of `pose_errors` and of the path's length over the true one."""
    errors, placed, ids, model = list[tuple[float, ...]](), 0, large.ids(), tiny_model()
    for clip in ids:
        record, frames = large.record(clip), large.frames(clip)
        true, estimator = record.track, Colmap(focal=float(record.track.K[0, 0]))
        try:
            found = estimator(frames, np.arange(len(true)) / true.fps, true.fps)
            track = found.track.relative_to_first().scaled(found.scale(IngestConfig.depth))
        except EstimateError:
            continue
        placed += 1
        few = replace(record, hw=(model.height, model.width))
        posed = replace(few, track=track, pose_kind="estimated")
        try:
            model.clip_spec.check_clip(posed, clip)
        except DataError:
            continue
        if true.path_length() > STANDS and not failures(Candidate(frames, track), QualityConfig()):
            errors.append((*pose_errors(track, true), track.path_length() / true.path_length()))
            small = np.stack([resize_and_crop(frame, *few.hw) for frame in frames])
            folders[TRUE].write(few, small)
            folders[COLMAP].write(posed, small)
    for folder in folders.values():
        folder.finish()
    quartiles = np.percentile(np.array(errors), (25, 50, 75), axis=0).T.tolist()
    names = ("rotation_deg", "path_share", "length_ratio")
    return {"clips": len(ids), "placed": placed, "kept": len(errors), **dict(zip(names, quartiles, strict=True))}


def trained(out: Path, data: Path, seed: int, held: HeldOut) -> FollowResult:
    """Camera following of a model that relearnt control from these latents."""
    run = replace(camera_run(out, data.name, steps=STEPS, batch=BATCH), data=str(data / "latents"), seed=seed)
    folder = data / f"seed-{seed}"
    train(run, folder)
    model = load_model(folder).ready()
    sampler = replace(model.config.sampler, steps=12, guidance=1.0)  # as `minwm ablate`
    _, row = measure_model(data.name, replace(model, config=replace(model.config, sampler=sampler)), held)
    assert row.follow
    return row.follow


def clip_errors(rows: Sequence[FollowResult]) -> np.ndarray:
    """Per clip and seed: 1 - the camera score of that clip."""
    rotation = [np.array(row.rot_err_per_clip) / row.static_rot_deg for row in rows]
    translation = [np.array(row.trans_err_per_clip) / row.static_trans_u for row in rows]
    return (np.stack(rotation, 1) + np.stack(translation, 1)) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    out, codec, model = given.out, load_codec(shipped("codec")), tiny_model()
    large = render_worlds(
        out / "large", RenderConfig(latents=9, height=PIXELS, width=PIXELS, seed=SEED), clips=given.clips
    )
    arms = {TRUE: out / "true", COLMAP: out / "colmap"}
    folders = {arm: ClipFolder.create(path / "raw", arm, {"clips": given.clips}) for arm, path in arms.items()}
    if not (out / "poses.json").exists():
        write_json(out / "poses.json", pose_clips(large, folders))
    camera_start(out / "start")
    held = HeldOut(model, codec, EVALUATION, model.scene)
    rows = dict[str, list[FollowResult]]()
    for arm, path in arms.items():
        encode_clips(folders[arm].path, path / "latents", codec, model.text, cfg=EncodeConfig(val=0))
        rows[arm] = [trained(out, path, seed, held) for seed in range(given.seeds)]
    errors, interval = {arm: clip_errors(results) for arm, results in rows.items()}, Bootstrap(EVALUATION.clips)
    missed = errors[COLMAP] - errors[TRUE]
    found = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": versions(),
        "poses": read_json(out / "poses.json"),
        "training": {"steps": STEPS, "batch": BATCH, "seeds": given.seeds},
        "evaluated_clips": EVALUATION.clips,
        "camera_score": {arm: asdict(interval(lambda x, e=e: 1 - float(e[x].mean()))) for arm, e in errors.items()},
        "camera_score_by_seed": {arm: (1 - e.mean(0)).tolist() for arm, e in errors.items()},
        "true_minus_colmap": asdict(interval(lambda drawn: float(missed[drawn].mean()))),
    }  # fmt: skip
    write_json(given.json, found)


if __name__ == "__main__":
    main()
