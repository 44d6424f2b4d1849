"""What the play tests share: a fake engine, a tiny model, scenarios of both, inputs, and a server in a thread."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from aiohttp import web
from torch import nn

from minwm.cameras.trajectory import Motion
from minwm.core.runtime import StageTimer
from minwm.families.wan.transformer import WanConfig
from minwm.nets.chunks import StreamConfig
from minwm.nets.small_codec import SmallCodecConfig
from minwm.nets.text import WordText
from minwm.play.protocol import Input
from minwm.play.scenario import Scenario, StartState, model_scenario
from minwm.play.server import PlayServer
from minwm.play.transport import Access, WebApp
from minwm.store.model import Model, ModelConfig
from minwm.stream.solvers import FewStepSampler

SECRET = Access("secret")
MOTION = Motion(move=1.0, turn=40.0, fps=64.0)
SMALL = ModelConfig(
    network=WanConfig(
        dim=32, heads=2, layers=2, ffn=48, channels=4, text_dim=8, text_length=24, freq_dim=8, camera="dual"
    ),
    sampler=FewStepSampler(steps=2),
    codec=SmallCodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=2),
    motion=MOTION,
    text=WordText(dim=8),
    height=32,
    width=32,
    stream=StreamConfig(chunk=1, window=2),
)


def tiny_model() -> Model:
    torch.manual_seed(0)
    net, codec = SMALL.network.build(), SMALL.codec.build()
    for part in (net, codec):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.2)
    return Model(SMALL, net.eval().requires_grad_(False), codec.eval().requires_grad_(False))


class Clock:
    """A clock that tests set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class PositionEngine:
    """A fake engine. Frames are one colour, which encodes the camera position: 128 + 40 (x, z, y)."""

    motion, chunk = MOTION, 1

    def __init__(self, slow: float = 0.0, fails_at: int = 10**9) -> None:
        self.timer, self.slow, self.fails_at, self.made = StageTimer(), slow, fails_at, 0

    def start(self) -> np.ndarray:
        return next(self.advance(np.eye(4)[None]))

    def advance(self, c2w: np.ndarray) -> Iterator[np.ndarray]:
        self.timer.restart()
        self.made += 1
        if self.made > self.fails_at:
            raise RuntimeError("out of memory")
        time.sleep(self.slow)
        levels = 128 + 40 * c2w[:, [0, 2, 1], 3]
        self.timer.record("diffuse")
        yield np.broadcast_to(levels.clip(0, 255).astype(np.uint8)[:, None, None], (len(c2w), 16, 16, 3)).copy()

    def update_cache(self) -> None: ...

    def snapshot(self) -> None: ...

    def restore(self, snapshot: None) -> None: ...


def painted(views: int = 1, **options: Any) -> Scenario:
    return Scenario(
        title="painted",
        views=("model", "other")[:views],
        config=replace(SMALL, height=16, width=16),
        start=StartState(seed=3, prompt="a room"),
        engines=lambda _: [PositionEngine(**options) for _ in range(views)],
        takes_image=True,
    )


def start_image() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (32, 32, 3), np.uint8)


def learned(model: Model) -> Scenario:
    return model_scenario(model, "tiny", StartState(seed=3, prompt="a red room", image=start_image()))


def make_input(seq: int, held: str = "", total: float = 0.0, look: tuple[float, float] = (0.0, 0.0)) -> Input:
    """An input message; `held` is w, s or nothing."""
    down = {"w": 1.0, "s": -1.0, "": 0.0}[held]
    return Input(seq=seq, t=10.0 * seq, held=(0, 0, down, 0, 0, 0), total=(0, 0, total, 0, 0, 0), look=look)


@contextlib.asynccontextmanager
async def served(server: PlayServer, access: Access = SECRET) -> AsyncIterator[str]:
    runner = web.AppRunner(WebApp(server, access).app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class ServerThread:
    """A `PlayServer` in a thread of this process, so that a test can inspect it."""

    def __init__(self, scenario: Scenario, access: Access = SECRET, **options: Any) -> None:
        self.play_server = PlayServer(scenario, **options)
        self.loop, self.ended = asyncio.new_event_loop(), asyncio.Event()
        self.url, started = "", threading.Event()

        async def main() -> None:
            async with served(self.play_server, access) as address:
                self.url = f"{address}/?token=secret"
                started.set()
                await self.ended.wait()

        self.thread = threading.Thread(target=lambda: self.loop.run_until_complete(main()))
        self.thread.start()
        assert started.wait(10)

    def cut(self) -> None:
        """Close every connection."""

        async def close() -> None:
            for client in [*self.play_server.clients]:
                await client.transport.close()

        asyncio.run_coroutine_threadsafe(close(), self.loop).result(5)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.ended.set)
        self.thread.join(10)
        self.loop.close()
