"""Named runs, as functions. A pipeline is data, a codec, stages and their evaluation; paths follow from `out`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.resources import files
from pathlib import Path

from minwm.checkpoint import ModelConfig
from minwm.core.config import ConfigError, UserError, choose
from minwm.core.trajectory import Motion
from minwm.data.encode import EncodeConfig
from minwm.data.rerender import RenderConfig
from minwm.formats import SIZES
from minwm.nets.codec import CodecConfig
from minwm.nets.text import WordText
from minwm.nets.umt5 import Umt5Text
from minwm.nets.wan import WanConfig
from minwm.nets.wan_vae import WAN22, WanVaeConfig
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
        return runs[choose(name, runs, "stage")]


SHIFT = 3.0
"""A clip of the demo has 144 tokens where Wan's has 31,200: less noise destroys it, so times are shifted less."""
MOTION = Motion(move=0.5, turn=16.0, fps=16.0)


def tiny_model() -> ModelConfig:
    """The Wan transformer, small enough for two CPU cores: 64x64 pixels, 9 latents, chunks of 2 after the image."""
    network = WanConfig(dim=128, heads=4, layers=6, ffn=512, channels=16, text_dim=64, text_length=24, freq_dim=64)
    sampler = Bidirectional(steps=50, guidance=1.5, shift=SHIFT)
    return ModelConfig(network=network, sampler=sampler, codec=CodecConfig(), motion=MOTION, text=WordText())


ASSETS = Path(str(files("minwm"))) / "assets"
"""What is shipped with the package; a README in each folder says how it was made."""


def starting_checkpoint(name: str) -> str | None:
    """Folder of a stage's shipped checkpoint."""
    folder = ASSETS / "demo" / name
    return str(folder) if folder.exists() else None


def model_to_play() -> Path:
    """The model for those who name none: the shipped one, or else what the demo has made here."""
    for folder in (ASSETS / "world" / "dmd", Path("runs/demo/dmd")):
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
        "ar": 160,
        "ode": 150,
        "consistency": 140,
        "dmd": 105,
    }
    pipeline = in_stages("demo", out, clips=700, worlds_seed=0, steps=steps, batch=12)
    codec = pipeline.codec and _from_shipped(pipeline.codec, "codec")
    return replace(pipeline, codec=codec, stages=tuple(_from_shipped(run, "student") for run in pipeline.stages))


def _from_shipped(run: Run, role: str, rate: float = 0.2) -> Run:
    """A stage that continues, at `rate` of its learning rate, from a shipped checkpoint of itself, if there is one."""
    shipped = starting_checkpoint(run.name)
    if not shipped:
        return run
    return replace(run, init=replace(run.init, **{role: shipped}), optim=replace(run.optim, lr=rate * run.optim.lr))


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
    return in_stages("demo-scratch", out, clips=6000, worlds_seed=1, steps=steps, batch=16)


def world_model(network: WanConfig, size: int) -> ModelConfig:
    """For long walks: clips of 5 seconds, which are also what a stream remembers, beside its first frame."""
    return replace(
        tiny_model(), network=network, height=size, width=size, latents=21, window=10, roll=True, context_noise=0.2
    )


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
    pipeline = in_stages("world", out, base=base, clips=20000, worlds_seed=4, steps=steps, batch=16, image_start=0.9)
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
    pipeline = in_stages("world-64", out, base=base, clips=4000, worlds_seed=3, steps=steps, batch=4, image_start=0.9)
    codec = pipeline.codec and _from_shipped(pipeline.codec, "codec")
    stages = [_from_shipped(run, "student", 0.6) for run in pipeline.stages]
    large = {"camera": 16}  # cameras are learnt from large batches (docs/ablations.md)
    return replace(
        pipeline, codec=codec, stages=tuple(replace(run, batch=large.get(run.name, run.batch)) for run in stages)
    )


def smoke(out: Path) -> Pipeline:
    """Every line of the pipeline in under a minute, from random weights; the pictures mean nothing."""
    stages = ("codec", "foundation", "camera", "ar", "ode", "consistency", "dmd")
    pipeline = in_stages("smoke", out, clips=12, worlds_seed=2, steps=dict.fromkeys(stages, 2), batch=2)
    small = replace(tiny_model(), network=replace(tiny_model().network, dim=32, heads=2, layers=2, ffn=64))
    small = replace(small, codec=CodecConfig(width=16, fine=16, finest=8, decoder_depth=1))
    ode = next(run for run in pipeline.stages if run.name == "ode").recipe
    changes = {"ode": {"recipe": replace(ode, ode_steps=4)}}
    shrunk = tuple(replace(run, model=_like(run.model, small), **changes.get(run.name, {})) for run in pipeline.stages)
    return replace(
        pipeline,
        codec=pipeline.codec and replace(pipeline.codec, model=small),
        stages=shrunk,
        collect=4,
        evaluation=Evaluation(clips=3, bench_repeats=1),
    )


def _like(model: ModelConfig, small: ModelConfig) -> ModelConfig:
    """`model` with the sizes of `small`, keeping its camera mode and a short version of its sampler."""
    network = replace(small.network, camera=model.network.camera)
    sampler = model.sampler if isinstance(model.sampler, FewStep) else replace(model.sampler, steps=3)
    return replace(model, network=network, codec=small.codec, sampler=sampler)


def in_stages(
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
        seed=worlds_seed, motion=MOTION, latents=base.latents, height=base.height, width=base.width, clips_per_world=1
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
    stepwise = replace(camera, sampler=Autoregressive(steps=50, guidance=1.5, shift=SHIFT))
    few = replace(camera, sampler=FewStep(steps=4, shift=SHIFT))
    law = TimeLaw(shift=SHIFT, weight="none")

    def folder(stage: str) -> str:
        return str(out / stage)

    def run(stage: str, model: ModelConfig, recipe: RecipeConfig, lr: float, init: Init) -> Run:
        optim = OptimConfig(lr=lr, beta2=0.99, warmup=20, final=0.1)
        data = folder("trajectories" if stage == "ode" else "latents")
        return Run(name=stage, model=model, recipe=recipe, data=data, init=init, optim=optim, seed=1, save_every=50)

    bidirectional = BidirectionalConfig(time=law, image_start=image_start)
    own_past = 0.5 if base.context_noise else 0.0  # both against drift: for models that are walked through for long
    causal = AutoregressiveConfig(time=law, image_start=image_start, own_past=own_past)
    ode = OdeConfig(shift=SHIFT, ode_steps=24, guidance=1.5)
    consistency = ConsistencyConfig(
        grid=12, shift=SHIFT, guidance=1.5, target_decay=0.9, image_start=image_start, own_past=own_past
    )
    still, late = (0.2, 0.3) if base.roll else (0.0, 0.0)  # who walks for long stands for long, and must not drift
    dmd = DmdConfig(shift=SHIFT, guidance=1.5, critic_updates=2, image_start=image_start, still=still, late=late)
    scores = Init(student=folder("consistency"), critic=folder("camera"), real=folder("camera"))
    yield run("foundation", base, replace(bidirectional, image_start=0.8), 1e-3, Init())
    yield run("camera", camera, bidirectional, 1e-3, Init(student=folder("foundation")))
    yield run("ar", stepwise, causal, 5e-4, Init(student=folder("camera")))
    yield run("ode", few, ode, 3e-4, Init(student=folder("ar")))
    yield run("consistency", few, consistency, 3e-4, Init(student=folder("ar"), teacher=folder("ar")))
    yield replace(run("dmd", few, dmd, 1e-4, scores), critic=OptimConfig(lr=2e-4, beta1=0.0, warmup=5))


WAN_FOCAL = (969.697 / 1920, 969.697 / 1080)
"""fx / width and fy / height of the cameras that minWM's weights were trained with."""
RELEASE_FOCAL = (0.5, 0.5)
"""What minWM's own Wan inference passes instead; give it to `minwm convert --focal` to get its pictures again."""
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The negative prompt that Wan was released with: garish, overexposed, static, blurred, subtitles, ..."""


def wan_model(size: str) -> ModelConfig:
    """A published Wan model, bidirectional and without cameras, as minWM trains on: 20 latents in chunks of 4."""
    network = SIZES[choose(size, SIZES, "size of Wan")]
    base = ModelConfig(
        network=network,
        sampler=Bidirectional(steps=50, guidance=8.0, shift=5.0),
        codec=WanVaeConfig(),
        motion=Motion(move=0.32, turn=12.0, fps=16.0),  # 0.08 units and 3 degrees per latent
        text=Umt5Text(source="weights/Wan2.1-T2V-1.3B"),
        negative=WAN_NEGATIVE,
        latents=20,
        height=480,
        width=832,
        focal=WAN_FOCAL,
        chunk=4,
        first=0,
        sink=1,
        window=4,
        roll=True,
    )
    if network.channels == WAN22.channels:  # larger pixels, and made for image starts
        return replace(base, codec=WAN22, height=704, width=1280, latents=21, first=1)
    return base


def self_forcing() -> ModelConfig:
    """The setting of Self-Forcing's published times: chunks of 3 latents, 4 passes, no cameras.

    The ring is full at the 6th chunk, which those times are of: it sees 18 latents, itself included.
    """
    base = replace(wan_model("wan2.1-1.3b"), sampler=FewStep(steps=4, shift=5.0), latents=21)
    return replace(base, chunk=3, sink=0, window=6, roll=False)


MODELS: dict[str, Callable[[], ModelConfig]] = {"self-forcing": self_forcing}
"""Made by no pipeline: to be measured with random weights."""


def wan(size: str, out: Path) -> Pipeline:
    """minWM's recipe for Wan on the user's own posed clips (`OUT/raw`), from the published model in `OUT/base`.

    Hyper-parameters are those of the reference (its configs, and paper Sec. 3.1), except where it pays not to:
    weights and optimiser in float32 also in stage 3 (updates of 2e-6 vanish in bfloat16); prompts dropped in 1 of 10
    clips, so that guidance has an unconditional branch to stand on; moving averages of the weights in every stage,
    not in the last ones alone; DMD counts student and critic updates alike: 240 steps are 40 and 200.
    """
    base = wan_model(size)
    camera = replace(base, network=replace(base.network, camera="dual"))
    stepwise = replace(camera, sampler=Autoregressive(steps=50, guidance=3.0, shift=5.0))
    few = replace(camera, sampler=FewStep(steps=4, shift=5.0))
    optim = OptimConfig(lr=2e-6, beta1=0.0, beta2=0.999, weight_decay=0.01, clip=10.0)

    def folder(stage: str) -> str:
        return str(out / stage)

    def run(stage: str, model: ModelConfig, recipe: RecipeConfig, steps: int, init: Init) -> Run:
        return Run(
            name=stage,
            model=model,
            recipe=recipe,
            data=folder("latents"),
            init=replace(init, codec=folder("base")),
            steps=steps,
            batch=1,
            accumulate=32,
            optim=optim,
            precision="bfloat16",
            checkpointing="attention",
        )

    ode = replace(
        run("ode", few, OdeConfig(guidance=6.0), 2000, Init(student=folder("ar"))),
        data=folder("trajectories"),
        optim=replace(optim, beta1=0.9),
    )
    after_ar = Init(student=folder("ar"), teacher=folder("ar"))
    scores = Init(student=folder("consistency"), critic=folder("camera"), real=folder("camera"))
    dmd = run("dmd", few, DmdConfig(guidance=4.0, critic_updates=5), 240, scores)
    stages = (
        run("camera", camera, BidirectionalConfig(), 5000, Init(student=folder("base"))),
        run("ar", stepwise, AutoregressiveConfig(), 4000, Init(student=folder("camera"))),
        ode,
        run("consistency", few, ConsistencyConfig(guidance=3.0), 2000, after_ar),
        replace(dmd, critic=replace(optim, lr=4e-7), checkpointing=True),  # three networks: to fit 80 GB
    )
    return Pipeline(name=size, render=None, clips=0, encode=EncodeConfig(), codec=None, stages=stages, collect=4096)


PIPELINES: dict[str, Callable[[Path], Pipeline]] = {
    "demo": demo,
    "demo-scratch": demo_scratch,
    "world": world,
    "world-64": world_64,
    "place": lambda out: import_module("minwm.presets_place").place(out),
    "smoke": smoke,
    **{size: partial(wan, size) for size in SIZES},
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
