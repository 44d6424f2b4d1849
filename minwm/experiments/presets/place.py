"""The preset of the place: one small world, known by heart."""

from dataclasses import replace
from pathlib import Path

from minwm.data.encode import EncodeConfig
from minwm.experiments.presets.base import Pipeline
from minwm.experiments.presets.demo import small_pipeline, tiny_model, world_model
from minwm.families.wan.transformer import WanConfig
from minwm.nets.chunks import StreamConfig
from minwm.nets.small_codec import SmallCodecConfig
from minwm.recipes.codec import CodecTraining
from minwm.recipes.consistency import ConsistencyConfig
from minwm.recipes.diffusion import AutoregressiveConfig, DiffusionConfig
from minwm.recipes.dmd import DmdConfig
from minwm.recipes.ode import OdeConfig
from minwm.stream.solvers import FewStepSampler
from minwm.train.config import OptimConfig, Run

STREAM = StreamConfig(chunk=1, sink=0, window=2, retrieved=7, recompute="causal", context_noise=0.2)


def place(out: Path) -> Pipeline:
    """One place that a small network knows by heart, 128x128 pixels, from random weights (docs/place.md).

    A small network, which predicts clean latents, in bfloat16: many hours on CPUs that multiply it fast. Larger ones
    learn less in the first hours.
    """
    channels = 48
    network = WanConfig(
        dim=128, heads=1, layers=4, ffn=512, channels=channels, text_dim=64, text_length=24, freq_dim=64, patch=1,
        predicts="clean", camera="single",
    )  # fmt: skip
    base = replace(
        world_model(tiny_model().network, 128),
        network=network,
        scenes="place",
        stream=StreamConfig(chunk=1, context_noise=0.2),
        codec=SmallCodecConfig(channels=channels, width=128, fine=96, finest=48, energy=4.0),
    )
    steps = {
        "codec": 2000,
        "foundation": 8000,
        "camera": 3000,
        "ar": 3000,
        "ode": 2000,
        "consistency": 2000,
        "dmd": 5000,
    }
    pipeline = small_pipeline("place", out, base=base, clips=1600, worlds_seed=1, steps=steps, batch=8, image_start=0.9)
    render = pipeline.render and replace(pipeline.render, scenes="place")
    optim = OptimConfig(lr=2e-3, beta2=0.99, warmup=50, final=0.02)
    codec = pipeline.codec and replace(
        pipeline.codec, recipe=CodecTraining(latents=5), batch=4, precision="bfloat16", optim=optim
    )
    encode = EncodeConfig(dtype="float16")
    stages = tuple(_adapted(run, out / "codec") for run in pipeline.stages)
    causal = tuple(name for name in pipeline.evaluated if name != "camera")  # which makes no walks
    return replace(pipeline, evaluated=causal, render=render, codec=codec, encode=encode, stages=stages)


def _adapted(run: Run, views: Path) -> Run:
    """In bfloat16 and by Muon, with cameras in one branch from the first stage on. Diffusion learns from parts of
    clips, in quick steps, of far views above all, and its errors are those of the clean latents. Nothing is guided:
    the first frame says more of what is seen than the caption."""
    model, recipe, optim = run.model, run.recipe, replace(run.optim, warmup=100)
    model = replace(model, network=replace(model.network, camera="single"))
    if run.name != "foundation":
        model = replace(model, stream=STREAM)
    few = isinstance(model.sampler, FewStepSampler)
    sampler = replace(model.sampler, steps=2) if few else replace(model.sampler, steps=8, guidance=1.0)
    model = replace(model, sampler=sampler)
    if isinstance(recipe, OdeConfig | ConsistencyConfig | DmdConfig):
        recipe = replace(recipe, guidance=1.0, latents=2, latents_apart=2, views=views)
    if isinstance(recipe, DmdConfig):
        recipe = replace(recipe, latents=3, static_cameras=0.3, long_rollouts=0.5, max_prefix_chunks=8, regression=0.1)
    if isinstance(recipe, OdeConfig):
        recipe = replace(recipe, ode_steps=8)
    if isinstance(recipe, DiffusionConfig):
        latents, apart, lr = {"foundation": (3, 8, 6e-3), "camera": (3, 2, 3e-3), "ar": (2, 2, 2e-3)}[run.name]
        time = replace(recipe.time, weight="clean")
        recipe = replace(recipe, latents=latents, latents_apart=apart, image_start=0.9, time=time)
        recipe = replace(recipe, views=None if run.name == "foundation" else views)
        optim = replace(optim, optimizer="muon", lr=lr)
    if isinstance(recipe, AutoregressiveConfig):
        recipe = replace(recipe, self_conditioning=0.8)
    return replace(run, model=model, recipe=recipe, optim=optim, precision="bfloat16", ema=0.998, save_every=250)
