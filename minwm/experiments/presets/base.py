"""What a pipeline is: data, a codec, stages and their evaluation."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any

from minwm.core.config import lookup, override
from minwm.data.encode import EncodeConfig
from minwm.data.rerender import RenderConfig
from minwm.eval.run import EvalConfig
from minwm.train.config import Run

EVALUATION = EvalConfig(clips=16, counterfactual=("camera", "dmd"), revisits=0, walks=0, seeds=0)
"""What takes minutes: camera following, quality and speed."""


SETTABLE: dict[str, Any] = {
    "clips": int,
    "workers": int,
    "collect": int,
    "evaluated": tuple[str, ...],
    "render": RenderConfig,
    "encode": EncodeConfig,
    "evaluation": EvalConfig,
    "codec": Run,
}
"""Fields of a pipeline that can be set, with their types."""


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
    workers: int = 2
    """Processes that render."""
    changes: Mapping[str, str] = field(default_factory=dict)
    """Fields that `override` has set, with dots."""

    def stage(self, name: str) -> Run:
        runs = {run.name: run for run in (self.codec, *self.stages) if run}
        return lookup(runs, name, "stage")

    def command(self, out: Path) -> str:
        """What runs it."""
        changes = [word for name, value in self.changes.items() for word in (f"--{name}", value)]
        return shlex.join(["minwm", "pipeline", self.name, "--out", str(out), *changes])

    def settings(self) -> Any:
        """A dataclass whose fields are the stages and the other parts, by name: what `override` can set."""
        values = {name: value for name in SETTABLE if (value := getattr(self, name)) is not None}
        values |= {run.name: run for run in self.stages}
        fields = [(name, SETTABLE.get(name, Run), field(default=value)) for name, value in values.items()]
        return make_dataclass("Pipeline", fields, frozen=True, kw_only=True)()

    def override(self, values: Mapping[str, str]) -> "Pipeline":
        """The pipeline with fields of its parts replaced, as in `{"camera.steps": "5", "render.height": "64"}`."""
        changed = vars(override(self.settings(), values))
        own = {name: value for name, value in changed.items() if name in SETTABLE}
        stages = tuple(changed[run.name] for run in self.stages)
        pipeline = replace(self, **own, stages=stages, changes={**self.changes, **values})
        for name in pipeline.evaluated:
            pipeline.stage(name)
        return pipeline
