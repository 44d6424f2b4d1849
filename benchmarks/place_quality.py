"""How like the truth a model's clips are on held-out walks through the place, and what its codec alone would give.

    python benchmarks/place_quality.py MODEL RAW [--clips 16] [--json FILE]

MODEL is a model or codec folder, RAW a folder of clips (`minwm data render`) whose held-out part is used: the first
frame is given, with the true cameras; all later ones are the model's.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from minwm.checkpoint import Model, load_codec, load_model
from minwm.core.camera import views
from minwm.core.media import frames, pixels
from minwm.core.runtime import generator, versions
from minwm.core.types import Condition
from minwm.data.clips import ClipRecord
from minwm.data.dataset import RawDataset
from minwm.eval.quality import at_seconds, psnr, sharpness
from minwm.sampling import draw, draws_of, generate


def measured(made: np.ndarray, truth: np.ndarray, fps: float) -> dict[str, object]:
    """PSNR over all frames but the first and after each second, gradient energy over that of the truth."""
    values = psnr(made, truth)
    return {
        "psnr": round(float(values[:, 1:].mean()), 2),
        "psnr_at_seconds": [round(interval.value, 2) for interval in at_seconds(values, fps)],
        "sharpness": round(float(sharpness(made[:, 1:]).mean() / sharpness(truth[:, 1:]).mean()), 3),
    }


@torch.inference_mode()
def clip_of(model: Model, record: ClipRecord, first: torch.Tensor, seed: int) -> np.ndarray:
    """The model's frames n h w 3 along the cameras of the record, from the latent `first` (1 1 c h w) on."""
    config = model.config
    w2c, K = views([record.track], config.motion.stride)
    cond = Condition(w2c=w2c, K=K, first=first, **config.read([record.caption]))
    shape, draws = config.latent_shape(1, w2c.shape[1]), draws_of(config.sampler, config.geometry)
    noise = draw(shape, draws, first, generator(seed, record.id))
    return frames(model.codec.decode(generate(model.net, config.sampler, noise, cond, config.geometry)))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    codec, data = load_codec(options.model), RawDataset(options.raw, "val")
    count = min(options.clips, len(data))
    truth = np.stack([data[i].numpy() for i in range(count)])
    with torch.inference_mode():
        latents = [codec.encode(pixels(torch.from_numpy(clip))[None]) for clip in truth]
        through = np.stack([frames(codec.decode(latent))[0] for latent in latents])
    fps = data.folder.record(data.ids[0]).track.fps
    found = {"clips": count, "seed": options.seed, "codec": measured(through, truth, fps)}
    if (options.model / "model.json").exists():
        model = load_model(options.model)
        records = [data.folder.record(data.ids[i]) for i in range(count)]
        made = [clip_of(model, r, latent[:, :1], options.seed) for r, latent in zip(records, latents, strict=True)]
        found["model"] = measured(np.stack(made), truth, fps)
    text = json.dumps({**found, "versions": versions()}, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
