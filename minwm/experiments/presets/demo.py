"""Named runs, as functions. A pipeline is data, a codec, stages and their evaluation; paths follow from `out`."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from minwm.core.config import UserError
from minwm.data.encode import EncodeConfig
from minwm.data.rerender import RenderConfig
from minwm.experiments.presets.base import EVALUATION, Pipeline
from minwm.families.wan.transformer import WanConfig
from minwm.nets.chunks import StreamConfig
from minwm.nets.small_codec import SmallCodecConfig
from minwm.nets.text import WordText
from minwm.recipes.codec import CodecTraining
from minwm.recipes.consistency import ConsistencyConfig
from minwm.recipes.diffusion import AutoregressiveConfig, BidirectionalConfig, TimeLaw
from minwm.recipes.dmd import DmdConfig
from minwm.recipes.ode import OdeConfig
from minwm.store.layouts import NetworkConfig
from minwm.store.model import ModelConfig
from minwm.stream.solvers import AutoregressiveSampler, BidirectionalSampler, FewStepSampler
from minwm.train.config import AnyRecipeConfig, Init, OptimConfig, Run

SHIFT = 3.0
"""A clip of the demo has 144 tokens where Wan's has 31,200: less noise destroys it, so times are shifted less."""


def tiny_model() -> ModelConfig:
    """The Wan transformer, small enough for two CPU cores: 64x64 pixels, 9 latents, chunks of 2 after the image."""
    network = WanConfig(dim=128, heads=4, layers=6, ffn=512, channels=16, text_dim=64, text_length=24, freq_dim=64)
    sampler = BidirectionalSampler(steps=50, guidance=1.5, shift=SHIFT)
    return ModelConfig(
        network=network,
        sampler=sampler,
        codec=SmallCodecConfig(),
        text=WordText(),
        stream=StreamConfig(chunk=2, first_chunk=1),
    )


ASSETS = Path(str(files("minwm"))) / "assets"
"""What is shipped with the package; a README in each folder says how it was made."""


def starting_checkpoint(name: str, demo: str = "demo") -> str | None:
    """Folder of a stage's shipped checkpoint."""
    folder = ASSETS / demo / name
    return str(folder) if folder.exists() else None


def model_to_play() -> Path:
    """The model for those who name none: the shipped one, or else what the demo has made here."""
    for folder in (ASSETS / "place" / "dmd", Path("runs/demo/dmd")):
        if (folder / "model.json").exists():
            return folder
    raise UserError(
        "there is no model yet: make one with minwm pipeline demo, name one with --model DIR, or walk through a "
        "rendered world with --world 7"
    )


def demo(out: Path) -> Pipeline:
    """Everything in minutes on two CPU cores; some stages continue from shipped checkpoints."""
    steps = {
        "codec": 150,
        "foundation": 60,
        "camera": 120,
        "ar": 120,
        "ode": 100,
        "consistency": 80,
        "dmd": 90,
    }
    pipeline = small_pipeline("demo", out, clips=500, worlds_seed=0, steps=steps, batch=12)
    codec = pipeline.codec and from_shipped(pipeline.codec)
    return replace(pipeline, codec=codec, stages=tuple(from_shipped(run) for run in pipeline.stages))


def from_shipped(run: Run, rate: float = 0.2, demo: str = "demo") -> Run:
    """A stage that continues, at `rate` of its learning rate, from a shipped checkpoint of itself, if there is one."""
    shipped = starting_checkpoint(run.name, demo)
    if not shipped:
        return run
    return replace(run, init=replace(run.init, student=shipped), optim=replace(run.optim, lr=rate * run.optim.lr))


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
    return small_pipeline("demo-scratch", out, clips=6000, worlds_seed=1, steps=steps, batch=16)


def world_model(network: NetworkConfig, size: int) -> ModelConfig:
    """For long walks: clips of 5 seconds, which are also what a stream remembers, beside its first frame."""
    stream = StreamConfig(chunk=2, first_chunk=1, window=10, rolling_sink=True, context_noise=0.2)
    return replace(tiny_model(), network=network, height=size, width=size, latents=21, stream=stream)


def world(out: Path) -> Pipeline:
    """The world to walk through, 128x128 pixels, from random weights: hours on a GPU."""
    network = WanConfig(dim=256, heads=4, layers=12, ffn=1024, channels=16, text_dim=64, text_length=24)
    steps = {
        "codec": 6000,
        "foundation": 20000,
        "camera": 30000,
        "ar": 15000,
        "ode": 4000,
        "consistency": 4000,
        "dmd": 2000,
    }
    base = world_model(network, 128)
    pipeline = small_pipeline(
        "world", out, base=base, clips=20000, worlds_seed=4, steps=steps, batch=16, image_start=0.9
    )
    return replace(pipeline, stages=tuple(replace(run, precision="bfloat16") for run in pipeline.stages))


def world_64(out: Path) -> Pipeline:
    """The same at 64x64 pixels on two CPU cores: longer clips and noised context, from the demo's checkpoints."""
    steps = {
        "codec": 9000,
        "foundation": 500,
        "camera": 5000,
        "ar": 3500,
        "ode": 600,
        "consistency": 600,
        "dmd": 5000,
    }
    base = world_model(tiny_model().network, 64)
    pipeline = small_pipeline(
        "world-64", out, base=base, clips=4000, worlds_seed=3, steps=steps, batch=4, image_start=0.9
    )
    codec = pipeline.codec and from_shipped(pipeline.codec)
    stages = [from_shipped(run, 0.6) for run in pipeline.stages]
    large = {"camera": 16}  # cameras are learnt from large batches (docs/ablations.md)
    return replace(
        pipeline, codec=codec, stages=tuple(replace(run, batch=large.get(run.name, run.batch)) for run in stages)
    )


def smoke(out: Path) -> Pipeline:
    """Every line of the pipeline in under a minute, from random weights; the pictures mean nothing."""
    stages = ("codec", "foundation", "camera", "ar", "ode", "consistency", "dmd")
    pipeline = small_pipeline("smoke", out, clips=12, worlds_seed=2, steps=dict.fromkeys(stages, 2), batch=2)
    small = replace(tiny_model(), network=replace(tiny_model().network, dim=32, heads=2, layers=2, ffn=64))
    small = replace(small, codec=SmallCodecConfig(width=16, fine=16, finest=8, decoder_depth=1))
    ode = next(run for run in pipeline.stages if run.name == "ode").recipe
    changes = {"ode": {"recipe": replace(ode, ode_steps=4)}}
    shrunk = tuple(replace(run, model=_like(run.model, small), **changes.get(run.name, {})) for run in pipeline.stages)
    return replace(
        pipeline,
        codec=pipeline.codec and replace(pipeline.codec, model=small),
        stages=shrunk,
        collect=4,
        evaluation=replace(EVALUATION, clips=3, bench_repeats=1),
    )


def _like(model: ModelConfig, small: ModelConfig) -> ModelConfig:
    """`model` with the sizes of `small`, keeping its camera mode and a short version of its sampler."""
    network = replace(small.network, camera=model.network.camera)
    sampler = replace(model.sampler, steps=3) if model.sampler.steps > 4 else model.sampler
    return replace(model, network=network, codec=small.codec, sampler=sampler)


def small_pipeline(
    name: str,
    out: Path,
    *,
    base: ModelConfig | None = None,
    clips: int,
    worlds_seed: int,
    steps: Mapping[str, int],
    batch: int,
    image_start: float = 1.0,
) -> Pipeline:
    """Worlds are rendered for `base` and its stages; `image_start` of their batches have the first frame given."""
    base = base or tiny_model()
    codec = Run(
        name="codec",
        model=base,
        recipe=CodecTraining(),
        data=str(out / "raw"),
        steps=steps["codec"],
        batch=1,
        optim=OptimConfig(lr=3e-3, beta2=0.99, warmup=50, final=0.02),
        ema=0.99,
        save_every=100,
        seed=1,
    )
    render = RenderConfig(
        seed=worlds_seed, motion=base.motion, latents=base.latents, height=base.height, width=base.width
    )
    stages = tuple(
        replace(run, steps=steps[run.name], batch=batch, init=replace(run.init, codec=str(out / "codec")))
        for run in _stages(out, base, image_start)
    )
    return Pipeline(
        name=name, render=render, clips=clips, encode=EncodeConfig(), codec=codec, stages=stages, collect=64
    )


def _stages(out: Path, base: ModelConfig, image_start: float) -> Iterator[Run]:
    """The stages of a small world, but for their length and batch."""
    camera = replace(base, network=replace(base.network, camera="dual"))
    stepwise = replace(camera, sampler=AutoregressiveSampler(steps=50, guidance=1.5, shift=SHIFT))
    few = replace(camera, sampler=FewStepSampler(steps=4, shift=SHIFT))
    law = TimeLaw(shift=SHIFT, weight="none")

    def folder(stage: str) -> str:
        return str(out / stage)

    def run(stage: str, model: ModelConfig, recipe: AnyRecipeConfig, lr: float, init: Init) -> Run:
        optim = OptimConfig(lr=lr, beta2=0.99, warmup=20, final=0.1)
        data = folder("trajectories" if stage == "ode" else "latents")
        return Run(name=stage, model=model, recipe=recipe, data=data, init=init, optim=optim, seed=1, save_every=50)

    bidirectional = BidirectionalConfig(time=law, image_start=image_start)
    self_conditioning = 0.5 if base.stream.context_noise else 0.0  # with context noise, against drift in long streams
    causal = AutoregressiveConfig(time=law, image_start=image_start, self_conditioning=self_conditioning)
    ode = OdeConfig(ode_steps=24, guidance=1.5)
    consistency = ConsistencyConfig(
        grid=12, shift=SHIFT, guidance=1.5, target_decay=0.9, image_start=image_start,
        self_conditioning=self_conditioning,
    )  # fmt: skip
    dmd = DmdConfig(guidance=1.5, critic_updates=2, image_start=image_start)
    if base.stream.rolling_sink:  # made for long streams
        dmd = replace(dmd, static_cameras=0.2, long_rollouts=0.3)
    scores = Init(student=folder("consistency"), critic=folder("camera"), real=folder("camera"))
    yield run("foundation", base, replace(bidirectional, image_start=0.8), 1e-3, Init())
    yield run("camera", camera, bidirectional, 1e-3, Init(student=folder("foundation")))
    yield run("ar", stepwise, causal, 5e-4, Init(student=folder("camera")))
    yield run("ode", few, ode, 3e-4, Init(student=folder("ar")))
    yield run("consistency", few, consistency, 3e-4, Init(student=folder("ar"), teacher=folder("ar")))
    yield replace(run("dmd", few, dmd, 1e-4, scores), critic=OptimConfig(lr=2e-4, beta1=0.0, warmup=5))
