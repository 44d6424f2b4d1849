"""What a pipeline is: data, a codec, stages and their evaluation."""

from dataclasses import dataclass

from minwm.core.config import lookup
from minwm.data.encode import EncodeConfig
from minwm.data.rerender import RenderConfig
from minwm.train.config import Run


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is generated and measured at the end."""

    clips: int = 16
    """Held-out clips, each in a world that no stage has seen."""
    stages: tuple[str, ...] = ("camera", "ar", "ode", "consistency", "dmd")
    counterfactual: tuple[str, ...] = ("camera", "dmd")
    """Stages that also get every action from one first frame."""
    examples: int = 6
    """Clips shown in the report."""
    seed: int = 1
    bench_repeats: int = 3


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """All stages of one project folder, in order."""

    name: str
    render: RenderConfig | None
    """None: the raw clips are the user's own."""
    clips: int
    """Training clips to render."""
    encode: EncodeConfig
    codec: Run | None
    """None: the codec is that of a published model."""
    stages: tuple[Run, ...]
    collect: int = 0
    """Clips whose ODE trajectories are collected before the stage `ode`."""
    evaluation: Evaluation = Evaluation()
    workers: int = 2

    def stage(self, name: str) -> Run:
        runs = {run.name: run for run in (self.codec, *self.stages) if run}
        return lookup(runs, name, "stage")
