"""The fixed suite of paths along which any model is scored, and the videos that it makes along them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from minwm.cameras.trajectory import Motion, parse
from minwm.core.config import UserError
from minwm.core.files import atomic, read_text
from minwm.core.media import read_image, write_image
from minwm.eval.cases import HELD_OUT, SCENES_PER_SEED, TRIES
from minwm.eval.image import chunk_spans
from minwm.eval.source import Video, VideoSource, depth_file, digest, folder_source
from minwm.session.batch import Request, generate_all
from minwm.session.views import Viewpoint
from minwm.store.model import Model, ModelConfig
from minwm.train.parallel import wait_for_all

PATHS = ("w", "s", "a", "d", "j", "l", "i", "k", "w+j", "w+l", "d+j", "a+l", "w,s", "l,j", "w,l", "static")
"""Keys held one after the other, each for an equal part of the time: every key alone, chords, there and back, a corner,
stillness."""
SECONDS = 5.0
LONG = (("w,l,w,j", 20.0), ("w+l,w+j", 60.0))
"""Longer paths, of models that stream, beside a full turn."""
Start = tuple[str, Path | None, Viewpoint | None]
"""A prompt; the first frame of models that take one, and from where it is seen, if that is known."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def suite(config: ModelConfig) -> list[str]:
    """Trajectories: `PATHS` of `SECONDS`, then longer ones; for models that make whole clips, `PATHS` of that size."""
    motion = config.motion
    if not config.sampler.causal:
        return [_split(path, config.latents - 1) for path in PATHS]
    short = [_split(path, _latents(motion, SECONDS)) for path in PATHS]
    turn = f"l*{_latents(motion, 360 / motion.turn)}" if motion.turn else "static*1"
    return [*short, turn, *(_split(path, _latents(motion, seconds)) for path, seconds in LONG)]


def _latents(motion: Motion, seconds: float) -> int:
    return max(1, round(seconds * motion.fps / motion.stride))


def _split(path: str, latents: int) -> str:
    """Keys one after the other, over so many latents in all."""
    keys = path.split(",")
    ends = [latents * (i + 1) // len(keys) for i in range(len(keys))]
    return ",".join(f"{key}*{n}" for key, n in zip(keys, np.diff([0, *ends]).tolist(), strict=True))


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty; UserError if there are none."""
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{file} has no lines; write one entry per line")
    return lines


def requests(
    config: ModelConfig,
    folder: Path,
    trajectories: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    images: Path | None = None,
    seed: int = 0,
) -> list[Request]:
    """One request per trajectory (None: `suite`), which take prompts and images in turn.

    The prompt of an image is in NAME.txt beside it, unless there are `prompts`. A model that starts from images and is
    given none starts from views of held-out scenes, written to `folder` with their depth, with their captions; so do
    prompts.
    """
    if images is not None and not config.image_start:
        raise UserError(f"--images {images}: this model starts from its prompt alone; give --prompts FILE")
    if prompts is not None and images is None and config.image_start:
        raise UserError("--prompts: this model starts from images, which the prompts describe; give --images DIR too")
    paths = suite(config) if trajectories is None else list(trajectories)
    if images is not None:
        starts = _given(images, prompts)
    elif prompts is not None:
        starts = list[Start]((prompt, None, None) for prompt in prompts)
    else:
        starts = _held_out(config, folder, paths)
    found = []
    for i, path in enumerate(paths):
        prompt, image, viewpoint = starts[i % len(starts)]
        text = prompts[i % len(prompts)] if prompts else prompt
        known = {"image": image, "viewpoint": viewpoint}
        found.append(Request(name=f"{i:03d}", prompt=text, trajectory=path, seed=seed + i, **known))
    return found


def _given(images: Path, prompts: Sequence[str] | None) -> list[Start]:
    files = sorted(path for path in images.glob("*") if path.suffix.lower() in IMAGES)
    if not files:
        raise UserError(f"--images {images} holds no {', '.join(IMAGES)}")
    starts = list[Start]()
    for file in files:
        text = file.with_suffix(".txt")
        if prompts is None and not text.exists():
            raise UserError(f"{file}: it has no prompt; give --prompts FILE, or write one to {text}")
        starts.append(("" if prompts else read_text(text).strip(), file, None))
    return starts


def _held_out(config: ModelConfig, folder: Path, paths: Sequence[str]) -> list[Start]:
    """Caption and first view of a held-out scene per path, from where the path is free if there is such a place."""
    starts = list[Start]()
    for i, path in enumerate(paths):
        scene, rng = config.scene((HELD_OUT + 2) * SCENES_PER_SEED + i), np.random.default_rng([HELD_OUT, i])
        track = parse(path, stride=config.motion.stride).track(config.motion, config.intrinsics)
        spawns = (scene.spawn(rng, part) for part in [track] * TRIES + [track.slice(0, 1)] * TRIES)
        origin = next((pose for pose in spawns if pose is not None), None)
        if origin is None:
            raise UserError(f"scene {i} of the suite has no free place; give --images DIR")
        image = folder / "starts" / f"{i:03d}.png" if config.image_start else None
        if image and not (image.exists() and depth_file(folder, image.stem).exists()):
            view = scene.render(track.slice(0, 1).transformed(origin), config.height, config.width)
            write_image(image, view.frames[0])
            with atomic(depth_file(folder, image.stem)) as partial, partial.open("wb") as file:
                np.save(file, view.depth[0])
        starts.append((scene.caption, image, Viewpoint(scene, origin)))
    return starts


def model_source(
    model: Model, wanted: Sequence[Request], folder: Path, name: str, part: tuple[int, int] = (0, 1)
) -> VideoSource:
    """The videos of a model, made in `folder` unless they are there; `part` (i, n): by n processes, which wait for each
    other."""
    cfg = model.config
    generate_all(
        model,
        wanted,
        lambda request: parse(request.trajectory, stride=cfg.motion.stride).track(cfg.motion, cfg.intrinsics),
        folder,
        {"model": name},
        part,
    )
    wait_for_all(part)
    made, tasks = folder_source(folder), {request.name: _task(request) for request in wanted}

    def video(name: str) -> Video:
        video = made.video(name)
        return replace(video, task=tasks[name], chunks=chunks_of(cfg, len(video.frames)))

    return VideoSource([*tasks], video)


def chunks_of(config: ModelConfig, frames: int) -> tuple[list[tuple[int, int]], int] | None:
    """`Video.chunks` of a model's video; None if the model makes it at once."""
    stream, stride = config.stream, config.motion.stride
    spans = chunk_spans(frames, stream.first_chunk_frames, stream.chunk, stride)
    return (spans, stride) if config.sampler.causal else None


def _task(request: Request) -> dict[str, str]:
    image = {"image": digest(read_image(request.image))} if request.image else {}
    return {"prompt": request.prompt, **image}
