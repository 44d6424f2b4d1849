"""A recording of live play: as a video, and as a raw clip with the inputs that reproduce it."""

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
from minwm.core.media import mp4_bytes, write_image, write_video
from minwm.core.runtime import git_commit
from minwm.data.clips import ClipFolder, ClipRecord
from minwm.data.rerender import split_key
from minwm.play.scenario import Scenario, StartState
from minwm.session.engines import Engine, SceneEngine

VIDEO_WIDTH = 512
"""Videos of smaller frames are enlarged by a whole factor to about this width, pixels per view."""

Frames = UInt8[np.ndarray, "n h w 3"]


@dataclass(frozen=True)
class ChunkInput:
    """What one chunk was generated with."""

    action: Action
    prompt: str


@dataclass
class Recording:
    """Consecutive chunks of a rollout. The first part is the single frame that precedes them."""

    scenario: Scenario
    start: StartState
    """Of the rollout."""
    engine: Engine
    """Of the first view."""
    first_chunk: int
    """Chunks generated before the recording began."""
    parts: list[tuple[Float[np.ndarray, "n 4 4"], list[Frames]]] = field(default_factory=list)
    """Poses, and the frames of every view."""
    inputs: tuple[ChunkInput, ...] = ()
    """Inputs of all chunks from the start of the rollout to the end of the recording."""

    @property
    def nbytes(self) -> int:
        return sum(frames.nbytes for _, views in self.parts for frames in views)

    def views(self) -> list[Frames]:
        return [np.concatenate(frames) for frames in zip(*(views for _, views in self.parts), strict=True)]

    def mp4(self) -> bytes:
        """All views side by side."""
        frames = np.concatenate(self.views(), axis=2)
        config = self.scenario.config
        return mp4_bytes(frames, config.motion.fps, scale=max(1, VIDEO_WIDTH // config.width))

    def clip(self) -> bytes:
        """A zip of a folder of raw clips (the first view only), and of camera.json, actions.json and start.png, or
        start.mp4 and start.json (the cameras of that video)."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            track = self._track()
            made_by = {"title": self.scenario.title, "config": to_dict(self.scenario.config)}
            clips = ClipFolder.create(folder, "play", made_by)
            clips.write(self._record(track), self.views()[0])
            clips.finish()
            track.save(folder / "camera.json")
            (folder / "actions.json").write_text(json.dumps(self._actions(), indent=1))
            if (video := self.start.video) is not None:
                write_video(folder / "start.mp4", video.frames, video.track.fps)
                video.track.save(folder / "start.json")
            elif self.start.image is not None:
                write_image(folder / "start.png", self.start.image)
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
                for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                    file.write(path, path.relative_to(folder))
            return packed.getvalue()

    def _track(self) -> CameraTrack:
        poses = np.concatenate([poses for poses, _ in self.parts])
        config = self.scenario.config
        return CameraTrack(c2w=poses, K=config.intrinsics, fps=config.motion.fps).relative_to_first()

    def _record(self, track: CameraTrack) -> ClipRecord:
        config = self.scenario.config
        about: dict[str, Any]
        if isinstance(self.engine, SceneEngine):
            about = {
                "source": "procedural",
                "source_id": f"world {self.start.seed}",
                "source_license": "CC0-1.0",
                "split_key": split_key(self.start.seed),
                "caption_source": "procedural",
                "pose_kind": "ground_truth",
                "origin": self.engine.origin @ self.parts[0][0][0],
                "seed": self.start.seed,
                "generator": f"minwm.render.worlds {git_commit() or 'unknown'}",
            }
        else:
            about = {
                "source": "generated",
                "source_id": self.scenario.title,
                "source_license": f"terms of {self.scenario.title} and of its start image",
                "split_key": f"play:{self.scenario.title}",
                "caption_source": "player",
                "pose_kind": "commanded",
                "generator": f"minwm.play {git_commit() or 'unknown'}",
                "parent_model": self.scenario.title,
            }
        caption = self.inputs[self.first_chunk].prompt if self.first_chunk < len(self.inputs) else self.start.prompt
        name = f"play-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        return ClipRecord(id=name, track=track, caption=caption, hw=(config.height, config.width), **about)

    def _actions(self) -> dict[str, object]:
        """With the start image, all that `Session` needs to generate the same frames on the same machine."""
        chunks = [{"action": list(astuple(chunk.action)), "prompt": chunk.prompt} for chunk in self.inputs]
        return {
            "title": self.scenario.title,
            "config": to_dict(self.scenario.config),
            "seed": self.start.seed,
            "prompt": self.start.prompt,
            "recorded_from": self.first_chunk,
            "chunks": chunks,
        }
