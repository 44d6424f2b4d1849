"""One walk: engines in lockstep, stepped by one thread at the pace of the screen.

Everything that changes the walk happens in that thread, between two chunks. Other threads say what is wanted
(`hear`, `order`), attach outlets, and read `state`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from minwm.cameras.trajectory import drive
from minwm.core.config import UserError
from minwm.play.game import Begin, Game, reworded
from minwm.play.intent import Intent
from minwm.play.pacer import Pacer
from minwm.play.protocol import Can, Command, Header, Input, Order, Prompt, Rewind, Seed, Speed, State, Times
from minwm.play.recording import Played, Recording
from minwm.play.video import Codec, Encoder, Outlet, Packet
from minwm.session.engines import ModelEngine
from minwm.session.session import Session

REWIND_BYTES = 4 << 30
"""Memory for the snapshots of one view; beyond it the oldest go, whatever number was asked for."""
RECORDING_BYTES = 1 << 30
WAITING_ORDERS = 32

Frames = UInt8[np.ndarray, "n h w 3"]


@dataclass(frozen=True)
class Picture:
    """An order: begin anew from this picture."""

    image: UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class Look:
    """An order: show where we are, to those who have just come."""


class Player:
    """`run` in a thread of its own until `close`; its exceptions are those of the engines."""

    def __init__(
        self,
        game: Game,
        rewind: int = 60,
        report: Callable[[str | None], object] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`report` is called with what an order failed of, and with None when the state has changed."""
        self.game, self.rewind, self.report, self.clock = game, rewind, report, clock
        self.motion, self.frames = game.config.motion, game.config.stream.chunk * game.config.motion.stride
        self.seconds = self.frames / self.motion.fps
        self.lock = threading.Condition()
        self.intent, self.arrived = Intent(self.motion), 0.0
        self.said = Input()  # what the newest chunk reflects
        self.pacer = Pacer(self.motion.fps, self.frames, clock)
        self.orders: deque[Order | Picture | Look] = deque()
        self.outlets: tuple[Outlet, ...] = ()
        self.encoders: dict[tuple[Codec, int], Encoder] = {}
        self.closed = self.paused = False
        self.begin = self.walked_from = game.begin
        """What the next walk begins with, and what this one did."""
        self.prompt = game.begin.prompt  # as the engines have read it
        self.serial = self.count = 0  # chunks published; frames walked
        self.sessions: list[Session] = []
        self.played: list[Played] = []
        self.trail: deque[list[Frames]] = deque(maxlen=rewind + 1)  # the last frame of each chunk, for rewinding
        self.script: deque[Played] | None = None  # inputs that are replayed
        self.fork: int | None = None  # the chunk to which the last rewind went
        self.recording: Recording | None = None
        self.recorded: Recording | None = None

    # -----------------------------------------------------------------------------------------
    # Any thread

    def hear(self, said: Input) -> None:
        with self.lock:
            self.intent.hear(said, self.pacer.rate)
            self.arrived = self.clock()

    def release(self, joined: bool = True) -> None:
        """The player has gone, or another one begins, who has just joined or has been watching."""
        with self.lock:
            self.intent.release(Input() if joined else None)
            self.pacer.shown, self.said = None, Input()

    def shown(self, frame: int) -> None:
        with self.lock:
            self.pacer.shown = frame
            self.lock.notify()

    def order(self, order: Order | Picture | Look) -> None:
        """Raises UserError if too many wait."""
        with self.lock:
            if len(self.orders) >= WAITING_ORDERS:
                raise UserError(f"{WAITING_ORDERS} commands are waiting; wait for them")
            self.orders.append(order)
            self.lock.notify()

    def attach(self, outlet: Outlet) -> None:
        with self.lock:
            self.outlets = (*self.outlets, outlet)
            self.orders.append(Look())
            self.lock.notify()

    def detach(self, outlet: Outlet) -> None:
        with self.lock:
            self.outlets = tuple(other for other in self.outlets if other is not outlet)

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.lock.notify()

    @property
    def can(self) -> Can:
        return Can(prompt=self.game.takes_prompt, image=self.game.takes_image, rewind=self.rewind)

    def state(self) -> State:
        return State(
            paused=self.paused,
            recording=self.recording is not None,
            chunk=len(self.played),
            rewind=min((len(session.past) for session in self.sessions), default=0),
            speed=self.pacer.speed,
            seed=self.begin.seed,
            prompt=self.begin.prompt,
        )

    # -----------------------------------------------------------------------------------------
    # The thread of the walk

    def run(self) -> None:
        self.start()
        while not self.closed:
            order = self._next()
            if order is not None:
                self.obey(order)
            elif not self.closed:
                self.step()

    def _next(self) -> Order | Picture | Look | None:
        """The next order; None when a chunk is due. While nobody looks, nothing is made."""
        with self.lock:
            while not self.closed:
                if self.orders:
                    return self.orders.popleft()
                due = None if self.paused or not self.outlets else self.pacer.wait()
                if due is not None and due <= 0:
                    return None
                self.lock.wait(due)
        return None

    def start(self, begin: Begin | None = None) -> None:
        """Begin anew: with what the last walk began with, or otherwise. UserError leaves all as it was."""
        begin = begin or self.begin
        if begin is not self.walked_from or self.prompt != begin.prompt or not self.sessions:
            engines = self.game.engines(begin)
            self.sessions = [Session(engine, history=self.rewind) for engine in engines]
            begin = reworded(begin, engines[0])
        self._stop()
        self.begin = self.walked_from = begin
        self.prompt, self.count = begin.prompt, 0
        self.played, self.script, self.fork = [], None, None
        views = [session.start() for session in self.sessions]
        self.trail.clear()
        self.trail.append([frames[-1:].copy() for frames in views])
        with self.lock:
            self.intent.forget()
            self.pacer.restart()
        self.serial += 1
        self._publish(views, np.tile(np.eye(4), (len(views[0]), 1, 1)), 0.0, first=True)
        self._settle()
        self.pacer.made(0, self.count)

    def step(self) -> None:
        """One chunk."""
        began = self.clock()
        with self.lock:
            self.said, queued = self.intent.newest, max(0.0, began - self.arrived) if self.arrived else 0.0
            self.arrived = 0.0
            played = self.script.popleft() if self.script else Played(self.intent.take(self.seconds), self.begin.prompt)
        if played.prompt != self.prompt:
            self._reword(played.prompt)
        poses = drive(self.sessions[0].pose, [played.action] * self.frames, self.motion)
        self.played.append(played)
        self.serial += 1
        first, lead, made = self.count, 0.0, []
        for parts in zip(*(session.step_by_latent(played.action) for session in self.sessions), strict=True):
            done = self.count - first
            self._publish(parts, poses[done : done + len(parts[0])], 1000 * queued)
            made.append(parts)
            lead = max(lead, self.clock() - began - done / (self.motion.fps * self.pacer.speed))
        self.trail.append([frames[-1:].copy() for frames in made[-1]])
        with self.lock:
            self.pacer.made(first, self.frames, self.clock() - began, lead)
        self._settle()
        if self.recording:
            self.recording.parts.append((poses, [np.concatenate(parts) for parts in zip(*made, strict=True)]))
            if self.recording.nbytes > RECORDING_BYTES:
                self._stop()
                self.report(f"the recording has reached {RECORDING_BYTES >> 20} MiB, and was stopped")
        if self.script is not None and not self.script:
            self.script, self.paused = None, True
        self.report(None)

    def _settle(self) -> None:
        """What can be done while the frames are on their way; and forget snapshots that take too much memory."""
        for session in self.sessions:
            session.engine.update_cache()
            while sum(nbytes(snapshot) for _, snapshot in session.past) > REWIND_BYTES:
                session.past.popleft()

    def _publish(
        self, views: Sequence[Frames], poses: Float[np.ndarray, "n 4 4"], queue: float, first: bool = False
    ) -> None:
        """Encode frames of the current chunk for everyone who looks, and hand them over one by one."""
        codecs: set[Codec] = {outlet.codec for outlet in self.outlets}
        laps = [session.engine.timer.seconds for session in self.sessions]
        stages = [{name: 1000 * lap.get(name, 0.0) for name in ("diffuse", "decode", "copy")} for lap in laps]
        for i, pose in enumerate(poses):
            for view, frames in enumerate(views):
                for codec in codecs:
                    outlets = [outlet for outlet in self.outlets if outlet.codec == codec]
                    began = time.perf_counter()
                    key = (first and i == 0) or any(outlet.wants_key for outlet in outlets)
                    kind, payload = self._encoder(codec, view)(frames[i], key)
                    encode = 1000 * (time.perf_counter() - began)
                    header = Header(
                        kind=kind,
                        view=view,
                        first=first and i == 0,
                        frame=self.count,
                        chunk=len(self.played),
                        seq=self.said.seq,
                        seed=self.begin.seed,
                        media=1000 * self.count / self.motion.fps,
                        t=self.said.t,
                        times=Times(queue=queue, encode=encode, **stages[view]),
                        c2w=pose,
                    )
                    for outlet in outlets:
                        outlet.put(Packet(self.serial, header, payload))
            self.count += 1

    def _encoder(self, codec: Codec, view: int) -> Encoder:
        config = self.game.config
        if (codec, view) not in self.encoders:
            self.encoders[codec, view] = Encoder(codec, config.height, config.width, self.motion.fps)
        return self.encoders[codec, view]

    def _here(self, first: bool) -> None:
        """Show again where we are."""
        self.count -= 1
        self.serial += 1
        self._publish(self.trail[-1], self.sessions[0].pose[None], 0.0, first)

    # -----------------------------------------------------------------------------------------
    # Orders

    def obey(self, order: Order | Picture | Look) -> None:
        """Carry out an order, or report why not."""
        try:
            self._carry_out(order)
        except UserError as error:
            self.report(str(error))
        self.report(None)

    def _carry_out(self, order: Order | Picture | Look) -> None:
        match order:
            case Look():
                self._here(first=False)
            case Rewind(chunks=chunks):
                self._rewind(chunks)
            case Seed(value=value):
                self.start(replace(self.begin, seed=value))
            case Speed(value=value):
                self.pacer.speed = value
            case Prompt(text=text):
                if not self.game.takes_prompt:
                    raise UserError("this game has no prompt")
                self._reword(" ".join(text.split()))
            case Picture(image=image):
                if not self.game.takes_image:
                    raise UserError("this game does not begin with a picture")
                self.start(replace(self.begin, image=image))
            case Command(name=name):
                self._command(name)

    def _command(self, name: str) -> None:
        match name:
            case "pause":
                self.paused = True
            case "resume":
                self.paused = False
                self._resume()
            case "step":
                self.paused = True
                self.step()
            case "reset":
                self.start()
            case "replay":
                script = deque(self.played)
                if not script:
                    raise UserError("nothing was played yet that could be replayed")
                self.start(self.walked_from)
                self.script, self.paused = script, False
            case "branch":
                if self.fork is None or self.fork >= len(self.played):
                    raise UserError("branch goes back to where the last rewind went; rewind first, and walk on")
                self._rewind(len(self.played) - self.fork)
            case "record":
                if not self.recording:
                    here = [(self.sessions[0].pose[None], self.trail[-1])]
                    at = len(self.played)
                    self.recording = Recording(self.game, self.walked_from, self.sessions[0].engine, at, here)
            case "stop":
                self._stop()

    def _resume(self) -> None:
        with self.lock:
            self.intent.forget()
            self.pacer.restart()

    def _rewind(self, chunks: int) -> None:
        if chunks > self.state().rewind:
            raise UserError(f"cannot rewind {chunks} chunks: {self.state().rewind} are kept")
        for session in self.sessions:
            session.rewind(chunks)
        del self.played[-chunks:]
        for _ in range(chunks):
            self.trail.pop()
        self.count -= chunks * self.frames
        self.script, self.fork = None, len(self.played)
        if self.recording:
            if len(self.recording.parts) <= chunks:
                self.recording = None
            else:
                del self.recording.parts[-chunks:]
        self._resume()
        self._here(first=True)

    def _reword(self, prompt: str) -> None:
        """Another prompt for the chunks that follow, and for walks that begin later."""
        for session in self.sessions:
            if isinstance(session.engine, ModelEngine):
                session.engine.set_prompt(prompt)
        self.prompt, self.begin = prompt, replace(self.begin, prompt=prompt)

    def _stop(self) -> None:
        """End the recording, if there is one, and keep it if it holds a chunk."""
        if self.recording and len(self.recording.parts) > 1:
            self.recorded = replace(self.recording, played=tuple(self.played))
        self.recording = None


def nbytes(snapshot: Any) -> int:
    """Bytes of all tensors in nested tuples."""
    if isinstance(snapshot, Tensor):
        return snapshot.nbytes
    return sum(map(nbytes, snapshot)) if isinstance(snapshot, tuple | list) else 0
