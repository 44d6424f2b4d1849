"""Live play: what is wanted becomes what is seen, at the pace of the screen, and can be recorded and walked again."""

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from playing import MOTION, SMALL, Clock, learned, painted, said, start_image, tiny_model

from minwm.cameras.trajectory import Action
from minwm.core.config import UserError
from minwm.core.media import read_video
from minwm.data.clips import ClipFolder, check
from minwm.data.rerender import check_renders
from minwm.nets.attention import StreamConfig
from minwm.play.game import Begin, Game, model_game, world_game
from minwm.play.pacer import Pacer
from minwm.play.player import Look, Player, nbytes
from minwm.play.protocol import (
    H264,
    H264_KEY,
    JPEG,
    Command,
    Error,
    Header,
    Input,
    Prompt,
    Rewind,
    Seed,
    State,
    Times,
    unpack,
)
from minwm.play.video import WAITING_CHUNKS, Outlet, Packet
from minwm.session.engines import ModelEngine
from minwm.session.session import Session
from minwm.store.model import Model


@pytest.fixture
def model() -> Model:
    return tiny_model()


# ---------------------------------------------------------------------------------------------
# Pace and queue


@pytest.mark.parametrize(("cost", "lead"), [(0.01, 0.01), (0.2, 0.2), (0.45, 0.45), (0.45, 0.3)])
@pytest.mark.parametrize("lag", [0.0, 0.1])
def test_generation_stays_within_one_chunk_of_playback_and_keeps_up(cost: float, lead: float, lag: float) -> None:
    clock, fps, frames = Clock(), 16.0, 8
    pacer = Pacer(fps, frames, clock)
    begun, shows = [], []
    for k in range(40):
        while (wait := pacer.wait()) > 0:
            clock.now += min(wait, 0.01)
            if begun:
                on_screen = int((clock.now - lag - shows[-1]) * fps)  # what the screen shows of the newest chunk
                pacer.shown = (k - 1) * frames + min(on_screen, frames - 1) if on_screen >= 0 else (k - 1) * frames - 1
        if k > 1:
            assert clock.now >= shows[-1], f"chunk {k} is begun before chunk {k - 1} is on the screen"
        begun.append(clock.now)
        clock.now += cost
        pacer.made(k * frames, frames, cost, lead)
        shows.append(pacer.begin)
    gaps = np.diff(begun[20:])
    assert gaps.mean() == pytest.approx(frames / fps, abs=0.01)
    assert min(s - b for s, b in zip(shows[20:], begun[20:], strict=True)) < lead + 0.1, "as late as possible"


def test_generation_waits_for_a_screen_that_lags_but_not_forever() -> None:
    clock = Clock()
    pacer = Pacer(16.0, 8, clock)
    pacer.made(0, 8, 0.01)
    pacer.made(8, 8, 0.01)
    pacer.shown = 6  # still in the chunk before
    clock.now = pacer.end
    assert pacer.wait() == pytest.approx(0.5)
    pacer.shown = 7  # at its end
    assert pacer.wait() <= 0


def packet(serial: int, kind: int = JPEG, view: int = 0, first: bool = False) -> Packet:
    zeros: dict[str, Any] = dict(frame=serial, chunk=serial, seq=0, seed=0, media=0.0, t=0.0)
    header = Header(kind=kind, view=view, first=first, times=Times(), c2w=np.eye(4), **zeros)
    return Packet(serial, header, b"x")


def drain(outlet: Outlet) -> list[Header]:
    taken = []
    while isinstance(message := outlet.pop(), bytes):
        taken.append(unpack(message)[0])
    return taken


def test_a_slow_client_loses_the_oldest_chunk() -> None:
    woken = []
    outlet = Outlet("jpeg", 1, lambda: woken.append(1))
    for serial in range(10):
        for _ in range(3):
            outlet.put(packet(serial))
    left = drain(outlet)
    assert [h.frame for h in left] == [8, 8, 8, 9, 9, 9] and len(woken) == 30
    assert [h.first for h in left] == [True] + 5 * [False], "the client learns that there was a beginning"
    assert len({h.frame for h in left}) == WAITING_CHUNKS


def test_a_beginning_discards_what_waits_in_both_views() -> None:
    outlet = Outlet("jpeg", 2, lambda: None)
    for view in (0, 1):
        outlet.put(packet(1, view=view))
    for view in (0, 1):
        outlet.put(packet(2, view=view, first=True))
    assert [(h.frame, h.view, h.first) for h in drain(outlet)] == [(2, 0, True), (2, 1, True)]


def test_a_slow_h264_client_begins_again_at_a_key_frame() -> None:
    outlet = Outlet("h264", 1, lambda: None)
    outlet.put(packet(0, H264))
    assert outlet.wants_key and not drain(outlet)
    outlet.put(packet(1, H264_KEY))
    assert not outlet.wants_key
    for serial in (1, 2, 3):
        outlet.put(packet(serial, H264))
    assert outlet.wants_key
    outlet.put(packet(4, H264))
    assert not drain(outlet)
    outlet.put(packet(5, H264_KEY))
    assert [(h.frame, h.first) for h in drain(outlet)] == [(5, True)]


def test_texts_go_first_and_only_the_newest_state_counts() -> None:
    outlet = Outlet("jpeg", 1, lambda: None)
    outlet.put(packet(1))
    state = State(paused=False, recording=False, chunk=1, rewind=0, speed=1.0, seed=0, prompt="")
    for chunk in range(5):
        outlet.say(replace(state, chunk=chunk))
    for number in range(100):
        outlet.say(Error(reason=str(number)))
    texts = [json.loads(message) for message in iter(outlet.pop, None) if isinstance(message, str)]
    assert len(texts) <= 16 and texts[-1]["reason"] == "99"


# ---------------------------------------------------------------------------------------------
# The walk, without its thread


class Screen:
    """Collects what a player shows."""

    def __init__(self, player: Player, codec: Any = "jpeg") -> None:
        self.shots: list[tuple[Header, bytes]] = []
        self.outlet = Outlet(codec, len(player.game.views), self.look)
        player.attach(self.outlet)

    def look(self) -> None:
        while (message := self.outlet.pop()) is not None:
            if isinstance(message, bytes):
                self.shots.append(unpack(message))

    @property
    def headers(self) -> list[Header]:
        return [header for header, _ in self.shots]


def started(game: Game, **how: Any) -> tuple[Player, list[str]]:
    reasons: list[str] = []
    player = Player(game, report=lambda reason: reasons.append(reason) if reason else None, **how)
    player.start()
    return player, reasons


def keys(player: Player, *held: str) -> list[np.ndarray]:
    """Play a chunk for each; returns the last frame of every view after each."""
    shown = []
    for text in held:
        seq = player.intent.newest.seq + 1
        player.hear(Input(seq=seq, t=0.0, held=np.array(vector(text)).tolist() and vector(text)))
        player.step()
        shown.append(np.stack([frames[0] for frames in player.trail[-1]]))
    return shown


def vector(text: str) -> tuple[float, float, float, float, float, float]:
    action = Action.of(text)
    return action.move_x, action.move_y, action.move_z, action.yaw, action.pitch, action.roll


def test_the_newest_input_wins_and_every_frame_says_which() -> None:
    player, _ = started(painted())
    screen = Screen(player)
    player.hear(said(1, "s"))
    player.hear(said(2, "w"))
    player.step()
    assert {h.seq for h in screen.headers} == {2} and {h.t for h in screen.headers} == {20.0}
    assert [h.frame for h in screen.headers] == [1, 2, 3, 4] and {h.chunk for h in screen.headers} == {1}
    z = [h.c2w[2, 3] for h in screen.headers]
    assert np.allclose(z, np.arange(1, 5) / MOTION.fps)
    player.hear(said(3, ""))
    late = Screen(player)
    player.obey(Look())
    assert [(h.frame, h.seq, h.first) for h in late.headers] == [(4, 2, True)], "no chunk reflects the third yet"
    assert screen.headers[0].media == pytest.approx(1000 / MOTION.fps) and screen.headers[0].times.encode > 0


def test_the_first_frames_of_a_chunk_are_shown_before_the_last_are_drawn(model: Model) -> None:
    """And the next chunk is begun as late as they allow, and those after them: a latent here takes 0.1 s to draw."""
    clock = Clock()
    player, _ = started(
        learned(replace(model, config=replace(model.config, stream=StreamConfig(chunk=2, first_chunk=1, window=2)))),
        clock=clock,
    )
    (session,), left = player.sessions, []
    decode, screen = session.engine.decode, Screen(player)  # type: ignore[attr-defined]
    slow = lambda *args: (setattr(clock, "now", clock.now + 0.1), decode(*args))[1]  # noqa: E731
    session.engine.decode = slow  # type: ignore[attr-defined]
    screen.outlet.wake = lambda: (screen.look(), left.append((len(screen.shots), round(clock.now - 100, 3))))
    player.hear(said(1, "w"))
    player.step()
    assert left[3] == (4, 0.1) and left[-1] == (8, 0.2)
    assert [h.frame for h in screen.headers] == [*range(1, 9)] and {h.chunk for h in screen.headers} == {1}
    assert np.allclose([h.c2w[2, 3] for h in screen.headers], np.arange(1, 9) / MOTION.fps)
    assert (*player.pacer.costs, *player.pacer.leads) == pytest.approx((0.2, 0.2 - 4 / MOTION.fps))


def test_rewinding_and_walking_again_shows_the_same_frames(model: Model) -> None:
    player, _ = started(learned(model))
    before = keys(player, *"wjdw")
    screen = Screen(player)
    player.obey(Rewind(chunks=2))
    assert len(player.played) == 2 and player.state().rewind == 2
    (shown,) = screen.headers
    assert shown.first and shown.chunk == 2 and shown.frame == 8
    again = keys(player, *"dw")
    assert all(np.array_equal(a, b) for a, b in zip(before[2:], again, strict=True))
    player.obey(Command(name="branch"))
    assert len(player.played) == 2
    assert not np.array_equal(keys(player, "s")[0], again[0])


def test_replaying_shows_the_same_frames_whatever_was_edited(model: Model) -> None:
    player, reasons = started(learned(model))
    player.obey(Prompt(text="a blue hall"))
    first = keys(player, *"wj")
    player.obey(Prompt(text="a red tower"))
    first += keys(player, "d")
    assert player.state().prompt == "a red tower"
    player.obey(Command(name="replay"))
    again = keys(player, *"sss")
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert player.paused and not reasons and player.state().prompt == "a red tower"
    session = Session(ModelEngine(model, start_image(), "a red room", 3))  # and without any player
    session.start()
    frames = []
    for played in player.played:
        session.engine.set_prompt(played.prompt)  # type: ignore[attr-defined]
        frames.append(session.step(played.action)[-1])
    assert all(np.array_equal(a[0], b) for a, b in zip(first, frames, strict=True))


def test_the_prompt_the_seed_and_the_picture_matter(model: Model) -> None:
    def last(*orders: Any) -> np.ndarray:
        player, reasons = started(learned(model))
        for order in orders:
            player.obey(order)
        assert not reasons
        return keys(player, *"ww")[-1]

    plain = last()
    assert np.array_equal(plain, last())
    assert np.array_equal(plain, last(Seed(value=4), Seed(value=3)))
    assert not np.array_equal(plain, last(Prompt(text="a blue hall")))
    assert not np.array_equal(plain, last(Seed(value=4)))


def test_orders_that_cannot_be_obeyed_are_explained_and_change_nothing(model: Model) -> None:
    player, reasons = started(learned(model))
    before = keys(player, "w")
    for order in (
        Prompt(text="word " * 40),
        Rewind(chunks=2),
        Command(name="branch"),
    ):
        player.obey(order)
    assert ["25" in reasons[0] or "40 words" in reasons[0], "cannot rewind 2" in reasons[1], "branch" in reasons[2]]
    assert all(reasons) and len(reasons) == 3 and player.state().prompt == "a red room"
    player.obey(Command(name="replay"))
    assert np.array_equal(before, keys(player, "s"))


def test_both_views_walk_in_step(model: Model) -> None:
    game = model_game(model, "tiny", Begin(prompt="a room", image=start_image()), other=model)
    player, _ = started(game)
    screen = Screen(player)
    for shot in keys(player, *"wjd"):
        assert np.array_equal(*shot), "the same model, the same inputs"
    pairs = list(zip(screen.headers[::2], screen.headers[1::2], strict=True))
    assert [(a.view, b.view) for a, b in pairs] == [(0, 1)] * len(pairs)
    assert all((a.frame, a.seq) == (b.frame, b.seq) and np.array_equal(a.c2w, b.c2w) for a, b in pairs)
    player.obey(Rewind(chunks=2))
    assert np.array_equal(*keys(player, "i")[0])
    other = replace(model, config=replace(model.config, motion=replace(model.config.motion, fps=8.0)))
    with pytest.raises(UserError, match="motion is"):
        model_game(model, "tiny", Begin(), other=other)


def test_the_past_is_bounded_by_number_and_by_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    player, _ = started(learned(model), rewind=3)
    keys(player, *"wjdsw")
    assert player.state().rewind == 3 and len(player.trail) == 4
    size = nbytes(player.sessions[0].past[-1][1])
    assert size > 1000
    monkeypatch.setattr("minwm.play.player.REWIND_BYTES", 2 * size)
    keys(player, "w")
    assert player.state().rewind == 2
    player.obey(Rewind(chunks=2))
    assert player.state().rewind == 0


def test_h264_can_be_decoded_from_every_beginning() -> None:
    player, _ = started(painted())
    early = Screen(player, "h264")
    keys(player, "w")
    late = Screen(player, "h264")
    keys(player, "w", "w")
    player.obey(Command(name="reset"))
    keys(player, "d")
    for screen in (early, late):
        kinds = [h.kind for h in screen.headers]
        assert kinds[0] == H264_KEY
        assert [h.kind for h in screen.headers if h.first] == [H264_KEY] * 2, "joining, and the reset"
        decoder = av.CodecContext.create("h264", "r")
        frames = [f for _, payload in screen.shots for f in decoder.decode(av.Packet(payload))]  # type: ignore
        frames += decoder.decode(None)  # type: ignore
        assert len(frames) == len(kinds)
        red = [f.to_ndarray(format="rgb24")[..., 0].mean() for f in frames]
        assert red[-1] == pytest.approx(128 + 40 / 16, abs=3)


# ---------------------------------------------------------------------------------------------
# Recordings


def unpacked(player: Player, folder: Path) -> Path:
    assert player.recorded
    with zipfile.ZipFile(io.BytesIO(player.recorded.clip())) as file:
        file.extractall(folder)
    return folder


def test_a_recording_of_a_world_is_a_clip_that_passes_every_check(tmp_path: Path) -> None:
    game = world_game(7, replace(SMALL, height=32, width=48, focal=(0.6, 0.9)))
    player, _ = started(game)
    keys(player, *"wl")
    player.obey(Command(name="record"))
    keys(player, "w", ".", "wj", "w")
    player.hear(said(100, "", 0.004))  # a tap: slower than everything else
    player.step()
    player.obey(Command(name="stop"))
    folder = unpacked(player, tmp_path)
    assert check(folder) == [] and check_renders(ClipFolder(folder), share=1.0) == []
    (clip,) = ClipFolder(folder).ids()
    record = ClipFolder(folder).record(clip)
    assert len(record.track) == 21 and record.source == "procedural" and record.pose_kind == "ground_truth"
    assert record.caption == game.begin.prompt
    inputs = json.loads((folder / "actions.json").read_text())
    assert len(inputs["chunks"]) == 7 and inputs["recorded_from"] == 2
    assert player.recorded
    (tmp_path / "walk.mp4").write_bytes(player.recorded.mp4())
    assert read_video(tmp_path / "walk.mp4")[0].shape == (21, 320, 480, 3)


def test_a_recording_of_a_model_says_whose_terms_it_inherits(model: Model, tmp_path: Path) -> None:
    player, _ = started(learned(model))
    player.obey(Command(name="record"))
    keys(player, *"wjs")
    player.obey(Rewind(chunks=1))
    keys(player, "d")
    player.obey(Command(name="reset"))  # which ends the recording, too
    assert player.recorded and not player.state().recording
    folder = unpacked(player, tmp_path)
    assert check(folder) == []
    record = ClipFolder(folder).record(ClipFolder(folder).ids()[0])
    assert record.parent_model == "tiny" and record.pose_kind == "commanded" and len(record.track) == 13
    assert (folder / "start.png").exists() and (folder / "camera.json").exists()
    inputs = json.loads((folder / "actions.json").read_text())
    session = Session(ModelEngine(model, start_image(), inputs["prompt"], inputs["seed"]))
    actions = [Action(*chunk["action"]) for chunk in inputs["chunks"]]
    walked = np.concatenate(list(session.play(actions)))
    assert np.array_equal(walked, player.recorded.views()[0]), "the recorded inputs give the recorded frames"


def test_a_recording_that_grows_too_large_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    player, reasons = started(painted())
    player.obey(Command(name="record"))
    monkeypatch.setattr("minwm.play.player.RECORDING_BYTES", 16 * 16 * 3 * 10)
    keys(player, *"www")
    assert not player.state().recording and "was stopped" in reasons[0]
    assert player.recorded and len(player.recorded.views()[0]) == 13
