"""What is played: a procedural world, a model, or two of them side by side on the same inputs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8

from minwm.checkpoint import Model, ModelConfig
from minwm.core.config import UserError
from minwm.core.trajectory import parse
from minwm.engine import PLAIN, EngineConfig
from minwm.render.worlds import World
from minwm.session import Engine, ModelEngine, RendererEngine

ROOM = "w*8"
"""The way that is free in front of who enters a world."""


@dataclass(frozen=True, kw_only=True)
class Begin:
    """What a walk begins with; with the same inputs it gives the same frames."""

    seed: int = 0
    prompt: str = ""
    image: UInt8[np.ndarray, "h w 3"] | None = None


@dataclass(frozen=True, kw_only=True)
class Game:
    """One thing to play."""

    title: str
    views: tuple[str, ...]
    """What is seen side by side: model, other, world."""
    config: ModelConfig
    """Size, speeds and chunk of all views."""
    begin: Begin
    engines: Callable[[Begin], list[Engine]]
    """Engines, one per view, that start so. Raises UserError, and changes none, where nothing can begin so."""
    takes_prompt: bool = False
    takes_image: bool = False


def enter(seed: int, cfg: ModelConfig, kind: type[World] = World) -> RendererEngine:
    """A world, from a place with room ahead."""
    track = parse(ROOM, stride=cfg.motion.stride).track(cfg.motion, cfg.intrinsics)
    return RendererEngine.spawn(seed, track, cfg, kind)


def world_game(seed: int, cfg: ModelConfig, kind: type[World] = World) -> Game:
    """A world without a model; its seed is the world's number."""
    begin = Begin(seed=seed, prompt=enter(seed, cfg, kind).world.caption)
    return Game(
        title="procedural world" if kind is World else "the place",
        views=("world",),
        config=cfg,
        begin=begin,
        engines=lambda begin: [enter(begin.seed, cfg, kind)],
    )


def model_game(
    model: Model,
    title: str,
    begin: Begin,
    other: Model | None = None,
    truth: RendererEngine | None = None,
    engine: EngineConfig = PLAIN,
) -> Game:
    """A model; beside it, if given, another one, or the world that its start picture is from.

    The models must have been made `ready` for `engine`. Recorded graphs belong to the memory of their engine, so with
    graphs the same engines serve every walk; without, each walk has its own, and nobody's walk takes no memory.
    """
    cfg = model.config
    if other:
        _same_game(cfg, other.config)
    models = [model, other] if other else [model]
    kept: list[ModelEngine] = []

    def engines(begin: Begin) -> list[Engine]:
        given = begin.image, begin.prompt, begin.seed
        for one, beginning in zip(kept, [one.read(*given) for one in kept], strict=True):
            one.begin(beginning)
        made = kept or [ModelEngine(m, *given, engine) for m in models]
        if engine.graphs:
            kept[:] = made
        return [*made, truth] if truth else [*made]

    return Game(
        title=title,
        views=("model", *(["other"] if other else []), *(["world"] if truth else [])),
        config=cfg,
        begin=begin,
        engines=engines,
        takes_prompt=True,
        takes_image=cfg.geometry.lead == 1 and truth is None,
    )


def _same_game(ours: ModelConfig, theirs: ModelConfig) -> None:
    for name in ("motion", "chunk", "height", "width"):
        if (a := getattr(ours, name)) != (b := getattr(theirs, name)):
            raise UserError(f"the models cannot be compared on the same inputs: {name} is {a} here and {b} there")
    if ours.geometry.lead != theirs.geometry.lead:
        raise UserError("the models cannot be compared: one starts from an image, the other does not")


def reworded(begin: Begin, engine: Engine) -> Begin:
    """With the caption of the world, where the engine shows one."""
    return replace(begin, prompt=engine.world.caption) if isinstance(engine, RendererEngine) else begin
