"""The generation loop of live play, its scheduler and send queues, and recordings; without a server or a thread."""

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from playing import MOTION, SMALL, Clock, learned, make_input, painted, start_image, tiny_model

from minwm.cameras.trajectory import Action
from minwm.core.config import UserError
from minwm.core.media import read_video
from minwm.data.clips import ClipFolder, check
from minwm.data.rerender import check_renders
from minwm.nets.chunks import StreamConfig
from minwm.play.loop import PlayLoop, ResendFrame, nbytes
from minwm.play.protocol import (
    H264,
    H264_KEY,
    JPEG,
    Error,
    Header,
    Input,
    Prompt,
    Rewind,
    Seed,
    SimpleCommand,
    State,
    Times,
    unpack,
)
from minwm.play.scenario import Scenario, StartState, model_scenario, world_scenario
from minwm.play.scheduler import ChunkScheduler
from minwm.play.send_queue import MAX_QUEUED_CHUNKS, Packet, SendQueue
from minwm.session.engines import ModelEngine
from minwm.session.session import Session
from minwm.store.model import Model


@pytest.fixture
def model() -> Model:
    return tiny_model()


# ---------------------------------------------------------------------------------------------
# Scheduler and send queue


@pytest.mark.parametrize(("cost", "delay"), [(0.01, 0.01), (0.2, 0.2), (0.45, 0.45), (0.45, 0.3)])
@pytest.mark.parametrize("lag", [0.0, 0.1])
def test_generation_stays_within_one_chunk_of_playback_and_keeps_up(cost: float, delay: float, lag: float) -> None:
    clock, fps, frames = Clock(), 16.0, 8
    scheduler = ChunkScheduler(fps, frames, clock)
    starts, shows = [], []
    for k in range(40):
        while (wait := scheduler.wait()) > 0:
            clock.now += min(wait, 0.01)
            if starts:
                now = int((clock.now - lag - shows[-1]) * fps)  # frame of the newest chunk on the screen
                scheduler.shown = (k - 1) * frames + (min(now, frames - 1) if now >= 0 else -1)
        if k > 1:
            assert clock.now >= shows[-1], f"chunk {k} starts before chunk {k - 1} is on the screen"
        starts.append(clock.now)
        clock.now += cost
        scheduler.chunk_done(k * frames, frames, cost, delay)
        shows.append(scheduler.display_start)
    gaps = np.diff(starts[20:])
    assert gaps.mean() == pytest.approx(frames / fps, abs=0.01)
    assert min(s - b for s, b in zip(shows[20:], starts[20:], strict=True)) < delay + 0.1, "as late as possible"


def test_generation_waits_for_a_screen_that_lags_but_not_forever() -> None:
    clock = Clock()
    scheduler = ChunkScheduler(16.0, 8, clock)
    scheduler.chunk_done(0, 8, 0.01)
    scheduler.chunk_done(8, 8, 0.01)
    scheduler.shown = 6  # still in the chunk before
    clock.now = scheduler.display_end
    assert scheduler.wait() == pytest.approx(0.5)
    scheduler.shown = 7  # at its end
    assert scheduler.wait() <= 0


def packet(serial: int, kind: int = JPEG, view: int = 0, flush: bool = False) -> Packet:
    zeros: dict[str, Any] = dict(frame=serial, chunk=serial, seq=0, seed=0, media=0.0, t=0.0)
    header = Header(kind=kind, view=view, flush=flush, times=Times(), c2w=np.eye(4), **zeros)
    return Packet(serial, header, b"x")


def drain(queue: SendQueue) -> list[Header]:
    taken = []
    while isinstance(message := queue.pop(), bytes):
        taken.append(unpack(message)[0])
    return taken


def test_a_slow_client_loses_the_oldest_chunk() -> None:
    woken = []
    queue = SendQueue("jpeg", 1, lambda: woken.append(1))
    for serial in range(10):
        for _ in range(3):
            queue.put_frame(packet(serial))
    left = drain(queue)
    assert [h.frame for h in left] == [8, 8, 8, 9, 9, 9] and len(woken) == 30
    assert [h.flush for h in left] == [True] + 5 * [False], "the flush flag is not lost with its frame"
    assert len({h.frame for h in left}) == MAX_QUEUED_CHUNKS


def test_a_flush_discards_the_queued_frames_of_both_views() -> None:
    queue = SendQueue("jpeg", 2, lambda: None)
    for view in (0, 1):
        queue.put_frame(packet(1, view=view))
    for view in (0, 1):
        queue.put_frame(packet(2, view=view, flush=True))
    assert [(h.frame, h.view, h.flush) for h in drain(queue)] == [(2, 0, True), (2, 1, True)]


def test_a_slow_h264_client_continues_at_a_key_frame() -> None:
    queue = SendQueue("h264", 1, lambda: None)
    queue.put_frame(packet(0, H264))
    assert queue.needs_key_frame and not drain(queue)
    queue.put_frame(packet(1, H264_KEY))
    assert not queue.needs_key_frame
    for serial in (1, 2, 3):
        queue.put_frame(packet(serial, H264))
    assert queue.needs_key_frame
    queue.put_frame(packet(4, H264))
    assert not drain(queue)
    queue.put_frame(packet(5, H264_KEY))
    assert [(h.frame, h.flush) for h in drain(queue)] == [(5, True)]


def test_texts_are_sent_first_and_only_the_newest_state() -> None:
    queue = SendQueue("jpeg", 1, lambda: None)
    queue.put_frame(packet(1))
    state = State(paused=False, recording=False, chunk=1, rewind=0, speed=1.0, seed=0, prompt="")
    for chunk in range(5):
        queue.put_text(replace(state, chunk=chunk))
    for number in range(100):
        queue.put_text(Error(reason=str(number)))
    texts = [json.loads(message) for message in iter(queue.pop, None) if isinstance(message, str)]
    assert len(texts) <= 16 and texts[-1]["reason"] == "99"


# ---------------------------------------------------------------------------------------------
# The generation loop, without its thread


class Screen:
    """A client in this process: collects the frames of its send queue."""

    def __init__(self, loop: PlayLoop, codec: Any = "jpeg") -> None:
        self.shots: list[tuple[Header, bytes]] = []
        self.queue = SendQueue(codec, len(loop.scenario.views), self.drain)
        loop.attach(self.queue)

    def drain(self) -> None:
        while (message := self.queue.pop()) is not None:
            if isinstance(message, bytes):
                self.shots.append(unpack(message))

    @property
    def headers(self) -> list[Header]:
        return [header for header, _ in self.shots]


def started(scenario: Scenario, **options: Any) -> tuple[PlayLoop, list[str]]:
    reasons: list[str] = []
    loop = PlayLoop(scenario, on_error=reasons.append, **options)
    loop.start()
    return loop, reasons


def keys(loop: PlayLoop, *held: str) -> list[np.ndarray]:
    """Play a chunk for each key string; returns the last frame of every view after each."""
    shown = []
    for text in held:
        seq = loop.accumulator.newest.seq + 1
        loop.set_input(Input(seq=seq, t=0.0, held=np.array(vector(text)).tolist() and vector(text)))
        loop.step()
        shown.append(np.stack([frames[0] for frames in loop.last_frames[-1]]))
    return shown


def vector(text: str) -> tuple[float, float, float, float, float, float]:
    action = Action.of(text)
    return action.move_x, action.move_y, action.move_z, action.yaw, action.pitch, action.roll


def test_a_chunk_applies_the_newest_input_and_its_frames_name_it() -> None:
    loop, _ = started(painted())
    screen = Screen(loop)
    loop.set_input(make_input(1, "s"))
    loop.set_input(make_input(2, "w"))
    loop.step()
    assert {h.seq for h in screen.headers} == {2} and {h.t for h in screen.headers} == {20.0}
    assert [h.frame for h in screen.headers] == [1, 2, 3, 4] and {h.chunk for h in screen.headers} == {1}
    z = [h.c2w[2, 3] for h in screen.headers]
    assert np.allclose(z, np.arange(1, 5) / MOTION.fps)
    loop.set_input(make_input(3, ""))
    late = Screen(loop)
    loop.apply(ResendFrame())
    assert [(h.frame, h.seq, h.flush) for h in late.headers] == [(4, 2, True)], "no chunk reflects the third yet"
    assert screen.headers[0].media == pytest.approx(1000 / MOTION.fps) and screen.headers[0].times.encode > 0


def test_the_first_frames_of_a_chunk_are_sent_before_the_last_are_decoded(model: Model) -> None:
    """And the scheduler learns of it: here each of the two latents takes 0.1 s to decode."""
    clock = Clock()
    loop, _ = started(
        learned(replace(model, config=replace(model.config, stream=StreamConfig(chunk=2, first_chunk=1, window=2)))),
        clock=clock,
    )
    (session,), left = loop.sessions, []
    decode, screen = session.engine.decode_next, Screen(loop)  # type: ignore[attr-defined]
    slow = lambda *args: (setattr(clock, "now", clock.now + 0.1), decode(*args))[1]  # noqa: E731
    session.engine.decode_next = slow  # type: ignore[attr-defined]
    screen.queue.on_put = lambda: (screen.drain(), left.append((len(screen.shots), round(clock.now - 100, 3))))
    loop.set_input(make_input(1, "w"))
    loop.step()
    assert left[3] == (4, 0.1) and left[-1] == (8, 0.2)
    assert [h.frame for h in screen.headers] == [*range(1, 9)] and {h.chunk for h in screen.headers} == {1}
    assert np.allclose([h.c2w[2, 3] for h in screen.headers], np.arange(1, 9) / MOTION.fps)
    assert (*loop.scheduler.costs, *loop.scheduler.delays) == pytest.approx((0.2, 0.2 - 4 / MOTION.fps))


def test_a_step_before_the_start_is_refused(model: Model) -> None:
    with pytest.raises(UserError, match=r"call start\(\) first"):
        Session(ModelEngine(model, start_image(), "a red room")).step(Action.of("w"))


def test_after_a_rewind_the_same_inputs_give_the_same_frames(model: Model) -> None:
    loop, _ = started(learned(model))
    before = keys(loop, *"wjdw")
    screen = Screen(loop)
    loop.apply(Rewind(chunks=2))
    assert len(loop.inputs) == 2 and loop.state().rewind == 2
    (shown,) = screen.headers
    assert shown.flush and shown.chunk == 2 and shown.frame == 8
    again = keys(loop, *"dw")
    assert all(np.array_equal(a, b) for a, b in zip(before[2:], again, strict=True))
    loop.apply(SimpleCommand(name="branch"))
    assert len(loop.inputs) == 2
    assert not np.array_equal(keys(loop, "s")[0], again[0])


def test_replay_gives_the_same_frames_after_prompt_changes(model: Model) -> None:
    loop, reasons = started(learned(model))
    loop.apply(Prompt(text="a blue hall"))
    first = keys(loop, *"wj")
    loop.apply(Prompt(text="a red tower"))
    first += keys(loop, "d")
    assert loop.state().prompt == "a red tower"
    loop.apply(SimpleCommand(name="replay"))
    again = keys(loop, *"sss")
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert loop.paused and not reasons and loop.state().prompt == "a red tower"
    session = Session(ModelEngine(model, start_image(), "a red room", 3))  # the same without a play loop
    session.start()
    frames = []
    for chunk in loop.inputs:
        session.engine.set_prompt(chunk.prompt)  # type: ignore[attr-defined]
        frames.append(session.step(chunk.action)[-1])
    assert all(np.array_equal(a[0], b) for a, b in zip(first, frames, strict=True))


def test_the_prompt_and_the_seed_change_the_frames(model: Model) -> None:
    def last(*commands: Any) -> np.ndarray:
        loop, reasons = started(learned(model))
        for command in commands:
            loop.apply(command)
        assert not reasons
        return keys(loop, *"ww")[-1]

    plain = last()
    assert np.array_equal(plain, last())
    assert np.array_equal(plain, last(Seed(value=4), Seed(value=3)))
    assert not np.array_equal(plain, last(Prompt(text="a blue hall")))
    assert not np.array_equal(plain, last(Seed(value=4)))


def test_commands_that_fail_are_reported_and_change_nothing(model: Model) -> None:
    loop, reasons = started(learned(model))
    before = keys(loop, "w")
    for command in (
        Prompt(text="word " * 40),
        Rewind(chunks=2),
        SimpleCommand(name="branch"),
    ):
        loop.apply(command)
    assert ["25" in reasons[0] or "40 words" in reasons[0], "cannot rewind 2" in reasons[1], "branch" in reasons[2]]
    assert all(reasons) and len(reasons) == 3 and loop.state().prompt == "a red room"
    loop.apply(SimpleCommand(name="replay"))
    assert np.array_equal(before, keys(loop, "s"))


def test_both_views_apply_the_same_inputs(model: Model) -> None:
    scenario = model_scenario(model, "tiny", StartState(prompt="a room", image=start_image()), other=model)
    loop, _ = started(scenario)
    screen = Screen(loop)
    for shot in keys(loop, *"wjd"):
        assert np.array_equal(*shot), "the same model, the same inputs"
    pairs = list(zip(screen.headers[::2], screen.headers[1::2], strict=True))
    assert [(a.view, b.view) for a, b in pairs] == [(0, 1)] * len(pairs)
    assert all((a.frame, a.seq) == (b.frame, b.seq) and np.array_equal(a.c2w, b.c2w) for a, b in pairs)
    loop.apply(Rewind(chunks=2))
    assert np.array_equal(*keys(loop, "i")[0])
    other = replace(model, config=replace(model.config, stream=StreamConfig(chunk=2)))
    with pytest.raises(UserError, match="chunk is 1 here and 2 there"):
        model_scenario(model, "tiny", StartState(), other=other)


def test_snapshots_are_bounded_by_number_and_by_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = started(learned(model), rewind=3)
    keys(loop, *"wjdsw")
    assert loop.state().rewind == 3 and len(loop.last_frames) == 4
    size = nbytes(loop.sessions[0].past[-1][1])
    assert size > 1000
    monkeypatch.setattr("minwm.play.loop.MAX_SNAPSHOT_BYTES", 2 * size)
    keys(loop, "w")
    assert loop.state().rewind == 2
    loop.apply(Rewind(chunks=2))
    assert loop.state().rewind == 0


def test_h264_can_be_decoded_after_joining_and_after_a_reset() -> None:
    loop, _ = started(painted())
    early = Screen(loop, "h264")
    keys(loop, "w")
    late = Screen(loop, "h264")
    keys(loop, "w", "w")
    loop.apply(SimpleCommand(name="reset"))
    keys(loop, "d")
    for screen in (early, late):
        kinds = [h.kind for h in screen.headers]
        assert kinds[0] == H264_KEY
        assert [h.kind for h in screen.headers if h.flush] == [H264_KEY] * 2, "joining, and the reset"
        decoder = av.CodecContext.create("h264", "r")
        frames = [f for _, payload in screen.shots for f in decoder.decode(av.Packet(payload))]  # type: ignore
        frames += decoder.decode(None)  # type: ignore
        assert len(frames) == len(kinds)
        red = [f.to_ndarray(format="rgb24")[..., 0].mean() for f in frames]
        assert red[-1] == pytest.approx(128 + 40 / 16, abs=3)


# ---------------------------------------------------------------------------------------------
# Recordings


def unpacked(loop: PlayLoop, folder: Path) -> Path:
    assert loop.recorded
    with zipfile.ZipFile(io.BytesIO(loop.recorded.clip())) as file:
        file.extractall(folder)
    return folder


def test_a_recording_of_a_world_is_a_clip_that_passes_every_check(tmp_path: Path) -> None:
    scenario = world_scenario(7, replace(SMALL, height=32, width=48, focal=(0.6, 0.9)))
    loop, _ = started(scenario)
    keys(loop, *"wl")
    loop.apply(SimpleCommand(name="record"))
    keys(loop, "w", ".", "wj", "w")
    loop.set_input(make_input(100, "", 0.004))  # a tap: slower than everything else
    loop.step()
    loop.apply(SimpleCommand(name="stop"))
    folder = unpacked(loop, tmp_path)
    assert check(folder) == [] and check_renders(ClipFolder(folder), share=1.0) == []
    (clip,) = ClipFolder(folder).ids()
    record = ClipFolder(folder).record(clip)
    assert len(record.track) == 21 and record.source == "procedural" and record.pose_kind == "ground_truth"
    assert record.caption == scenario.start.prompt
    inputs = json.loads((folder / "actions.json").read_text())
    assert len(inputs["chunks"]) == 7 and inputs["recorded_from"] == 2
    assert loop.recorded
    (tmp_path / "play.mp4").write_bytes(loop.recorded.mp4())
    assert read_video(tmp_path / "play.mp4")[0].shape == (21, 320, 480, 3)


def test_a_recording_of_a_model_says_whose_terms_it_inherits(model: Model, tmp_path: Path) -> None:
    loop, _ = started(learned(model))
    loop.apply(SimpleCommand(name="record"))
    keys(loop, *"wjs")
    loop.apply(Rewind(chunks=1))
    keys(loop, "d")
    loop.apply(SimpleCommand(name="reset"))  # which ends the recording, too
    assert loop.recorded and not loop.state().recording
    folder = unpacked(loop, tmp_path)
    assert check(folder) == []
    record = ClipFolder(folder).record(ClipFolder(folder).ids()[0])
    assert record.parent_model == "tiny" and record.pose_kind == "commanded" and len(record.track) == 13
    assert (folder / "start.png").exists() and (folder / "camera.json").exists()
    inputs = json.loads((folder / "actions.json").read_text())
    session = Session(ModelEngine(model, start_image(), inputs["prompt"], inputs["seed"]))
    actions = [Action(*chunk["action"]) for chunk in inputs["chunks"]]
    frames = np.concatenate(list(session.play(actions)))
    assert np.array_equal(frames, loop.recorded.views()[0]), "the recorded inputs give the recorded frames"


def test_a_recording_that_grows_too_large_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, reasons = started(painted())
    loop.apply(SimpleCommand(name="record"))
    monkeypatch.setattr("minwm.play.loop.MAX_RECORDING_BYTES", 16 * 16 * 3 * 10)
    keys(loop, *"www")
    assert not loop.state().recording and "was stopped" in reasons[0]
    assert loop.recorded and len(loop.recorded.views()[0]) == 13
