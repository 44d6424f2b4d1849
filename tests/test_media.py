"""Files appear whole or not at all; frames survive their encodings; drawings show what they should."""

import errno
import io
import os
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from minwm.core import files, media, runtime
from minwm.core.config import UserError
from minwm.core.files import atomic


def clip(frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth moving picture, n h w 3."""
    t, y, x = np.mgrid[0:frames, 0:height, 0:width]
    channels = [np.sin(x / 9 + t / 4), np.cos(y / 7 - t / 5), np.sin((x + y) / 11)]
    return (np.stack(channels, -1) * 100 + 128).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def test_atomic_writes_whole_files_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    for text in ("one", "two"):
        with atomic(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["x.json"]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_text_in_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "prompts.txt").write_text("caf\u00e9", encoding=encoding)
    with pytest.raises(UserError, match=r"prompts.txt is not UTF-8 text .* save it as UTF-8"):
        files.read_text(tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("caf\u00e9", encoding="utf-8-sig")
    assert files.read_text(tmp_path / "prompts.txt") == "caf\u00e9"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("lost"), OSError(errno.EIO, "broken")])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(type(failure)), atomic(path) as temporary:
        temporary.write_text("half of the n")
        raise failure
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]


def test_folders_are_synced_only_where_they_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows opens no folders, and syncs files that are open for writing alone."""
    open_file = os.open

    def windows(path: Path, flags: int, mode: int = 0o777) -> int:
        if Path(path).is_dir() or not flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, flags, mode)

    with monkeypatch.context() as patch:
        patch.setattr(files, "FOLDERS_OPEN", False)
        patch.setattr(files.os, "open", windows)
        files.write_text(str(tmp_path / "x.txt"), "x")
    assert (tmp_path / "x.txt").read_text() == "x"


@pytest.mark.parametrize("in_words", [False, True])
def test_a_full_disk_is_told_with_the_free_bytes(tmp_path: Path, in_words: bool) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(UserError, match=r"no space left to write .*x\.json: \d+ bytes are free"):  # noqa: SIM117
        with atomic(path) as temporary:
            temporary.write_text("half of the n")
            if in_words:
                raise RuntimeError("IoError: No space left on device (os error 28)")
            with open("/dev/full", "w") as full:  # a real ENOSPC from the kernel
                full.write("x" * 100_000)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]


def test_a_video_on_a_full_disk_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_sync", lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(UserError, match="no space left"):
        media.write_video(tmp_path / "x.mp4", clip(), 16)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("crf", "height", "least"), [(12, 48, 40), (12, 47, 40), (23, 48, 33), (23, 47, 33)])
def test_video_round_trip(tmp_path: Path, crf: int, height: int, least: float) -> None:
    path, frames = tmp_path / "x.mp4", clip(height=height)
    media.write_video(path, frames, 12.5, crf=crf)
    again, fps = media.read_video(path)
    assert fps == 12.5 and again.shape == frames.shape and again.dtype == np.uint8
    assert psnr(frames, again) > least


def test_videos_say_how_their_colours_are_stored(tmp_path: Path) -> None:
    """Else a browser takes another matrix, and shows other colours than were written; it asks for all four."""
    frames = clip()
    for crf in (12, 23):
        media.write_video(tmp_path / f"{crf}.mp4", frames, 16, crf=crf)
    access_unit, _ = media.H264Encoder(48, 64, 16).encode(frames[0])
    (tmp_path / "live.h264").write_bytes(access_unit)
    for name in ("12.mp4", "23.mp4", "live.h264"):
        with av.open(str(tmp_path / name)) as container:
            next(container.decode(video=0))
            codec = container.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_range) == (Colorspace.ITU601, ColorRange.MPEG), name
        assert (codec.color_primaries, codec.color_trc) == (ColorPrimaries.BT709, ColorTrc.IEC61966_2_1), name


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    written = set()
    for index in range(20):  # each time in other memory
        frames = torch.from_numpy(clip()) if index % 2 else clip()
        media.write_video(tmp_path / "x.mp4", frames, 16)
        written.add((tmp_path / "x.mp4").read_bytes())
    assert len(written) == 1


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    for path in (broken, tmp_path / "missing.mp4"):
        with pytest.raises(UserError, match=path.name):
            media.read_video(path)
        with pytest.raises(UserError, match=path.name):
            media.read_image(path)
    with pytest.raises(UserError, match="at least one frame"):
        media.write_video(tmp_path / "x.mp4", clip()[:0], 16)
    with pytest.raises(ValueError, match=r"uint8 with 3 channels last, not float64 of shape \(9, 48, 64, 3\)"):
        media.contact_sheet([clip() / 255.0], every=1, labels=["x"])


def test_browser_video() -> None:
    import av

    data = media.mp4_bytes(clip(height=47), 16, scale=3)
    assert data.index(b"moov") < data.index(b"mdat")  # the index comes first, so that it plays while it loads
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.pix_fmt) == (192, 142, "yuv420p")
        assert sum(1 for _ in container.decode(stream)) == 9


def test_images(tmp_path: Path) -> None:
    frame = clip()[0]
    media.write_image(tmp_path / "x.png", frame)
    np.testing.assert_array_equal(media.read_image(tmp_path / "x.png"), frame)
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(media.png_bytes(frame)))), frame)
    media.write_image(tmp_path / "x.jpg", frame)
    assert (tmp_path / "x.jpg").read_bytes()[:2] == media.jpeg_bytes(frame)[:2] == b"\xff\xd8"
    assert psnr(media.read_image(tmp_path / "x.jpg"), frame) > 30


def picture(mode: str) -> Image.Image:
    """A grey level of 100 of 255 in any mode of Pillow."""
    if mode.startswith("I;16"):
        values = np.full((4, 6), 100 * 257, ">u2" if mode == "I;16B" else "<u2")
        return Image.frombytes(mode, (6, 4), values.tobytes())
    if mode in ("La", "RGBa", "LA", "PA", "P", "1", "RGBX"):
        return Image.new("L", (6, 4), 100).convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)
    if mode == "LAB":
        return Image.new("LAB", (6, 4), (108, 128, 128))  # L* of sRGB 100 is 42.4 of 100
    return Image.new("RGB", (6, 4), (100, 100, 100)).convert(mode)


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_of_a_picture_is_right_or_refused(mode: str) -> None:
    if mode in ("I", "F"):
        with pytest.raises(UserError, match=f"mode {mode} have no known black and white"):
            media.to_rgb(picture(mode))
    elif mode != "1":
        assert np.abs(media.to_rgb(picture(mode)).astype(int) - 100).max() <= 2
    assert np.array_equal(media.to_rgb(Image.new("1", (1, 1), 1)), [[[255, 255, 255]]])


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    palette = red.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    grey = Image.fromarray(np.full((4, 4), 1000, np.uint16))
    red.save(tmp_path / "rgba.png")
    palette.save(tmp_path / "palette.png")
    red.convert("RGB").save(tmp_path / "keyed.png", transparency=(255, 0, 0))
    grey.save(tmp_path / "grey.png", transparency=1000)
    for file in sorted(tmp_path.iterdir()):
        assert media.read_image(file).min() == 255, file.name
    half = media.to_rgb(np.full((1, 1, 4), (0, 0, 0, 128), np.uint8))
    assert half.tolist() == [[[127, 127, 127]]]


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "uint32", "int8", "int16", "int64", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (4,), (4, 6), (4, 6, 1), (4, 6, 2), (4, 6, 3), (4, 6, 4), (2, 4, 6, 3), (0, 6)])
def test_every_array_is_a_picture_or_refused(dtype: str, shape: tuple[int, ...]) -> None:
    white = np.full(shape, 1 if dtype == "bool" else 65535 if dtype == "uint16" else 255).astype(dtype)
    known = {"bool": [(4, 6)], "uint16": [(4, 6)], "uint8": [(4, 6), (4, 6, 2), (4, 6, 3), (4, 6, 4)]}
    if shape in known.get(dtype, []):
        assert np.array_equal(media.to_rgb(white), np.full((4, 6, 3), 255))
        assert np.array_equal(media.resize_and_crop(white, 2, 2), np.full((2, 2, 3), 255))
    else:
        with pytest.raises(UserError, match=r"give uint8|no known black and white"):
            media.to_rgb(white)


@pytest.mark.parametrize(("turns", "matrix"), [(1, (0, 1, -1, 0)), (2, (-1, 0, 0, -1)), (3, (0, -1, 1, 0))])
def test_the_rotation_of_a_phone_is_applied(tmp_path: Path, turns: int, matrix: tuple[int, int, int, int]) -> None:
    path, frames = tmp_path / "x.mp4", clip()
    media.write_video(path, frames, 16)
    data, (a, b, c, d) = path.read_bytes(), matrix
    at = data.index(b"tkhd") + 44  # the display matrix of the track, nine fixed-point numbers
    rotation = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:at] + rotation + data[at + 36 :])
    again, _ = media.read_video(path)
    assert psnr(np.rot90(frames, -turns, axes=(1, 2)), again) > 40  # a turn is clockwise, as the matrix is


def test_pixels_that_are_not_square_are_widened(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv444p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for image in clip():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    again, _ = media.read_video(tmp_path / "x.mp4")
    assert again.shape == (9, 48, 85, 3)


def test_pixels_and_frames_are_inverse() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
    x = media.to_pixels(levels)
    assert x.shape == (2, 3, 16, 16) and x.dtype == torch.float32 and (x.min(), x.max()) == (-1, 1)
    np.testing.assert_array_equal(media.to_frames(x), levels.numpy())
    np.testing.assert_array_equal(media.to_frames(x[None] * 5)[0] > 127, levels.numpy() > 127)
    assert media.to_pixels(levels[None].numpy()).shape == (1, 2, 3, 16, 16)


def test_contact_sheet_places_every_frame() -> None:
    rows = [clip(9), clip(5, height=32)]
    sheet = media.contact_sheet(rows, every=4, labels=["first", "the second"])
    margin = sheet.shape[1] - 3 * (64 + 2)
    assert sheet.shape[0] == 2 + 50 + 34 and margin > 40
    np.testing.assert_array_equal(sheet[2:50, margin + 66 : margin + 130], rows[0][4])
    np.testing.assert_array_equal(sheet[52:84, margin + 66 : margin + 130], rows[1][4])
    for top, bottom in ((2, 50), (52, 84)):
        assert (sheet[top:bottom, :margin] < 128).any()  # a label is drawn
    assert (sheet[52:84, margin + 132 :] == 255).all()  # the shorter row ends in white


def test_overlay_lights_the_pressed_keys() -> None:
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    shown = media.overlay_keys(frames, [(), ("w",), {"j"}, frozenset({"left"}), ("dn",)])
    assert shown.shape == (5, 256, 256, 3) and shown.dtype == np.uint8
    lit = (shown[..., 0] > 180) & (shown[..., 2] < 100)  # the colour of a pressed key
    assert [bool(picture[:, :128].any()) for picture in lit] == [False, True, False, False, True]
    assert [bool(picture[:, 160:].any()) for picture in lit] == [False, False, True, True, False]
    np.testing.assert_array_equal(shown[2], shown[3])
    assert media.overlay_keys(np.zeros((1, 20, 200, 3), np.uint8), [()]).shape == (1, 40, 400, 3)
    with pytest.raises(ValueError, match="5 frames, but keys for 1"):
        media.overlay_keys(frames, [()])


def test_generators_differ_by_salt_and_repeat() -> None:
    draws = [
        torch.rand(1, generator=each)
        for each in (
            runtime.generator(0),
            runtime.generator(0, "noise"),
            runtime.generator(0, "noise", 1),
            runtime.generator(1),
        )
    ]
    assert len({float(draw) for draw in draws}) == 4
    assert float(draws[1]) == float(torch.rand(1, generator=runtime.generator(0, "noise")))
    assert runtime.generator(0, "noise", 1).initial_seed() == 1_413_489_107_338_554_685  # on every machine


def test_missing_extras_name_themselves() -> None:
    assert runtime.require("json", "data") is __import__("json")
    with pytest.raises(UserError, match=r"no_such_library is not installed; run: pip install 'minwm\[data\]'"):
        runtime.require("no_such_library.part", "data")


def test_the_commit_is_this_checkouts(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(runtime.__file__).parents[2]
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    commit = runtime.git_commit.__wrapped__()
    assert (commit or "").removesuffix("-dirty") == (head.stdout.strip() if head.returncode == 0 else "")
    monkeypatch.setenv("PATH", "")
    assert runtime.git_commit.__wrapped__() is None  # no git at all
    assert {"python", "torch", "platform", "cpu"} <= runtime.versions().keys()


def test_progress_writes_about_ten_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with runtime.progress(200, "clips") as bar:
        for step in range(200):
            bar.advance(text=f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[0].startswith("clips 20/200 · ") and lines[-1].endswith("loss 199")
    monkeypatch.setenv("RANK", "1")
    with runtime.progress(1, "clips") as bar:
        bar.advance()
    with runtime.progress(0, "nothing"):
        pass
    assert capsys.readouterr().err == ""


def test_progress_draws_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    with runtime.progress(4, "clips") as bar:
        for _ in range(4):
            bar.advance(text="loss [0]")
    shown = capsys.readouterr().err
    assert "4/4" in shown and "loss [0]" in shown and "/s" in shown
