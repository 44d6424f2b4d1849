"""What a small network learns of the place in a given CPU time: one row of the choice of the model.

    python benchmarks/place_choice.py LATENTS --name "rays" --network '{"camera": "plucker"}' --json FILE

LATENTS is a folder of latent shards (`minwm data encode`). The row (held-out loss, and PSNR of sampled latents to the
true ones, as it is in pixels, per latent after the first) is added to FILE, at a third, two thirds and all of the time;
with `--decay` the learning rate falls linearly in the last 40 % of it.
With `--model FOLDER` (`benchmarks/snapshot.py`) that model is measured in the same way, and nothing is trained.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.utils import clip_grad_norm_

from minwm.core.runtime import generator, versions
from minwm.core.types import Clip
from minwm.data.dataset import ShardDataset
from minwm.experiments.presets.place import place
from minwm.nets.backbone import Backbone
from minwm.nets.small_codec import SmallCodec
from minwm.recipes.diffusion import BidirectionalConfig, TimeLaw
from minwm.store.folder import load_codec, load_model
from minwm.store.model import ModelConfig
from minwm.stream.rollout import sample_bidirectional
from minwm.stream.solvers import BidirectionalSampler as Sampler
from minwm.train.config import OptimConfig
from minwm.train.loop import Ema

SMALL = {"dim": 128, "heads": 2, "layers": 4, "ffn": 512, "camera": "dual", "patch": 2}
HELD_OUT, SAMPLER = 24, Sampler(steps=8, guidance=1.0, shift=3.0)


def part(clip: Clip, start: int, frames: int) -> Clip:
    """`frames` latents from `start` on, with cameras relative to the first of them."""
    latents, cond = clip.latents[:, start : start + frames], clip.cond.frames(start, start + frames)
    assert cond.w2c is not None
    w2c = cond.w2c @ torch.linalg.inv(cond.w2c[:, :1])
    return Clip(latents, replace(cond, w2c=w2c, first_latents=latents[:, :1]))


@torch.no_grad()
def measure(
    net: Backbone, cfg: BidirectionalConfig, model: ModelConfig, held: Clip, codec: SmallCodec
) -> dict[str, Any]:
    recipe = cfg.build(model, {"student": net})
    losses = [float(recipe.loss(held, 0, generator(0, "judge", i)).total) for i in range(3)]
    noise = torch.randn(held.latents.shape, generator=generator(0, "sample"))
    made = sample_bidirectional(net, SAMPLER, noise, held.cond)
    error = (made - held.latents).float() * codec.std[:, None, None]  # the codec's basis is orthonormal
    block = 3 * codec.stride * codec.scale**2
    mse = error.square().sum(2).mean((0, 2, 3)) / block / 4  # pixels span 2
    psnr = [round(float(-10 * value.log10()), 2) for value in mse[1:]]
    return {"loss": round(sum(losses) / 3, 4), "psnr": psnr}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents", type=Path)
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--network", type=json.loads, default={})
    parser.add_argument("--weight", default="none")
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--decay", action="store_true")
    parser.add_argument("--seconds", type=float, default=75)
    parser.add_argument("--clips", type=int, default=280)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    row = vars(options := parser.parse_args())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    codec, model = load_codec(options.codec), place(Path()).stage("camera").model
    assert isinstance(codec, SmallCodec)
    held = part(ShardDataset(options.latents, "val").batch(range(HELD_OUT)), 0, options.frames)
    found = json.loads(options.json.read_text()) if options.json.exists() else {"rows": []}
    cfg = BidirectionalConfig(time=TimeLaw(shift=3.0, weight=options.weight))
    if options.model:
        trained = load_model(options.model)
        with torch.autocast("cpu", torch.bfloat16):
            measured = measure(trained.net, cfg, trained.config, held, codec)
        found.setdefault("longer", []).append({"name": options.name, **measured})
        options.json.write_text(json.dumps({**found, "versions": versions()}, indent=1) + "\n")
        return
    config = replace(model.network, channels=codec.channels, **{**SMALL, **options.network})
    net = config.build()
    recipe = cfg.build(model, {"student": net})
    data = ShardDataset(options.latents, "train")
    optimizers = OptimConfig(optimizer=options.optimizer, lr=options.lr, beta2=0.99).build(net).values()
    ema, draws = Ema(net, 0.99), generator(0)
    step, spent, curve = 0, 0.0, []
    while len(curve) < 3:
        began = time.process_time()
        clip = data.batch(torch.randint(min(options.clips, len(data)), (options.batch,), generator=draws).tolist())
        start = int(torch.randint(clip.latents.shape[1] - options.frames + 1, (), generator=draws))
        with torch.autocast("cpu", torch.bfloat16):
            loss = recipe.loss(part(clip, start, options.frames), step, draws)
        loss.total.backward()
        clip_grad_norm_(net.parameters(), 1.0)
        decay = min(1.0, max(0.05, (1 - spent / options.seconds) / 0.4)) if options.decay else 1.0
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = options.lr * min(1.0, (step + 1) / 50) * decay
            optimizer.step()
            optimizer.zero_grad()
        ema.update(net, step)
        step, spent = step + 1, spent + time.process_time() - began
        if spent > options.seconds * (len(curve) + 1) / 3:
            with torch.autocast("cpu", torch.bfloat16):
                curve.append(
                    {
                        "cpu_seconds": round(spent),
                        "steps": step,
                        **measure(cast(Backbone, ema.net), cfg, model, held, codec),
                    }
                )
    about = {name: row[name] for name in ("name", "network", "weight", "frames", "batch", "lr", "optimizer", "clips")}
    found["rows"].append({**about, "parameters": sum(p.numel() for p in net.parameters()), "curve": curve})
    options.json.write_text(json.dumps({**found, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
