"""What is known of a scene beforehand: pictures from all over it, for models that remember views."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minwm.cameras.track import CameraTrack, se3_inverse
from minwm.core.media import to_pixels
from minwm.core.types import Views
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
            views = _views(start.scene.hour, model.codec, cfg)
            found.append(views.transformed(torch.from_numpy(start.origin)))
    if len(found) < len(starts):
        warnings.warn(
            "this model was trained with views of the place; started elsewhere it goes on without them",
            stacklevel=1,  # of this line, so that it is said once
        )
        return []
    return found


class RenderedLatents(dict[int, Tensor]):
    """Latents of pictures from along a track, drawn and encoded when they are first asked for."""

    def __init__(self, scene: Scene, track: CameraTrack, codec: VideoCodec, cfg: ModelConfig) -> None:
        self.scene, self.track, self.codec, self.size = scene, track, codec, (cfg.height, cfg.width)

    @torch.no_grad()
    def __missing__(self, i: int) -> Float[Tensor, "c h w"]:
        frames = torch.from_numpy(self.scene.render(self.track.slice(i, i + 1), *self.size).frames)
        pixels = to_pixels(frames[None]).to(next(self.codec.parameters()).device)
        self[i] = self.codec.encode(pixels)[0, 0].cpu()
        return self[i]


@lru_cache(maxsize=len(HOURS))
def _views(hour: str, codec: VideoCodec, cfg: ModelConfig) -> Views:
    place = Place(list(HOURS).index(hour))
    track = CameraTrack(place.viewpoints, cfg.intrinsics, cfg.motion.fps)
    w2c, K = torch.from_numpy(se3_inverse(track.c2w)), torch.from_numpy(track.K).float()
    return Views(RenderedLatents(place, track, codec, cfg), w2c, K)
