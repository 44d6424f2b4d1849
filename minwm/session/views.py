"""What is known of a scene beforehand: pictures from all over it, for models that remember views."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float

from minwm.cameras.track import CameraTrack, se3_inverse
from minwm.core.media import to_pixels
from minwm.core.types import Views
from minwm.nets.codec import VideoCodec
from minwm.render.base import Scene
from minwm.render.place import HOURS, Place
from minwm.store.model import Model, ModelConfig

BATCH = 64
"""Pictures encoded at once."""


@dataclass(frozen=True, eq=False)
class Viewpoint:
    """From where the first frame of a video is seen."""

    scene: Scene
    origin: Float[np.ndarray, "4 4"]
    """c2w in the scene."""


def known_views(model: Model, starts: Sequence[Viewpoint | None]) -> list[Views]:
    """Views of the scene of each start, in its frame; none unless it is the place, and streamed with views."""
    cfg = model.config
    if not (cfg.stream.retrieved and cfg.sampler.causal and cfg.scenes == "place"):
        return []
    found = list[Views]()
    for start in starts:
        if start and isinstance(start.scene, Place):
            views = _views(start.scene.hour, model.codec, cfg)
            found.append(views.transformed(torch.from_numpy(start.origin)))
    return found if len(found) == len(starts) else []


@lru_cache(maxsize=len(HOURS))
@torch.no_grad()
def _views(hour: str, codec: VideoCodec, cfg: ModelConfig) -> Views:
    place, device = Place(list(HOURS).index(hour)), next(codec.parameters()).device
    track = CameraTrack(place.viewpoints(), cfg.intrinsics, cfg.motion.fps)
    frames = torch.from_numpy(place.render(track, cfg.height, cfg.width).frames)
    latents = [codec.encode(to_pixels(part[:, None]).to(device))[:, 0] for part in frames.split(BATCH)]
    return Views(torch.cat(latents).cpu(), torch.from_numpy(se3_inverse(track.c2w)), torch.from_numpy(track.K).float())
