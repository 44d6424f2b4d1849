"""Random and damaged messages: each is parsed, or refused with a reason, and nothing else happens."""

import asyncio
import contextlib
import json
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from playing import MOTION, painted
from talking import in_memory, until

from minwm.core.config import UserError
from minwm.play.client import Client, ReceivedFrame
from minwm.play.inputs import MAX_LOOK_RATE, InputAccumulator
from minwm.play.protocol import (
    HEADER_STRUCT,
    REASON_LIMIT,
    VERSION,
    Header,
    Hello,
    Input,
    Prompt,
    ProtocolError,
    Rewind,
    Seed,
    Shown,
    SimpleCommand,
    Speed,
    Times,
    parse_client_message,
    parse_server_message,
    to_json,
    unpack,
)
from minwm.play.rtc import BAD_OFFER, Peer
from minwm.play.server import PlayServer


def unhurried(examples: int) -> settings:
    """No deadline: the machine may be busy."""
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])


NAMES = [
    *("type", "kind", "name", "v", "codecs", "resume", "seq", "t", "held", "total", "look", "frame"),
    *("chunks", "value", "text", "reason", "fatal"),
]
KINDS = ["hello", "input", "shown", "command", "command rewind", "state", "welcome", "error"]
SIMPLE = ["pause", "resume", "step", "reset", "record", "stop", "branch", "replay"]
COMMANDS = [*SIMPLE, "rewind", "seed", "speed", "prompt"]

numbers = some.integers() | some.floats() | some.sampled_from([0, 1, -1, 2**32, 1e308, float("nan")])
scalars = some.none() | some.booleans() | numbers | some.text(max_size=20) | some.sampled_from(KINDS + COMMANDS)
trees = some.recursive(
    scalars, lambda inner: some.lists(inner, max_size=7) | some.dictionaries(some.text(max_size=5), inner), max_leaves=9
)
near_misses = some.builds(
    lambda kind, command, rest: json.dumps({**rest, "type": kind, **({"name": command} if "command" in kind else {})}),
    some.sampled_from(KINDS),
    some.sampled_from(COMMANDS),
    some.dictionaries(some.sampled_from(NAMES), trees, max_size=6),
)

ticks = some.floats(-1e12, 1e12)
axes = some.tuples(*[some.floats(-1, 1)] * 6)
inputs = some.builds(
    Input,
    seq=some.integers(0, 2**32 - 1),
    t=ticks,
    held=axes,
    total=some.tuples(*[ticks] * 6),
    look=some.tuples(ticks, ticks),
)
prompts = some.text(some.characters(exclude_categories=("Cs",)), min_size=1, max_size=900).filter(str.strip)
messages = some.one_of(
    inputs,
    some.builds(Hello, v=some.integers(), codecs=some.lists(some.text(max_size=9)), resume=some.none() | some.text()),
    some.builds(Shown, frame=some.integers()),
    some.builds(SimpleCommand, name=some.sampled_from(SIMPLE)),  # type: ignore[arg-type]
    some.builds(Rewind, chunks=some.integers(1, 1_000_000)),
    some.builds(Seed, value=some.integers(0, 2**32 - 1)),
    some.builds(Speed, value=some.floats(0.25, 4)),
    some.builds(Prompt, text=prompts),
)


@some.composite
def damaged(draw: Any) -> str:
    """A message with a part cut out, and something put in its place."""
    text = to_json(draw(messages))
    a, b = sorted((draw(some.integers(0, len(text))), draw(some.integers(0, len(text)))))
    return (
        text[:a]
        + draw(some.text(max_size=8) | some.sampled_from(["[", '"', "{", "1e999", "\\ud800", "null"]))
        + text[b:]
    )


@unhurried(150)
@given(some.text() | near_misses | damaged() | some.binary(max_size=50))
def test_a_text_is_parsed_or_refused_with_a_reason(text: str | bytes) -> None:
    for read in (parse_client_message, parse_server_message):
        try:
            message = read(text)
        except ProtocolError as error:
            assert 0 < len(str(error)) <= REASON_LIMIT
        else:
            assert isinstance(text, str) and json.loads(text)["type"] == message.kind.split()[0]


@unhurried(80)
@given(messages)
def test_messages_survive_the_round_trip(message: Any) -> None:
    assert parse_client_message(to_json(message)) == message


@unhurried(80)
@given(some.binary(max_size=200) | some.builds(lambda body: b"MW" + bytes([VERSION]) + body, some.binary(max_size=200)))
def test_bytes_are_a_frame_or_are_refused(data: bytes) -> None:
    if len(data) < HEADER_STRUCT.size or data[:3] != b"MW" + bytes([VERSION]):
        with pytest.raises(ProtocolError, match="not a frame"):
            unpack(data)
    else:
        assert unpack(data)[1] == data[HEADER_STRUCT.size :]


singles = some.floats(width=32, allow_nan=False)
counts = some.integers(0, 2**32 - 1)


@unhurried(80)
@given(
    some.builds(
        Header,
        kind=some.integers(0, 2),
        view=some.integers(0, 255),
        flush=some.booleans(),
        **dict.fromkeys(("frame", "chunk", "seq", "seed"), counts),
        **dict.fromkeys(("media", "t"), some.floats(allow_nan=False)),
        times=some.builds(Times, **dict.fromkeys(Times.__annotations__, singles)),
        c2w=some.lists(singles, min_size=12, max_size=12).map(lambda n: np.array([*n, 0, 0, 0, 1.0]).reshape(4, 4)),
    ),
    some.binary(max_size=9),
)
def test_a_header_comes_back_as_it_was(header: Header, payload: bytes) -> None:
    back, rest = unpack(header.pack() + payload)
    assert rest == payload and np.array_equal(back.c2w, header.c2w)
    assert astuple(back)[:-1] == astuple(header)[:-1]


@unhurried(80)
@given(some.lists(inputs | some.floats(0.01, 2), max_size=20))
def test_no_input_exceeds_full_speed(story: list[Input | float]) -> None:
    accumulator = InputAccumulator(MOTION)
    for event in story:
        if isinstance(event, Input):
            accumulator.add(event)
            continue
        action = np.array(astuple(accumulator.take(event)))
        limit = np.array([1, 1, 1, 1 + MAX_LOOK_RATE, 1 + MAX_LOOK_RATE, 1]) + 1e-9
        assert np.isfinite(action).all() and (abs(action) <= limit).all()


@unhurried(20)
@given(some.lists(some.text(max_size=40) | near_misses | damaged() | messages.map(to_json) | some.binary(max_size=9)))
def test_no_client_disturbs_the_player(texts: list[str | bytes]) -> None:
    """A spectator sends hello and then anything; the player keeps receiving frames without errors."""

    async def main() -> None:
        server = PlayServer(painted())
        async with in_memory(server) as dial:
            client = await Client.join(await dial())
            spectator = await dial()
            await spectator.send(to_json(Hello(v=VERSION, codecs=["jpeg"])))
            with contextlib.suppress(ConnectionError):
                for text in texts:
                    await spectator.send(text)
            await spectator.close()
            await until(client, lambda m: isinstance(m, ReceivedFrame) and m.header.chunk > 1)
            assert not client.errors

    asyncio.run(asyncio.wait_for(main(), 20))


OFFER = f"""v=0\r
o=- 1 1 IN IP4 0.0.0.0\r
s=-\r
t=0 0\r
a=group:BUNDLE 0\r
m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r
c=IN IP4 0.0.0.0\r
a=mid:0\r
a=sctp-port:5000\r
a=max-message-size:65536\r
a=candidate:1 1 udp 2130706431 b3a1c1f0-0c53-4b7e-9d8a-5a1f.local 9 typ host\r
a=ice-ufrag:abcd\r
a=ice-pwd:abcdefghijklmnopqrstuv\r
a=fingerprint:sha-256 {":".join(["AB"] * 32)}\r
a=setup:actpass\r
"""


@unhurried(40)
@given(some.integers(0, len(OFFER)), some.integers(0, len(OFFER)), some.text(max_size=9))
def test_an_offer_is_answered_or_refused(a: int, b: int, new: str) -> None:
    pytest.importorskip("aiortc", reason="WebRTC needs aiortc")

    async def answer(sdp: str) -> str:
        peer = Peer()
        try:
            return await peer.answer(sdp, "127.0.0.1")
        except UserError as error:
            return str(error)
        finally:
            await peer.close()

    reply = asyncio.run(answer(OFFER[: min(a, b)] + new + OFFER[max(a, b) :]))
    assert reply.startswith("v=0") or reply == BAD_OFFER
