"""What the shipped models aim at, in the scenes that they know, and whether a model reaches it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from minwm.bench.target import Target
from minwm.eval.run import EvalResult
from minwm.render.place import SceneKind


@dataclass(frozen=True, kw_only=True)
class Aims:
    """Bounds. None, or an empty mapping: no aim."""

    turn: float
    """Share of a commanded turn that is missed."""
    direction: float
    """Degrees by which a direction of movement is missed."""
    behind: float
    """dB behind the multi-step teacher after a second."""
    psnr: Mapping[int, float] = field(default_factory=dict)
    """dB to the truth, at least, after so many seconds: where nothing has to be invented."""
    first_look: float | None = None
    """dB by which the view after a full turn is less like the first one than views after a second are like theirs."""
    sharpness: float | None = None
    """Gradient energy after five seconds of a random walk, at least, over that of the truth."""


AIMS: dict[SceneKind, Aims] = {
    "worlds": Aims(turn=0.15, direction=15.0, behind=2.0),
    "place": Aims(
        turn=0.10, direction=10.0, behind=1.0, psnr={1: 25.0, 5: 23.0, 60: 20.0}, first_look=1.0, sharpness=0.8
    ),
}


def targets(row: EvalResult, scenes: SceneKind, teacher: EvalResult | None = None) -> dict[Target, float]:
    """Targets of a model with what it reaches, on medians; `teacher` is the multi-step model that the few-step one came
    from."""
    return dict([*_clips(row, AIMS[scenes], teacher), *_streams(row, AIMS[scenes])])


def _clips(row: EvalResult, aims: Aims, teacher: EvalResult | None) -> Iterator[tuple[Target, float]]:
    motion = row.follow and row.follow.motion.overall
    if motion and motion.turn_error:
        yield Target("yaw and pitch missed, share of the command", aims.turn), motion.turn_error.value
    if motion and motion.direction_deg:
        yield Target("direction of movement missed, degrees", aims.direction), motion.direction_deg.value
    after = [model.quality.psnr_at for model in (teacher, row) if model and model.quality and model.quality.psnr_at]
    if len(after) == 2:
        behind = after[0][0].value - after[1][0].value
        yield Target("PSNR behind the multi-step teacher after 1 s, dB", aims.behind), behind


def _streams(row: EvalResult, aims: Aims) -> Iterator[tuple[Target, float]]:
    if not row.drift:
        return
    walk, turn = row.drift["random walk"], row.drift["turn around"]
    for seconds, bound in aims.psnr.items():
        if seconds <= len(walk.psnr):
            yield Target(f"PSNR to the truth after {seconds} s, dB", bound, at_least=True), walk.psnr[seconds - 1].value
    if aims.first_look is not None and turn.first_look and turn.psnr:
        lost = turn.psnr[0].value - turn.first_look.value
        yield Target("PSNR of a full turn to the first look, below that after 1 s, dB", aims.first_look), lost
    if aims.sharpness is not None and len(walk.sharpness) >= 5:
        yield Target("gradient energy after 5 s, of the truth's", aims.sharpness, at_least=True), walk.sharpness[4]
    ends = [second for curves in row.drift.values() for second in curves.collapsed]
    yield Target("long rollouts that collapsed", 0.0), float(sum(second is not None for second in ends))
