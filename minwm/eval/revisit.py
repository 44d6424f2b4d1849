"""Revisits: a camera goes out and comes back, or turns away and back; does the model show what it showed before?"""

import math
from dataclasses import dataclass

import numpy as np

from minwm.eval.cases import Clips, Videos
from minwm.eval.image import psnr
from minwm.eval.stats import Bootstrap, Interval
from minwm.session.generate import whole_chunks
from minwm.store.model import ModelConfig

THERE_AND_BACK = (("l", "j"), ("w", "s"), ("j", "l"), ("a", "d"), ("s", "w"), ("d", "a"))
TURN_AWAY = 72.0
"""Degrees of the long revisits: nothing of the first view is left in the picture."""


@dataclass(frozen=True)
class Revisit:
    """Likeness of frames on the way back to those on the way out at the same pose; means over clips."""

    consistency: Interval
    """PSNR between both, over the half of the way that is nearest to the start."""
    away: Interval
    """PSNR between the turning point and the first frame: how much there was to remember."""
    gain: Interval
    """The difference: 0 for a video that never changed, and for one that has forgotten everything."""
    truth: Interval | None
    """PSNR to the true view over the last half second, when the camera is back; None for text starts."""


def routes(config: ModelConfig, clips: int, *, away: bool) -> list[str]:
    """Out and back within a training clip, or (`away`) so far that the first view is lost from sight."""
    half, latents = (config.latents - 1) // 2, config.latents
    if away:
        per_latent = config.motion.turn * config.motion.stride / config.motion.fps
        half = config.stream.chunk * math.ceil(TURN_AWAY / per_latent / config.stream.chunk)
        latents = whole_chunks(config, 2 * half + 1)
    rest = latents - 1 - 2 * half
    pairs = [THERE_AND_BACK[i % len(THERE_AND_BACK)] for i in range(clips)]
    return [f"{out}*{half},{back}*{half}" + (f",static*{rest}" if rest else "") for out, back in pairs]


def measure_revisits(config: ModelConfig, clips: Clips, videos: Videos) -> Revisit:
    """Videos at the pixel rate, along `routes`."""
    out = int(clips.cases[0].trajectory.partition(",")[0].partition("*")[2])
    turn, stride = out * config.motion.stride, config.motion.stride
    near = np.arange(turn // 2 + 1)
    same = psnr(videos[:, 2 * turn - near], videos[:, near]).mean(1)
    away = psnr(videos[:, turn], videos[:, 0])
    bootstrap = Bootstrap(len(videos))
    consistency, distinct, gain = (bootstrap(lambda i, x=x: x[i].mean()) for x in (same, away, same - away))
    truth = None
    if config.image_start:
        end = slice(2 * turn + 1 - 2 * stride, 2 * turn + 1)
        back = psnr(videos[:, end], clips.truth[:, end]).mean(1)
        truth = bootstrap(lambda i: back[i].mean())
    return Revisit(consistency, distinct, gain, truth)
