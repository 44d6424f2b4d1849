"""The generation loop of live play: one rollout, all views in lockstep, chunk by chunk at the pace of playback.

Only the thread of `run` changes the rollout, between two chunks. Other threads set the input, submit commands, attach
send queues and read `state`.
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
from torch.utils._pytree import tree_leaves

from minwm.cameras.trajectory import integrate_actions
from minwm.core.config import UserError
from minwm.play.inputs import InputAccumulator
from minwm.play.protocol import (
    Capabilities,
    Command,
    Header,
    Input,
    Prompt,
    Rewind,
    Seed,
    SimpleCommand,
    Speed,
    State,
    Times,
)
from minwm.play.recording import ChunkInput, Recording
from minwm.play.scenario import Scenario, StartState, with_caption
from minwm.play.scheduler import ChunkScheduler
from minwm.play.send_queue import Codec, Encoder, Packet, SendQueue
from minwm.session.engines import ModelEngine
from minwm.session.session import Session

MAX_SNAPSHOT_BYTES = 4 << 30
"""Memory for the rewind snapshots of one view; beyond it the oldest are dropped."""
MAX_RECORDING_BYTES = 1 << 30
MAX_QUEUED_COMMANDS = 32
NO_IMAGE = "this model or world does not start from an image"

Frames = UInt8[np.ndarray, "n h w 3"]


@dataclass(frozen=True)
class StartImage:
    """A command: restart from this image."""

    image: UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class ResendFrame:
    """A command: send the newest frame again, for a client that has just joined."""


AnyCommand = Command | StartImage | ResendFrame


class PlayLoop:
    """Generates one rollout at a time. `run` blocks until `close`, and raises what the engines raise."""

    def __init__(
        self,
        scenario: Scenario,
        rewind: int = 60,
        on_state: Callable[[], object] = lambda: None,
        on_error: Callable[[str], object] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`rewind`: chunks that can be undone. From the loop's thread, `on_state` is called when `state` has changed,
        `on_error` with the reason why a command failed."""
        self.scenario, self.rewind, self.clock = scenario, rewind, clock
        self.on_state, self.on_error = on_state, on_error
        self.motion = scenario.config.motion
        self.frames = scenario.config.stream.chunk * self.motion.stride  # per chunk
        self.lock = threading.Condition()
        self.accumulator, self.input_arrived = InputAccumulator(self.motion), 0.0
        self.chunk_input = Input()  # the newest input when the newest chunk started
        self.scheduler = ChunkScheduler(self.motion.fps, self.frames, clock)
        self.commands: deque[AnyCommand] = deque()
        self.queues: tuple[SendQueue, ...] = ()
        self.encoders: dict[tuple[Codec, int], Encoder] = {}
        self.closed = self.paused = False
        self.start_state = self.next_start = scenario.start  # of this rollout, and of the next: the prompt may differ
        self.prompt = scenario.start.prompt  # that the engines have now
        self.serial = self.frame_count = 0  # chunks sent since construction; frames since the start
        self.sessions: list[Session] = []
        self.inputs: list[ChunkInput] = []  # of every chunk since the start
        self.last_frames: deque[list[Frames]] = deque(maxlen=rewind + 1)  # of each chunk and view
        self.replay: deque[ChunkInput] | None = None  # chunk inputs still to be replayed
        self.fork: int | None = None  # the chunk to which the last rewind went
        self.recording: Recording | None = None
        self.recorded: Recording | None = None

    # -----------------------------------------------------------------------------------------
    # Any thread

    def set_input(self, new: Input) -> None:
        with self.lock:
            self.accumulator.add(new, self.scheduler.rate)
            self.input_arrived = self.clock()

    def reset_input(self, joined: bool = True) -> None:
        """Release all axes: the player left, or another one starts, who has just `joined` or was a spectator before."""
        with self.lock:
            self.accumulator.reset(Input() if joined else None)
            self.scheduler.shown, self.chunk_input = None, Input()

    def set_shown(self, frame: int) -> None:
        """The player's page displays this frame."""
        with self.lock:
            self.scheduler.shown = frame
            self.lock.notify()

    def submit(self, command: AnyCommand) -> None:
        """Queue a command. Raises UserError if too many are queued."""
        with self.lock:
            if len(self.commands) >= MAX_QUEUED_COMMANDS:
                raise UserError(f"{MAX_QUEUED_COMMANDS} commands are queued already; wait until they are applied")
            self.commands.append(command)
            self.lock.notify()

    def attach(self, queue: SendQueue) -> None:
        """Send all frames to this queue from now on, the newest one first."""
        with self.lock:
            self.queues = (*self.queues, queue)
            self.commands.append(ResendFrame())
            self.lock.notify()

    def detach(self, queue: SendQueue) -> None:
        with self.lock:
            self.queues = tuple(other for other in self.queues if other is not queue)

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.lock.notify()

    @property
    def capabilities(self) -> Capabilities:
        scenario = self.scenario
        return Capabilities(
            camera=scenario.takes_camera,
            prompt=scenario.takes_prompt,
            image=scenario.takes_image,
            rewind=self.rewind,
        )

    def state(self) -> State:
        return State(
            paused=self.paused,
            recording=self.recording is not None,
            chunk=len(self.inputs),
            rewind=min((len(session.past) for session in self.sessions), default=0),
            speed=self.scheduler.speed,
            seed=self.next_start.seed,
            prompt=self.next_start.prompt,
        )

    # -----------------------------------------------------------------------------------------
    # The loop's thread

    def run(self) -> None:
        self.start()
        while not self.closed:
            command = self._wait()
            if command is not None:
                self.apply(command)
            elif not self.closed:
                self.step()

    def _wait(self) -> AnyCommand | None:
        """The next command; None when a chunk is due. Without clients no chunk is due."""
        with self.lock:
            while not self.closed:
                if self.commands:
                    return self.commands.popleft()
                due = None if self.paused or not self.queues else self.scheduler.wait()
                if due is not None and due <= 0:
                    return None
                self.lock.wait(due)
        return None

    def start(self, start: StartState | None = None) -> None:
        """Start a rollout, from `next_start` by default. Raises UserError, and changes nothing, if that is invalid."""
        start = start or self.next_start
        if start is not self.start_state or self.prompt != start.prompt or not self.sessions:
            engines = self.scenario.engines(start)
            self.sessions = [Session(engine, history=self.rewind) for engine in engines]
            start = with_caption(start, engines[0])
        self._stop_recording()
        self.start_state = self.next_start = start
        self.prompt, self.frame_count = start.prompt, 0
        self.inputs, self.replay, self.fork = [], None, None
        views = [session.start() for session in self.sessions]
        self.last_frames.clear()
        self.last_frames.append([frames[-1:].copy() for frames in views])
        self._restart_clock()
        self.serial += 1
        self._send(views, np.tile(np.eye(4), (len(views[0]), 1, 1)), 0.0, flush=True)
        self._update_caches()
        self.scheduler.chunk_done(0, self.frame_count)

    def step(self) -> None:
        """Generate and send one chunk."""
        started = self.clock()
        with self.lock:
            self.chunk_input = self.accumulator.newest
            queued = max(0.0, started - self.input_arrived) if self.input_arrived else 0.0
            self.input_arrived = 0.0
            if self.replay:
                chunk = self.replay.popleft()
            else:
                chunk = ChunkInput(self.accumulator.take(self.frames / self.motion.fps), self.next_start.prompt)
        if chunk.prompt != self.prompt:
            self._set_prompt(chunk.prompt)
        poses = integrate_actions(self.sessions[0].pose, [chunk.action] * self.frames, self.motion)
        self.inputs.append(chunk)
        self.serial += 1
        first, delay, made = self.frame_count, 0.0, []
        for parts in zip(*(session.step_by_latent(chunk.action) for session in self.sessions), strict=True):
            done = self.frame_count - first
            self._send(parts, poses[done : done + len(parts[0])], 1000 * queued)
            made.append(parts)
            delay = max(delay, self.clock() - started - done / (self.motion.fps * self.scheduler.speed))
        self.last_frames.append([frames[-1:].copy() for frames in made[-1]])
        with self.lock:
            self.scheduler.chunk_done(first, self.frames, self.clock() - started, delay)
        self._update_caches()
        if self.recording:
            self.recording.parts.append((poses, [np.concatenate(parts) for parts in zip(*made, strict=True)]))
            if self.recording.nbytes > MAX_RECORDING_BYTES:
                self._stop_recording()
                self.on_error(f"the recording has reached {MAX_RECORDING_BYTES >> 20} MiB and was stopped")
        if self.replay is not None and not self.replay:
            self.replay, self.paused = None, True
        self.on_state()

    def _update_caches(self) -> None:
        """Work that the frames need not wait for: write the KV caches, and drop snapshots beyond the memory limit."""
        for session in self.sessions:
            session.engine.update_cache()
            while sum(nbytes(snapshot) for _, snapshot in session.past) > MAX_SNAPSHOT_BYTES:
                session.past.popleft()

    def _send(
        self, views: Sequence[Frames], poses: Float[np.ndarray, "n 4 4"], queued: float, flush: bool = False
    ) -> None:
        """Encode frames of the current chunk once per codec and put them into the send queues. `queued`: ms."""
        codecs: set[Codec] = {queue.codec for queue in self.queues}
        timings = [session.engine.timer.seconds for session in self.sessions]
        stages = [{name: 1000 * stage.get(name, 0.0) for name in ("diffuse", "decode", "copy")} for stage in timings]
        for i, pose in enumerate(poses):
            for view, frames in enumerate(views):
                for codec in codecs:
                    queues = [queue for queue in self.queues if queue.codec == codec]
                    started = time.perf_counter()
                    key = (flush and i == 0) or any(queue.needs_key_frame for queue in queues)
                    kind, payload = self._encoder(codec, view)(frames[i], key)
                    encode = 1000 * (time.perf_counter() - started)
                    header = Header(
                        kind=kind,
                        view=view,
                        flush=flush and i == 0,
                        frame=self.frame_count,
                        chunk=len(self.inputs),
                        seq=self.chunk_input.seq,
                        seed=self.next_start.seed,
                        media=1000 * self.frame_count / self.motion.fps,
                        t=self.chunk_input.t,
                        times=Times(queue=queued, encode=encode, **stages[view]),
                        c2w=pose,
                    )
                    for queue in queues:
                        queue.put_frame(Packet(self.serial, header, payload))
            self.frame_count += 1

    def _encoder(self, codec: Codec, view: int) -> Encoder:
        config = self.scenario.config
        if (codec, view) not in self.encoders:
            self.encoders[codec, view] = Encoder(codec, config.height, config.width, self.motion.fps)
        return self.encoders[codec, view]

    def _resend_frame(self, flush: bool) -> None:
        self.frame_count -= 1
        self.serial += 1
        self._send(self.last_frames[-1], self.sessions[0].pose[None], 0.0, flush)

    # -----------------------------------------------------------------------------------------
    # Commands

    def apply(self, command: AnyCommand) -> None:
        """Apply a command, or report why it fails; a command that fails changes nothing."""
        try:
            self._apply(command)
        except UserError as error:
            self.on_error(str(error))
        self.on_state()

    def _apply(self, command: AnyCommand) -> None:
        match command:
            case ResendFrame():
                self._resend_frame(flush=False)
            case Rewind(chunks=chunks):
                self._rewind(chunks)
            case Seed(value=value):
                self.start(replace(self.next_start, seed=value))
            case Speed(value=value):
                self.scheduler.speed = value
            case Prompt(text=text):
                if not self.scenario.takes_prompt:
                    raise UserError("a rendered world takes no prompt")
                self._set_prompt(" ".join(text.split()))
            case StartImage(image=image):
                if not self.scenario.takes_image:
                    raise UserError(NO_IMAGE)
                self.start(replace(self.next_start, image=image, video=None))
            case SimpleCommand(name=name):
                self._apply_simple(name)

    def _apply_simple(self, name: str) -> None:
        match name:
            case "pause":
                self.paused = True
            case "resume":
                self.paused = False
                self._restart_clock()
            case "step":
                self.paused = True
                self.step()
            case "reset":
                self.start()
            case "replay":
                replay = deque(self.inputs)
                if not replay:
                    raise UserError("nothing to replay: no chunk was generated since the start")
                self.start(self.start_state)
                self.replay, self.paused = replay, False
            case "branch":
                if self.fork is None or self.fork >= len(self.inputs):
                    raise UserError("branch returns to where the last rewind went: rewind first, then move on")
                self._rewind(len(self.inputs) - self.fork)
            case "record":
                if not self.recording:
                    newest = [(self.sessions[0].pose[None], self.last_frames[-1])]
                    engine, first_chunk = self.sessions[0].engine, len(self.inputs)
                    self.recording = Recording(self.scenario, self.start_state, engine, first_chunk, newest)
            case "stop":
                self._stop_recording()

    def _restart_clock(self) -> None:
        """Drop unapplied input, and start the next chunk at once."""
        with self.lock:
            self.accumulator.clear()
            self.scheduler.restart()

    def _rewind(self, chunks: int) -> None:
        if chunks > self.state().rewind:
            raise UserError(f"cannot rewind {chunks} chunks: {self.state().rewind} are kept")
        for session in self.sessions:
            session.rewind(chunks)
        del self.inputs[-chunks:]
        for _ in range(chunks):
            self.last_frames.pop()
        self.frame_count -= chunks * self.frames
        self.replay, self.fork = None, len(self.inputs)
        if self.recording:
            if len(self.recording.parts) <= chunks:
                self.recording = None
            else:
                del self.recording.parts[-chunks:]
        self._restart_clock()
        self._resend_frame(flush=True)

    def _set_prompt(self, prompt: str) -> None:
        """Set the prompt of the next chunks, and of later starts."""
        for session in self.sessions:
            if isinstance(session.engine, ModelEngine):
                session.engine.set_prompt(prompt)
        self.prompt, self.next_start = prompt, replace(self.next_start, prompt=prompt)

    def _stop_recording(self) -> None:
        """End the recording, if there is one; keep it if it has a chunk."""
        if self.recording and len(self.recording.parts) > 1:
            self.recorded = replace(self.recording, inputs=tuple(self.inputs))
        self.recording = None


def nbytes(snapshot: Any) -> int:
    """Bytes of all tensors in a nested container."""
    return sum(leaf.nbytes for leaf in tree_leaves(snapshot) if isinstance(leaf, Tensor))
