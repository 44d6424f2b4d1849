"""minWM's recipe for published Wan models."""

from dataclasses import replace
from pathlib import Path

from minwm.cameras.trajectory import Motion
from minwm.core.config import lookup
from minwm.data.encode import EncodeConfig
from minwm.experiments.presets.base import EVALUATION, Pipeline
from minwm.families.wan.convert import RELEASES
from minwm.families.wan.text import Umt5Text
from minwm.families.wan.vae import WAN22, WanVaeConfig
from minwm.nets.chunks import StreamConfig
from minwm.recipes.consistency import ConsistencyConfig
from minwm.recipes.diffusion import AutoregressiveConfig, BidirectionalConfig
from minwm.recipes.dmd import DmdConfig
from minwm.recipes.ode import OdeConfig
from minwm.store.model import ModelConfig
from minwm.stream.solvers import AutoregressiveSampler, BidirectionalSampler, FewStepSampler
from minwm.train.config import AnyRecipeConfig, Init, OptimConfig, Run

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
    network = replace(lookup(RELEASES, size, "size of Wan").config, principal_point=False)
    base = ModelConfig(
        network=network,
        sampler=BidirectionalSampler(steps=50, guidance=8.0, shift=5.0),
        codec=WAN22 if network.channels == WAN22.channels else WanVaeConfig(),
        motion=Motion(move=0.32, turn=12.0, fps=16.0),  # 0.08 units and 3 degrees per latent
        text=Umt5Text(source="weights/Wan2.1-T2V-1.3B"),
        negative=WAN_NEGATIVE,
        latents=20,
        height=480,
        width=832,
        focal=WAN_FOCAL,
        stream=StreamConfig(chunk=4, sink=1, window=4, rolling_sink=True),
    )
    if network.channels == WAN22.channels:  # larger pixels, and made for image starts
        stream = replace(base.stream, first_chunk=1)
        return replace(base, height=704, width=1280, latents=21, stream=stream)
    return base


def self_forcing() -> ModelConfig:
    """The setting of Self-Forcing's published times: chunks of 3 latents, 4 passes, no cameras.

    The ring is full at the 6th chunk, which those times are of: it sees 18 latents, itself included.
    """
    base = replace(wan_model("wan2.1-1.3b"), sampler=FewStepSampler(steps=4, shift=5.0), latents=21)
    return replace(base, stream=StreamConfig(chunk=3, sink=0, window=6))


def wan(size: str, out: Path) -> Pipeline:
    """minWM's recipe for Wan on the user's own posed clips (`OUT/raw`), from the published model in `OUT/base`.

    Hyper-parameters are those of the reference (its configs, and paper Sec. 3.1), except where it pays not to
    (docs/paper.md): weights and optimiser in float32 also in stage 3 (updates of 2e-6 vanish in bfloat16); prompts
    dropped in 1 of 10 clips, so that guidance has an unconditional branch to stand on; moving averages of the weights
    in all stages but the last, which is short; DMD counts student and critic updates alike: 240 steps are 40 and 200.
    """
    base = wan_model(size)
    camera = replace(base, network=replace(base.network, camera="dual"))
    stepwise = replace(camera, sampler=AutoregressiveSampler(steps=50, guidance=3.0, shift=5.0))
    few = replace(camera, sampler=FewStepSampler(steps=4, shift=5.0))
    optim = OptimConfig(lr=2e-6, beta1=0.0, beta2=0.999, weight_decay=0.01, clip=10.0)

    def folder(stage: str) -> str:
        return str(out / stage)

    def run(stage: str, model: ModelConfig, recipe: AnyRecipeConfig, steps: int, init: Init) -> Run:
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
        run("camera", camera, BidirectionalConfig(dropped_prompt=""), 5000, Init(student=folder("base"))),
        run("ar", stepwise, AutoregressiveConfig(dropped_prompt=""), 4000, Init(student=folder("camera"))),
        ode,
        run("consistency", few, ConsistencyConfig(guidance=3.0), 2000, after_ar),
        # 40 student updates are too few for an average, which would lag by 16; three networks: to fit 80 GB
        replace(dmd, critic=replace(optim, lr=4e-7), ema=0.0, checkpointing=True),
    )
    evaluation = replace(EVALUATION, revisits=4, seeds=2)  # the rest is for image starts
    return Pipeline(
        name=size, render=None, clips=0, encode=EncodeConfig(), codec=None, stages=stages, collect=4096,
        evaluation=evaluation,
    )  # fmt: skip


def paper(out: Path) -> Pipeline:
    """The paper's run of Wan2.1-T2V-1.3B: all differences that docs/paper.md lists are removed.

    Where paper and released code disagree it is the paper's way: PRoPE in the one attention there is. Stage 3 starts
    from stage 2a, the released config's choice; `init.student` names stage 2b's folder instead.
    """
    pipeline = wan("wan2.1-1.3b", out)
    recipe_changes = {
        "camera": {"text_dropout": 0.0},
        "ar": {"text_dropout": 0.0},
        "consistency": {"reaches_zero": False},
        "dmd": {"exit_step": "step", "context": "exit", "critic_data": "exit"},
    }

    def changed(run: Run) -> Run:
        network = replace(run.model.network, camera="single", principal_point=True, rounded=True)
        model = replace(run.model, network=network, stream=StreamConfig(chunk=4, sink=0, window=5))
        recipe = replace(run.recipe, **recipe_changes.get(run.name, {}))
        init = replace(run.init, student=str(out / "ode")) if run.name == "dmd" else run.init
        return replace(run, model=model, recipe=recipe, init=init, ema=0.99 if run.name == "consistency" else 0.0)

    stages = tuple(changed(run) for run in pipeline.stages)
    return replace(pipeline, name="paper", encode=EncodeConfig(dtype="float16"), stages=stages)
