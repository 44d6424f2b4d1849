"""The paper's ablations (figures 3 to 5) and claims, small enough for a CPU: arms that differ in one thing.

Nothing is trained here; `ablate.py` does that. All folders are below one, `out`: `latents` (the training clips),
`start` and `ar` (what arms start from), and a folder per ablation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from minwm.control.prope import Mode
from minwm.core.config import ConfigError, lookup
from minwm.data.noise import PoseNoise
from minwm.experiments.presets.demo import SHIFT, demo, starting_checkpoint
from minwm.store.model import ModelConfig
from minwm.stream.solvers import FewStepSampler, Sampler
from minwm.train.config import Init, OptimConfig, Run


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One value of what an ablation varies."""

    name: str
    runs: tuple[Run, ...]
    """Stages, one after the other; the last one's model is measured. Arms may share runs, which are made once."""
    x: float = 0.0
    """Place on the axis of the drawing."""
    seed: int = 0
    sampler: Sampler | None = None
    """Measure with this one instead of the model's own."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Arms that answer a question."""

    name: str
    question: str
    varies: str
    """What differs between arms: the label of the axis."""
    small: str
    """How small it is, in words."""
    arms: tuple[Arm, ...]
    numeric: bool = False
    """The axis is a number of things, drawn on a logarithmic scale; else arms have their names there."""
    reliance: bool = False
    """The last stage's loss on held-out clips is measured too, with their cameras and with those of other clips."""
    drift: bool = False
    """Long rollouts and speed are measured too."""


def shipped(name: str) -> Path:
    """Folder of a checkpoint that comes with the package."""
    folder = starting_checkpoint(name)
    if folder is None:
        raise ConfigError(f"the package ships no {name!r} checkpoint, from which ablations start")
    return Path(folder)


def _stage(out: Path, stage: str, folder: Path, init: Init, *, steps: int, lr: float, batch: int = 8) -> Run:
    """A stage of the demo in small."""
    run = demo(out).stage(stage)
    optim = OptimConfig(lr=lr, beta2=0.99, warmup=min(20, steps // 2), final=0.1)
    return replace(
        run, name=folder.name, data=str(out / "latents"), init=replace(init, codec=str(shipped("codec"))), steps=steps,
        batch=batch, optim=optim, seed=0, ema=0.95, save_every=200, tensorboard=False,
    )  # fmt: skip


def camera_run(out: Path, name: str, *, steps: int = 200, batch: int = 8, student: str | None = None) -> Run:
    """Phase 1: cameras are learnt again, by the shipped camera model whose camera branch was taken away."""
    init = Init(student=student or str(out / "start"))
    return _stage(out, "camera", Path(name), init, steps=steps, lr=1e-3, batch=batch)


NOISES = {
    "exact": None,
    "jittered": PoseNoise(jitter_deg=3.0, jitter_units=0.06),
    "drifting": PoseNoise(drift_deg=6.0, drift_units=0.12),
    "estimated": PoseNoise(log_scale=0.4, slow_deg=2.0, slow_units=0.05, outliers=0.03),
    "twice as badly estimated": PoseNoise(log_scale=0.8, slow_deg=4.0, slow_units=0.1, outliers=0.06),
}
"""A latent of the demo's motion is 4 degrees or 0.125 units: jitter is most of one; drift is that after a second."""


def poses(out: Path) -> Ablation:
    arms = [
        Arm(name=name, x=i, runs=(replace(camera_run(out, name), pose_noise=noise),))
        for i, (name, noise) in enumerate(NOISES.items())
    ]
    return Ablation(
        name="poses",
        question="How exact must the cameras of the training clips be?",
        varies="cameras of the training clips",
        small="200 steps of 8 clips, cameras relearnt from the shipped camera model without its camera branch",
        arms=tuple(arms),
        reliance=True,
    )


def steps(out: Path) -> Ablation:
    arms = [Arm(name=f"{n} steps", x=n, runs=(camera_run(out, f"{n}", steps=n),)) for n in (10, 25, 50, 100, 200, 400)]
    return Ablation(
        name="steps",
        question="After how many steps does control set in?",
        varies="training steps",
        small="batch 8, every arm a run of its own, cameras relearnt as in `poses`",
        arms=tuple(arms),
        numeric=True,
        reliance=True,
    )


def batch(out: Path) -> Ablation:
    def arm(size: int, seed: int) -> Arm:
        run = replace(camera_run(out, f"{size}-{seed}", steps=100, batch=size), seed=seed)
        return Arm(name=f"batch {size}, seed {seed}", x=size, seed=seed, runs=(run,))

    return Ablation(
        name="batch",
        question="How large must a batch be?",
        varies="clips per step",
        small="100 steps, 2 seeds, cameras relearnt as in `poses`",
        arms=tuple(arm(size, seed) for size in (1, 2, 4, 8, 16, 32) for seed in range(2)),
        numeric=True,
        reliance=True,
    )


def camera(out: Path) -> Ablation:
    """From the foundation, for every kind of camera input is new to that; hence the many steps."""
    ways: dict[str, Mode] = {"dual PRoPE": "dual", "single PRoPE": "single", "Plücker": "plucker"}

    def arm(x: int, name: str, mode: Mode) -> Arm:
        run = camera_run(out, mode, steps=3000, student=str(shipped("foundation")))
        network = replace(run.model.network, camera=mode)
        return Arm(name=name, x=x, runs=(replace(run, model=replace(run.model, network=network)),))

    return Ablation(
        name="camera",
        question="How should cameras enter the network?",
        varies="camera input",
        small="3,000 steps of 8 clips from the shipped foundation, which knows no cameras",
        arms=tuple(arm(i, name, mode) for i, (name, mode) in enumerate(ways.items())),
        reliance=True,
    )


def _few(out: Path, kind: str, name: str, count: int) -> Run:
    """A distillation of the shipped autoregressive model."""
    teacher = str(out / "ar")
    init = {
        "ode": Init(student=teacher),
        "consistency": Init(student=teacher, teacher=teacher),
        "dmd": Init(student=teacher, critic=str(shipped("camera")), real=str(shipped("camera"))),
    }[kind]
    run = _stage(out, kind, Path(name), init, steps=count, lr=1e-4 if kind == "dmd" else 3e-4)
    return replace(run, data=str(out / "trajectories")) if kind == "ode" else run


def distill(out: Path) -> Ablation:
    """Stage 2a against 2b; DMD after and without it; self-rollouts against as much teacher forcing."""
    folder, short, long = out / "distill", 120, 240
    dmd = _few(out, "dmd", "dmd", short)
    after = replace(dmd, init=replace(dmd.init, student=str(folder / "consistency")))
    consistency = _few(out, "consistency", "consistency", short)
    ways = {
        "2a: ODE": (_few(out, "ode", "ode", short),),
        "2b: consistency": (consistency,),
        "2b, twice as long": (_few(out, "consistency", "consistency-long", long),),
        "2b, then DMD": (consistency, after),
        "DMD alone": (_few(out, "dmd", "dmd-alone", long),),
    }
    return Ablation(
        name="distill",
        question="Which way to few steps?",
        varies="distillation",
        small="120 steps of 8 clips a stage from the shipped autoregressive model; 2a has 64 stored trajectories",
        arms=tuple(Arm(name=name, x=i, runs=runs) for i, (name, runs) in enumerate(ways.items())),
        drift=True,
    )


def sampling(out: Path) -> Ablation:
    """The same student in 1, 2 and 4 steps; and students with chunks of 1, 2 and 4 latents, in 4 steps."""
    return Ablation(
        name="sampling",
        question="How many steps, how long a chunk?",
        varies="sampling",
        small="120 steps of consistency distillation from the shipped autoregressive model; chunks other than its own "
        "2 latents first have 120 steps of teacher forcing",
        arms=tuple(_sampling(out)),
        drift=True,
    )


def with_chunk(model: ModelConfig, chunk: int) -> ModelConfig:
    return replace(model, stream=replace(model.stream, chunk=chunk))


def _sampling(out: Path) -> Iterator[Arm]:
    student = _few(out, "consistency", "chunk-2", 120)
    for i, count in enumerate((1, 2, 4)):
        sampler = FewStepSampler(steps=count, shift=SHIFT)
        yield Arm(name=f"{count} steps, chunk 2", x=i, runs=(student,), sampler=sampler)
    for i, chunk in enumerate((1, 4), 3):
        folder = out / "sampling" / f"ar-{chunk}"
        causal = _stage(out, "ar", folder, Init(student=str(out / "ar")), steps=120, lr=3e-4)
        causal = replace(causal, model=with_chunk(causal.model, chunk))
        few = replace(student, name=f"chunk-{chunk}", model=with_chunk(student.model, chunk))
        few = replace(few, init=replace(few.init, student=str(folder), teacher=str(folder)))
        yield Arm(name=f"4 steps, chunk {chunk}", x=i, runs=(causal, few))


ABLATIONS: dict[str, Callable[[Path], Ablation]] = {
    "poses": poses, "steps": steps, "batch": batch, "camera": camera, "distill": distill, "sampling": sampling,
}  # fmt: skip


def ablation(name: str, out: Path) -> Ablation:
    return lookup(ABLATIONS, name, "ablation")(out)
