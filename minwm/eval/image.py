"""Image quality against the true frames: PSNR, SSIM, how both change with time (drift), flicker and seams.

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
from minwm.eval.stats import Bootstrap, Interval

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
    """Pixel-frame ranges [start, stop) of the image of a clip and of its chunks, of `chunk` latents each.

    The first chunk has `first` latents (latent 0 is the image, one frame, each later one `stride`); nothing is left of
    it if that is 1. The last chunk may be shorter.
    """
    edges = sorted({0, 1, 1 + stride * (first - 1)})
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
    psnr_at: list[Interval]
    """After 1, 2, ... seconds: mean over the quarter second that ends there, interval over clips."""
    ssim_at: list[Interval]
    flicker: float | None
    """Mean size of the second difference in time over that of the truth: 1 moves as smoothly, more flickers. None
    for videos at the latent rate, as `seam`."""
    seam: float | None
    """Change across chunk borders over change across borders between latents of one chunk, relative to the same ratio
    of the truth: 1 is no seam. (Latents have seams of their own, which are the codec's.)"""


def measure_quality(
    generated: UInt8[Array, "c n h w 3"],
    truth: UInt8[Array, "..."],
    spans: Sequence[tuple[int, int]],
    *,
    given: int = 1,
    fps: float = 16.0,
    stride: int = 1,
) -> Quality:
    """Measure clips against their true renders. The first `given` chunks were conditions, so they do not
    count in the totals and the slope (they are still listed). `fps` is that of these frames, of which `stride` are a
    latent. Raises QualityError when nothing is left to measure."""
    _same_shape(generated, truth)
    if not 0 <= given < len(spans):
        raise QualityError(f"{len(spans)} chunks of which {given} were given: nothing was generated; pass longer clips")
    all_psnr, all_ssim = psnr(generated, truth), ssim(generated, truth)
    frame_psnr, frame_ssim = all_psnr.mean(0), all_ssim.mean(0)
    per_psnr = [float(frame_psnr[a:b].mean()) for a, b in spans]
    per_ssim = [float(frame_ssim[a:b].mean()) for a, b in spans]
    start = spans[given][0]
    return Quality(
        psnr=float(frame_psnr[start:].mean()),
        ssim=float(frame_ssim[start:].mean()),
        psnr_per_chunk=per_psnr,
        ssim_per_chunk=per_ssim,
        drift_db_per_chunk=slope(per_psnr[given:]),
        sharpness=float(sharpness(generated[:, start:]).mean() / max(sharpness(truth[:, start:]).mean(), 1e-9)),
        given=given,
        psnr_at=at_seconds(all_psnr, fps),
        ssim_at=at_seconds(all_ssim, fps),
        flicker=flicker(generated) / max(flicker(truth), 1e-9) if stride > 1 else None,
        seam=seam(generated, truth, spans, stride),
    )


def at_seconds(values: Float[Array, "c n"], fps: float) -> list[Interval]:
    """Mean over the quarter of a second that ends at 1, 2, ... seconds, with intervals over clips."""
    bootstrap, width = Bootstrap(len(values)), max(1, round(fps / 4))
    ends = [round(second * fps) for second in range(1, 1 + int((values.shape[1] - 1) / fps))]
    found = [bootstrap.mean(values[:, end + 1 - width : end + 1]) for end in ends]
    return [interval for interval in found if interval]


def flicker(frames: UInt8[Array, "c n h w 3"]) -> float:
    """Mean absolute second difference in time, 8-bit levels: steady motion has little of it."""
    x = frames.astype(np.float32)
    return float(np.abs(x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2]).mean())


def seam(
    generated: UInt8[Array, "*c n h w 3"],
    truth: UInt8[Array, "..."] | None,
    spans: Sequence[tuple[int, int]],
    stride: int,
) -> float | None:
    """Change across borders of chunks over change across borders between latents of one chunk; over the same of the
    truth if there is one. None where a chunk is a single latent or there is only one."""
    shown, true = (None if x is None else _seam_ratio(x, spans, stride) for x in (generated, truth))
    return shown if shown is None or true is None else shown / max(true, 1e-6)


def _seam_ratio(frames: UInt8[Array, "*c n h w 3"], spans: Sequence[tuple[int, int]], stride: int) -> float | None:
    """See `seam`."""
    borders = [start - 1 for start, _ in spans[2:]]  # the border after a given first image is no seam
    inside = [start - 1 for a, b in spans[1:] for start in range(a + stride, b, stride)]
    if stride == 1 or not borders or not inside:
        return None
    change = np.abs(np.diff(frames.astype(np.float32), axis=-4)).mean((-3, -2, -1)).reshape(-1, frames.shape[-4] - 1)
    per_frame = change.mean(0)
    return float(per_frame[borders].mean() / max(per_frame[inside].mean(), 1e-6))


def colour_distance(a: UInt8[Array, "*n h w 3"], b: UInt8[Array, "..."]) -> Float[Array, "*n"]:
    """Distance of the colours of frames, wherever they are: 2-Wasserstein between Gaussians of independent red, green
    and blue, in 8-bit levels."""
    _same_shape(a, b)
    (mean_a, spread_a), (mean_b, spread_b) = (
        (x.mean((-3, -2)), x.std((-3, -2))) for x in (a.astype(np.float32), b.astype(np.float32))
    )
    return np.sqrt(((mean_a - mean_b) ** 2 + (spread_a - spread_b) ** 2).sum(-1))


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


def sharpness(frames: UInt8[Array, "*n h w 3"]) -> Float[Array, "*n"]:
    """Gradient energy of each frame, 8-bit levels squared."""
    grey = frames.astype(np.float32).mean(-1)
    return (np.diff(grey, axis=-1) ** 2).mean((-2, -1)) + (np.diff(grey, axis=-2) ** 2).mean((-2, -1))


def _same_shape(a: Array, b: Array) -> None:
    if a.shape != b.shape or a.shape[-1] != 3 or a.ndim < 4:
        raise QualityError(f"cannot compare frames of shape {a.shape} with {b.shape}; both must be (..., n, h, w, 3)")
