"""Measures by networks that others have trained, each in a local TorchScript file; nothing is downloaded.

LPIPS (Zhang et al. 2018) and DreamSim (Fu et al. 2023) compare frames with a reference, four a second. The Frechet
video distance (FVD; Unterthiner et al. 2018) compares the set of videos with the set of true ones, by features of I3D.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float

from minwm.core.config import UserError
from minwm.core.media import to_pixels
from minwm.core.runtime import pick_device
from minwm.eval.camera.score import Samples
from minwm.eval.source import Frames, Video

Array = np.ndarray
Network = Any
"""A scripted module, which has the type of its own source."""
SIDE = 224
"""Rows and columns that DreamSim and I3D see."""
WINDOW = 16
"""Frames of which I3D gives one sample."""


def load_network(path: Path) -> Network:
    """The network of a file, on this machine's GPU if there is one; UserError if it is no TorchScript file."""
    try:
        return torch.jit.load(str(path), map_location=pick_device()).eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is no TorchScript file ({reason}); docs/evaluation.md says how to make one") from error


def four_a_second(video: Video) -> range:
    """Indices of the frames that are compared; the first one may be given."""
    return range(1, len(video.frames), max(1, round(video.fps / 4)))


@torch.inference_mode()
def lpips(network: Network, video: Video) -> Samples:
    """`network(a, b)` is the distance of images b 3 h w in [-1, 1]."""
    return {"lpips": [float(network(*_pixels(pair))) for pair in _pairs(video)]}


@torch.inference_mode()
def dreamsim(network: Network, video: Video) -> Samples:
    """`network(a, b)` is the distance of images b 3 224 224 in [0, 1]."""
    pairs = ((_resized(x, "bicubic") / 2 + 0.5 for x in _pixels(pair)) for pair in _pairs(video))
    return {"dreamsim": [float(network(*pair)) for pair in pairs]}


@torch.inference_mode()
def i3d_features(network: Network, video: Video) -> tuple[Float[Array, "w d"], Float[Array, "w d"]]:
    """Features of all windows of the video and of its true one, by the file of StyleGAN-V: of b 3 n 224 224 pixels in
    [-1, 1] it gives b d."""
    assert video.truth is not None
    found = list[Array]()
    for frames in (video.frames, video.truth):
        pixels = _resized(_pixels((frames,))[0], "bilinear").movedim(1, 0)[None]
        windows = [pixels[:, :, i : i + WINDOW] for i in range(0, max(1, len(frames) - WINDOW + 1), WINDOW)]
        features = [network(x, rescale=False, resize=False, return_features=True) for x in windows]
        found.append(torch.cat(features).double().cpu().numpy())
    return found[0], found[1]


def frechet_distance(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> float:
    """Squared 2-Wasserstein distance of the Gaussians that fit two sets, each of at least two."""
    one, two = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    # the singular values of one @ two.T are the eigenvalues of the root of the product of both covariances
    overlap = np.linalg.norm(one @ two.T, "nuc")
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + (one**2).sum() + (two**2).sum() - 2 * overlap)


def _pairs(video: Video) -> list[tuple[Frames, Frames]]:
    assert video.reference is not None
    return [(video.frames[i : i + 1], video.reference[i : i + 1]) for i in four_a_second(video)]


def _pixels(images: tuple[Frames, ...]) -> list[torch.Tensor]:
    return [to_pixels(x).to(pick_device()) for x in images]


def _resized(pixels: Float[torch.Tensor, "b 3 h w"], mode: str) -> Float[torch.Tensor, "b 3 224 224"]:
    """Large pictures are smoothed first where those who publish the network do so: in bicubic mode."""
    return F.interpolate(pixels, (SIDE, SIDE), mode=mode, antialias=mode == "bicubic").clamp(-1, 1)
