"""What every renderer is."""

from typing import Protocol, runtime_checkable

from minwm.cameras.track import CameraTrack
from minwm.render.worlds import Rendered


@runtime_checkable
class Scene(Protocol):
    """A known world, rendered along a track in its own coordinates."""

    def render(self, track: CameraTrack, height: int, width: int, supersample: int = 2) -> Rendered: ...
