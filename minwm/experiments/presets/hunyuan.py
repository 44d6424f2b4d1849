"""minWM's recipe for HunyuanVideo-1.5, and the demo on a small network of its kind."""

from dataclasses import replace
from pathlib import Path

from minwm.core.config import lookup
from minwm.data.encode import EncodeConfig
from minwm.experiments.presets.base import EVALUATION, Pipeline
from minwm.experiments.presets.demo import from_shipped, small_pipeline, tiny_model
from minwm.experiments.presets.wan import wan_model
from minwm.families.hunyuan.convert import RELEASES
from minwm.families.hunyuan.text import HunyuanText
from minwm.families.hunyuan.transformer import HunyuanConfig
from minwm.families.hunyuan.vae import HunyuanVaeConfig
from minwm.nets.chunks import StreamConfig
from minwm.recipes.consistency import ConsistencyConfig
from minwm.recipes.diffusion import AutoregressiveConfig, BidirectionalConfig, DiffusionConfig, TimeLaw
from minwm.recipes.dmd import DmdConfig
from minwm.recipes.ode import OdeConfig
from minwm.store.model import ModelConfig
from minwm.stream.solvers import AutoregressiveSampler, BidirectionalSampler, FewStepSampler
from minwm.train.config import AnyRecipeConfig, Init, OptimConfig, Run

GUIDANCE = 5.0
"""Of the teacher in all stages of distillation (HY)."""
TIMES = TimeLaw(law="logit_normal", shift=3.0, weight="none")
OPTIM = OptimConfig(optimizer="muon", lr=1e-5, weight_decay=1e-4, clip=1.0, skip_above=10.0)
"""Of all published recipes this one alone trains by Muon; a step from a gradient that is far too long is left out."""


def hunyuan_model(size: str) -> ModelConfig:
    """A published HunyuanVideo-1.5 for 480p from an image, bidirectional and without cameras.

    Clips and cameras are those of minWM's data, as for Wan; solver, shift and guidance are the release's.
    """
    network = lookup(RELEASES, size, "size of HunyuanVideo-1.5").config
    sampler = BidirectionalSampler(steps=50, guidance=6.0, shift=5.0, solver="euler")
    if network.meanflow:
        sampler = replace(sampler, steps=12, guidance=1.0, shift=7.0)
    return replace(
        wan_model("wan2.1-1.3b"),
        network=replace(network, principal_point=False),
        sampler=sampler,
        codec=HunyuanVaeConfig(),
        text=HunyuanText(source="weights/HunyuanVideo-1.5"),
        negative="",  # what prompts are dropped for in training, too
        stream=StreamConfig(chunk=4, image_start=True, sink=1, window=4, rolling_sink=True),
    )


def hunyuan(out: Path) -> Pipeline:
    """minWM's recipe for HunyuanVideo-1.5 on the user's own posed clips (`OUT/raw`), from the release in `OUT/base`.

    Step counts are the paper's (Sec. 3.1), in batches of 32: 8,000 bidirectional steps, of which autoregressive
    training follows the first 5,000 (`camera`), and the scores of DMD all (`score`); then 4,000, 1,500 and 500, of
    which 100 are the student's. Text has timestep 0 in all stages. Muon, times and weights are those of the released
    code; weights and optimiser are float32 also in stage 3, where it has bfloat16.
    """
    base = hunyuan_model("hunyuan1.5-8b")
    camera = replace(base, network=replace(base.network, camera="dual", text_time="zero"))
    few = replace(camera, sampler=FewStepSampler(steps=4, shift=5.0))
    stepwise = replace(camera, sampler=AutoregressiveSampler(steps=50, guidance=6.0, shift=5.0, solver="euler"))
    bidirectional = BidirectionalConfig(time=TIMES, dropped_prompt="")

    def run(stage: str, model: ModelConfig, recipe: AnyRecipeConfig, steps: int, **roles: str) -> Run:
        init = Init(**{role: str(out / name) for role, name in {"codec": "base", **roles}.items()})
        data = str(out / ("trajectories" if recipe.needs_trajectories else "latents"))
        return Run(
            name=stage, model=model, recipe=recipe, data=data, init=init, steps=steps, batch=1, accumulate=32,
            optim=OPTIM, precision="bfloat16", checkpointing=True,
        )  # fmt: skip

    faster = replace(OPTIM, lr=2e-5)
    causal = AutoregressiveConfig(time=TIMES, dropped_prompt="", time_per="clip")
    consistency = ConsistencyConfig(guidance=GUIDANCE, target_decay=0.999)
    dmd = run(
        "dmd", few, DmdConfig(guidance=GUIDANCE, normaliser="batch"), 500,
        student="consistency", critic="score", real="score",
    )  # fmt: skip
    stages = (
        replace(run("camera", camera, bidirectional, 5000, student="base"), optim=faster),
        replace(run("score", camera, bidirectional, 3000, student="camera"), optim=faster),
        run("ar", stepwise, causal, 4000, student="camera"),
        run("ode", few, OdeConfig(guidance=GUIDANCE), 1500, student="ar"),
        run("consistency", few, consistency, 1500, student="ar", teacher="ar"),
        # 100 student updates are few for an average; the critic is to follow the student, and is slower
        replace(dmd, optim=replace(OPTIM, beta1=0.0), critic=replace(OPTIM, lr=8e-6, beta1=0.0), ema=0.0),
    )
    return Pipeline(
        name="hunyuan1.5-8b", render=None, clips=0, encode=EncodeConfig(), codec=None, stages=stages, collect=4096,
        evaluation=replace(EVALUATION, revisits=4, seeds=2),
    )  # fmt: skip


def paper(out: Path) -> Pipeline:
    """minWM's released run of HunyuanVideo-1.5: all differences that docs/paper.md lists are removed.

    Stage 3 starts from stage 2a, the released code's choice; `init.student` names stage 2b's folder instead.
    """
    pipeline = hunyuan(out)

    def changed(run: Run) -> Run:
        stream = StreamConfig(chunk=4, image_start=True, sink=0, window=5)
        run = replace(run, model=replace(run.model, stream=stream), ema=0.999 if run.name == "consistency" else 0.0)
        if not isinstance(run.recipe, DmdConfig):
            return run
        recipe = replace(run.recipe, score_times="exit", critic_data="exit", t_min=0.0, t_max=1.0)
        return replace(run, recipe=recipe, init=replace(run.init, student=str(out / "ode")))

    return replace(pipeline, name="paper-hunyuan", stages=tuple(changed(run) for run in pipeline.stages))


def demo_hunyuan(out: Path) -> Pipeline:
    """The demo on a small HunyuanVideo-1.5: text, image and video in one attention; in minutes on two CPU cores.

    Data and codec are the demo's; tokens are 64 a frame, as this family has no patches, where the demo has 16: batches
    are smaller. Text is shown timestep 0 in all stages, as minWM does, so that the autoregressive ones change nothing
    for it, and has null rows where cameras are seen, so that a stream may move its world frame.
    """
    network = HunyuanConfig(
        dim=128, heads=2, layers=4, ffn=512, refiner_layers=1, channels=16, text_dim=64, text_length=24, glyph_dim=8,
        glyph_length=1, glyph_hidden=16, image_dim=8, image_length=1, freq_dim=64, rope=(16, 24, 24), text_time="zero",
        prope_text=False,
    )  # fmt: skip
    steps = {
        "codec": 150,
        "foundation": 60,
        "camera": 200,
        "ar": 120,
        "ode": 50,
        "consistency": 50,
        "dmd": 40,
    }
    base = replace(tiny_model(), network=network)
    pipeline = small_pipeline("demo-hunyuan", out, base=base, clips=700, worlds_seed=0, steps=steps, batch=4)
    codec = pipeline.codec and from_shipped(pipeline.codec)
    stages = tuple(from_shipped(_adapted(run), demo="demo-hunyuan") for run in pipeline.stages)
    return replace(pipeline, codec=codec, stages=stages, collect=32)


def _adapted(run: Run) -> Run:
    """The foundation has cameras already, and learns from parts of clips, by errors of the clean latents."""
    if run.name != "foundation" or not isinstance(run.recipe, DiffusionConfig):
        return run
    model = replace(run.model, network=replace(run.model.network, camera="dual"))
    time = replace(run.recipe.time, weight="clean")
    return replace(run, model=model, recipe=replace(run.recipe, latents=5, time=time, image_start=1.0))
