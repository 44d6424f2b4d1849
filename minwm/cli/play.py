"""The verb that plays: a model, a procedural world or the place in the browser."""

import asyncio
import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from minwm.cli.base import PLAIN, Count, Decoder, Engine, EngineFlags, Steps, app, command, say
from minwm.cli.models import first_frame, with_steps
from minwm.core.config import UserError

if TYPE_CHECKING:
    from minwm.checkpoint import Model, ModelConfig
    from minwm.play.game import Game

WORLD = 7
"""Where a model begins that is given neither a picture nor a world."""
LAST_STAGE = "dmd"


@command(app, "play")
def play(
    model: Annotated[
        str | None,
        arg(metavar="DIR|USER/NAME", help="model, or folder of a pipeline such as runs/demo; if not given, ours"),
    ] = None,
    world: Annotated[int | None, arg(metavar="SEED", help="this procedural world; with --model: start in it")] = None,
    place: Annotated[
        bool,
        arg(help="the place, as it truly is; --world 0, 1, 2, 3: at noon, in the evening, at night, in the morning"),
    ] = False,
    image: Annotated[Path | None, arg(metavar="PNG", help="start from this picture")] = None,
    prompt: Annotated[str | None, arg(metavar="TEXT", help="what is seen; the world's caption if not given")] = None,
    compare: Annotated[
        str | None, arg(metavar="truth|DIR", help="beside the model: the true world, or another model")
    ] = None,
    seed: Annotated[int, arg(metavar="N", help="of the noise")] = 0,
    steps: Steps = None,
    size: Annotated[int, arg(metavar="PIXELS", help="of a world without a model")] = 128,
    rewind: Annotated[int, arg(metavar="CHUNKS", help="that can be undone")] = 60,
    host: Annotated[str, arg(help="address to listen on; the token is needed on every one")] = "127.0.0.1",
    port: Count = 7860,
    engine: Engine = PLAIN,
    decoder: Decoder = None,
) -> None:
    """Walk through a model or a world in the browser; prints the address to open."""
    import torch

    from minwm.play.game import world_game
    from minwm.play.transport import serve
    from minwm.presets import model_to_play
    from minwm.render.place import Place

    # a core is left to the server: threads of torch that must share theirs wait for each other
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    if place:
        if model:
            raise UserError("--place is the place as it truly is; a model is played with --model alone")
        game = world_game(world or 0, _world_config(size), Place)
    elif model or world is None:
        game = _model_game(model or str(model_to_play()), world, image, prompt, compare, seed, steps, engine, decoder)
        _warm_up(game)
    elif image or prompt or compare or decoder or steps is not None or engine != PLAIN:
        raise UserError("--world SEED without --model is a rendered world, which takes no other option of a model")
    else:
        game = world_game(world, _world_config(size))
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        asyncio.run(serve(game, host, port, rewind, say))


def _model_game(
    name: str,
    world: int | None,
    image: Path | None,
    prompt: str | None,
    compare: str | None,
    seed: int,
    steps: int | None,
    engine: EngineFlags,
    decoder: str | None,
) -> "Game":
    from minwm.eval.speed import make_ready
    from minwm.play.game import Begin, enter, model_game

    model = with_steps(_load(name, decoder), steps)
    cfg = model.config
    if image and world is not None:
        raise UserError("give --image or --world, not both: each says where the model starts")
    if cfg.geometry.lead != 1 and (image or world is not None):
        raise UserError("this model starts from its prompt alone; leave out --image and --world")
    picture, truth = first_frame(image, cfg)[0] if image else None, None
    if picture is None and cfg.geometry.lead == 1:
        truth = enter(WORLD if world is None else world, cfg)
        picture, prompt = truth.start()[0], prompt or truth.world.caption
    if not prompt:
        raise UserError("give --prompt TEXT: what is seen")
    if compare == "truth" and not truth:
        raise UserError("--compare truth needs a model that starts in a procedural world: give --world SEED")
    begin, title = Begin(seed=seed, prompt=prompt, image=picture), "/".join(Path(name).parts[-2:])
    chosen, raced, fp8 = make_ready(model, engine.config())
    if fp8:
        say(f"FP8 changes the latents of a trial by {fp8.error:.3g} of their norm, its frames by {fp8.psnr:.1f} dB")
    if raced:
        times = ", ".join(f"{kernel} {ms:.3g} ms" for kernel, ms in raced.ms.items() if ms is not None)
        say(f"attention of a chunk: {times}; {raced.winner} is used")
    if compare == "truth":
        return model_game(model, title, begin, truth=truth, engine=chosen)
    other = _load(compare, decoder) if compare else None
    if other:
        make_ready(other, chosen)
    return model_game(model, title, begin, other=other, engine=chosen)


def _warm_up(game: "Game") -> None:
    """Compile, record and choose now what a walk would otherwise stop for."""
    from minwm.session import ModelEngine

    for one in game.engines(game.begin):
        if isinstance(one, ModelEngine):
            start, *regimes = one.warm_up()
            say(f"warm-up: the start in {start:.1f} s, {len(regimes)} kinds of chunk in {sum(regimes):.1f} s")


def _load(name: str, decoder: str | None) -> "Model":
    """A model; of a pipeline's folder its last stage."""
    from minwm.checkpoint import tiny_decoder
    from minwm.hub import load

    folder = Path(name)
    last = folder / LAST_STAGE
    model = load(last if not (folder / "model.json").exists() and (last / "model.json").exists() else name)
    return (tiny_decoder(model, decoder) if decoder else model).ready()


def _world_config(size: int) -> "ModelConfig":
    """Brisk, and in the shortest chunks: a world is rendered faster than any screen shows it."""
    from minwm.core.trajectory import Motion
    from minwm.presets import tiny_model

    if size < 16:
        raise UserError(f"--size {size}: give at least 16 pixels")
    return replace(tiny_model(), height=size, width=size, chunk=1, motion=Motion(move=1.0, turn=60.0, fps=24.0))
