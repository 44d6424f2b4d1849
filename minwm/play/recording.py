"""A recorded part of a walk, as a video, and as a raw clip with all that is needed to walk it again."""

import io
import json
import tempfile
import zipfile
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from minwm.cameras.track import CameraTrack
from minwm.cameras.trajectory import Action
from minwm.core.config import to_dict
from minwm.core.media import mp4_bytes, write_image
from minwm.core.runtime import git_commit
from minwm.data.clips import ClipFolder, ClipRecord
from minwm.data.rerender import split_key
from minwm.play.game import Begin, Game
from minwm.session.engines import Engine, RendererEngine

WATCHED = 512
"""Videos are enlarged to about this many pixels of width."""

Frames = UInt8[np.ndarray, "n h w 3"]


@dataclass(frozen=True)
class Played:
    """The input of one chunk."""

    action: Action
    prompt: str


@dataclass
class Recording:
    """Chunks as they were played. The first part is the one frame from which the recording goes on."""

    game: Game
    begin: Begin
    """Of the whole walk."""
    engine: Engine
    """Of the first view."""
    start: int
    """Chunks walked before."""
    parts: list[tuple[Float[np.ndarray, "n 4 4"], list[Frames]]] = field(default_factory=list)
    """Poses, and frames of every view."""
    played: tuple[Played, ...] = ()
    """Inputs of the walk from its beginning to the end of the recording."""

    @property
    def nbytes(self) -> int:
        return sum(frames.nbytes for _, views in self.parts for frames in views)

    def views(self) -> list[Frames]:
        return [np.concatenate(frames) for frames in zip(*(views for _, views in self.parts), strict=True)]

    def mp4(self) -> bytes:
        """All views side by side, for any browser."""
        frames = np.concatenate(self.views(), axis=2)
        return mp4_bytes(frames, self.game.config.motion.fps, scale=max(1, WATCHED // self.game.config.width))

    def clip(self) -> bytes:
        """A zip that unpacks to a folder of raw clips (the first view), with the inputs beside it: actions.json."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            track = self._track()
            clips = ClipFolder.create(folder, "play", {"game": self.game.title, "config": to_dict(self.game.config)})
            clips.write(self._record(track), self.views()[0])
            clips.finish()
            track.save(folder / "camera.json")
            (folder / "actions.json").write_text(json.dumps(self._inputs(), indent=1))
            if self.begin.image is not None:
                write_image(folder / "start.png", self.begin.image)
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
                for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                    file.write(path, path.relative_to(folder))
            return packed.getvalue()

    def _track(self) -> CameraTrack:
        poses = np.concatenate([poses for poses, _ in self.parts])
        config = self.game.config
        return CameraTrack(c2w=poses, K=config.intrinsics, fps=config.motion.fps).anchored()

    def _record(self, track: CameraTrack) -> ClipRecord:
        config = self.game.config
        about: dict[str, Any]
        if isinstance(self.engine, RendererEngine):
            about = {
                "source": "procedural",
                "source_id": f"world {self.begin.seed}",
                "source_license": "CC0-1.0",
                "split_key": split_key(self.begin.seed),
                "caption_source": "procedural",
                "pose_kind": "ground_truth",
                "origin": self.engine.origin @ self.parts[0][0][0],
                "seed": self.begin.seed,
                "generator": f"minwm.render.worlds {git_commit() or 'unknown'}",
            }
        else:
            about = {
                "source": "generated",
                "source_id": self.game.title,
                "source_license": f"terms of {self.game.title} and of its start picture",
                "split_key": f"play:{self.game.title}",
                "caption_source": "player",
                "pose_kind": "commanded",
                "generator": f"minwm.play {git_commit() or 'unknown'}",
                "parent_model": self.game.title,
            }
        caption = self.played[self.start].prompt if self.start < len(self.played) else self.begin.prompt
        name = f"play-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        return ClipRecord(id=name, track=track, caption=caption, hw=(config.height, config.width), **about)

    def _inputs(self) -> dict[str, object]:
        """With the start picture, all that `Session` needs to make the same frames on the same machine."""
        chunks = [{"action": list(astuple(chunk.action)), "prompt": chunk.prompt} for chunk in self.played]
        return {
            "game": self.game.title,
            "config": to_dict(self.game.config),
            "seed": self.begin.seed,
            "prompt": self.begin.prompt,
            "recorded_from": self.start,
            "chunks": chunks,
        }
