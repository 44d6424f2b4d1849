"""The play server over every transport: roles, turns, reconnects, bad clients, failures and leaks."""

import asyncio
import contextlib
import gc
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from playing import Clock, learned, painted, tiny_model
from talking import (
    Dial,
    Pipe,
    frame_with,
    in_memory,
    over_every_transport,
    over_sockets,
    quiet_threads,
    run_scene,
    until,
)

from minwm.cameras.trajectory import Action
from minwm.nets.attention import KVArena
from minwm.play.client import Client, ReceivedFrame
from minwm.play.loop import PlayLoop
from minwm.play.protocol import (
    VERSION,
    Error,
    Hello,
    ProtocolError,
    Rewind,
    Shown,
    SimpleCommand,
    State,
    parse_server_message,
    to_json,
)
from minwm.play.send_queue import SendQueue
from minwm.play.server import MAX_CLIENTS, MAX_MESSAGES_PER_SECOND, PlayServer
from minwm.session.session import Session

quiet = pytest.fixture(quiet_threads, autouse=True)


@over_every_transport
def test_the_first_client_plays(transport: Any) -> None:
    async def scene(_: PlayServer, dial: Dial) -> None:
        client = await Client.join(await dial())
        assert client.welcome.role == "player" and client.welcome.fps == 64 and client.welcome.chunk == 4
        assert client.welcome.capabilities.rewind == 60 and client.welcome.seed == 3
        first = await until(client, lambda m: isinstance(m, ReceivedFrame))
        assert first.header.flush and first.header.frame == 0 and abs(int(first.pixels[0, 0, 1]) - 128) <= 2
        await client.hold(Action.of("w"))
        held = await until(client, frame_with(1))
        later = await until(client, lambda m: isinstance(m, ReceivedFrame) and m.header.chunk >= held.header.chunk + 4)
        assert later.header.c2w[2, 3] > 0.2 and int(later.pixels[0, 0, 1]) > 132, "green is forward"
        assert later.header.t == client.input.t
        await client.command("pause")
        state = await until(client, lambda m: isinstance(m, State) and m.paused)
        assert state.role == "player" and state.chunk > 4 and state.rewind == min(state.chunk, 60), state

    run_scene(scene, transport)


@over_every_transport
def test_a_bad_client_is_refused_and_disturbs_nobody(transport: Any) -> None:
    async def scene(server: PlayServer, dial: Dial) -> None:
        client = await Client.join(await dial())
        for text in (
            "garbage",
            "{}",
            to_json(SimpleCommand(name="reset")),
            to_json(Hello(v=VERSION + 1, codecs=["jpeg"])),
        ):
            bad = await dial()
            await bad.send(text)
            answer = parse_server_message(await bad.receive() or "")
            assert isinstance(answer, Error) and answer.fatal and answer.reason
            assert await bad.receive() is None
        with pytest.raises(ProtocolError, match="no codec in common"):
            await Client.join(await dial(), codecs=("av1",))
        second = await Client.join(await dial())
        await second.transport.send(b"\x00" * 100)
        gone = await until(second, lambda m: isinstance(m, Error))
        assert gone.fatal and "binary" in gone.reason
        await client.hold(Action.of("w"))
        await until(client, frame_with(1))
        assert [client.id for client in server.clients] == [client.welcome.session]

    run_scene(scene, transport)


def test_too_many_messages_close_the_connection() -> None:
    async def scene(_: PlayServer, dial: Dial) -> None:
        client = await Client.join(await dial())
        with contextlib.suppress(ConnectionError):
            for frame in range(3 * MAX_MESSAGES_PER_SECOND):
                await client.send(Shown(frame=frame))
        gone = await until(client, lambda m: isinstance(m, Error))
        assert gone.fatal and "in a second" in gone.reason

    run_scene(scene, over_sockets)


@over_every_transport
def test_the_second_client_watches_and_gets_its_turn(transport: Any) -> None:
    clock = Clock()

    async def scene(server: PlayServer, dial: Dial) -> None:
        clock.now += 1000  # a turn starts when its player joins
        first, second = await Client.join(await dial()), await Client.join(await dial())
        server.check_timeouts()
        assert server.clients[0].id == first.welcome.session
        assert (second.welcome.role, second.welcome.queue_position) == ("spectator", 1)
        await second.command("reset")
        refused = await until(second, lambda m: isinstance(m, Error))
        assert "spectator" in refused.reason and not refused.fatal
        await second.hold(Action.of("d"))
        await first.hold(Action.of("w"))
        seen = await until(second, lambda m: isinstance(m, ReceivedFrame) and m.header.c2w[2, 3] > 0.1)
        assert abs(seen.header.c2w[0, 3]) < 1e-6, "a spectator moves nothing"
        clock.now += 200
        await until(second, lambda m: isinstance(m, State) and m.role == "player")
        await until(first, lambda m: isinstance(m, State) and m.role == "spectator" and m.queue_position == 1)
        await second.hold(Action.of("d"))
        await until(second, lambda m: isinstance(m, ReceivedFrame) and m.header.c2w[0, 3] > 0.05)
        await second.transport.close()
        await asyncio.sleep(0.05)
        clock.now += 10  # a disconnected player loses the turn if others wait
        await until(first, lambda m: isinstance(m, State) and m.role == "player")

    run_scene(scene, transport, clock=clock)


@over_every_transport
def test_a_reconnected_player_resumes_its_session(transport: Any) -> None:
    clock = Clock()

    async def scene(server: PlayServer, dial: Dial) -> None:
        client = await Client.join(await dial())
        await client.hold(Action.of("w"))
        last = await until(client, lambda m: isinstance(m, ReceivedFrame) and m.header.chunk > 5)
        await client.transport.close()
        while server.clients[0].disconnected_at is None:
            await asyncio.sleep(0.01)
        clock.now += 60
        await asyncio.sleep(0.3)  # without clients nothing is generated
        made = len(server.loop.inputs) if server.loop else 0
        await asyncio.sleep(0.2)
        assert server.loop and len(server.loop.inputs) == made >= last.header.chunk
        again = await Client.join(await dial(), resume=client.welcome.session)
        assert again.welcome.role == "player" and again.welcome.session == client.welcome.session
        here = await until(again, lambda m: isinstance(m, ReceivedFrame))
        assert here.header.flush and here.header.chunk == made
        newer = await Client.join(await dial(), resume=client.welcome.session)  # a second tab takes over
        gone = await until(again, lambda m: isinstance(m, Error))
        assert gone.fatal and "another connection" in gone.reason and newer.welcome.role == "player"
        await newer.transport.close()
        while server.clients[0].disconnected_at is None:
            await asyncio.sleep(0.01)
        loop, clock.now = server.loop, clock.now + 400
        server.check_timeouts()
        assert loop and loop.closed and server.loop is None and not server.clients

    run_scene(scene, transport, clock=clock)


def test_what_comes_late_over_an_old_connection_is_ignored() -> None:
    async def scene(_: PlayServer, dial: Dial) -> None:
        old = await Client.join(await dial())
        assert isinstance(old.transport, Pipe)
        while not old.transport.inbox.full():  # it reads nothing, so the server cannot close this connection
            await asyncio.sleep(0.01)
        new = await Client.join(await dial(), resume=old.welcome.session)
        old.input = replace(old.input, seq=50)
        await old.hold(Action.of("d"))
        await new.hold(Action.of("w"))
        seen = await until(new, lambda m: isinstance(m, ReceivedFrame) and m.header.c2w[2, 3] > 0.2)
        assert seen.header.c2w[0, 3] == 0 and seen.header.seq == 1
        await old.transport.close()

    run_scene(scene, in_memory)


@over_every_transport
def test_a_failing_engine_is_reported_and_the_server_goes_on(transport: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def scene(_: PlayServer, dial: Dial) -> None:
        for _turn in range(2):
            client = await Client.join(await dial())
            gone = await until(client, lambda m: isinstance(m, Error))
            assert gone.fatal and "RuntimeError: out of memory" in gone.reason
            assert await client.receive() is None

    run_scene(scene, transport, painted(fails_at=6))
    assert "generation failed" in caplog.text


@over_every_transport
def test_a_slow_client_does_not_slow_generation(transport: Any) -> None:
    async def scene(server: PlayServer, dial: Dial) -> None:
        slow, quick = await Client.join(await dial()), await Client.join(await dial())
        before = await until(quick, lambda m: isinstance(m, ReceivedFrame) and m.header.chunk > 1)
        later = await until(quick, lambda m: isinstance(m, ReceivedFrame) and m.header.chunk > before.header.chunk + 16)
        assert sum(len(client.queue.packets) for client in server.clients) <= 4 * 4
        chunks = []
        while not chunks or chunks[-1] <= later.header.chunk:
            shot = await until(slow, lambda m: isinstance(m, ReceivedFrame))
            chunks.append(shot.header.chunk)
        assert chunks == sorted(chunks)
        if transport is in_memory:  # the kernel would hold some for a socket
            assert np.diff(chunks).max() > 1, "some chunks were dropped, and then it went on"

    run_scene(scene, transport)


def test_a_hundred_spectators_leak_nothing() -> None:
    async def scene(server: PlayServer, dial: Dial) -> None:
        first = await Client.join(await dial())
        await until(first, lambda m: isinstance(m, ReceivedFrame))

        async def visit() -> None:
            client = await Client.join(await dial())
            await until(client, lambda m: isinstance(m, ReceivedFrame))
            await client.transport.close()

        async def count() -> tuple[int, int, int, int]:
            assert server.loop
            async with asyncio.timeout(5):  # the server has yet to notice that the last one left
                while len(server.loop.queues) > 1 or len(server.clients) > 1:
                    await asyncio.sleep(0.01)
            gc.collect()
            queues = sum(type(thing) is SendQueue for thing in gc.get_objects())
            return threading.active_count(), len(server.clients), len(server.loop.queues), queues

        await visit()
        before = await count()
        for _ in range(100):
            await visit()
            assert server.loop
            server.loop.set_shown(10**6)
        after = await count()
        assert after == before

    run_scene(scene, in_memory)


def test_a_hundred_rollouts_leak_nothing() -> None:
    """Each client plays a little, rewinds and leaves; the server ends its rollout and starts the next one."""
    clock, scenario = Clock(), learned(tiny_model())

    async def scene(server: PlayServer, dial: Dial) -> None:
        async def visit() -> None:
            client = await Client.join(await dial())
            await client.hold(Action.of("w"))
            await until(client, lambda m: isinstance(m, ReceivedFrame) and m.header.chunk == 1)
            await client.send(Rewind(chunks=1))
            await client.transport.close()
            while server.clients[0].disconnected_at is None:
                await asyncio.sleep(0.001)
            clock.now += server.idle_timeout + 1
            server.check_timeouts()
            assert server.loop is None and not server.clients

        def count() -> dict[str, int]:
            deadline = time.monotonic() + 5
            while gc.collect() >= 0 and any(type(thing) is KVArena for thing in gc.get_objects()):
                assert time.monotonic() < deadline, "the last rollout does not end"
                time.sleep(0.01)
            things = gc.get_objects()
            tensors = [thing for thing in things if issubclass(type(thing), torch.Tensor)]
            counted = KVArena, SendQueue, Session, PlayLoop
            kinds = {kind.__name__: sum(type(t) is kind for t in things) for kind in counted}
            memory = {"bytes": sum(t.nbytes for t in tensors), "objects": len(things)}
            return {"threads": threading.active_count(), **memory, **kinds}

        counts = []
        for visits in (3, 100):
            for _ in range(visits):
                await visit()
            counts.append(await asyncio.to_thread(count))
        growth = {name: counts[1].pop(name) - counts[0].pop(name) for name in ("objects", "bytes")}
        assert growth["objects"] < 100, "one each would be a leak"
        assert growth["bytes"] < 100 * 100, "RoPE tables of at most 16 chunks are cached"
        assert all(counts[1][kind] <= count for kind, count in counts[0].items()), counts

    run_scene(scene, in_memory, scenario, clock=clock)


def test_a_full_server_refuses_clients() -> None:
    async def scene(_: PlayServer, dial: Dial) -> None:
        for _turn in range(MAX_CLIENTS):
            await Client.join(await dial())
        with pytest.raises(ProtocolError, match="the server is full"):
            await Client.join(await dial())

    run_scene(scene, in_memory)
