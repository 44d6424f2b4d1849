"""The log of a training run: `metrics.jsonl`, one line per step, and TensorBoard events."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minwm.core.files import write_text
from minwm.core.runtime import require


@contextmanager
def metrics_log(out: Path, start: int, tensorboard: bool) -> Iterator[Any]:
    """Yield `write(step, trains, values)`; lines from `start` on, which a resumed run repeats, are removed first."""
    path = out / "metrics.jsonl"
    kept = [line for line in read_metrics(out) if line["step"] < start]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    writer = None
    if tensorboard:
        require("tensorboard", "track")
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(out / "tensorboard", purge_step=start)
    with path.open("a", buffering=1) as lines:

        def write(step: int, trains: str, values: dict[str, float]) -> None:
            lines.write(json.dumps({"step": step, "trains": trains, **values}) + "\n")
            if writer:
                for name, value in values.items():
                    writer.add_scalar(f"{trains}/{name}", value, step)

        try:
            yield write
        finally:
            if writer:
                writer.close()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without an incomplete last line."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
