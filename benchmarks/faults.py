"""What becomes of a training run when something goes wrong: counted, not claimed.

python benchmarks/faults.py results/faults.json    # as root on Linux, for the disk that is full

The stage `foundation` of the preset `smoke`, on one or two CPU processes. After every fault the same command is given
again, until the run is finished; then its weights are compared with those of a run that nothing happened to.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from minwm.core.config import UserError
from minwm.core.files import write_json
from minwm.core.runtime import git_commit, versions
from minwm.data.dataset import Loader
from minwm.experiments.pipeline import run_pipeline
from minwm.experiments.presets import pipeline
from minwm.recipes.base import Loss
from minwm.recipes.diffusion import BidirectionalDiffusion
from minwm.train.build import train
from minwm.train.config import Run
from minwm.train.parallel import ParallelConfig
from minwm.train.state import States

KILLS = 50


def start(run: Run, out: Path, world: int = 1, prepare: Callable[[int], None] = lambda _rank: None) -> list[int]:
    """Fork the processes of a training; `prepare` brings the fault into one, by its rank. Returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        if child := os.fork():
            children.append(child)
            continue
        log = os.open(out.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if world > 1:
            group = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in group.items()})
        code = 1
        try:
            prepare(rank)
            train(run, out)
            code = 0
        except (UserError, OSError) as error:
            sys.stderr.write(f"error: {error}\n")
            code = error.exit_code if isinstance(error, UserError) else 2
        finally:
            sys.stderr.flush()
            os._exit(code)
    return children


def finish(children: list[int]) -> list[int]:
    """Exit codes; -9 for a process that was killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def message(out: Path, rank: int = 0) -> str:
    """The last error that a process wrote."""
    lines = out.with_suffix(f".{rank}.log").read_text().splitlines()
    return next((line for line in reversed(lines) if "rror" in line), "").replace(str(out.parent), "")


def goes_on(run: Run, out: Path, whole: Path) -> bool:
    """Whether the run is finished by the same command, with the weights of one that nothing happened to."""
    same = finish(start(run, out)) == [0]
    same = same and (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    return same and not [*out.rglob("*.tmp")]


def killed(run: Run, out: Path, whole: Path) -> dict[str, Any]:
    """kill -9 at random times in a part of the run; once it is finished all the same, from the start again."""
    at, kept, same, kills, draw = 0, [], [], 0, random.Random(0)
    part = json.loads((whole / "summary.json").read_text())["seconds"] / 4
    while kills < KILLS:
        (child,) = start(run, out)
        time.sleep(draw.uniform(0, part))
        os.kill(child, signal.SIGKILL)
        kills += finish([child]) == [-signal.SIGKILL]
        now = States(out).latest() or 0
        kept.append(now >= at)
        at = now
        if (out / "summary.json").exists() or kills == KILLS:
            same.append(goes_on(run, out, whole))
            shutil.rmtree(out)
            at = 0
    return {"kills": kills, "no_saved_step_lost": all(kept), "runs": len(same), "same_weights": all(same)}


def terminated(run: Run, out: Path, whole: Path) -> dict[str, Any]:
    """SIGTERM once a state is there."""
    (child,) = start(run, out)
    while not States(out).latest():
        time.sleep(0.05)
    os.kill(child, signal.SIGTERM)
    told = time.monotonic()
    codes = finish([child])
    found = {"exit_codes": codes, "seconds": time.monotonic() - told, "message": message(out)}
    return found | {"same_weights": goes_on(run, out, whole)}


def full(run: Run, out: Path, whole: Path) -> dict[str, Any]:
    """No file may become larger than what a state needs: a write fails in the middle."""
    codes = finish(start(run, out, 1, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))))
    found = {"exit_codes": codes, "message": message(out), "half_written": len([*out.rglob("*.tmp")])}
    return found | {"same_weights": goes_on(run, out, whole)}


def full_disk(run: Run, out: Path, whole: Path) -> dict[str, Any]:
    """The run has a disk of its own, which the first state fits on and the second does not; then it is made larger."""
    out.mkdir()
    held = sum(path.stat().st_size for path in (whole / "state").rglob("*") if path.is_file())
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, f"size={held * 3 // 2}", "minwm", out], check=True)
    try:
        codes = finish(start(run, out))
        found = {"exit_codes": codes, "message": message(out), "half_written": len([*out.rglob("*.tmp")])}
        subprocess.run([*mount, f"remount,size={100 * held}", "minwm", out], check=True)
        return found | {"same_weights": goes_on(run, out, whole)}
    finally:
        subprocess.run(["umount", out], check=True)


def jumps(run: Run, out: Path, whole: Path) -> dict[str, Any]:
    """The time of day is a day ahead or behind at random, whenever Python reads it."""
    real, draw = time.time, random.Random(0)

    def prepare(_rank: int) -> None:
        time.time = lambda: real() + draw.choice((-86400, 86400))

    began = time.monotonic()
    codes = finish(start(run, out, 1, prepare))
    seconds = time.monotonic() - began
    counted = json.loads((out / "summary.json").read_text())["seconds"]
    return {"exit_codes": codes, "seconds": seconds, "counted": counted, "same_weights": goes_on(run, out, whole)}


def damaged(how: Callable[[Path], None]) -> Callable[[Run, Path, Path], dict[str, Any]]:
    def fault(run: Run, out: Path, whole: Path) -> dict[str, Any]:
        keeping = replace(run, keep=2)
        (child,) = start(keeping, out)
        while len(States(out).steps()) < 2:
            time.sleep(0.05)
        os.kill(child, signal.SIGKILL)
        finish([child])
        newest = out / "state" / f"{States(out).latest():06d}"
        how(newest / "__0_0.distcp")
        codes = finish(start(keeping, out))
        found = {"exit_codes": codes, "message": message(out)}
        shutil.rmtree(newest)  # as the message says
        return found | {"same_weights": goes_on(keeping, out, whole)}

    return fault


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def nan(run: Run, out: Path, whole: Path) -> dict[str, Any]:
    """A loss that is no number, once."""

    def prepare(_rank: int) -> None:
        plain = BidirectionalDiffusion.loss

        def loss(self: BidirectionalDiffusion, clip: Any, step: int, generator: torch.Generator) -> Loss:
            found = plain(self, clip, step, generator)
            return replace(found, total=found.total * float("nan")) if step == run.steps // 2 else found

        BidirectionalDiffusion.loss = loss

    codes = finish(start(run, out, 1, prepare))
    return {"exit_codes": codes, "message": message(out), "same_weights": goes_on(run, out, whole)}


def of_two(fault: Callable[[], None]) -> Callable[[Run, Path, Path], dict[str, Any]]:
    """Something happens to one of two processes while it loads clips; nobody else stops the other one."""

    def run_two(run: Run, out: Path, _whole: Path) -> dict[str, Any]:
        limit, when = ParallelConfig(timeout=10), out.with_suffix(".fault")
        pair = replace(run, steps=20, batch=run.batch // 2, accumulate=2, parallel=limit)

        def prepare(rank: int) -> None:
            following, seen = Loader.__next__, []

            def next_batch(self: Loader) -> Any:
                seen.append(1)
                if rank == 1 and len(seen) == pair.steps // 2:
                    when.touch()
                    fault()
                return following(self)

            Loader.__next__ = next_batch

        children = start(pair, out, 2, prepare)
        codes = finish(children[:1])
        seconds = time.time() - when.stat().st_mtime
        os.kill(children[1], signal.SIGKILL)
        finish(children[1:])
        found = {"exit_code_of_the_other": codes, "seconds": seconds, "message": message(out)}
        return found | {"finishes_again": finish(start(pair, out, 2))}

    return run_two


FAULTS = {
    "kill -9": killed,
    "SIGTERM": terminated,
    "file size limit": full,
    "full disk": full_disk,
    "clock jumps": jumps,
    "a bit of a shard flipped": damaged(flip),
    "shard cut short": damaged(lambda path: os.truncate(path, path.stat().st_size // 2)),
    "NaN in the loss": nan,
    "one of two processes dies": of_two(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "one of two loaders hangs": of_two(lambda: time.sleep(600)),
}


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(target: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        plan = pipeline("smoke", root)
        stage = plan.stages[0]
        run_pipeline(plan, root, say, until=stage.name)
        run = replace(stage, steps=60, save_every=3, tensorboard=False)
        finish(start(run, root / "whole"))
        for number, (name, fault) in enumerate(FAULTS.items()):
            found[name] = fault(run, root / f"fault{number}", root / "whole")
            say(f"{name}: {json.dumps(found[name])}")
    about = {
        "command": f"python benchmarks/faults.py {target}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(target, {**about, "commit": git_commit(), "versions": versions(), "faults": found})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
