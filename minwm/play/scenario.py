"""What a server plays: a procedural world, a model, or a model beside another view that gets the same inputs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8

from minwm.cameras.trajectory import parse
from minwm.core.config import UserError
from minwm.session.engines import Engine, ModelEngine, SceneEngine
from minwm.session.start import StartVideo
from minwm.session.views import known_views
from minwm.store.model import Model, ModelConfig
from minwm.stream.accelerate import PLAIN, EngineConfig

FREE_PATH = "w*8"
"""Trajectory that is free of obstacles at the start of a world: eight chunks forward."""


@dataclass(frozen=True, kw_only=True)
class StartState:
    """What a rollout starts from; the same inputs then give the same frames."""

    seed: int = 0
    prompt: str = ""
    image: UInt8[np.ndarray, "h w 3"] | None = None
    video: StartVideo | None = None
    """To go on from, in place of an image."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """The views, their common config, and a factory of their engines."""

    title: str
    views: tuple[str, ...]
    """Names of the views, side by side: model, other, world."""
    config: ModelConfig
    """Frame size, motion and chunk, the same for all views."""
    start: StartState
    engines: Callable[[StartState], list[Engine]]
    """Makes the engines, one per view. Raises UserError, and changes no engine, for an invalid start state."""
    takes_camera: bool = True
    """False: a model without camera control, which input does not move."""
    takes_prompt: bool = False
    takes_image: bool = False


def spawn_world(seed: int, cfg: ModelConfig) -> SceneEngine:
    """The scene of a seed, from a position from which `FREE_PATH` is free."""
    track = parse(FREE_PATH, stride=cfg.motion.stride).track(cfg.motion, cfg.intrinsics)
    return SceneEngine.spawn(seed, track, cfg)


def world_scenario(seed: int, cfg: ModelConfig) -> Scenario:
    """A rendered world without a model; the seed of its start state is the world's number."""
    return Scenario(
        title="the place" if cfg.scenes == "place" else "procedural world",
        views=("world",),
        config=cfg,
        start=StartState(seed=seed, prompt=spawn_world(seed, cfg).scene.caption),
        engines=lambda start: [spawn_world(start.seed, cfg)],
    )


def model_scenario(
    model: Model,
    title: str,
    start: StartState,
    other: Model | None = None,
    world: SceneEngine | None = None,
    truth: bool = False,
    engine: EngineConfig = PLAIN,
) -> Scenario:
    """A model, and beside it another model or the world that rendered its start image (`truth`).

    A model that remembers views is given those of `world`, and starts nowhere else. The models must have been made
    `ready` for `engine`. CUDA graphs are bound to the memory of their engine: with graphs all rollouts share the
    engines, else each rollout makes new ones, and an idle server holds no cache.
    """
    cfg = model.config
    if other:
        _check_comparable(cfg, other.config)
    models = [model, other] if other else [model]
    views = [known_views(m, [world.viewpoint if world else None]) for m in models]
    reused: list[ModelEngine] = []

    def engines(start: StartState) -> list[Engine]:
        given = start.video or start.image, start.prompt, start.seed
        for one, inputs in zip(reused, [one.encode_inputs(*given) for one in reused], strict=True):
            one.inputs = inputs
        made = reused or [ModelEngine(m, *given, engine, known) for m, known in zip(models, views, strict=True)]
        if engine.graphs:
            reused[:] = made
        return [*made, world] if world and truth else [*made]

    return Scenario(
        title=title,
        views=("model", *(["other"] if other else []), *(["world"] if truth else [])),
        config=cfg,
        start=start,
        engines=engines,
        takes_camera=cfg.network.camera != "none",
        takes_prompt=True,
        takes_image=cfg.image_start and not truth and not any(views),
    )


def _check_comparable(ours: ModelConfig, theirs: ModelConfig) -> None:
    pairs = {
        "motion": (ours.motion, theirs.motion),
        "chunk": (ours.stream.chunk, theirs.stream.chunk),
        "first_chunk_frames": (ours.geometry.first_chunk_frames, theirs.geometry.first_chunk_frames),
        "image_start": (ours.image_start, theirs.image_start),
        "size": ((ours.height, ours.width), (theirs.height, theirs.width)),
    }
    for name, (a, b) in pairs.items():
        if a != b:
            raise UserError(f"the models cannot be compared on the same inputs: {name} is {a} here and {b} there")


def with_caption(start: StartState, engine: Engine) -> StartState:
    """The start state with the world's caption as its prompt, if the engine renders a world."""
    return replace(start, prompt=engine.scene.caption) if isinstance(engine, SceneEngine) else start
