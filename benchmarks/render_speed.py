"""CPU milliseconds per frame of the plain and of the compiled raycaster, in one run on one thread.

python benchmarks/render_speed.py [--json FILE]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from minwm.cameras.random_paths import random_track
from minwm.cameras.trajectory import Motion
from minwm.core.runtime import versions
from minwm.render import fast, raycast
from minwm.render.place import Place
from minwm.render.worlds import World

K = np.array([0.714, 0.714, 0.5, 0.5])
SIZES, FRAMES, REPEATS = (64, 128), (1, 40), 5


def milliseconds(render: Callable[[], object], frames: int) -> float:
    """Least of REPEATS, after a first call that compiles."""
    render()
    spent = []
    for _ in range(REPEATS):
        start = time.process_time()
        render()
        spent.append(time.process_time() - start)
    return round(1000 * min(spent) / frames, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind in (Place, World):
        world, rng, origin = kind(0), np.random.default_rng(0), None
        while origin is None:
            track, _ = random_track(rng, 41, Motion(move=0.5, turn=16.0, fps=16.0), K)
            origin = world.spawn(rng, track)
        for size in SIZES:
            for count in FRAMES:
                view = track.transformed(origin).c2w[:count]
                given = world.scene, view, np.tile(K, (count, 1)), size, size, 2
                plain = milliseconds(lambda given=given: raycast.render(*given, "cpu"), count)
                compiled = milliseconds(lambda given=given: fast.render(*given), count)
                row = {"scene": kind.__name__, "size": size, "frames_per_call": count}
                rows.append({**row, "torch_ms": plain, "numba_ms": compiled, "times": round(plain / compiled, 1)})
    text = json.dumps({"rows": rows, "versions": versions()}, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
