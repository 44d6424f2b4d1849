"""`minwm play`: a model, a procedural world or the place in the browser."""

import asyncio
import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from minwm.cli.base import PLAIN, Decoder, Engine, EngineFlags, Steps, command, echo
from minwm.cli.models import with_steps
from minwm.cli.video import Start, StartPoses, read_start
from minwm.core.config import UserError

if TYPE_CHECKING:
    from minwm.play.scenario import Scenario
    from minwm.store.model import Model, ModelConfig

SCENE = {"worlds": 7, "place": 16}
"""By kind, the scene whose first frame a model starts from by default."""
LAST_STAGE = "dmd"


@command("play")
def play(
    model: Annotated[
        str | None,
        arg(metavar="DIR|USER/NAME", help="model, or folder of a pipeline such as runs/demo; if not given, ours"),
    ] = None,
    world: Annotated[int | None, arg(metavar="SEED", help="this procedural world; with --model: start in it")] = None,
    place: Annotated[
        bool, arg(help="the place as it truly is; --world 0, 1, 2, 3: noon, evening, night, morning")
    ] = False,
    start: Start = None,
    start_poses: StartPoses = None,
    prompt: Annotated[str | None, arg(metavar="TEXT", help="of the scene; the world's caption if not given")] = None,
    compare: Annotated[
        str | None, arg(metavar="truth|DIR", help="beside the model: the true world, or another model")
    ] = None,
    seed: Annotated[int, arg(metavar="N", help="seed of the noise")] = 0,
    steps: Steps = None,
    size: Annotated[int, arg(metavar="PIXELS", help="frame size of a world without a model")] = 128,
    rewind: Annotated[int, arg(metavar="CHUNKS", help="chunks that can be undone")] = 60,
    host: Annotated[str, arg(help="address to listen on; the token is needed on every one")] = "127.0.0.1",
    port: Annotated[int, arg(metavar="N", help="port to listen on; 0: any free one")] = 7860,
    public_url: Annotated[str | None, arg(metavar="URL", help="address of the page behind a reverse proxy")] = None,
    embed: Annotated[
        str | None, arg(metavar="ORIGIN|*", help="pages that may embed the player, such as http://localhost:8888")
    ] = None,
    engine: Engine = PLAIN,
    decoder: Decoder = None,
) -> None:
    """Play a model or a rendered world in the browser; prints the address to open."""
    import torch

    from minwm.experiments.presets.demo import model_to_play
    from minwm.play.scenario import world_scenario
    from minwm.play.transport import Access, serve

    if not 0 <= port < 1 << 16:
        raise UserError(f"--port {port}: give 0 to 65535")
    access = Access(public_url=public_url, embed=embed)
    # leave a core to the server: torch threads that share a core wait for each other
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    if place:
        if model:
            raise UserError("--place is the place as it truly is; a model is played with --model alone")
        scenario = world_scenario(world or 0, replace(_world_config(size), scenes="place"))
    elif model or world is None:
        name = model or str(model_to_play())
        scenario = _model_scenario(name, world, (start, start_poses), prompt, compare, seed, steps, engine, decoder)
    elif start or start_poses or prompt or compare or decoder or steps is not None or engine != PLAIN:
        raise UserError("--world SEED without --model is a rendered world, which takes no other option of a model")
    else:
        scenario = world_scenario(world, _world_config(size))
    _warm_up(scenario)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl+C stops the server
        asyncio.run(serve(scenario, host, port, rewind, access, echo))


def _model_scenario(
    name: str,
    world: int | None,
    start: "tuple[Path | None, Path | None]",
    prompt: str | None,
    compare: str | None,
    seed: int,
    steps: int | None,
    engine: EngineFlags,
    decoder: str | None,
) -> "Scenario":
    import numpy as np

    from minwm.play.scenario import StartState, model_scenario, spawn_world
    from minwm.session.prepare import prepare_model

    model = with_steps(_load(name, decoder), steps)
    cfg = model.config
    if start[0] and world is not None:
        raise UserError("give --start or --world, not both: each says where the model starts")
    first, spawned = read_start(*start, cfg), None
    if not cfg.image_start and (isinstance(first, np.ndarray) or world is not None):
        raise UserError(
            "this model starts from its prompt alone, or goes on from a video; leave out --world and images"
        )
    if first is None and cfg.image_start:
        spawned = spawn_world(SCENE[cfg.scenes] if world is None else world, cfg)
        first, prompt = spawned.start()[0], prompt or spawned.scene.caption
    if not prompt:
        raise UserError("give --prompt TEXT: a description of the scene")
    if compare == "truth" and not spawned:
        raise UserError("--compare truth needs a model that starts in a procedural world: give --world SEED")
    image, video = (first, None) if isinstance(first, np.ndarray) else (None, first)
    begin, title = StartState(seed=seed, prompt=prompt, image=image, video=video), "/".join(Path(name).parts[-2:])
    if cfg.network.camera == "none":
        echo("this model has no camera control: keys and mouse do not move its camera")
    chosen, kernels, fp8 = prepare_model(model, engine.config())
    if fp8:
        echo(f"FP8 changes the latents of a trial by {fp8.error:.3g} of their norm, its frames by {fp8.psnr:.1f} dB")
    if kernels:
        times = ", ".join(f"{kernel} {ms:.3g} ms" for kernel, ms in kernels.ms.items() if ms is not None)
        echo(f"attention of a chunk: {times}; {kernels.fastest} is used")
    if compare == "truth":
        return model_scenario(model, title, begin, world=spawned, truth=True, engine=chosen)
    other = _load(compare, decoder) if compare else None
    if other:
        prepare_model(other, chosen)
    return model_scenario(model, title, begin, other=other, world=spawned, engine=chosen)


def _warm_up(scenario: "Scenario") -> None:
    """Compile what draws and what computes, record CUDA graphs and choose kernels before the first client connects."""
    from minwm.session.engines import ModelEngine

    for one in scenario.engines(scenario.start):
        if isinstance(one, ModelEngine):
            start, *regimes = one.warm_up()
            echo(f"warm-up: the start in {start:.1f} s, {len(regimes)} kinds of chunk in {sum(regimes):.1f} s")
        else:
            one.start()


def _load(name: str, decoder: str | None) -> "Model":
    """A model; of a pipeline's folder, its last stage."""
    from minwm.store.folder import tiny_decoder
    from minwm.store.hub import load

    folder = Path(name)
    last = folder / LAST_STAGE
    model = load(last if not (folder / "model.json").exists() and (last / "model.json").exists() else name)
    return (tiny_decoder(model, decoder) if decoder else model).ready()


def _world_config(size: int) -> "ModelConfig":
    """Config of a rendered world: chunks of one latent for low latency, and faster motion than the models have."""
    from minwm.cameras.trajectory import Motion
    from minwm.experiments.presets.demo import tiny_model
    from minwm.nets.chunks import StreamConfig

    if size < 16:
        raise UserError(f"--size {size}: give at least 16 pixels")
    return replace(
        tiny_model(),
        height=size,
        width=size,
        stream=StreamConfig(chunk=1),
        motion=Motion(move=1.0, turn=60.0, fps=24.0),
    )
