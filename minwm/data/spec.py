"""What a model says of its training clips, compared with them: on others, training would save a wrong model.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minwm.cameras.track import rotation_degrees
from minwm.cameras.trajectory import Motion
from minwm.core.config import to_dict
from minwm.data.clips import RENDERED, ClipRecord, DataError
from minwm.nets.text import TextEncoder
from minwm.render.place import SceneKind

FPS_TOLERANCE = 0.01
"""Largest relative difference of frame rates: 29.97 is 30."""
FOCAL_TOLERANCE = 0.02
"""Largest relative difference of focal lengths."""
SPEED_LIMIT = 10.0
"""A clip's mean speed, in multiples of the model's, above which its poses have another scale."""


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """The fields of a model that its training clips have too, under their names in `ModelConfig`."""

    latents: int
    height: int
    width: int
    focal: tuple[float, float]
    motion: Motion
    text: TextEncoder
    scenes: SceneKind
    scale: int
    """Pixels per latent row and column."""
    channels: int
    """Of latents."""

    def check_shards(self, manifest: Mapping[str, Any], where: str) -> None:
        """Raise DataError unless the clips were encoded, and rendered if they were, as the model says."""
        codec, text, raw = manifest["codec"], manifest["text"], manifest["raw"]["config"]
        for name, ours, theirs in (
            ("motion.stride", self.motion.stride, codec["stride"]),
            ("codec.scale", self.scale, codec["scale"]),
            ("network.channels", self.channels, codec["channels"]),
            ("text", type(self.text).__name__, text["id"]),
            ("text.dim", self.text.dim, text["dim"]),
            ("text.length", self.text.length, text["length"]),
            *((f"text.{name}", [*shape], text.get(name)) for name, shape in self.text.shapes.items() if name != "text"),
        ):
            _compare(name, ours, theirs, where)
        for name, theirs in raw["motion"].items() if isinstance(raw.get("motion"), dict) else ():
            _compare(f"motion.{name}", to_dict(self.motion).get(name), theirs, where)

    def check_clip(self, record: ClipRecord, where: str) -> None:
        """Raise DataError unless scenes, frames, size, rate, focal lengths and speed of a clip are the model's."""
        track, (height, width) = record.track, record.hw
        _compare("scenes", self.scenes, RENDERED.get(record.source, self.scenes), where)
        _compare("height", self.height, height, where)
        _compare("width", self.width, width, where)
        _compare("frames", self.motion.stride * (self.latents - 1) + 1, len(track), where)
        _compare("motion.fps", self.motion.fps, track.fps, where, FPS_TOLERANCE)
        for ours, theirs in zip(self.focal * len(track), track.K[:, :2].flatten().tolist(), strict=True):
            if not math.isclose(ours, theirs, rel_tol=FOCAL_TOLERANCE):
                _compare("focal", self.focal, tuple(track.K[0, :2].tolist()), where)
        relative = track.relative()
        steps = np.linalg.norm(relative[:, :3, 3], axis=-1)
        turns = rotation_degrees(relative[:, :3, :3])
        for name, ours, values in (("move", self.motion.move, steps), ("turn", self.motion.turn, turns)):
            theirs = float(values.mean()) * track.fps if len(values) else 0.0
            if ours and theirs > SPEED_LIMIT * ours:
                _compare(f"motion.{name}", ours, theirs, where)


def _compare(name: str, ours: Any, theirs: Any, where: str, tolerance: float = 0.0) -> None:
    same = math.isclose(ours, theirs, rel_tol=tolerance) if tolerance else ours == theirs
    if not same:
        field = {"frames": "latents"}.get(name, name)
        raise DataError(f"{where}: its {name} is {theirs}, the model's {ours}; give other data, or set model.{field}")
