"""Named runs, as functions; paths follow from `out`."""

from collections.abc import Callable
from functools import partial, update_wrapper
from pathlib import Path

from minwm.core.config import ConfigError, lookup
from minwm.experiments.presets import demo, hunyuan, place, wan, worldplay
from minwm.experiments.presets.base import Pipeline
from minwm.store.model import ModelConfig
from minwm.train.config import Run

MODELS: dict[str, Callable[[], ModelConfig]] = {"self-forcing": wan.self_forcing}
"""Models that no pipeline makes: to be measured with random weights."""
PUBLISHED: dict[str, Callable[[], ModelConfig]] = {
    **{size: partial(wan.wan_model, size) for size in wan.RELEASES},
    **{size: partial(hunyuan.hunyuan_model, size) for size in hunyuan.RELEASES},
    "hy-worldplay-5b": worldplay.worldplay_5b,
    "hy-worldplay-8b": worldplay.worldplay_8b,
}

PIPELINES: dict[str, Callable[[Path], Pipeline]] = {
    "demo": demo.demo,
    "demo-scratch": demo.demo_scratch,
    "demo-hunyuan": hunyuan.demo_hunyuan,
    "world": demo.world,
    "world-64": demo.world_64,
    "place": place.place,
    "smoke": demo.smoke,
    "paper": wan.paper,
    "paper-hunyuan": hunyuan.paper,
    **{size: update_wrapper(partial(wan.wan, size), wan.wan) for size in wan.RELEASES},
    "hunyuan1.5-8b": hunyuan.hunyuan,
    "worldplay-finetune": worldplay.finetune,
    "worldplay-distill": worldplay.distill,
}


def pipeline(name: str, out: Path) -> Pipeline:
    return lookup(PIPELINES, name, "pipeline")(out)


def published(size: str) -> ModelConfig:
    """A published model as it is before any training here."""
    return lookup(PUBLISHED, size, "published model")()


def stage(name: str, out: Path) -> Run:
    """A single run: `demo/camera` is the stage `camera` of the pipeline `demo`, in its folder `out`."""
    head, slash, tail = name.partition("/")
    if not slash:
        options = ", ".join(f"{p}/{r.name}" for p in PIPELINES for r in pipeline(p, out).stages[:2])
        raise ConfigError(f"{name!r} names no stage; give PIPELINE/STAGE, such as {options}")
    return pipeline(head, out).stage(tail)
