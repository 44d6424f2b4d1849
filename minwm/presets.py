"""Named runs, as functions. A pipeline is data, a codec, stages and their evaluation; paths follow from `out`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from minwm.checkpoint import ModelConfig
from minwm.core.config import ConfigError, choose
from minwm.core.trajectory import Motion
from minwm.data.encode import EncodeConfig
from minwm.data.rerender import RenderConfig
from minwm.nets.codec import CodecConfig
from minwm.nets.text import WordText
from minwm.nets.wan import WanConfig
from minwm.recipes.codec import CodecTraining
from minwm.recipes.consistency import ConsistencyConfig
from minwm.recipes.diffusion import AutoregressiveConfig, BidirectionalConfig, TimeLaw
from minwm.recipes.dmd import DmdConfig
from minwm.recipes.ode import OdeConfig
from minwm.sampling import Autoregressive, Bidirectional, FewStep
from minwm.train import Init, OptimConfig, RecipeConfig, Run


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
    render: RenderConfig
    clips: int
    """Training clips."""
    encode: EncodeConfig
    codec: Run
    stages: tuple[Run, ...]
    collect: int = 0
    """Clips whose ODE trajectories are collected before the stage `ode`."""
    evaluation: Evaluation = Evaluation()
    workers: int = 2

    def stage(self, name: str) -> Run:
        runs = {run.name: run for run in (self.codec, *self.stages)}
        return runs[choose(name, runs, "stage")]


SHIFT = 3.0
"""A clip of the demo has 144 tokens where Wan's has 31,200: less noise destroys it, so times are shifted less."""
MOTION = Motion(move=0.5, turn=16.0, fps=16.0)


def tiny_model() -> ModelConfig:
    """The Wan transformer, small enough for two CPU cores: 64x64 pixels, 9 latents, chunks of 2 after the image."""
    network = WanConfig(dim=128, heads=4, layers=6, ffn=512, channels=16, text_dim=64, text_length=24, freq_dim=64)
    sampler = Bidirectional(steps=50, guidance=1.5, shift=SHIFT)
    return ModelConfig(network=network, sampler=sampler, codec=CodecConfig(), motion=MOTION, text=WordText())


def starting_checkpoint(name: str) -> str | None:
    """Folder of a checkpoint shipped with the package (assets/demo/README.md says how they were made)."""
    folder = Path(str(files("minwm"))) / "assets" / "demo" / name
    return str(folder) if folder.exists() else None


def demo(out: Path) -> Pipeline:
    """Everything in minutes on two CPU cores; some stages continue from shipped checkpoints."""
    steps = {
        "codec": 150,
        "foundation": 60,
        "camera": 200,
        "ar": 380,
        "ode": 120,
        "consistency": 110,
        "dmd": 75,
    }
    pipeline = _pipeline("demo", out, clips=256, worlds_seed=0, steps=steps, batch=12)
    codec = _from_shipped(pipeline.codec, "codec")
    return replace(pipeline, codec=codec, stages=tuple(_from_shipped(run, "student") for run in pipeline.stages))


def _from_shipped(run: Run, role: str) -> Run:
    """A stage that continues, gently, from a shipped checkpoint of itself, where there is one."""
    shipped = starting_checkpoint(run.name)
    if not shipped:
        return run
    return replace(run, init=replace(run.init, **{role: shipped}), optim=replace(run.optim, lr=0.2 * run.optim.lr))


def demo_scratch(out: Path) -> Pipeline:
    """The same from random weights, in hours: what made the shipped checkpoints."""
    steps = {
        "codec": 2500,
        "foundation": 2600,
        "camera": 4000,
        "ar": 1000,
        "ode": 1000,
        "consistency": 1000,
        "dmd": 500,
    }
    return _pipeline("demo-scratch", out, clips=6000, worlds_seed=1, steps=steps, batch=16)


def smoke(out: Path) -> Pipeline:
    """Every line of the pipeline in under a minute, from random weights; the pictures mean nothing."""
    stages = ("codec", "foundation", "camera", "ar", "ode", "consistency", "dmd")
    pipeline = _pipeline("smoke", out, clips=12, worlds_seed=2, steps=dict.fromkeys(stages, 2), batch=2)
    small = replace(tiny_model(), network=replace(tiny_model().network, dim=32, heads=2, layers=2, ffn=64))
    small = replace(small, codec=CodecConfig(width=16, fine=16, finest=8, decoder_depth=1))
    ode = next(run for run in pipeline.stages if run.name == "ode").recipe
    changes = {"ode": {"recipe": replace(ode, ode_steps=4)}}
    shrunk = tuple(replace(run, model=_like(run.model, small), **changes.get(run.name, {})) for run in pipeline.stages)
    return replace(
        pipeline,
        codec=replace(pipeline.codec, model=small),
        stages=shrunk,
        collect=4,
        evaluation=Evaluation(clips=3, bench_repeats=1),
    )


def _like(model: ModelConfig, small: ModelConfig) -> ModelConfig:
    """`model` with the sizes of `small`, keeping its camera mode and a short version of its sampler."""
    network = replace(small.network, camera=model.network.camera)
    sampler = model.sampler if isinstance(model.sampler, FewStep) else replace(model.sampler, steps=3)
    return replace(model, network=network, codec=small.codec, sampler=sampler)


def _pipeline(name: str, out: Path, *, clips: int, worlds_seed: int, steps: Mapping[str, int], batch: int) -> Pipeline:
    base = tiny_model()
    camera = replace(base, network=replace(base.network, camera="dual"))
    stepwise = replace(camera, sampler=Autoregressive(steps=50, guidance=1.5, shift=SHIFT))
    few = replace(camera, sampler=FewStep(steps=4, shift=SHIFT))
    law = TimeLaw(shift=SHIFT, weight="none")

    def folder(stage: str) -> str:
        return str(out / stage)

    def run(stage: str, model: ModelConfig, recipe: RecipeConfig, lr: float, init: Init) -> Run:
        return Run(
            name=stage,
            model=model,
            recipe=recipe,
            data=folder("latents"),
            init=replace(init, codec=folder("codec")),
            steps=steps[stage],
            batch=batch,
            optim=OptimConfig(lr=lr, beta2=0.99, warmup=20, final=0.1),
            seed=1,
            save_every=50,
        )

    after_ar = Init(student=folder("ar"), teacher=folder("ar"))
    bidirectional, causal = BidirectionalConfig(time=law), AutoregressiveConfig(time=law)
    ode = OdeConfig(shift=SHIFT, ode_steps=24, guidance=1.5)
    consistency = ConsistencyConfig(grid=12, shift=SHIFT, guidance=1.5, target_decay=0.9)
    dmd = DmdConfig(shift=SHIFT, guidance=1.5, critic_updates=2)
    scores = Init(student=folder("consistency"), critic=folder("camera"), real=folder("camera"))
    stages = (
        run("foundation", base, replace(bidirectional, image_start=0.8), 1e-3, Init()),
        run("camera", camera, bidirectional, 1e-3, Init(student=folder("foundation"))),
        run("ar", stepwise, causal, 5e-4, Init(student=folder("camera"))),
        replace(run("ode", few, ode, 3e-4, Init(student=folder("ar"))), data=folder("trajectories")),
        run("consistency", few, consistency, 3e-4, after_ar),
        replace(run("dmd", few, dmd, 1e-4, scores), critic=OptimConfig(lr=2e-4, beta1=0.0, warmup=5)),
    )
    codec = Run(
        name="codec",
        model=base,
        recipe=CodecTraining(),
        data=folder("raw"),
        steps=steps["codec"],
        batch=1,
        optim=OptimConfig(lr=3e-3, beta2=0.99, warmup=50, final=0.02),
        ema=0.99,
        save_every=100,
        seed=1,
    )
    render = RenderConfig(seed=worlds_seed, motion=MOTION, latents=base.latents, clips_per_world=1)
    return Pipeline(
        name=name, render=render, clips=clips, encode=EncodeConfig(), codec=codec, stages=stages, collect=64
    )


PIPELINES: dict[str, Callable[[Path], Pipeline]] = {
    "demo": demo,
    "demo-scratch": demo_scratch,
    "smoke": smoke,
}


def pipeline(name: str, out: Path) -> Pipeline:
    return PIPELINES[choose(name, PIPELINES, "pipeline")](out)


def stage(name: str, out: Path) -> Run:
    """A single run: `demo/camera` is the stage `camera` of the pipeline `demo`, in its folder `out`."""
    head, slash, tail = name.partition("/")
    if not slash:
        options = ", ".join(f"{p}/{r.name}" for p in PIPELINES for r in pipeline(p, out).stages[:2])
        raise ConfigError(f"{name!r} names no stage; give PIPELINE/STAGE, such as {options}")
    return pipeline(head, out).stage(tail)
