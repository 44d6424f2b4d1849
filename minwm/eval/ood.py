"""Out-of-distribution distances: how far frames are from true views of held-out scenes, without any network.

`feature_distance` looks at statistics of the whole frame, `patch_distance` at small patches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8

from minwm.cameras.track import CameraTrack
from minwm.eval.cases import HELD_OUT, SCENES_PER_SEED, reconstruct
from minwm.nets.codec import VideoCodec
from minwm.render.base import Scenes
from minwm.store.model import ModelConfig

Array = np.ndarray
FIRST_SCENE = HELD_OUT * SCENES_PER_SEED + 700_000
VIEWS = 96
"""Reference views, one per scene."""
PATCH, STRIDE, PATCHES = 4, 2, 8000
"""Patches have 4x4 pixels, every 2 pixels, at half the resolution, where the codec's blur does not count; so many of
the reference views' are kept."""
FLAT = 0.25
"""Contrast below which a patch counts as flat: root of the sum of squares over a patch, colours in [0, 1]."""


@dataclass(frozen=True)
class ReferenceStatistics:
    """Mean and standard deviation of the features of true views, and patches of them."""

    mean: Float[Array, " k"]
    std: Float[Array, " k"]
    patches: Float[torch.Tensor, "m d"]

    @classmethod
    def of(cls, config: ModelConfig, codec: VideoCodec, scenes: Scenes, views: int = VIEWS) -> "ReferenceStatistics":
        """Of one true view each of held-out scenes; patches also of the views that the codec reconstructs."""
        true = np.stack([*islice(_views(config, scenes), views)])
        patches = patches_of(np.concatenate([true, reconstruct(codec, true[:, None])[:, 0]])).flatten(0, 1)
        kept = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:PATCHES]
        features = features_of(true)
        return cls(features.mean(0), features.std(0), patches[kept])

    def feature_distance(self, frames: UInt8[Array, "*n h w 3"]) -> Float[Array, "*n"]:
        """Root mean square over the features of their distance from the mean in standard deviations."""
        return np.sqrt((((features_of(frames) - self.mean) / self.std) ** 2).mean(-1))

    def patch_distance(self, frames: UInt8[Array, "n h w 3"]) -> Float[Array, " n"]:
        """Mean over patches of the distance to the nearest reference patch, as a share of the patch's own contrast."""
        found = []
        for part in torch.split(patches_of(frames), 16):
            nearest = torch.cdist(part.flatten(0, 1), self.patches).amin(1).view(part.shape[:2])
            found.append((nearest / (part.norm(dim=-1) + FLAT)).mean(1))
        return torch.cat(found).numpy()


def _views(config: ModelConfig, scenes: Scenes) -> Iterator[UInt8[Array, "h w 3"]]:
    """Views of the scenes that have room for a camera."""
    still = CameraTrack(np.eye(4)[None], config.intrinsics, config.motion.fps)
    for seed in range(FIRST_SCENE, FIRST_SCENE + 100_000):
        scene = scenes(seed)
        origin = scene.spawn(np.random.default_rng(seed), still)
        if origin is not None:
            yield scene.render(still.transformed(origin), config.height, config.width).frames[0]


def patches_of(frames: UInt8[Array, "n h w 3"]) -> Float[torch.Tensor, "n p d"]:
    """All patches of every frame at half the resolution, in [0, 1], each without its mean colour."""
    x = F.avg_pool2d(torch.from_numpy(frames).movedim(-1, 1).float() / 255, 2)
    cut = x.unfold(2, PATCH, STRIDE).unfold(3, PATCH, STRIDE).flatten(4).flatten(2, 3)  # n 3 p d
    return (cut - cut.mean(-1, keepdim=True)).transpose(1, 2).flatten(2)


def features_of(frames: UInt8[Array, "*n h w 3"]) -> Float[Array, "*n 11"]:
    """Per frame: mean and standard deviation of red, green and blue; brightness of the upper half less that of the
    lower; and the logarithm of the gradient energy at four scales, where flat pictures have least and noise most."""
    x = frames.astype(np.float32)
    means, stds, grey = x.mean((-3, -2)), x.std((-3, -2)), x.mean(-1)
    half, energies = grey.shape[-2] // 2, []
    tilt = grey[..., :half, :].mean((-2, -1)) - grey[..., half:, :].mean((-2, -1))
    for _ in range(4):
        across, down = np.diff(grey, axis=-1), np.diff(grey, axis=-2)
        energies.append(np.log((across**2).mean((-2, -1)) + (down**2).mean((-2, -1)) + 0.1))
        h, w = (n // 2 * 2 for n in grey.shape[-2:])
        grey = grey[..., :h, :w].reshape(*grey.shape[:-2], h // 2, 2, w // 2, 2).mean((-3, -1))
    return np.concatenate([means, stds, np.stack([tilt, *energies], -1)], -1)
