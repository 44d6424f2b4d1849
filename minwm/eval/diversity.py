"""Diversity: how far a model's video depends on the seed and on the prompt, where image and camera stay the same."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from minwm.eval.cases import Clips
from minwm.store.model import Model, ModelConfig


@dataclass(frozen=True)
class Diversity:
    """Spread of videos in 8-bit levels, per second: root of the mean variance over pixels, frames and clips."""

    seed: list[float]
    """Over seeds: what the first frame does not determine."""
    prompt: list[float]
    """Between the true caption and that of another scene, under one seed."""
    worlds: float | None
    """Between the last true frames of different scenes: what unrelated pictures would give; None for text starts."""


def measure_diversity(model: Model, clips: Clips, seeds: int, seed: int) -> Diversity:
    """Over `seeds` seeds from `seed` on. Takes at least two clips."""
    config, captions = model.config, clips.captions
    drawn = np.stack([clips.generate(model, seed + i) for i in range(seeds)])
    swapped = clips.generate(model, seed, [*captions[1:], captions[0]])
    unrelated = None
    if config.image_start:
        unrelated = float(np.sqrt(clips.truth[:, -1].astype(np.float32).var(0, ddof=1).mean()))
    return Diversity(_spread(drawn, config), _spread(np.stack([drawn[0], swapped]), config), unrelated)


def _spread(videos: UInt8[np.ndarray, "k c n h w 3"], config: ModelConfig) -> list[float]:
    variance: Float[np.ndarray, " n"] = videos.astype(np.float32).var(0, ddof=1).mean((0, 2, 3, 4))
    fps = round(config.motion.fps)
    ends = range(fps, len(variance), fps) or range(len(variance) - 1, len(variance))
    return [float(np.sqrt(variance[max(1, end - fps + 1) : end + 1].mean())) for end in ends]
