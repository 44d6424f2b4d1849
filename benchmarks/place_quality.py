"""How like the truth a model's clips are on held-out walks through the place, and what its codec alone would give.

    python benchmarks/place_quality.py MODEL RAW [--clips 16] [--still 1 20] [OPTIONS] [--json FILE]

MODEL is a model or codec folder, RAW a folder of clips (`minwm data render`) whose held-out part is used: the first
frame is given, with the true cameras; all later ones are the model's, of a bidirectional one as many as it was trained
on. `--far` asks how well the model knows the place: for a view so many latents away, given the first frame alone.
`--still` asks what is left of the first frame after so many seconds without a key. `--retrieved` shows a stream so many
views in place of the model's own.
"""

import argparse
import json
import math
import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from minwm.cameras.trajectory import parse
from minwm.core.media import to_frames, to_pixels
from minwm.core.runtime import git_commit, versions
from minwm.data.clips import ClipRecord
from minwm.data.dataset import RawDataset
from minwm.eval.image import at_seconds, psnr, sharpness
from minwm.render.place import Place
from minwm.session.generate import generate
from minwm.session.views import Viewpoint, known_views
from minwm.store.folder import load_codec, load_model
from minwm.store.model import Model
from minwm.stream.solvers import FewStepSampler


def measured(made: np.ndarray, truth: np.ndarray, fps: float) -> dict[str, object]:
    """PSNR over all frames but the first and after each second, gradient energy over that of the truth."""
    values = psnr(made, truth)
    return {
        "psnr": round(float(values[:, 1:].mean()), 2),
        "psnr_at_seconds": [round(interval.value, 2) for interval in at_seconds(values, fps)],
        "sharpness": round(float(sharpness(made[:, 1:]).mean() / sharpness(truth[:, 1:]).mean()), 3),
    }


def viewpoint(record: ClipRecord) -> Viewpoint:
    assert record.seed is not None and record.origin is not None
    return Viewpoint(Place(record.seed), record.origin)


def far_views(
    model: Model, truth: np.ndarray, records: list[ClipRecord], far: list[int], seed: int
) -> dict[int, float]:
    """PSNR of the frames of one latent, so many latents after the only one that is given."""
    found, two_latents = {}, replace(model, config=replace(model.config, latents=2))
    for k in far:
        last = model.config.motion.stride * k
        frames = [0, *range(last - model.config.motion.stride + 1, last + 1)]
        tracks = [replace(r.track, c2w=r.track.c2w[frames], K=r.track.K[frames]) for r in records]
        views = known_views(model, [viewpoint(record) for record in records])
        made = generate(two_latents, truth[:, 0], [r.caption for r in records], tracks, seed, views)
        found[k] = round(float(psnr(made, truth[:, frames])[:, 1:].mean()), 2)
    return found


def still_views(
    model: Model, truth: np.ndarray, records: list[ClipRecord], still: list[int], seed: int
) -> dict[int, float]:
    """PSNR to the first frame after so many seconds in which the camera stands still."""
    motion = model.config.motion
    latents = math.ceil(max(still) * motion.fps / motion.stride)
    track = parse(f"static*{latents}", stride=motion.stride).track(motion, model.config.intrinsics)
    views = known_views(model, [viewpoint(record) for record in records])
    made = generate(model, truth[:, 0], [r.caption for r in records], [track] * len(records), seed, views)
    values = psnr(made, np.broadcast_to(truth[:, :1], made.shape))
    return {second: round(float(values[:, round(second * motion.fps)].mean()), 2) for second in still}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--few-steps", type=int)
    parser.add_argument("--far", type=int, nargs="+", default=[])
    parser.add_argument("--still", type=int, nargs="+", default=[])
    parser.add_argument("--retrieved", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    codec, data = load_codec(options.model), RawDataset(options.raw, "val")
    count = min(options.clips, len(data))
    truth = np.stack([data[i].numpy() for i in range(count)])
    with torch.inference_mode():
        latents = [codec.encode(to_pixels(torch.from_numpy(clip))[None]) for clip in truth]
        through = np.stack([to_frames(codec.decode(latent))[0] for latent in latents])
    fps = data.folder.record(data.ids[0]).track.fps
    found = {"clips": count, "seed": options.seed, "codec": measured(through, truth, fps)}
    if (options.model / "model.json").exists():
        model = load_model(options.model)
        if options.retrieved:
            stream = replace(model.config.stream, retrieved=options.retrieved)
            model = replace(model, config=replace(model.config, stream=stream))
        samplers = {"model": model.config.sampler}
        if options.few_steps:
            samplers["few_steps"] = FewStepSampler(steps=options.few_steps, shift=model.config.sampler.shift)
        records = [data.folder.record(data.ids[i]) for i in range(count)]
        frames = truth.shape[1] if model.config.sampler.causal else model.config.frames
        for name, sampler in samplers.items():
            sampled = replace(model, config=replace(model.config, sampler=sampler))
            made = [
                generate(
                    sampled,
                    clip[:1],
                    [r.caption],
                    [r.track.slice(0, frames)],
                    options.seed,
                    known_views(model, [viewpoint(r)]),
                )[0]
                for r, clip in zip(records, truth, strict=True)
            ]
            found[name] = {"frames": frames, "steps": sampler.steps, **measured(np.stack(made), truth[:, :frames], fps)}
        if options.far:
            found["far_views"] = far_views(model, truth, records, options.far, options.seed)
        if options.still:
            found["still"] = still_views(model, truth, records, options.still, options.seed)
    about = {"command": shlex.join(["python", *sys.argv]), "date": datetime.now(UTC).date().isoformat()}
    text = json.dumps({**about, "commit": git_commit(), **found, "versions": versions()}, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
