"""How fast minWM's own inference is on this machine, run by its own scripts in a folder of its own.

The folder is a checkout with its weights, as its README sets it up; where it holds a `.venv`, that is used. Nothing of
it is imported. The times are what it prints of the first chunk, and what passes between the videos that it writes.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from minwm.core.config import UserError
from minwm.core.media import read_video

PROMPTS = ("A stone bridge over a river.", "A quiet street at noon.", "A path through a forest.")
"""Of the first, which warms up, nothing is measured."""
FIRST_CHUNK = re.compile(r"\[timing\].*avg=([\d.]+)s")


@dataclass(frozen=True)
class Script:
    """Of a model: a path in the folder, and what it reads from the environment."""

    path: str
    output: str
    """Variable that names the folder of its videos."""
    prompts: str = ""
    """Variable that names a text file with a prompt per line; empty: it takes its own."""


SCRIPTS = {
    "wan2.1-1.3b": Script("Wan21/scripts/inference/run_infer_causal_camera.sh", "OUTPUT_FOLDER", "DATA_PATH"),
    "hunyuan1.5-8b": Script("HY15/scripts/inference/run_infer_causal_camera.sh", "OUTPUT_DIR"),
}
"""By preset; each makes videos of 77 frames with the weights of the last stage."""


@dataclass(frozen=True)
class ReferenceResult:
    """Comparable with `BenchResult` as far as names are equal."""

    first_chunk: dict[str, float]
    """`median_ms`: the mean that it prints, from the second video on; noise to the latents of the first chunk, M1."""
    fps: float
    """Frames of a video over the time since the one before: prompt, decoding and file included, unlike our M3."""
    videos: int
    """Those that were timed."""


def run_reference(folder: Path, script: Script) -> ReferenceResult:
    """Run a script and time it. UserError, with its last lines, if it fails or does not say what is looked for."""
    if not (folder / script.path).is_file():
        raise UserError(f"--reference {folder}: there is no {script.path}; give a checkout of minWM with its weights")
    with tempfile.TemporaryDirectory() as temporary:
        out, prompts = Path(temporary) / "videos", Path(temporary) / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS) + "\n")
        own = {script.output: str(out), **({script.prompts: str(prompts)} if script.prompts else {})}
        path = os.pathsep.join([str((folder / ".venv" / "bin").resolve()), os.environ["PATH"]])
        ran = subprocess.run(
            ["bash", script.path],
            check=False,
            cwd=folder,
            env={**os.environ, "PATH": path, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        printed = FIRST_CHUNK.search(ran.stdout)
        videos = sorted(out.rglob("*.mp4"), key=lambda file: file.stat().st_mtime)
        if ran.returncode or not printed or len(videos) < 2:
            problem = f"ended with {ran.returncode}, {len(videos)} videos and {'a' if printed else 'no'} line of timing"
            raise UserError(f"{folder / script.path} {problem}:\n{ran.stdout[-1500:]}")
        written = [file.stat().st_mtime for file in videos]
        frames = [len(read_video(file)[0]) for file in videos[1:]]
        rates = [n / (b - a) for n, (a, b) in zip(frames, pairwise(written), strict=True)]
    return ReferenceResult({"median_ms": 1000 * float(printed[1])}, float(np.median(rates)), len(rates))
