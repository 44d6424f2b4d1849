"""Videos of any kind as windows of a fixed rate, length and size, none across a cut."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from minwm.core.media import decode, open_video, reduced, resize_and_crop
from minwm.core.runtime import require
from minwm.data.clips import DataError

HDR = {16: "PQ (HDR10, Dolby Vision)", 18: "HLG"}
"""Transfer functions (ITU-T H.273) whose brightness 8 bits cannot hold."""
DETECTION_ROWS = 128
"""Rows of the pictures in which cuts are looked for."""
EARLY = 1e-3
"""Seconds by which a frame may come late and still be shown at a given time; timestamps are rounded to milliseconds."""


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """What windows are cut from a video."""

    frames: int
    fps: float
    height: int
    width: int
    cut: float
    """Threshold of PySceneDetect's ContentDetector (27 is its default); lower finds more cuts."""
    whole_rows: int = 0
    """Pixels on the shorter side of the whole pictures that are kept besides, at most; 0 keeps none."""


@dataclass(frozen=True, eq=False)
class Window:
    """Part of a shot."""

    shot: int
    """Number of the shot in its video."""
    start: float
    """Seconds from the first frame of the video."""
    frames: UInt8[np.ndarray, "n h w 3"]
    """Cropped in the middle to the shape wanted; fewer than wanted at the end of a shot."""
    times: Float[np.ndarray, " n"]
    """When each of these frames was taken: seconds from the first frame of the video."""
    picture: tuple[int, int]
    """Height and width before the crop."""
    whole: UInt8[np.ndarray, "n H W 3"] | None = None
    """The same frames before the crop, reduced to `WindowConfig.whole_rows`."""


@dataclass(frozen=True, eq=False)
class _Picture:
    time: float
    frame: UInt8[np.ndarray, "h w 3"]
    whole: UInt8[np.ndarray, "H W 3"] | None


def windows(path: Path, cfg: WindowConfig) -> Iterator[Window]:
    """Windows of a video, one after the other; the last of each shot may be short.

    At each time the frame is taken that a player would show then, so variable frame rates need no care. Raises
    UserError for a file that cannot be decoded, and for pictures that would come out wrong: HDR, interlaced, or
    smaller than wanted.
    """
    shot, start, last, size = 0, 0.0, None, (0, 0)
    held = list[_Picture]()
    for now, image, cut in _pictures(path, cfg):
        while last and start + len(held) / cfg.fps < now - EARLY:
            held.append(last)
            if len(held) == cfg.frames:
                yield _window(shot, start, held, size)
                start, held = start + cfg.frames / cfg.fps, []
        if cut:
            if held:
                yield _window(shot, start, held, size)
            shot, start, held = shot + 1, now, []
        whole = reduced(image, cfg.whole_rows) if cfg.whole_rows else None
        last, size = _Picture(now, resize_and_crop(image, cfg.height, cfg.width), whole), image.shape[:2]
    if last and start + len(held) / cfg.fps <= last.time + EARLY:
        held.append(last)
    if held:
        yield _window(shot, start, held, size)


def _window(shot: int, start: float, held: list[_Picture], size: tuple[int, int]) -> Window:
    whole = [picture.whole for picture in held if picture.whole is not None]
    frames, times = np.stack([picture.frame for picture in held]), np.array([picture.time for picture in held])
    return Window(shot, start, frames, times, size, np.stack(whole) if whole else None)


def _pictures(path: Path, cfg: WindowConfig) -> Iterator[tuple[float, UInt8[np.ndarray, "h w 3"], bool]]:
    """Each picture with its time since the first, and whether it is the first of another shot."""
    scenedetect = require("scenedetect", "data")
    detector = scenedetect.ContentDetector(threshold=cfg.cut, min_scene_len=0)
    first = None
    with open_video(path) as stream:
        if name := HDR.get(stream.codec_context.color_trc):
            way_out = "convert it to SDR (ffmpeg -vf zscale=t=linear,tonemap=hable,zscale=t=bt709,format=yuv420p)"
            raise DataError(f"{path}: its pictures are HDR, {name}; {way_out}")
        for number, frame in enumerate(decode(stream)):
            if frame.interlaced:
                raise DataError(f"{path}: its pictures are interlaced; deinterlace it (ffmpeg -vf bwdif)")
            if frame.time is None:
                raise DataError(f"{path}: its frames have no times; put the stream into an mp4 or mkv file")
            height, width = frame.image.shape[:2]
            if height < cfg.height or width < cfg.width:
                raise DataError(f"{path}: its pictures are {width}x{height}, clips are {cfg.width}x{cfg.height}")
            first = frame.time if first is None else first
            small = np.ascontiguousarray(reduced(frame.image, DETECTION_ROWS)[..., ::-1])
            cuts = detector.process_frame(scenedetect.FrameTimecode(number, 25.0), small)
            yield frame.time - first, frame.image, bool(cuts)
    if first is None:
        raise DataError(f"{path} holds no frames")
