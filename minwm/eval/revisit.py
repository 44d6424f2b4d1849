"""Does a model remember? It goes out and comes back, or turns away and back, and should see what it saw before.

And how far a model's video depends on the seed, and on the prompt, where the image and the camera stay the same.
"""

import math
from dataclasses import dataclass

import numpy as np

from minwm.eval.cases import HELD_OUT, Clips, Videos
from minwm.eval.image import psnr
from minwm.eval.stats import Bootstrap, Interval
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
    truth: Interval
    """PSNR to the true view over the last half second, when the camera is back."""


def routes(config: ModelConfig, clips: int, *, away: bool) -> list[str]:
    """Out and back within a clip of training, or (`away`) so far that the first view is lost from sight."""
    half = (config.latents - 1) // 2
    if away:
        per_latent = config.motion.turn * config.motion.stride / config.motion.fps
        half = config.stream.chunk * math.ceil(TURN_AWAY / per_latent / config.stream.chunk)
    pairs = [THERE_AND_BACK[i % len(THERE_AND_BACK)] for i in range(clips)]
    rest = "" if away or 2 * half == config.latents - 1 else f",static*{config.latents - 1 - 2 * half}"
    return [f"{out}*{half},{back}*{half}{rest}" for out, back in pairs]


def revisits(config: ModelConfig, clips: int, *, away: bool) -> Clips:
    return Clips.make(config, routes(config, clips, away=away), HELD_OUT + 1)


def revisit(config: ModelConfig, clips: Clips, videos: Videos) -> Revisit:
    """Videos at the pixel rate."""
    legs = [int(part.partition("*")[2]) for part in clips.trajectories[0].split(",")]
    turn, stride = legs[0] * config.motion.stride, config.motion.stride
    near = np.arange(turn // 2 + 1)
    same = psnr(videos[:, 2 * turn - near], videos[:, near]).mean(1)
    away = psnr(videos[:, turn], videos[:, 0])
    end = slice(2 * turn + 1 - 2 * stride, 2 * turn + 1)
    back = psnr(videos[:, end], clips.truth[:, end]).mean(1)
    bootstrap = Bootstrap(len(videos))
    return Revisit(*(bootstrap(lambda i, x=x: x[i].mean()) for x in (same, away, same - away, back)))
