"""The verb that makes videos."""

import time
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from minwm.cli.base import Flag, ModelFolder, Route, command, echo, open_model, read_track, refuse_existing
from minwm.core.config import UserError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    import numpy as np
    from jaxtyping import UInt8

    from minwm.core.runtime import Progress
    from minwm.session.start import StartVideo
    from minwm.store.model import ModelConfig


Start = Annotated[Path | None, arg(metavar="PNG|MP4", help="start from this picture, or go on from this video")]
StartPoses = Annotated[
    Path | None, arg(metavar="FILE.json", help="cameras of the video of --start; those of VIDEO.json if not given")
]


@command("generate", resumable="list")
def generate(
    model: ModelFolder,
    out: Annotated[Path, arg(metavar="FILE.mp4|DIR", help="the video, or the folder of those of --list")],
    trajectory: Route | None = None,
    prompt: Annotated[str | None, arg(metavar="TEXT", help="what is seen; the world's caption if not given")] = None,
    start: Start = None,
    start_poses: StartPoses = None,
    world: Annotated[int | None, arg(metavar="SEED", help="start in this procedural world")] = None,
    keys: Annotated[Flag, arg(help="draw the keys on the video")] = False,
    compare: Annotated[Flag, arg(help="with --world: the true view beside it")] = False,
    seed: Annotated[int, arg(metavar="N", help="of the noise; with --list of the first entry")] = 0,
    list: Annotated[  # noqa: A002  (the option is --list)
        Path | None, arg(metavar="FILE.json|DIR", help="make all videos of a list (docs/evaluation.md)")
    ] = None,
) -> None:
    """Make a video along a trajectory, from a prompt, a picture or a video and a prompt, or a procedural world.

    --list makes many; those that --out holds are kept, and under torchrun each process makes its part.
    """
    if list is not None:
        if trajectory or prompt or start or start_poses or world is not None or keys or compare:
            raise UserError("--list FILE.json says what to make; give besides only --model, --out and --seed")
        return _generate_list(model, list, out, seed)
    if trajectory is None:
        raise UserError('give --trajectory "KEYS" or FILE.json for one video, or --list FILE.json for many')
    return _generate_one(model, out, trajectory, prompt, (start, start_poses), world, keys, compare, seed)


def _generate_list(model: Path, requests: Path, out: Path, seed: int) -> None:
    """Every request of a list that is not in `out` yet."""
    from minwm.core.runtime import rank, world_size
    from minwm.session.batch import generate_all, read_requests

    loaded = open_model(model)
    wanted = read_requests(requests, loaded.config.motion, seed)
    made = generate_all(
        loaded,
        wanted,
        lambda request: read_track(request.trajectory, loaded.config, request.image)[0],
        out,
        {"model": str(model), "list": str(requests)},
        (rank(), world_size()),
    )
    echo(f"{out}: {len(wanted)} videos, of which {made} are new")


def _generate_one(
    model: Path,
    out: Path,
    trajectory: str,
    prompt: str | None,
    given: "tuple[Path | None, Path | None]",
    world: int | None,
    keys: bool,
    compare: bool,
    seed: int,
) -> None:
    import numpy as np

    from minwm.core.media import write_video
    from minwm.core.runtime import progress
    from minwm.session.engines import SceneEngine
    from minwm.session.generate import generate_pieces
    from minwm.session.start import StartVideo
    from minwm.session.views import known_views

    refuse_existing(out, ".mp4")
    loaded = open_model(model)
    begin, viewpoint = read_start(*given, loaded.config), None
    track, route = read_track(trajectory, loaded.config, given[0] if isinstance(begin, np.ndarray) else None)
    if keys and route is None:
        raise UserError(f"--keys: {trajectory} holds poses, not keys")
    if world is not None and begin is None:
        place = SceneEngine.spawn(world, track, loaded.config)
        first, truth = place.start()[:1], place.advance(track.c2w) if compare else None
        viewpoint = place.viewpoint
        prompt = place.scene.caption if prompt is None else prompt
    elif world is None and not compare and prompt is not None:
        first, truth = begin[None] if isinstance(begin, np.ndarray) else None, None
        if isinstance(begin, StartVideo):
            first, track = begin.frames[None], begin.track.continued(track)
    else:
        raise UserError("give --prompt TEXT (and --start FILE), or --world SEED (which --compare needs)")
    if loaded.config.network.camera == "none":
        echo("this model has no camera control: the trajectory only says how long the video is")
    start, pressed = time.monotonic(), route.keys_per_frame() if keys and route else None
    if pressed is not None:
        pressed = [*[frozenset[str]()] * (len(track) - len(pressed)), *pressed]
    with progress(len(track), "frames") as bar:
        pieces = generate_pieces(loaded, first, [prompt], [track], seed, known_views(loaded, [viewpoint]))
        write_video(out, _side_by_side(pieces, truth, pressed, bar), loaded.config.motion.fps)
    seconds = time.monotonic() - start
    echo(f"{prompt!r}, {route.describe() if route else trajectory}\n{out}: {len(track)} frames in {seconds:.1f} s")


def _side_by_side(
    pieces: "Iterator[UInt8[np.ndarray, 'b n h w 3']]",
    truth: "Iterator[UInt8[np.ndarray, 'n h w 3']] | None",
    pressed: "Sequence[Collection[str]] | None",
    bar: "Progress",
) -> "Iterator[UInt8[np.ndarray, 'H W 3']]":
    """Frames of a generated video, one by one, with the true view to their left and the pressed keys drawn on both."""
    import numpy as np

    from minwm.core.media import overlay_keys

    true_frames, done = chain.from_iterable(truth or ()), 0
    for (piece,) in pieces:
        stop = done + len(piece)
        videos = [piece] if truth is None else [np.stack([*islice(true_frames, len(piece))]), piece]
        if pressed:
            videos = [overlay_keys(video, pressed[done:stop]) for video in videos]
        yield from np.concatenate(videos, axis=2)
        bar.advance(len(piece))
        done = stop


def read_start(
    path: Path | None, poses: Path | None, cfg: "ModelConfig"
) -> "UInt8[np.ndarray, 'h w 3'] | StartVideo | None":
    """What --start and --start-poses say: a picture, or a video with the cameras of its frames."""
    from minwm.core.media import VIDEO_SUFFIXES, read_image, resize_and_crop
    from minwm.session.start import open_start_video

    if path is not None and path.suffix.lower() in VIDEO_SUFFIXES:
        video = open_start_video(path, poses, cfg)
        echo(f"{path}: goes on from its last {len(video.frames)} frames")
        return video
    if poses:
        raise UserError("--start-poses are the cameras of a video: give --start FILE.mp4")
    if path is None:
        return None
    image = read_image(path)
    if image.shape[:2] != (cfg.height, cfg.width):
        h, w = image.shape[:2]
        echo(f"{path}: {w}x{h} pixels, cropped in the middle and resized to the model's {cfg.width}x{cfg.height}")
    return resize_and_crop(image, cfg.height, cfg.width)
