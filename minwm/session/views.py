"""What is known of a scene beforehand: pictures from all over it, for models that remember views."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float

from minwm.core.types import Views
from minwm.data.views import draw_views
from minwm.nets.codec import VideoCodec
from minwm.render.base import Scene
from minwm.render.place import HOURS, Place
from minwm.store.model import Model, ModelConfig


@dataclass(frozen=True, eq=False)
class Viewpoint:
    """From where the first frame of a video is seen."""

    scene: Scene
    origin: Float[np.ndarray, "4 4"]
    """c2w in the scene."""


def known_views(model: Model, starts: Sequence[Viewpoint | None]) -> list[Views]:
    """Views of the scene of each start, in its frame; none unless it is the place, and streamed with views.

    A model of the place, started anywhere else, goes on without what it was trained with: that is said.
    """
    cfg = model.config
    if not (cfg.stream.retrieved and cfg.sampler.causal and cfg.scenes == "place"):
        return []
    found = list[Views]()
    for start in starts:
        if start and isinstance(start.scene, Place):
            views = _drawn(model.codec, cfg)[start.scene.hour]
            found.append(views.transformed(torch.from_numpy(start.origin)))
    if len(found) < len(starts):
        warnings.warn(
            "this model was trained with views of the place; started elsewhere it goes on without them",
            stacklevel=1,  # of this line, so that it is said once
        )
        return []
    return found


@lru_cache(maxsize=1)
def _drawn(codec: VideoCodec, cfg: ModelConfig) -> Mapping[str, Views]:
    """By hour."""
    return dict(zip(HOURS, draw_views(codec, cfg.clip_spec).values(), strict=True))
