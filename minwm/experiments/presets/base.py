"""What a pipeline is: data, a codec, stages and their evaluation."""

from dataclasses import dataclass

from minwm.core.config import lookup
from minwm.data.encode import EncodeConfig
from minwm.data.rerender import RenderConfig
from minwm.eval.run import EvalConfig
from minwm.render.base import Scenes
from minwm.render.worlds import World
from minwm.train.config import Run

EVALUATION = EvalConfig(clips=16, counterfactual=("camera", "dmd"), revisits=0, walks=0, seeds=0)
"""What takes minutes: camera following, quality and speed."""


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
    evaluation: EvalConfig = EVALUATION
    evaluated: tuple[str, ...] = ("camera", "ar", "ode", "consistency", "dmd")
    """Stages that are measured at the end."""
    scenes: Scenes = World
    """Where they are measured: the scene of a seed."""
    workers: int = 2

    def stage(self, name: str) -> Run:
        runs = {run.name: run for run in (self.codec, *self.stages) if run}
        return lookup(runs, name, "stage")
