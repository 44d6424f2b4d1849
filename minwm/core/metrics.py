"""The log of a training run: `metrics.jsonl`, one line per step, TensorBoard events, and a tracker's."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from minwm.core.config import UserError, parse_json
from minwm.core.files import check_shape, read_text, write_text
from minwm.core.runtime import rank, require

Tracker = Literal["none", "wandb", "trackio"]
"""Services that show logs of runs; both have wandb's interface."""


@contextmanager
def metrics_log(out: Path, start: int, tensorboard: bool, tracker: Tracker = "none") -> Iterator[Any]:
    """Yield `write(step, trains, values)`; lines from `start` on, which a resumed run repeats, are removed first.

    Of several processes the first one writes. The tracker has a project per parent folder, in which a run that goes on
    keeps its name.
    """
    if rank() != 0:
        yield lambda *_: None
        return
    path = out / "metrics.jsonl"
    kept = [line for line in read_metrics(out) if line["step"] < start]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    with ExitStack() as stack:
        writers = list[Any]()
        if tensorboard:
            require("tensorboard", "track")
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(out / "tensorboard", purge_step=start)
            stack.callback(writer.close)
            writers.append(
                lambda values, step: [writer.add_scalar(name, value, step) for name, value in values.items()]
            )
        if tracker != "none":
            service: Any = require(tracker, tracker)
            project, name = out.resolve().parts[-2:]
            service.init(
                project=project,
                name=name,
                resume="allow",
                **({"id": name, "dir": str(out)} if tracker == "wandb" else {}),
            )
            stack.callback(service.finish)
            writers.append(lambda values, step: service.log(values, step=step))
        lines = stack.enter_context(path.open("a", buffering=1))

        def write(step: int, trains: str, values: dict[str, float]) -> None:
            lines.write(json.dumps({"step": step, "trains": trains, **values}) + "\n")
            curves = {name if "/" in name else f"{trains}/{name}": value for name, value in values.items()}
            for show in writers:
                show(curves, step)

        yield write


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without an incomplete last line; UserError for a damaged one."""
    path = out / "metrics.jsonl"
    lines = read_text(path).splitlines(keepends=True) if path.exists() else []
    return [_step(line, f"{path}: line {i}") for i, line in enumerate(lines, 1) if line.endswith("\n")]


def _step(line: str, where: str) -> dict[str, Any]:
    try:
        values = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); delete it") from error
    if not isinstance(values, dict) or not all(type(v) in (int, float) or k == "trains" for k, v in values.items()):
        raise UserError(f"{where} is no step of a training; delete it")
    check_shape(values, {"step": int, "trains": str}, where)
    return values
