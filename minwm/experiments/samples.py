"""Videos that a model in training makes, beside the truth where there is one, and their scores."""

from pathlib import Path

import numpy as np

from minwm.core.media import contact_sheet, write_image
from minwm.data.clips import read_manifest
from minwm.data.remote import data_folder
from minwm.eval.cases import Videos
from minwm.eval.image import chunk_spans, flicker, seam
from minwm.eval.metrics import METRICS, measure
from minwm.eval.recorded import recorded_source, recordings
from minwm.eval.source import VideoSource
from minwm.eval.suite import model_source, requests, suite
from minwm.store.model import Model, ModelConfig
from minwm.train.config import Run

FRAMES = 8
"""Of each video, on the contact sheet."""


def sample_videos(run: Run, model: Model, folder: Path) -> dict[str, float]:
    """Make `run.samples` videos in `folder`, with a contact sheet; means of their scores by name.

    Along the cameras of held-out clips, which are their truth; if the data have none, along those of the suite that any
    model is scored on, where there is none.
    """
    data, source, truth = data_folder(run.data), None, None
    if read_manifest(data, run.recipe.data_command)["counts"].get("val"):
        truth = recordings(data, model, "val", run.samples)
        source = recorded_source(model, truth, folder, {"stage": run.name})
    else:
        paths = suite(model.config)[: run.samples]
        source = model_source(model, requests(model.config, folder, paths), folder, run.name)
    videos = {video.name: video for video in source}
    rows = {name: video.frames for name, video in videos.items()}
    if truth is not None:
        rows |= {f"{name}, true": truth.video(name).frames for name in videos}
    every = max(1, max(map(len, rows.values())) // FRAMES)
    write_image(folder / "sheet.png", contact_sheet([rows[name] for name in sorted(rows)], every, sorted(rows)))
    metrics = ("likeness",) if run.model.network.camera == "none" else ("camera", "likeness")
    scores = measure(VideoSource([*videos], lambda name: videos[name]), metrics).scores
    found = {quantity: score for quantities in scores.values() for quantity, score in quantities.items()}
    named = [quantity for metric in metrics for quantity in METRICS[metric].better]
    means = {quantity: found[quantity].mean.value for quantity in named if quantity in found}
    if truth is None:
        return means
    shown, true = (np.stack([each.video(name).frames for name in videos]) for each in (source, truth))
    return means | compare_looks(shown, true, model.config)


def compare_looks(shown: Videos, true: Videos, config: ModelConfig) -> dict[str, float]:
    """How videos look beside the true ones, 1 is alike: motion (mean change from frame to frame), saturation (mean
    range of the colours of a pixel), flicker and seam (`Quality`). A text start shows another scene than the truth."""
    change, colours = (lambda x: np.abs(np.diff(x.astype(np.float32), axis=1)).mean()), np.ptp
    spans = chunk_spans(shown.shape[1], config.stream.first_chunk_frames, config.stream.chunk, config.motion.stride)
    at_borders = seam(shown, true, spans, config.motion.stride)
    ratios = {
        "motion": (change(shown), change(true)),
        "saturation": (colours(shown, axis=-1).mean(), colours(true, axis=-1).mean()),
        "flicker": (flicker(shown), flicker(true)),
    }
    found = {name: float(a / max(b, 1e-6)) for name, (a, b) in ratios.items()}
    return found if at_borders is None else {**found, "seam": at_borders}
