"""The wire protocol, and the input accumulator: what keys, taps and the mouse do to the next chunk."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from playing import MOTION, make_input

from minwm.cameras.trajectory import Action
from minwm.play.inputs import MAX_LOOK_RATE, InputAccumulator
from minwm.play.protocol import (
    H264_KEY,
    JPEG,
    VERSION,
    Error,
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
    droppable,
    parse_client_message,
    parse_server_message,
    to_json,
    unpack,
)

CHUNK = 0.5


# ---------------------------------------------------------------------------------------------
# Protocol

INPUT = to_json(make_input(1, "w"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("nonsense", "Expecting value"),
        ("[]", "JSON object"),
        ("{}", "JSON object"),
        ('{"type": 3}', "JSON object"),
        ('{"type": "input", "kind": "hello"}', "JSON object"),
        ('{"type": "delete"}', "no .*'delete'"),
        ('{"type": "command", "name": "shutdown"}', "shutdown"),
        ('{"type": "command", "name": ["rewind"]}', "expected"),
        ('{"type": "command", "name": "rewind"}', "chunks"),
        ('{"type": "command", "name": "rewind", "chunks": 1.5}', "expected int"),
        ('{"type": "command", "name": "rewind", "chunks": true}', "expected int"),
        ('{"type": "command", "name": "rewind", "chunks": 0}', "1 to"),
        ('{"type": "command", "name": "speed", "value": 0}', "0.25 to 4"),
        ('{"type": "command", "name": "speed", "value": NaN}', "0.25 to 4"),
        ('{"type": "command", "name": "seed", "value": -1}', "seed"),
        ('{"type": "command", "name": "prompt", "text": "  "}', "1 to 1000"),
        (json.dumps({"type": "command", "name": "prompt", "text": "x" * 1001}), "1 to 1000"),
        ('{"type": "command", "name": "prompt", "text": "\\ud800"}', "surrogate"),
        (INPUT.replace("1.0", "1.5", 1), "-1 to 1"),
        (INPUT.replace("1.0", "NaN", 1), "-1 to 1"),
        (INPUT.replace("1.0", "1e999", 1), "-1 to 1"),
        (INPUT.replace('"seq": 1', '"seq": 4294967296'), "seq"),
        (INPUT.replace('"t": 10.0', f'"t": {10**400}'), "too large"),
        (INPUT.replace('"t": 10.0', '"t": "now"'), "expected float"),
        (INPUT.replace("[0, ", "[", 1), "expected"),
        ('{"type": "input"' + ', "more": 1}', "more"),
        ("[" * 16000, "recursion"),
        ('{"type":' + "[" * 8000 + "]" * 8000 + "}", "recursion"),
        ('{"type": "shown", "frame": ' + "[" * 400 + "]" * 400 + "}", "expected"),
        ('"' + "x" * 20000 + '"', "at most 16384 bytes"),
        (json.dumps("\u00e9" * 9000, ensure_ascii=False), "at most 16384 bytes"),
        ('{"type": "hello", "v": 1, "codecs": "jpeg"}', "expected"),
        (b"\x00\x01", "binary"),
    ],
)
def test_hostile_texts_are_refused_with_a_reason(text: str | bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason) as caught:
        parse_client_message(text)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    "message",
    [
        Hello(v=VERSION, codecs=["h264", "jpeg"], resume="abc"),
        make_input(7, "s", -0.25, (3.0, -1.5)),
        Shown(frame=9),
        SimpleCommand(name="replay"),
        Rewind(chunks=4),
        Seed(value=2**32 - 1),
        Speed(value=0.25),
        Prompt(text="a red tower"),
    ],
    ids=lambda message: message.kind,
)
def test_texts_survive_the_round_trip(message: Any) -> None:
    assert parse_client_message(to_json(message)) == message
    with pytest.raises(ProtocolError):
        parse_server_message(to_json(message))


def test_texts_have_the_documented_form() -> None:
    assert json.loads(to_json(Rewind(chunks=2))) == {"type": "command", "name": "rewind", "chunks": 2}
    assert json.loads(to_json(SimpleCommand(name="pause"))) == {"type": "command", "name": "pause"}
    assert json.loads(to_json(Error(reason="no", fatal=True))) == {"type": "error", "reason": "no", "fatal": True}
    text = '{"type": "input", "seq": 4, "t": 1, "held": [0,0,1,0,0,0], "total": [0,0,0,0,0,0], "look": [0,0]}'
    assert parse_client_message(text) == Input(seq=4, t=1.0, held=(0, 0, 1, 0, 0, 0))


def test_the_header_has_the_documented_layout() -> None:
    pose = np.eye(4)
    pose[:3] = np.arange(12).reshape(3, 4)
    header = Header(
        kind=H264_KEY,
        view=1,
        flush=True,
        frame=70_000,
        chunk=9,
        seq=2**32 - 1,
        seed=5,
        media=1234.5,
        t=1e12,
        times=Times(queue=1, diffuse=2, decode=3, copy=4, encode=5),
        c2w=pose,
    )
    data = header.pack()
    assert len(data) == 108 and data[:8] == b"MW" + bytes([VERSION, H264_KEY, 1, 1, 0, 0])
    assert np.frombuffer(data, "<u4", 4, 8).tolist() == [70_000, 9, 2**32 - 1, 5]
    assert np.frombuffer(data, "<f8", 2, 24).tolist() == [1234.5, 1e12]
    assert np.frombuffer(data, "<f4", 17, 40).tolist() == [1, 2, 3, 4, 5, *range(12)]
    back, payload = unpack(data + b"payload")
    assert payload == b"payload" and np.array_equal(back.c2w, pose)
    assert replace(back, c2w=pose).pack() == data
    jpegs = [replace(header, kind=JPEG, flush=first).pack() for first in (False, True)]
    assert [droppable(message) for message in (*jpegs, data, "text", b"")] == [True, False, False, False, False]
    for broken in (b"", data[:107], b"XX" + data[2:], b"MW" + bytes([VERSION + 1]) + data[3:]):
        with pytest.raises(ProtocolError, match="not a frame"):
            unpack(broken)


# ---------------------------------------------------------------------------------------------
# InputAccumulator. A chunk lasts half a second here.


def forward(accumulator: InputAccumulator) -> float:
    """Seconds at full speed that the next chunk goes forward."""
    return accumulator.take(CHUNK).move_z * CHUNK


def test_a_tap_between_two_boundaries_moves_its_own_duration() -> None:
    accumulator = InputAccumulator(MOTION)
    accumulator.add(make_input(1, "w", 0.0))
    accumulator.add(make_input(2, "", 0.03))
    assert forward(accumulator) == pytest.approx(0.03)
    assert forward(accumulator) == 0


def test_a_held_key_acts_for_whole_chunks_and_is_not_applied_twice() -> None:
    accumulator = InputAccumulator(MOTION)
    accumulator.add(make_input(1, "w", 0.0))
    assert [forward(accumulator), forward(accumulator)] == [
        CHUNK,
        CHUNK,
    ]  # held across two boundaries: no news in between
    accumulator.add(make_input(2, "", 0.9))  # released 0.1 s before the second chunk is over
    assert forward(accumulator) == 0
    accumulator.add(make_input(3, "w", 0.9))
    accumulator.add(make_input(4, "", 0.93))
    assert forward(accumulator) == pytest.approx(0.03), "what was applied too early is dropped, not undone"


def test_a_key_released_after_the_boundary_gets_the_rest_of_its_time() -> None:
    accumulator = InputAccumulator(MOTION)
    accumulator.add(make_input(1, "w", 0.0))  # 0.3 s before the boundary
    assert forward(accumulator) == CHUNK
    accumulator.add(make_input(2, "", 0.7))  # 0.4 s after it: 0.7 s were made, half a second was given
    assert forward(accumulator) == pytest.approx(0.2)
    assert forward(accumulator) == 0


def test_time_before_the_boundary_is_part_of_a_held_chunk() -> None:
    accumulator = InputAccumulator(MOTION)
    accumulator.add(make_input(1, "w", 0.0))
    accumulator.add(make_input(2, "w", 0.2))  # said again: the page may repeat itself
    assert forward(accumulator) == CHUNK, "at most full speed"
    accumulator.add(make_input(3, "", 0.5))
    assert forward(accumulator) == 0


def test_opposite_keys_within_a_chunk_both_count() -> None:
    accumulator = InputAccumulator(MOTION)
    accumulator.add(make_input(1, "w", 0.0))
    assert forward(accumulator) == CHUNK
    accumulator.add(make_input(2, "s", 0.1))  # 0.4 s too much were given: forgotten
    accumulator.add(make_input(3, "", 0.1 - 0.25))
    assert forward(accumulator) == pytest.approx(-0.25)


def test_chords_act_on_their_own_axes() -> None:
    accumulator = InputAccumulator(MOTION)
    accumulator.add(Input(seq=1, held=(1, 0, 1, -0.5, 0, 0)))
    assert accumulator.take(CHUNK) == Action(move_x=1, move_z=1, yaw=-0.5)


def test_an_older_input_changes_nothing() -> None:
    accumulator = InputAccumulator(MOTION)
    accumulator.add(make_input(2, "s", -0.1))
    accumulator.add(make_input(1, "w", 0.0))
    assert accumulator.newest.seq == 2 and accumulator.take(CHUNK).move_z == -1


def test_mouse_look_is_limited_and_one_chunk_of_the_rest_carries_over() -> None:
    accumulator, reach = InputAccumulator(MOTION), MAX_LOOK_RATE * MOTION.turn * CHUNK  # 40 degrees

    def turned() -> tuple[float, float]:
        action = accumulator.take(CHUNK)
        return action.yaw * MOTION.turn * CHUNK, action.pitch * MOTION.turn * CHUNK

    accumulator.add(make_input(1, look=(15.0, -5.0)))
    assert turned() == pytest.approx((15.0, -5.0))
    accumulator.add(make_input(2, look=(15.0 + reach + 10, -5.0)))
    assert turned() == pytest.approx((reach, 0))
    assert turned() == pytest.approx((10, 0))
    accumulator.add(make_input(3, look=(2000.0, -5.0)))
    assert [turned()[0] for _ in range(3)] == pytest.approx([reach, reach, 0])


def test_a_pause_and_a_turn_drop_unapplied_input() -> None:
    accumulator = InputAccumulator(MOTION)
    accumulator.add(make_input(1, "w", 0.0))
    accumulator.add(make_input(2, "", 0.4, (30.0, 0.0)))
    accumulator.clear()
    assert accumulator.take(CHUNK) == Action()
    accumulator.reset(None)  # the next player was a spectator who pressed keys
    accumulator.add(make_input(900, "w", 55.0, (500.0, 0.0)))
    assert accumulator.take(CHUNK) == Action(move_z=1)


def test_in_slow_motion_a_second_at_the_keys_is_less_in_the_world() -> None:
    accumulator = InputAccumulator(MOTION)
    accumulator.add(make_input(1, "w", 0.0), 0.25)
    accumulator.add(make_input(2, "", 0.2), 0.25)
    assert forward(accumulator) == pytest.approx(0.05)
