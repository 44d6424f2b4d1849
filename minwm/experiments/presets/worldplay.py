"""HY-WorldPlay: the published models, trained on further in their own way, and distilled for other chunks and steps.

Facts: HY-WorldPlay `scripts/training/hyvideo15/run_ar_hunyuan_action_mem.sh`, `hyvideo/pipelines`, `wan/inference`.
"""

from dataclasses import replace
from pathlib import Path

from minwm.cameras.trajectory import Motion
from minwm.data.encode import EncodeConfig
from minwm.experiments.presets.base import EVALUATION, Pipeline
from minwm.experiments.presets.hunyuan import GUIDANCE, OPTIM, TIMES, hunyuan_model
from minwm.experiments.presets.wan import wan_model
from minwm.nets.chunks import StreamConfig
from minwm.recipes.consistency import ConsistencyConfig
from minwm.recipes.diffusion import AutoregressiveConfig
from minwm.recipes.dmd import DmdConfig
from minwm.store.model import ModelConfig
from minwm.stream.solvers import AutoregressiveSampler, FewStepSampler
from minwm.train.config import AnyRecipeConfig, Init, Run

MOTION = Motion(move=0.48, turn=18.0, fps=24.0)
"""0.08 units and 3 degrees per latent."""
STREAM = StreamConfig(
    chunk=4, image_start=True, image_time=0.014, context_time=0.014, sink=1, window=4, retrieved=1, recompute="full"
)
"""A chunk sees the first one, the best of those between, and the last three: clean, but shown at 14/1000."""


def worldplay_5b() -> ModelConfig:
    """HY-WorldPlay's few-step student on Wan2.2-TI2V-5B: Euler at t = 1, .96, .889, .727.

    The image is the first latent of the first chunk of 4, and no chunk is always seen.
    """
    base = wan_model("wan2.2-ti2v-5b")
    return replace(
        base,
        network=replace(base.network, camera="dual", actions=True),
        sampler=AutoregressiveSampler(steps=4, guidance=1.0, shift=8.0, solver="euler"),
        motion=MOTION,
        latents=20,
        stream=replace(STREAM, sink=0),
    )


def worldplay_8b() -> ModelConfig:
    """HY-WorldPlay's few-step student on HunyuanVideo-1.5 (`ar_distilled_action_model`), at 24 frames per second.

    For `ar_model` and `ar_rl_model`: --sampler.steps 50 --sampler.guidance 6. The image is the first latent, where the
    release makes that one too, and gives the image beside it alone.
    """
    base = hunyuan_model("hunyuan1.5-8b")
    return replace(
        base,
        network=replace(base.network, camera="dual", actions=True),
        sampler=AutoregressiveSampler(steps=4, guidance=1.0, shift=5.0, solver="euler", rounded=True),
        motion=MOTION,
        latents=32,
        stream=STREAM,
    )


def _run(out: Path, stage: str, model: ModelConfig, recipe: AnyRecipeConfig, steps: int, **roles: str) -> Run:
    init = Init(**{role: str(out / name) for role, name in {"codec": "base", **roles}.items()})
    return Run(
        name=stage, model=model, recipe=recipe, data=str(out / "latents"), init=init, steps=steps, batch=1,
        accumulate=32, optim=OPTIM, precision="bfloat16", checkpointing=True,
    )  # fmt: skip


def finetune(out: Path) -> Pipeline:
    """HY-WorldPlay trained on, in its own way, on the user's long clips (`OUT/raw`), from `ar_model` in `OUT/base`.

    Diffusion forcing in windows of 24 latents: in 8 of 10 batches one chunk after what it retrieves, from anywhere in
    clips of 160 latents (from step 3,000 on; nearer to their start before), else the first 24. An image is given in 2
    of 10. `--finetune.recipe.forcing teacher` trains on clean chunks instead, which is what streams give.
    """
    base = worldplay_8b()
    model = replace(base, latents=160, sampler=replace(base.sampler, steps=50, guidance=6.0, rounded=False))
    recipe = AutoregressiveConfig(
        forcing="diffusion", memory=0.8, memory_grows=3000, time=TIMES, dropped_prompt="", image_start=0.2
    )
    return Pipeline(
        name="worldplay-finetune", render=None, clips=0, encode=EncodeConfig(), codec=None,
        stages=(_run(out, "finetune", model, recipe, 5000, student="base"),), evaluated=("finetune",),
        evaluation=replace(EVALUATION, counterfactual=(), revisits=4),
    )  # fmt: skip


def distill(out: Path) -> Pipeline:
    """HY-WorldPlay made faster: chunks of 2 latents in 2 steps, on the user's posed clips of 22 latents (`OUT/raw`).

    From `ar_model` in `OUT/base`, which learns the new chunks by teacher forcing; scored by `bidirectional_model` in
    `OUT/score`. It sees about as much of the past as before, recomputed as it was trained (causal). Whether that is
    fast enough, `minwm bench --model OUT/dmd --latency MS` says.
    """
    base = worldplay_8b()
    stream = replace(STREAM, chunk=2, sink=2, window=7, retrieved=2, recompute="causal")
    stepwise = replace(
        base, latents=22, stream=stream, sampler=replace(base.sampler, steps=50, guidance=6.0, rounded=False)
    )
    first = (1.0, 0.9375, 0.8333, 0.625)
    few = replace(stepwise, sampler=FewStepSampler(steps=2, shift=5.0, timesteps=first[::2], first_timesteps=first))
    ar = AutoregressiveConfig(time=TIMES, dropped_prompt="")
    dmd = _run(
        out, "dmd", few, DmdConfig(guidance=GUIDANCE, normaliser="batch"), 500,
        student="consistency", critic="score", real="score",
    )  # fmt: skip
    stages = (
        _run(out, "ar", stepwise, ar, 2000, student="base"),
        _run(
            out, "consistency", few, ConsistencyConfig(guidance=GUIDANCE, target_decay=0.999), 1500,
            student="ar", teacher="ar",
        ),
        replace(dmd, optim=replace(OPTIM, beta1=0.0), critic=replace(OPTIM, lr=8e-6, beta1=0.0), ema=0.0),
    )  # fmt: skip
    return Pipeline(
        name="worldplay-distill", render=None, clips=0, encode=EncodeConfig(), codec=None, stages=stages,
        evaluated=("ar", "consistency", "dmd"),
        evaluation=replace(EVALUATION, counterfactual=("ar", "dmd"), revisits=4),
    )  # fmt: skip
