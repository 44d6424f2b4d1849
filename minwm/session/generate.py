"""Whole videos along trajectories: `generate`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minwm.cameras.track import CameraTrack, latent_cameras
from minwm.cameras.trajectory import parse
from minwm.control.action import with_action_labels
from minwm.core.config import UserError
from minwm.core.media import read_image, resize_and_crop, to_pixels
from minwm.core.media import to_frames as to_frames
from minwm.core.runtime import generator
from minwm.core.types import Condition, Views
from minwm.store.model import Model, ModelConfig, Prompts
from minwm.stream.rollout import generate_latents, sample_noise, stream_latents
from minwm.stream.solvers import Noise

Images = UInt8[np.ndarray, "b H W 3"]
Start = Images | UInt8[np.ndarray, "b past H W 3"]
"""Images to start from, or videos of whole chunks to go on from."""
Trajectories = Sequence[str | CameraTrack]
"""Keys such as "w*8", or tracks at pixel rate; all of one length. Those of a video start have its cameras first."""
Seed = int | Sequence[int]
"""Of the noise: of all videos at once, or one for each, which is then the same in any batch."""


@torch.no_grad()
def generate(
    model: Model,
    start: Start | Sequence[str | Path] | None,
    prompts: Prompts,
    trajectories: Trajectories,
    seed: Seed = 0,
    views: Sequence[Views] = (),
) -> UInt8[np.ndarray, "b n H W 3"]:
    """Whole videos along trajectories, with whatever sampler the model has, on its device.

    They start with images (files are cropped and resized as `walk` does), or with the frames of videos, from which they
    go on; without any, from the prompts alone. `views` are known of the world of each (`session.views`). Raises
    UserError for frames of another size, videos that are no whole chunks, or a length that the model cannot make.

    >>> video = minwm.generate(model, None, ["a red tower"], ["w*8"])[0]       # n h w 3 uint8
    """
    if start is not None and not isinstance(start, np.ndarray):
        size = model.config.height, model.config.width
        start = np.stack([resize_and_crop(read_image(image), *size) for image in start])
    noise, cond = sampling_inputs(model, start, prompts, trajectories, seed)
    latents = generate_latents(model.net, model.config.sampler, noise, cond, model.config.geometry, views)
    check_finite(latents)
    return _frames(model.codec.decode(latents))


@torch.no_grad()
def generate_by_chunk(
    model: Model,
    start: Start | None,
    prompts: Prompts,
    trajectories: Trajectories,
    seed: Seed = 0,
    views: Sequence[Views] = (),
) -> Iterator[UInt8[np.ndarray, "b n H W 3"]]:
    """The same of a causal model, as frames of one chunk after another, so that long videos need not fit in memory."""
    sampler, state = model.config.sampler, None
    if not sampler.causal:
        raise UserError("a bidirectional model makes whole clips, not chunks; take an autoregressive one")
    noise, cond = sampling_inputs(model, start, prompts, trajectories, seed)
    for latents in stream_latents(model.net, sampler, noise, cond, model.config.geometry, views):
        check_finite(latents)
        decoded, state = model.codec.decode_next(latents, state)
        yield _frames(decoded)


def generate_pieces(
    model: Model,
    start: Start | None,
    prompts: Prompts,
    trajectories: Trajectories,
    seed: Seed = 0,
    views: Sequence[Views] = (),
) -> Iterator[UInt8[np.ndarray, "b n H W 3"]]:
    """The frames of `generate` as they are finished: chunk by chunk of a causal model, else all at once."""
    if model.config.sampler.causal:
        return generate_by_chunk(model, start, prompts, trajectories, seed, views)
    return iter((generate(model, start, prompts, trajectories, seed, views),))


def _frames(pixels: Float[Tensor, "b n 3 h w"]) -> UInt8[np.ndarray, "b n H W 3"]:
    check_finite(pixels)
    return to_frames(pixels)


def sampling_inputs(
    model: Model, start: Start | None, prompts: Prompts, trajectories: Trajectories, seed: Seed
) -> tuple[Noise, Condition]:
    """What a sampler starts from, on the model's device."""
    cfg, device = model.config, next(model.net.parameters()).device
    tracks = [
        parse(t, stride=cfg.motion.stride).track(cfg.motion, cfg.intrinsics) if isinstance(t, str) else t
        for t in trajectories
    ]
    w2c, K = latent_cameras(tracks, cfg.motion.stride)
    check_length(cfg, w2c.shape[1])
    videos = None if start is None else start[:, None] if start.ndim == 4 else start
    first, states = None, cfg.encode_prompts(prompts)
    check_start(cfg, 0 if videos is None else videos.shape[1])
    if videos is not None:
        check_image(cfg, videos[0, 0])
        states = {**states, **(cfg.text.encode_images([*videos[:, 0]]) if cfg.image_start else {})}
        first = model.codec.encode(to_pixels(videos).to(device))
        if first.shape[1] >= w2c.shape[1]:
            raise UserError(f"the start of {videos.shape[1]} frames is all of the video; give a longer trajectory")
    cond = with_action_labels(Condition(**states, w2c=w2c, K=K, first_latents=first)).to(device)
    shape = cfg.latent_shape(len(cond.text), w2c.shape[1])
    samples, like = cfg.sampler.num_noise_samples(cfg.geometry), torch.empty(0, device=device)
    if isinstance(seed, int):
        return sample_noise(shape, samples, like, generator(seed, "generate")), cond
    each = [sample_noise((1, *shape[1:]), samples, like, generator(one, "generate")) for one in seed]
    return torch.cat(each, dim=1), cond


def check_start(cfg: ModelConfig, frames: int) -> None:
    """Raise UserError unless the model was trained to start so: from an image (one frame), from its prompt alone (no
    frame), or from a video of whole chunks."""
    latents, stride = 1 + (frames - 1) // cfg.motion.stride, cfg.motion.stride
    if cfg.image_start and not frames:
        raise UserError("this model starts from an image: give one (--start PNG, or --world SEED)")
    if frames > 1:
        first, chunk = cfg.stream.first_chunk_frames, cfg.stream.chunk
        if (frames - 1) % stride or latents < first or (latents - first) % chunk:
            raise UserError(
                f"a start of {frames} frames is no whole number of chunks; give "
                f"{1 + stride * (first - 1)} + k * {stride * chunk} of them"
            )
    elif frames and not cfg.image_start:
        raise UserError(
            f"this model starts from its prompt alone, with {cfg.stream.first_chunk_frames} latents: leave out the "
            "image, or train or convert a model with stream.image_start=true"
        )


MAX_MAGNITUDE = 1e3
"""Of latents, which have about unit variance, and of pixels, which are in [-1, 1]."""


def check_finite(values: Tensor) -> None:
    """Raise UserError if latents or pixels are NaN, infinite, or so large that they are no picture."""
    largest = float(values.abs().max())
    if not largest < MAX_MAGNITUDE:
        raise UserError(
            f"the model gives no picture but numbers up to {largest:.3g}: its weights are damaged or its training "
            "diverged; convert it again, or train it from an earlier stage"
        )


def check_image(cfg: ModelConfig, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Raise UserError unless the image is 8-bit RGB of the model's size."""
    want = (cfg.height, cfg.width, 3)
    if image.shape != want or image.dtype != np.uint8:
        raise UserError(
            f"the first image is {image.dtype} of shape {image.shape}, this model sees uint8 of {want}; "
            "use minwm.core.media.resize_and_crop"
        )


def whole_chunks(cfg: ModelConfig, latents: int) -> int:
    """The least number of latents from `latents` on that is a first chunk and whole later ones."""
    first, chunk = cfg.stream.first_chunk_frames, cfg.stream.chunk
    return first - (first - latents) // chunk * chunk


def check_length(cfg: ModelConfig, latents: int) -> None:
    """Raise UserError, naming lengths that fit, unless the model can make a clip of that many latents."""
    stride, lead, chunk = cfg.motion.stride, cfg.geometry.first_chunk_frames, cfg.stream.chunk
    if not cfg.sampler.causal:
        kind, fit = "makes whole clips only", [cfg.latents]
    else:
        below = lead + max(0, (latents - lead) // chunk) * chunk
        kind = f"goes on by {chunk} latents"
        fit = [latents] if below == latents > lead else [n for n in (below, below + chunk) if n > lead]
    if latents not in fit:
        ways = " or ".join(f"{n - 1} latents ({stride * (n - 1) + 1} frames)" for n in fit)
        raise UserError(
            f"a trajectory of {latents - 1} latents ({stride * (latents - 1) + 1} frames) does not fit: "
            f"this model {kind}; give {ways}"
        )
