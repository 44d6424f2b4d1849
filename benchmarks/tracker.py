"""What the tracker of camera following reads in true videos that look as bad as a model's, for `results/`.

    python benchmarks/tracker.py results/tracker.json minwm/assets/world/dmd

Each true frame is blurred until it is as soft as the model's, then stained: smooth errors of colour, which stay where
they are in the picture, until it is as far from the truth. What is then read as missed is not the model's doing.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from minwm.core.runtime import generator, git_commit, versions
from minwm.eval.camera.align import AlignConfig, blurred, gradient_energy
from minwm.eval.camera.follow import FollowReference, FollowResult, measure_following
from minwm.eval.cases import Videos, held_out
from minwm.render.worlds import World
from minwm.store.folder import load_model

CLIPS, SEED = 16, 1
BLURS = (0.0, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
STAIN = 5.0
"""Pixels: standard deviation of the blur that makes noise smooth."""


def as_bad(truth: np.ndarray, video: np.ndarray, clip: int) -> tuple[np.ndarray, np.ndarray]:
    """A true clip (n h w 3) as soft as the video, frame by frame; and as far from the truth besides."""
    a, b = (torch.from_numpy(x).movedim(-1, 1).float() / 255 for x in (truth, video))
    options = torch.stack([blurred(a, sigma) for sigma in BLURS])
    have = gradient_energy(options.flatten(0, 1)).view(len(BLURS), -1).clamp_min(1e-9)
    soft = options[(have / gradient_energy(b).clamp_min(1e-9)).log().abs().argmin(0), torch.arange(len(a))]
    stain = blurred(torch.randn(1, *a.shape[1:], generator=generator(SEED, "stain", clip)), STAIN)
    missing = ((b - a).square().mean((1, 2, 3)) - (soft - a).square().mean((1, 2, 3))).clamp_min(0).sqrt()
    stained = soft + missing[:, None, None, None] * stain / stain.std()
    soft, stained = ((255 * x).round().clamp(0, 255).byte().movedim(1, -1).numpy() for x in (soft, stained))
    return soft, stained


def row(result: FollowResult) -> dict[str, float | None]:
    overall = result.motion.overall
    found = {"turn_error": overall.turn_error, "direction_deg": overall.direction_deg, "score": result.score}
    return {name: x and x.value for name, x in found.items()} | {"lost": result.lost_frac}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("model", type=Path)
    given = parser.parse_args()
    model = load_model(given.model).ready()
    config = model.config
    held = held_out(config, CLIPS, World)
    reference = FollowReference.render(held.cases, config.height, config.width, stride=config.motion.stride)
    made = held.generate(model, SEED)
    soft, stained = zip(*(as_bad(a, b, i) for i, (a, b) in enumerate(zip(held.truth, made, strict=True))), strict=True)
    videos: dict[str, Videos] = {"model": made, "truth": held.truth}
    videos |= {"softened": np.stack(soft), "softened and stained": np.stack(stained)}
    found = {
        "command": " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": versions(),
        "clips": CLIPS,
        "rows": {
            name: {
                kind: row(measure_following(reference, video, AlignConfig(detail=share)))
                for kind, share in (("colours", 0.0), ("details", AlignConfig.detail))
            }
            for name, video in videos.items()
        },
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
