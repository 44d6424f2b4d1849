"""What can be rendered: scenes, and the frames with depth that they give."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8

from minwm.cameras.track import CameraTrack


@dataclass(frozen=True)
class Rendered:
    frames: UInt8[np.ndarray, "n h w 3"]
    depth: Float[np.ndarray, "n h w"]
    """z-depth of the pixel centres, float32, world units; inf where the sky is."""


@runtime_checkable
class Scene(Protocol):
    """A place that can be seen from any pose. Axes are those of OpenCV: y points down."""

    @property
    def caption(self) -> str:
        """What there is to see; nothing about the camera."""
        ...

    def free(self, points: Float[np.ndarray, "*n 3"]) -> Bool[np.ndarray, "*n"]:
        """Whether a camera may be at these points, in scene coordinates."""
        ...

    def spawn(self, rng: np.random.Generator, track: CameraTrack) -> Float[np.ndarray, "4 4"] | None:
        """Pose in the scene of the first frame of an anchored track, so that its whole path is free; None if `rng`
        met no such place."""
        ...

    def render(self, track: CameraTrack, height: int, width: int, supersample: int = 2) -> Rendered:
        """Frames and depth along a track in scene coordinates; `supersample` rays per pixel and axis."""
        ...


Scenes = Callable[[int], Scene]
"""Scenes by seed: the same one for the same seed."""
