"""Recorded games: clips of what a player sees, with the cameras that the game itself reports.

A game is stepped frame by frame by the actions of trajectories, in the units of `Motion`: a model that is trained on
the clips is played with the same keys.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from minwm.cameras.track import CameraTrack
from minwm.cameras.trajectory import Action, Trajectory
from minwm.core.config import ConfigError, UserError, to_dict
from minwm.core.runtime import git_commit
from minwm.data.clips import ClipFolder, ClipRecord, DataError
from minwm.data.source import TRIES, CaptureConfig, produce

STANDING = 0.02
"""World units by which a camera may be off in any case: the game's own acceleration."""


@dataclass(frozen=True, eq=False)
class View:
    """What a game shows, and from where."""

    frame: UInt8[np.ndarray, "h w 3"]
    c2w: Float[np.ndarray, "4 4"]
    """Camera-to-world in the game's world: OpenCV axes, lengths in the units of `Motion.move`."""
    K: Float[np.ndarray, "4"]
    """Normalised."""


class GameEndedError(UserError):
    """The game cannot be stepped on: the player is dead, or the level is over."""


@runtime_checkable
class Game(Protocol):
    """A game at `motion.fps` frames per second."""

    world: str
    """Name of what is walked through."""
    license: str
    """Of its pictures: an SPDX name, or the name of the terms."""
    caption: str
    """What is seen; nothing about motion."""
    generator: str
    """Name and version of the code that makes the pictures."""

    def start(self, rng: np.random.Generator) -> View:
        """Begin anew at a place that `rng` draws; equal draws give equal games."""
        ...

    def step(self, action: Action) -> View:
        """Hold an action for one frame. Raises GameEndedError, or UserError for an action that the player cannot do."""
        ...


@dataclass(frozen=True, kw_only=True)
class RecordConfig(CaptureConfig):
    """Which clips of a game to record; the config of each game opens it."""

    moved: float = 0.95
    """Least share of the commanded distance that the camera moves; a clip in which it is blocked is tried elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.moved <= 1:
            raise ConfigError(f"moved={self.moved}: a share from 0 to 1")

    @property
    def game(self) -> str:
        """Name of the game: letters, digits, `-` and `_`."""
        raise NotImplementedError

    def open(self) -> Game:
        """Start the game."""
        raise NotImplementedError


@dataclass(frozen=True)
class GameSource:
    """Clips of a game; each begins the game anew, so it is the same whatever was recorded before."""

    cfg: RecordConfig

    @property
    def kind(self) -> str:
        return self.cfg.game

    @property
    def config(self) -> dict[str, Any]:
        return to_dict(self.cfg)

    def clip_id(self, index: int) -> str:
        return f"{self.cfg.game}-{self.cfg.seed:03d}-{index:06d}"

    def make(self, index: int) -> tuple[ClipRecord, np.ndarray]:
        rng, game = np.random.default_rng([self.cfg.seed, index]), _opened(self.cfg)
        for _ in range(TRIES):
            _, trajectory = self.cfg.path(index, rng)
            if views := walk(game, rng, trajectory, self.cfg):
                return self._record(index, game, trajectory, views), np.stack([view.frame for view in views])
        raise DataError(
            f"{game.world}: the camera is blocked in each of {TRIES} tries of clip {index}; use fewer latents, a "
            "slower motion or a smaller --moved"
        )

    def _record(self, index: int, game: Game, trajectory: Trajectory, views: list[View]) -> ClipRecord:
        c2w, K = np.stack([view.c2w for view in views]), np.stack([view.K for view in views])
        return ClipRecord(
            id=self.clip_id(index),
            source=self.cfg.game,
            source_id=f"{game.world}, clip {self.clip_id(index)}",
            source_license=game.license,
            split_key=self.clip_id(index),
            track=CameraTrack(c2w, K, self.cfg.motion.fps).relative_to_first(),
            caption=game.caption,
            caption_source=self.cfg.game,
            hw=views[0].frame.shape[:2],
            pose_kind="ground_truth",
            origin=c2w[0],
            generator=f"{game.generator}, minwm {git_commit() or 'unknown'}",
            trajectory=trajectory.canonical(),
        )


def walk(game: Game, rng: np.random.Generator, trajectory: Trajectory, cfg: RecordConfig) -> list[View] | None:
    """Views of all frames of a trajectory from a place that `rng` draws; None if the camera does not move as far as
    commanded, or further: it was blocked, fell, or was carried."""
    actions = [action for action in trajectory.actions() for _ in range(cfg.motion.stride)]
    moves = [(action.move_x, action.move_y, action.move_z) for action in actions]
    wanted = np.cumsum(np.linalg.norm(moves, axis=1)) * cfg.motion.move / cfg.motion.fps
    off, travelled = (1 - cfg.moved) * wanted[-1] + STANDING, 0.0
    try:
        views = [game.start(rng)]
        for action, distance in zip(actions, wanted, strict=True):
            views.append(game.step(action))
            travelled += float(np.linalg.norm(views[-1].c2w[:3, 3] - views[-2].c2w[:3, 3]))
            if abs(travelled - distance) > off:
                return None
    except GameEndedError:
        return None
    return views


def record(out: Path, cfg: RecordConfig, *, clips: int, workers: int = 1) -> ClipFolder:
    """Record clips of a game into `out`; a later call continues, or adds clips if `clips` is larger."""
    return produce(GameSource(cfg), out, clips, workers=workers)


@functools.lru_cache(maxsize=1)
def _opened(cfg: RecordConfig) -> Game:
    return cfg.open()
