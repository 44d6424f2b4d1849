"""A model folder, in float16, of the averaged network in the newest state of a run that is still going on.

python benchmarks/snapshot.py RUN CODEC OUT

RUN is the run's folder, CODEC that of its codec. OUT can be played and measured, and later runs can start from it
(`--init.student OUT`).
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from minwm.core.config import from_dict
from minwm.store.folder import load_codec, save_model
from minwm.train.config import Run
from minwm.train.state import States


def main() -> None:
    source, codec_folder, out = (Path(name) for name in sys.argv[1:4])
    run = from_dict(Run, json.loads((source / "run.json").read_text())["run"])
    net, codec, states = run.model.network.build(), load_codec(codec_folder), States(source)
    states.load(states.latest() or 0, {"ema": net}, [])
    config = replace(run.model, codec=codec.cfg, latents=run.recipe.clip_latents(run.model))
    save_model(out, config, net.half(), codec.half())
    sys.stdout.write(f"{out}: after {states.latest()} steps\n")


if __name__ == "__main__":
    main()
