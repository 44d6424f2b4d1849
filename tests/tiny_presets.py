"""Every preset in miniature: all of its stages, its layout and its switches; two steps of tiny networks."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from minwm.data.rerender import RenderConfig, render_worlds
from minwm.experiments.presets import PIPELINES
from minwm.experiments.presets.base import Pipeline
from minwm.experiments.presets.demo import ASSETS
from minwm.nets.text import WordText
from minwm.store.folder import save_published
from minwm.store.layouts import FAMILIES, open_published
from minwm.store.model import ModelConfig
from minwm.train.config import Run

CLIPS = 8
CODEC = {
    "small": {"width": 16, "fine": 16, "finest": 8, "decoder_depth": 1},
    "wan_vae": {"base": 8, "decoder_base": 8, "depth": 1},
    "hunyuan_vae": {"base": 8, "mult": (1, 2, 4, 8), "depth": 1, "temporal": (False, True, True)},
}
NETWORK = {
    "hunyuan": {
        "refiner_layers": 1, "glyph_dim": 4, "glyph_length": 2, "glyph_hidden": 8, "image_dim": 4, "image_length": 2,
        "rope": (8, 8, 8),
    }
}  # fmt: skip
"""Sizes by kind."""


def tiny_preset(name: str, out: Path, text_encoder: Path) -> Pipeline:
    """A preset with its sizes and counts made small; what a user must bring is written to `out`."""
    pipeline = PIPELINES[name](out)
    codec = pipeline.codec and tiny_run(pipeline.codec, text_encoder)
    stages = tuple(tiny_run(run, text_encoder) for run in pipeline.stages)
    model = stages[0].model
    render = RenderConfig(
        latents=model.latents, height=model.height, width=model.width, focal=model.focal, motion=model.motion, seed=5
    )
    if pipeline.render is None:
        render_worlds(out / "raw", render, clips=CLIPS)
        publish(model, out / "base")
        shutil.copytree(out / "base", out / "score")  # in one preset another release
    else:
        size = {"latents": model.latents, "height": model.height, "width": model.width}
        render = replace(pipeline.render, **size, motion=model.motion)
    revisits = min(pipeline.evaluation.revisits, 2) if pipeline.evaluation.seeds else 0
    return replace(
        pipeline, render=pipeline.render and render, clips=CLIPS, codec=codec, stages=stages, collect=2, workers=1,
        evaluation=replace(pipeline.evaluation, clips=3, counterfactual=(), bench_repeats=1, revisits=revisits),
        evaluated=pipeline.evaluated if name == "smoke" else pipeline.evaluated[-1:],
    )  # fmt: skip


def tiny_run(run: Run, text_encoder: Path) -> Run:
    """Two steps, from random weights where the preset starts from shipped ones; of DMD one step for each network."""
    small = {
        "ode_steps": 4, "grid": 4, "critic_updates": 1, "max_prefix_chunks": 2, "fit_clips": 2, "latents": 3,
        "memory": 0.5,
    }  # fmt: skip
    fields = {name: min(value, now) for name, value in small.items() if (now := vars(run.recipe).get(name))}
    shipped = {role: None for role, folder in vars(run.init).items() if folder and Path(folder).is_relative_to(ASSETS)}
    model = tiny_model(run.model, text_encoder)
    if model.stream.retrieved and model.stream.sink:
        model = replace(model, stream=replace(model.stream, chunk=2, window=1), latents=8)
    return replace(
        run, model=model, recipe=replace(run.recipe, **fields),
        init=replace(run.init, **shipped), steps=2, batch=2, accumulate=min(run.accumulate, 2), precision="float32",
        save_every=2,
    )  # fmt: skip


def tiny_model(model: ModelConfig, text_encoder: Path) -> ModelConfig:
    """The same classes, chunks and kind of sampler. Turns are so fast that a revisit is soon over."""
    text = model.text
    if text.kind == "umt5":
        text = replace(text, source=str(text_encoder), dim=32, length=64)
    else:
        text = WordText(dim=32, length=24)
    network = replace(
        model.network, dim=48, heads=2, layers=2, ffn=64, freq_dim=16, text_dim=text.dim, text_length=text.length,
        **NETWORK.get(model.network.kind, {}),
    )  # fmt: skip
    codec = replace(model.codec, **CODEC[model.codec.kind])
    sampler = model.sampler if model.sampler.kind == "few_step" else replace(model.sampler, steps=2)
    latents, side = (
        max(3, model.stream.first_chunk_frames + model.stream.chunk),
        max(32, 2 * network.patch * codec.scale),
    )
    motion = replace(model.motion, turn=4 * model.motion.turn)
    return replace(
        model, network=network, codec=codec, text=text, sampler=sampler, motion=motion, latents=latents, height=side,
        width=side,
    )  # fmt: skip


def publish(model: ModelConfig, base: Path) -> None:
    """Files in the original release's layout, and the model folder that `minwm convert` makes of them."""
    release = base.with_name("release")
    release.mkdir()
    torch.manual_seed(0)
    network = model.network if model.network.actions else replace(model.network, camera="none")
    FAMILIES[network.kind].export(network.build().state_dict(), network, release / "transformer", "original")
    save_file(model.codec.build().state_dict(), release / "vae.safetensors")
    published = open_published(release)
    save_published(base, replace(model, network=network), published, release / "vae.safetensors")
