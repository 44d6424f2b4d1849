"""What is known of a world beforehand: posed pictures, read from latent shards, or of the place drawn on demand."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minwm.cameras.track import CameraTrack, se3_inverse
from minwm.core.media import to_pixels
from minwm.core.types import Views
from minwm.data.clips import DataError
from minwm.data.dataset import Sample, ShardDataset, Split
from minwm.data.shards import list_shards
from minwm.data.spec import ClipSpec
from minwm.nets.codec import VideoCodec
from minwm.render.base import Scene
from minwm.render.place import HOURS, Place

HELD = 8192
"""Drawn views of each hour in memory, at most; the oldest go first."""


@lru_cache(maxsize=1)
def read_views(path: Path, spec: ClipSpec) -> Mapping[str, Views]:
    """Views by `ClipRecord.world`: the first latents of a folder of latent shards, of clips with an origin."""
    found: dict[str, list[Sample]] = {}
    names, splits = [shard.name for shard in list_shards(path)], get_args(Split)
    for split in (split for split in splits if any(name.startswith(split) for name in names)):
        data = ShardDataset(path, split, spec=replace(spec, latents=1))
        for sample in (data[i] for i in range(len(data))):
            if sample.record.origin is None:
                raise DataError(
                    f"{path}: nothing says where {sample.id} stands in its world (origin); give other clips"
                )
            found.setdefault(sample.record.world, []).append(sample)
    return {world: _stacked(samples) for world, samples in found.items()}


def _stacked(samples: Sequence[Sample]) -> Views:
    c2w = np.stack([np.asarray(s.record.origin) @ s.record.track.c2w[0] for s in samples])
    K = torch.from_numpy(np.stack([s.record.track.K[0] for s in samples])).float()
    return Views.of({i: s.latents[0] for i, s in enumerate(samples)}, torch.from_numpy(se3_inverse(c2w)), K)


class DrawnLatents(dict[int, Tensor]):
    """Latents of pictures from along a track, drawn and encoded when they are first asked for."""

    def __init__(self, scene: Scene, track: CameraTrack, size: tuple[int, int], codec: VideoCodec) -> None:
        self.scene, self.track, self.size, self.codec = scene, track, size, codec

    @torch.no_grad()
    def __missing__(self, i: int) -> Float[Tensor, "c h w"]:
        frames = torch.from_numpy(self.scene.render(self.track.slice(i, i + 1), *self.size).frames)
        pixels = to_pixels(frames[None]).to(next(self.codec.parameters()).device)
        if len(self) == HELD:
            del self[next(iter(self))]
        self[i] = self.codec.encode(pixels)[0, 0].cpu()
        return self[i]


def draw_views(codec: VideoCodec, spec: ClipSpec) -> Mapping[str, Views]:
    """Views by `ClipRecord.world`: of the place at each of its hours, from `Place.viewpoints`."""
    track, cameras = _place_cameras(spec.focal, spec.motion.fps)
    latents = [DrawnLatents(Place(hour), track, (spec.height, spec.width), codec) for hour in range(len(HOURS))]
    return {f"place {hour}": replace(cameras, latents=drawn) for hour, drawn in enumerate(latents)}


@lru_cache(maxsize=1)
def _place_cameras(focal: tuple[float, float], fps: float) -> tuple[CameraTrack, Views]:
    """Cameras at all viewpoints, of which there are too many to compute twice; the views have no latents."""
    track = CameraTrack(Place(0).viewpoints, np.array([*focal, 0.5, 0.5]), fps)
    return track, Views.of({}, torch.from_numpy(se3_inverse(track.c2w)), torch.from_numpy(track.K).float())
