"""What the shipped world aims at, and whether a model reaches it."""

from collections.abc import Iterator
from dataclasses import dataclass

from minwm.eval.run import EvalResult

TURN_SHARE, DIRECTION_DEG, BEHIND_DB = 0.15, 15.0, 2.0


@dataclass(frozen=True)
class Target:
    """A number that should be at most its bound."""

    name: str
    value: float
    bound: float
    met: bool


def targets(row: EvalResult, teacher: EvalResult | None = None) -> list[Target]:
    """Targets of a model, on medians; `teacher` is the multi-step model that the few-step one came from."""
    return [Target(name, value, bound, value <= bound) for name, value, bound in _values(row, teacher)]


def _values(row: EvalResult, teacher: EvalResult | None) -> Iterator[tuple[str, float, float]]:
    motion = row.follow and row.follow.motion.overall
    if motion and motion.turn_error:
        yield "yaw and pitch missed, share of the command", motion.turn_error.value, TURN_SHARE
    if motion and motion.direction_deg:
        yield "direction of movement missed, degrees", motion.direction_deg.value, DIRECTION_DEG
    after = [model.quality.psnr_at for model in (teacher, row) if model and model.quality and model.quality.psnr_at]
    if len(after) == 2:
        yield "PSNR behind the multi-step teacher after 1 s, dB", after[0][0].value - after[1][0].value, BEHIND_DB
    if row.drift:
        ends = [second for curves in row.drift.values() for second in curves.collapsed]
        yield "long rollouts that collapsed", float(sum(second is not None for second in ends)), 0.0
