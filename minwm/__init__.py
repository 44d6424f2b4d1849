"""minwm: camera-controlled, streaming video world models. Importing it only defines names."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minwm.cameras.track import CameraTrack as CameraTrack
    from minwm.cameras.trajectory import Action as Action
    from minwm.cameras.trajectory import parse as parse
    from minwm.core.types import Clip as Clip
    from minwm.eval.run import evaluate as evaluate
    from minwm.session.generate import generate as generate
    from minwm.session.session import Session as Session
    from minwm.session.session import walk as walk
    from minwm.store.hub import from_pretrained as from_pretrained
    from minwm.store.hub import load as load
    from minwm.store.hub import push_to_hub as push_to_hub
    from minwm.store.hub import save_pretrained as save_pretrained
    from minwm.store.model import Model as Model

__version__ = "0.1.0"

_MODULES = {
    "Action": "minwm.cameras.trajectory",
    "CameraTrack": "minwm.cameras.track",
    "Clip": "minwm.core.types",
    "Model": "minwm.store.model",
    "Session": "minwm.session.session",
    "evaluate": "minwm.eval.run",
    "from_pretrained": "minwm.store.hub",
    "generate": "minwm.session.generate",
    "load": "minwm.store.hub",
    "parse": "minwm.cameras.trajectory",
    "push_to_hub": "minwm.store.hub",
    "save_pretrained": "minwm.store.hub",
    "walk": "minwm.session.session",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562), so that `import minwm` needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"minwm has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
