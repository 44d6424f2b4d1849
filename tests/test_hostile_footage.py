"""Files that cannot be used, each for its own reason; the rest goes on, and the exit code tells."""

import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from commands import run
from PIL import Image
from test_ingest import CFG, encoded, footage, walk

from minwm.core.config import UserError
from minwm.data import clips
from minwm.data.clips import ClipFolder, check
from minwm.data.ingest import ingest, notes

DROPPED = {
    "short": lambda p: lossless(p, walk()[1][:1]),
    "picture.png": lambda p: Image.new("RGB", (160, 128)).save(p, "PNG"),
    "picture.jpg": lambda p: Image.new("RGB", (160, 128)).save(p, "JPEG"),
    "picture.gif": lambda p: Image.new("RGB", (160, 128)).save(p, "GIF"),
    "cut off": lambda p: (lossless(p, walk()[1][:20]), p.write_bytes(p.read_bytes()[:40_000])),
    "wide": lambda p: lossless(p, np.zeros((1, 128, 7680, 3), np.uint8)),
    "cameras end early": lambda p: change(p, c2w=lambda x: x[:9], K=lambda x: x[:9]),
}
"""Videos of one frame, or too few, whatever they are called; and a camera file of which poses are missing."""


def lossless(path: Path, frames: np.ndarray) -> None:
    encoded(path.with_suffix(".mkv"), frames, codec="ffv1", pix_fmt="bgr0").replace(path)


def audio(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        stream.layout = "mono"
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))


def archive(path: Path) -> None:
    """A bomb of which a member would be unpacked outside."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../../etc/passwd", bytes(10**7))


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        file.add(__file__, "../../x")


def cameras(video: Path) -> Path:
    return video.with_name(f"{video.stem}.camera.json")


def change(video: Path, **changes: Callable[[Any], Any]) -> None:
    record = json.loads(cameras(video).read_text())
    cameras(video).write_text(json.dumps(record | {name: new(record[name]) for name, new in changes.items()}))


def pose(row: int, column: int, value: Any) -> Callable[[Path], None]:
    """Sets a number of the fourth pose."""

    def spoil(video: Path) -> None:
        def new(c2w: list[Any]) -> list[Any]:
            c2w[3][row][column] = value
            return c2w

        change(video, c2w=new)

    return spoil


def linked(path: Path, target: Path | str) -> None:
    path.unlink()
    path.symlink_to(target)


NO_VIDEO, ENDLESS = "cannot be read as a video", "is a pipe or a device"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "zero bytes": (lambda p: p.write_bytes(b""), NO_VIDEO),
    "noise": (lambda p: p.write_bytes(bytes(range(256)) * 40), NO_VIDEO),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:700]), NO_VIDEO),
    "no start": (lambda p: p.write_bytes(bytes(2000) + p.read_bytes()[2000:]), NO_VIDEO),
    "end missing": (lambda p: p.write_bytes(p.read_bytes()[:-2000]), NO_VIDEO),
    "text": (lambda p: p.write_text("#EXTM3U\nhttp://x/y.ts\n"), NO_VIDEO),
    "playlist of a local file": (lambda p: p.write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"), NO_VIDEO),
    "list of a local file": (lambda p: p.write_text("ffconcat version 1.0\nfile /etc/passwd\n"), NO_VIDEO),
    "address of a stream": (lambda p: p.write_text("v=0\nm=video 5004 RTP/AVP 96\n"), NO_VIDEO),
    "web page": (lambda p: p.write_text("<html>404</html>"), NO_VIDEO),
    "pdf": (lambda p: p.write_bytes(b"%PDF-1.4\n" + b"x" * 500), NO_VIDEO),
    "svg": (lambda p: p.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), "no decoder for its pictures"),
    "zip": (archive, NO_VIDEO),
    "tar": (tar, NO_VIDEO),
    "program": (lambda p: p.write_bytes(b"\x7fELF" + bytes(900)), NO_VIDEO),
    "audio only": (audio, "holds no pictures"),
    "1x1": (lambda p: lossless(p, np.zeros((3, 1, 1, 3), np.uint8)), "its pictures are 1x1"),
    "too small": (lambda p: encoded(p, np.zeros((2, 32, 32, 3), np.uint8)), "its pictures are 32x32, clips are 128"),
    "a row too few": (lambda p: lossless(p, walk()[1][:3, :127]), "its pictures are 160x127"),
    "hdr": (lambda p: encoded(p, walk()[1][:4], color_trc=16), "HDR, PQ"),
    "hlg": (lambda p: encoded(p, walk()[1][:4], color_trc=18), "HDR, HLG"),
    "interlaced": (
        lambda p: encoded(p, walk()[1][:4], options={"flags": "+ildct+ilme", "x264-params": "tff=1"}),
        "interlaced",
    ),
    "no cameras": (lambda p: cameras(p).unlink(), "cannot read a camera track"),
    "cameras are a folder": (lambda p: (cameras(p).unlink(), cameras(p).mkdir()), "cannot read a camera track"),
    "a link to nothing": (lambda p: linked(cameras(p), "/nowhere"), "cannot read a camera track"),
    "a link to itself": (lambda p: linked(cameras(p), cameras(p)), "symbolic link"),
    "damaged cameras": (lambda p: cameras(p).write_text("{"), "is not JSON"),
    "cameras are a list": (lambda p: cameras(p).write_text("[]"), "holds a JSON list"),
    "cameras nested": (lambda p: cameras(p).write_text("[" * 100_000), "nested too deep"),
    "cameras are binary": (lambda p: cameras(p).write_bytes(bytes(range(256))), "not UTF-8"),
    "another convention": (lambda p: change(p, convention=lambda _: "w2c"), "no minwm camera track"),
    "nan": (pose(0, 3, float("nan")), "not finite"),
    "infinite": (pose(0, 3, float("inf")), "not finite"),
    "too large": (pose(0, 3, 10**400), "too large"),
    "a word": (pose(0, 3, "x"), "could not convert"),
    "mirrored": (lambda p: change(p, c2w=lambda x: [np.diag([-1.0, 1, 1, 1]).tolist()] * len(x)), "det(R) = -1"),
    "scaled": (lambda p: change(p, c2w=lambda x: [np.diag([2.0, 2, 2, 1]).tolist()] * len(x)), "R is no rotation"),
    "transposed": (pose(3, 0, 0.5), "the bottom row is"),
    "no poses": (lambda p: change(p, c2w=lambda _: []), "c2w has shape"),
    "poses of another shape": (lambda p: change(p, c2w=lambda x: [row[:3] for row in x]), "c2w has shape"),
    "fewer K than poses": (lambda p: change(p, K=lambda x: x[:9]), "K has shape"),
    "K in pixels": (lambda p: change(p, K=lambda _: [500.0, 500, 80, 64]), "K is (fx/W, fy/H"),
    "K zero": (lambda p: change(p, K=lambda _: [0.0, 0, 0.5, 0.5]), "K = [0.0"),
    "no rate": (lambda p: change(p, fps=lambda _: 0), "fps = 0"),
    "unit of length": (lambda p: change(p, unit=lambda _: "miles"), "unit = 'miles'"),
    "caption in another encoding": (lambda p: p.with_suffix(".txt").write_bytes(b"\xff\xfea\x00"), "not UTF-8"),
    "caption is a folder": (lambda p: (p.with_suffix(".txt").unlink(), p.with_suffix(".txt").mkdir()), "directory"),
    "caption is a pipe": (lambda p: (p.with_suffix(".txt").unlink(), os.mkfifo(p.with_suffix(".txt"))), ENDLESS),
    "cameras are a pipe": (lambda p: (cameras(p).unlink(), os.mkfifo(cameras(p))), ENDLESS),
    "cameras are a device": (lambda p: linked(cameras(p), "/dev/zero"), ENDLESS),
    "a stream without times": (lambda p: encoded(p.with_suffix(".h264"), walk()[1][:4]).replace(p), "have no times"),
    "K is no number": (lambda p: change(p, K=lambda _: [float("nan"), 0.9, 0.5, 0.5]), "K = [nan"),
    "K negative": (lambda p: change(p, K=lambda _: [-0.7, 0.9, 0.5, 0.5]), "K = [-0.7"),
    "endless rate": (lambda p: change(p, fps=lambda _: float("inf")), "fps = inf"),
    "bottom row of zeros": (pose(3, 3, 0.0), "the bottom row is [0.0, 0.0, 0.0, 0.0]"),
    "a later version": (lambda p: change(p, schema=lambda _: 99), "(schema 1, "),
}


def test_hostile_files_are_refused_each_for_its_reason_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    good = footage(source, "zz good")

    def copied(name: str) -> Path:
        for suffix in (".mp4", ".camera.json", ".txt"):
            shutil.copy(good.with_name(f"{good.stem}{suffix}"), source / f"{name}{suffix}")
        return source / f"{name}.mp4"

    for i, (spoil, _) in enumerate(REFUSED.values()):
        spoil(copied(f"v{i:02d}"))
    for i, spoil in enumerate(DROPPED.values()):
        spoil(copied(f"w{i:02d}"))
    os.symlink(source, source / "loop")
    linked(copied("gone"), "/nowhere/x.mp4")  # no file, and so no video
    copied("путь 道 ‮x")
    size = ("--latents", 5, "--height", 128, "--width", 128, "--estimator", "none")
    words = ("--source-license", "CC0-1.0", *size, "--json", tmp_path / "n.json")
    assert run("data", "ingest", source, "--out", tmp_path / "out", *words) == 2
    told = capsys.readouterr()
    assert f"{len(REFUSED)} of {len(REFUSED) + len(DROPPED) + 2} videos were refused" in told.err
    refused = {Path(note["video"]).stem: note for note in notes(tmp_path / "out")}
    for i, (fault, (_, reason)) in enumerate(REFUSED.items()):
        assert reason in refused[f"v{i:02d}"]["refused"], fault
    for i, fault in enumerate(DROPPED):
        note = refused[f"w{i:02d}"]
        assert not note["clips"] and not note["refused"], fault
        assert {line["rule"] for line in note["dropped"]} <= {"short", "no poses"}, fault
    whole = {note["video"] for note in refused.values() if note["clips"]}
    assert {Path(video).stem for video in whole} == {"zz good", "путь 道 ‮x", "v04"}, "v04 has a whole clip at its start"
    assert check(tmp_path / "out") == []
    assert not list((tmp_path / "out").rglob("*.tmp")) and not (tmp_path.parent / "x").exists()


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of the video, which is not noted as done."""
    footage(tmp_path / "in")

    def full(path: Path, *_: Any, **__: Any) -> None:
        raise UserError(f"no space left to write {path}")

    with monkeypatch.context() as patch:
        patch.setattr(clips, "write_video", full)
        with pytest.raises(UserError, match="no space left to write"):
            ingest(tmp_path / "in", tmp_path / "out", CFG)
    assert list(notes(tmp_path / "out")) == [] and ClipFolder(tmp_path / "out").ids() == []
    assert ingest(tmp_path / "in", tmp_path / "out", CFG)["clips"] == 1


def test_a_target_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    footage(tmp_path / "in")
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "out", Path("/proc/out")):
        assert run("data", "ingest", tmp_path / "in", "--out", target, "--source-license", "CC0-1.0") == 2
        assert f"{target} cannot be written" in capsys.readouterr().err
