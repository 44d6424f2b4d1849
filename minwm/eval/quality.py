"""Image quality against the true frames: PSNR, SSIM, and how both change with time (drift).

Frames are uint8 arrays `... n h w 3`; everything here is a pure function of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8

from minwm.core.config import UserError

Array = np.ndarray
QUANTISATION = 1 / 12
"""Variance of rounding to 8 bits. The floor of the squared error, so that equal frames read 58.9 dB, not
infinity."""


class QualityError(UserError):
    """Frames that cannot be compared."""


def psnr(a: UInt8[Array, "*n h w 3"], b: UInt8[Array, "..."]) -> Float[Array, "*n"]:
    """Peak signal-to-noise ratio of each frame in dB. Raises QualityError when the shapes differ."""
    _same_shape(a, b)
    error = ((a.astype(np.float32) - b.astype(np.float32)) ** 2).mean((-3, -2, -1))
    return 10 * np.log10(255.0**2 / np.maximum(error, QUANTISATION))


def ssim(a: UInt8[Array, "*n h w 3"], b: UInt8[Array, "..."]) -> Float[Array, "*n"]:
    """Structural similarity of each frame (Wang et al. 2004): Gaussian window of 11, sigma 1.5, mean over
    colours."""
    _same_shape(a, b)
    if min(a.shape[-3:-1]) < 11:
        raise QualityError(f"ssim: frames of {a.shape[-3]}x{a.shape[-2]} are smaller than its window of 11")
    x, y = (torch.from_numpy(np.ascontiguousarray(v)).flatten(0, -4).movedim(-1, -3).double() for v in (a, b))
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x, var_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    cov = _windowed(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return score.mean((1, 2, 3)).reshape(a.shape[:-3]).numpy()


def chunk_spans(frames: int, first: int, chunk: int, stride: int) -> list[tuple[int, int]]:
    """Pixel-frame ranges [start, stop) of the chunks of a clip that is generated `chunk` latents at a time.

    `first` latents form chunk 0 (latent 0 is one frame, each later one `stride`). The last
    chunk may be shorter.
    """
    edges = [0, 1 + stride * (first - 1)]
    while edges[-1] < frames:
        edges.append(min(edges[-1] + stride * chunk, frames))
    return list(pairwise(edges))


@dataclass(frozen=True)
class Quality:
    """How close generated clips are to the truth, over all of them and chunk by chunk."""

    psnr: float
    """dB, mean over the frames of every chunk but a given first one."""
    ssim: float
    psnr_per_chunk: list[float]
    ssim_per_chunk: list[float]
    drift_db_per_chunk: float
    """Slope of a straight line through the PSNR of the generated chunks; 0 is no drift."""
    sharpness: float
    """Gradient energy of the generated frames over that of the true ones; 1 is as sharp, less is blurred."""
    given: int
    """Chunks at the start that were conditions, not results."""


def quality(
    generated: UInt8[Array, "c n h w 3"],
    truth: UInt8[Array, "..."],
    spans: Sequence[tuple[int, int]],
    *,
    given: int = 1,
) -> Quality:
    """Measure clips against their true renders. The first `given` chunks were conditions, so they do not
    count in the totals and the slope (they are still listed). Raises QualityError when nothing is left to
    measure."""
    _same_shape(generated, truth)
    if not 0 <= given < len(spans):
        raise QualityError(f"{len(spans)} chunks of which {given} were given: nothing was generated; pass longer clips")
    frame_psnr, frame_ssim = psnr(generated, truth).mean(0), ssim(generated, truth).mean(0)
    per_psnr = [float(frame_psnr[a:b].mean()) for a, b in spans]
    per_ssim = [float(frame_ssim[a:b].mean()) for a, b in spans]
    start = spans[given][0]
    return Quality(
        psnr=float(frame_psnr[start:].mean()),
        ssim=float(frame_ssim[start:].mean()),
        psnr_per_chunk=per_psnr,
        ssim_per_chunk=per_ssim,
        drift_db_per_chunk=slope(per_psnr[given:]),
        sharpness=_sharpness(generated[:, start:]) / max(_sharpness(truth[:, start:]), 1e-9),
        given=given,
    )


def slope(values: Sequence[float]) -> float:
    """Least-squares slope per step; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    x = np.arange(len(values)) - (len(values) - 1) / 2
    return float((x * np.asarray(values)).sum() / (x * x).sum())


def _windowed(x: torch.Tensor) -> torch.Tensor:
    at = torch.arange(11, dtype=x.dtype) - 5
    window = torch.exp(-0.5 * (at / 1.5) ** 2)
    window = (window / window.sum()).expand(3, 1, 1, 11)
    return F.conv2d(F.conv2d(x, window, groups=3), window.transpose(-1, -2), groups=3)


def _sharpness(frames: Array) -> float:
    grey = frames.astype(np.float32).mean(-1)
    return float((np.diff(grey, axis=-1) ** 2).mean() + (np.diff(grey, axis=-2) ** 2).mean())


def _same_shape(a: Array, b: Array) -> None:
    if a.shape != b.shape or a.shape[-1] != 3 or a.ndim < 4:
        raise QualityError(f"cannot compare frames of shape {a.shape} with {b.shape}; both must be (..., n, h, w, 3)")
