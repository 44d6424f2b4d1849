"""Frames to image and video files and back. Frames are uint8 arrays `n h w 3` (numpy, or torch on any device)."""

import io
import math
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from minwm.core.config import UserError
from minwm.core.files import atomic

if TYPE_CHECKING:
    from av import VideoCodecContext, VideoFrame, VideoStream

Frames = UInt8[np.ndarray, "n h w 3"] | UInt8[Tensor, "n h w 3"]
Frame = UInt8[np.ndarray, "h w 3"] | UInt8[Tensor, "h w 3"]

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".ts")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_CRF_444 = 12
"""Up to this x264 crf, colour is stored at full resolution (yuv444p)."""
KEY_CAPS = {"w": (1, 0), "a": (0, 1), "s": (1, 1), "d": (2, 1)}
"""Position (column, row) of each key in a cluster of key caps; the arrow keys form a second cluster."""
ARROWS = {"i": "w", "j": "a", "k": "s", "l": "d", "up": "w", "left": "a", "down": "s", "right": "d"}


def to_pixels(frames: np.ndarray | Tensor) -> Float[Tensor, "... 3 h w"]:
    """uint8 frames `... h w 3` as float32 in [-1, 1] `... 3 h w`, on the device of the frames."""
    return torch.as_tensor(frames).movedim(-1, -3).float() / 127.5 - 1


def to_frames(pixels: Float[Tensor, "... 3 h w"]) -> UInt8[np.ndarray, "... h w 3"]:
    """Floats in [-1, 1] (clamped) as uint8 frames on the host; the inverse of `to_pixels`."""
    return to_uint8(pixels).cpu().numpy()


def to_uint8(pixels: Float[Tensor, "... 3 h w"]) -> UInt8[Tensor, "... h w 3"]:
    """Floats in [-1, 1] (clamped) as uint8 frames on the device of the pixels."""
    rounded = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return rounded.to(torch.uint8).movedim(-3, -1).contiguous()


def write_video(path: str | Path, frames: Iterable[Frame], fps: float, crf: int = MAX_CRF_444) -> None:
    """Write H.264 in mp4, whatever the suffix; yuv444p up to crf 12 and for odd sizes, else yuv420p.

    Frames are taken from the iterable one by one, once the file is open, and are not kept.
    """
    with atomic(path) as temporary:
        _encode(temporary, map(_numpy, frames), fps, crf)


def mp4_bytes(frames: Frames, fps: float, crf: int = 18, scale: int = 1) -> bytes:
    """An mp4 (yuv420p) as bytes, enlarged `scale` times by repeating pixels; odd sides are padded by one pixel."""
    images = _enlarge(_numpy(frames), scale)
    images = np.pad(images, [(0, 0), (0, images.shape[1] % 2), (0, images.shape[2] % 2), (0, 0)], mode="edge")
    with tempfile.TemporaryDirectory() as folder:  # moving the index to the front needs a real file
        path = Path(folder) / "video.mp4"
        _encode(path, iter(images), fps, crf)
        return path.read_bytes()


def _encode(path: Path, images: Iterator[np.ndarray], fps: float, crf: int) -> None:
    import av

    first = next(images, None)
    if first is None:
        raise UserError(f"a video needs at least one frame: {path.name} has none")
    height, width, _ = first.shape
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv444p" if crf <= MAX_CRF_444 or height % 2 or width % 2 else "yuv420p"
        # The same frames must give the same bytes: x264's macroblock tree reads memory that nobody set when
        # pictures are small, and the number of threads changes the result.
        stream.options = {"crf": str(crf), "preset": "fast", "x264-params": "mbtree=0"}
        stream.thread_count = 1
        _name_colours(stream.codec_context)
        for image in chain([first], images):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode(None))


def _name_colours(codec: "VideoCodecContext") -> None:
    """RGB becomes YUV by BT.601, as always in FFmpeg; where the stream does not say so, browsers read BT.709."""
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    codec.colorspace, codec.color_range = Colorspace.ITU601, ColorRange.MPEG
    codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.IEC61966_2_1  # those of sRGB


class H264Encoder:
    """Low-latency H.264 encoder: each frame gives its access unit (Annex B) at once. Sides must be even."""

    def __init__(self, height: int, width: int, fps: float, crf: int = 23) -> None:
        import av

        if height % 2 or width % 2:
            raise UserError(f"H.264 needs even sides, these are {width}x{height}; use JPEG")
        codec = av.CodecContext.create("libx264", "w")
        assert isinstance(codec, av.VideoCodecContext)
        codec.height, codec.width, codec.pix_fmt = height, width, "yuv420p"
        codec.framerate = Fraction(fps).limit_denominator(1001)
        codec.time_base = 1 / codec.framerate
        # key frames only on request, each with its parameter sets, so that a decoder can start there
        live = {"preset": "ultrafast", "tune": "zerolatency", "profile": "baseline", "forced-idr": "1", "g": "100000"}
        codec.options = {**live, "crf": str(crf)}
        _name_colours(codec)
        self._codec, self._count = codec, 0

    def encode(self, frame: Frame, key: bool = False) -> tuple[bytes, bool]:
        """The access unit of the next frame, and whether it is a key frame; `key` asks for one."""
        import av
        from av.video.frame import PictureType

        image = av.VideoFrame.from_ndarray(np.ascontiguousarray(_numpy(frame)), format="rgb24")
        image.pict_type = PictureType.I if key else PictureType.NONE
        image.pts, self._count = self._count, self._count + 1
        (packet,) = self._codec.encode(image)
        return bytes(packet), packet.is_keyframe


@contextmanager
def open_video(path: str | Path) -> Iterator["VideoStream"]:
    """The first video stream of a file. UserError if it cannot be opened or, while it is open, decoded."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} cannot be read as a video: it holds no pictures")
            if not container.streams.video[0].codec_context:
                raise UserError(f"{path} cannot be read as a video: there is no decoder for its pictures")
            yield container.streams.video[0]
    except (FFmpegError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a video: {error}") from error


class Decoded(NamedTuple):
    """One frame of a video, as a player shows it."""

    image: UInt8[np.ndarray, "h w 3"]
    time: float | None
    """Seconds, if the file says so."""
    interlaced: bool


def decode(stream: "VideoStream") -> Iterator[Decoded]:
    """The frames of a video, rotated by the display matrix (videos of phones) and widened to square pixels."""
    for frame in stream.container.decode(stream):  # type: ignore[union-attr]
        yield Decoded(_displayed(frame, stream.sample_aspect_ratio), frame.time, frame.interlaced_frame)


def read_video(path: str | Path) -> tuple[UInt8[np.ndarray, "n h w 3"], float]:
    """All frames of a video, as `decode` gives them, and its frames per second.

    Raises UserError if the file is missing or cannot be decoded.
    """
    with open_video(path) as stream:
        images = [frame.image for frame in decode(stream)]
        fps = stream.average_rate
    if not images or not fps:
        raise UserError(f"{path} holds no frames")
    return np.stack(images), float(fps)


def read_first_frame(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """A picture, or the first frame of a video; UserError if it cannot be read."""
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        return read_image(path)
    with open_video(path) as stream:
        for frame in decode(stream):
            return frame.image
    raise UserError(f"{path} holds no frames")


def read_grey(path: str | Path, rows: int = 360) -> tuple[list[UInt8[np.ndarray, "h w"]], float]:
    """All frames in grey, reduced to at most so many rows (of the shorter side), and frames per second."""
    with open_video(path) as stream:
        frames = [np.asarray(Image.fromarray(reduced(frame.image, rows)).convert("L")) for frame in decode(stream)]
        fps = stream.average_rate
    if not frames or not fps:
        raise UserError(f"{path} holds no frames")
    return frames, float(fps)


def reduced(image: UInt8[np.ndarray, "h w 3"], rows: int) -> UInt8[np.ndarray, "H W 3"]:
    """A picture with at most so many pixels on its shorter side."""
    part = rows / min(image.shape[:2])
    if part >= 1:
        return image
    size = (max(1, round(image.shape[1] * part)), max(1, round(image.shape[0] * part)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def _displayed(frame: "VideoFrame", pixel_aspect: Fraction | None) -> UInt8[np.ndarray, "h w 3"]:
    """A decoded frame in square pixels; `pixel_aspect` is width / height of a stored pixel (None or 0: square)."""
    width = round(frame.width * (pixel_aspect or 1))
    image = frame.reformat(width=width, format="rgb24", interpolation="LANCZOS").to_ndarray()
    return np.rot90(image, round(frame.rotation / 90))  # both count counterclockwise


def write_image(path: str | Path, image: Frame) -> None:
    """Write a PNG, or a JPEG if the suffix is .jpg or .jpeg."""
    lossy = Path(path).suffix.lower() in (".jpg", ".jpeg")
    with atomic(path) as temporary:
        temporary.write_bytes(jpeg_bytes(image, quality=95) if lossy else png_bytes(image))


def read_image(
    path: str | Path | io.BytesIO, formats: tuple[str, ...] | None = None, largest: float = math.inf
) -> UInt8[np.ndarray, "h w 3"]:
    """Any image that `to_rgb` takes, with its EXIF orientation applied.

    Raises UserError if it is missing or no image, of a format not in `formats`, or of more than `largest` pixels.
    """
    try:
        with Image.open(path, formats=formats) as image:
            if image.width * image.height > largest:
                raise ValueError(f"{image.width}x{image.height} pixels are too many")
            return to_rgb(ImageOps.exif_transpose(image))
    except (UserError, UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def to_rgb(image: Image.Image | np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """A picture of any mode as 8-bit RGB; transparent pixels are shown on white, 16-bit grey is scaled to 8 bits.

    Arrays are bool, uint8 or uint16 `h w` (grey), uint8 `h w 2` (with alpha), `h w 3` or `h w 4` (with alpha). Raises
    UserError for any other, and for floats and 32-bit integers, whose black and white are not known.
    """
    if not isinstance(image, Image.Image):
        image = _from_array(image)
    if image.mode in ("I", "F"):
        raise UserError(f"pixels of mode {image.mode} have no known black and white; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        levels = ((grey + 128) // 257).astype(np.uint8)
        levels[grey == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(levels)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _from_array(array: np.ndarray) -> Image.Image:
    try:
        if array.ndim in (2, 3) and array.size:
            return Image.fromarray(array)
        problem = "no picture"
    except (TypeError, ValueError) as error:
        problem = str(error)
    raise UserError(f"an array {array.dtype} of shape {array.shape}: {problem}; give uint8 of shape (h, w, 3)")


def resize_and_crop(image: np.ndarray, height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
    """Crop the centre to the aspect ratio of height x width, and resize to it (Lanczos); `image` as for `to_rgb`."""
    return np.array(ImageOps.fit(Image.fromarray(to_rgb(image)), (width, height), Image.Resampling.LANCZOS))


def jpeg_bytes(frame: Frame, quality: int = 85) -> bytes:
    """One frame as a JPEG; from quality 90 on without chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(_numpy(frame)).save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    return buffer.getvalue()


def png_bytes(frame: Frame) -> bytes:
    """One frame as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(_numpy(frame)).save(buffer, "PNG")
    return buffer.getvalue()


def contact_sheet(rows: Sequence[np.ndarray | Tensor], every: int, labels: Sequence[str]) -> UInt8[np.ndarray, "h w 3"]:
    """Every `every`-th frame of each video side by side, one labelled row per video; sizes may differ."""
    font, gap = ImageFont.load_default(size=12), 2
    margin = 2 * gap + math.ceil(max(font.getlength(label) for label in labels))
    cells = [_numpy(row)[::every] for row in rows]
    width = margin + max(len(row) * (row.shape[2] + gap) for row in cells)
    height = gap + sum(row.shape[1] + gap for row in cells)
    sheet = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(sheet), gap
    for row, label in zip(cells, labels, strict=True):
        draw.text((gap, top + row.shape[1] // 2), label, fill="black", font=font, anchor="lm")
        for column, cell in enumerate(row):
            sheet.paste(Image.fromarray(cell), (margin + column * (row.shape[2] + gap), top))
        top += row.shape[1] + gap
    return np.array(sheet)


def overlay_keys(frames: Frames, keys_per_frame: Sequence[Collection[str]]) -> UInt8[np.ndarray, "n height width 3"]:
    """Frames enlarged to at least 256 pixels of width, with the key caps drawn on them and pressed keys lit.

    Each entry holds the keys held down in that frame: w a s d, and i j k l or up left down right, which are
    shown as arrows. Any other key is shown by its name between the two clusters while it is held.
    """
    images = _numpy(frames)
    if len(images) != len(keys_per_frame):
        raise ValueError(f"{len(images)} frames, but keys for {len(keys_per_frame)}")
    images = _enlarge(images, math.ceil(256 / images.shape[2]))
    painted = {held: _key_caps(held, *images.shape[1:3]) for held in map(frozenset, keys_per_frame)}
    out = [
        Image.alpha_composite(Image.fromarray(image).convert("RGBA"), painted[frozenset(held)]).convert("RGB")
        for image, held in zip(images, keys_per_frame, strict=True)
    ]
    return np.stack([np.asarray(image) for image in out])


def _key_caps(held: frozenset[str], height: int, width: int) -> Image.Image:
    """A transparent image of both clusters in the lower corners."""
    layer = Image.new("RGBA", (width, height))
    draw, cap = ImageDraw.Draw(layer), width // 13
    font = ImageFont.load_default(size=cap * 0.6)
    bottom = height - 2 * cap - cap // 2
    arrows = {ARROWS[key] for key in held if key in ARROWS}
    for left, lit, shown in ((cap // 2, held, True), (width - 3 * cap - cap // 2, arrows, False)):
        for key, (column, row) in KEY_CAPS.items():
            x, y = left + column * cap, bottom + row * cap
            fill, ink = ((255, 210, 60, 230), "black") if key in lit else ((20, 20, 20, 120), "white")
            draw.rounded_rectangle((x + 1, y + 1, x + cap - 1, y + cap - 1), cap // 5, fill, outline=ink)
            centre = (x + cap / 2, y + cap / 2)
            if shown:
                draw.text(centre, key.upper(), fill=ink, font=font, anchor="mm")
            else:
                turn = {"w": 0, "a": 90, "s": 180, "d": -90}[key]
                draw.regular_polygon((*centre, cap * 0.28), 3, rotation=turn, fill=ink)
    others = " ".join(sorted(held - KEY_CAPS.keys() - ARROWS.keys()))
    draw.text((width / 2, height - cap), others, (255, 210, 60), font, "mm", stroke_width=2, stroke_fill="black")
    return layer


def _numpy(image: np.ndarray | Tensor) -> np.ndarray:
    array = image.cpu().numpy() if isinstance(image, Tensor) else image
    if array.dtype != np.uint8 or array.shape[-1] != 3:
        raise ValueError(f"frames are uint8 with 3 channels last, not {array.dtype} of shape {array.shape}")
    return array


def _enlarge(images: np.ndarray, scale: int) -> np.ndarray:
    return images.repeat(scale, axis=1).repeat(scale, axis=2)
