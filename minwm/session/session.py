"""Sessions: an engine steered by actions, and `walk`, which starts one from a model."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minwm.cameras.trajectory import Action, integrate_actions
from minwm.core.config import UserError
from minwm.core.media import read_image, resize_and_crop
from minwm.session.engines import Engine, Frames, ModelEngine, Pose
from minwm.session.start import StartVideo
from minwm.session.views import known_views
from minwm.store.model import Model


@dataclass
class Session:
    """An engine and the pose of its camera. `step` blocks for one chunk; `rewind` undoes steps."""

    engine: Engine
    pose: Pose = field(default_factory=lambda: np.eye(4))
    """Camera-to-world relative to the first frame, float64."""
    history: int | None = None
    """Steps that can be undone; None: all, and the memory of their snapshots grows with every step."""
    past: deque[tuple[Pose, Any]] = field(default_factory=deque, init=False)
    """Pose and engine snapshot before each of those steps."""

    def start(self) -> Frames:
        """The first frame; pose and history are reset."""
        self.pose, self.past = np.eye(4), deque(maxlen=self.history)
        return self.engine.start()

    def step(self, action: Action) -> Frames:
        """Hold an action for one chunk: chunk * stride frames."""
        return np.concatenate(list(self.step_by_latent(action)))

    def step_by_latent(self, action: Action) -> Iterator[Frames]:
        """The same, latent by latent, so that the first frames are shown before the last are decoded. The iterator must
        be exhausted."""
        self.past.append((self.pose, self.engine.snapshot()))
        frames = self.engine.chunk * self.engine.motion.stride
        c2w = integrate_actions(self.pose, [action] * frames, self.engine.motion)
        self.pose = c2w[-1]
        yield from self.engine.advance(c2w)

    def play(self, actions: list[Action]) -> Iterator[Frames]:
        """The first frame, then the frames of every action."""
        yield self.start()
        for action in actions:
            yield self.step(action)

    def rewind(self, steps: int = 1) -> None:
        """Undo the newest steps."""
        if not 1 <= steps <= len(self.past):
            kept = "were made" if self.history is None else f"are kept (history={self.history})"
            raise UserError(f"cannot rewind {steps} steps: {len(self.past)} {kept}")
        for _ in range(steps):
            self.pose, snapshot = self.past.pop()
            self.engine.restore(snapshot)


def walk(
    model: Model,
    prompt: str,
    start: np.ndarray | Path | str | StartVideo | None = None,
    seed: int = 0,
    history: int | None = None,
) -> Session:
    """A session of a causal model that starts from a prompt and an image, resized and cropped, or goes on from a video.

    An image is a file, or an array as `to_rgb` takes it; a video is read by `read_start_video`.

    >>> model = minwm.load("runs/demo/dmd")
    >>> session = minwm.walk(model, "a red tower and a blue dome on a stone plaza", "start.png")
    >>> first = session.start()                          # 1 64 64 3 uint8
    >>> frames = session.step(minwm.Action.of("wl"))     # 8 64 64 3: ahead and to the right for half a second
    >>> session.rewind()                                 # and another way from there
    """
    if isinstance(start, str | Path):
        start = read_image(start)
    if isinstance(start, np.ndarray):
        start = resize_and_crop(start, model.config.height, model.config.width)
    return Session(ModelEngine(model, start, prompt, seed, views=known_views(model, [None])), history=history)
