"""minwm: camera-controlled, streaming video world models. Importing it only defines names."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minwm.cameras.track import CameraTrack
    from minwm.cameras.trajectory import Action
    from minwm.core.types import Clip
    from minwm.session.session import Session, walk
    from minwm.store.hub import from_pretrained, load, push_to_hub, save_pretrained

__version__ = "0.1.0"
__all__ = [
    "Action",
    "CameraTrack",
    "Clip",
    "Session",
    "from_pretrained",
    "load",
    "push_to_hub",
    "save_pretrained",
    "walk",
]

_HOME = {
    "Action": ("minwm.cameras.trajectory", "Action"),
    "CameraTrack": ("minwm.cameras.track", "CameraTrack"),
    "Clip": ("minwm.core.types", "Clip"),
    "Session": ("minwm.session.session", "Session"),
    "from_pretrained": ("minwm.store.hub", "from_pretrained"),
    "load": ("minwm.store.hub", "load"),
    "push_to_hub": ("minwm.store.hub", "push_to_hub"),
    "save_pretrained": ("minwm.store.hub", "save_pretrained"),
    "walk": ("minwm.session.session", "walk"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562), so that `import minwm` needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"minwm has no attribute {name!r}")
    module, there = _HOME[name]
    return getattr(importlib.import_module(module), there)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
