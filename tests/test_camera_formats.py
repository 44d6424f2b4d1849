"""Camera files of other tools: read as published, written back, and what they cannot hold named."""

import json
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from commands import error_line, run

from minwm.cameras.formats.base import CameraFile, Given
from minwm.cameras.formats.table import FORMATS, read_cameras, write_cameras
from minwm.cameras.track import CameraError, CameraTrack, intrinsics, look_at, so3_exp
from minwm.cameras.trajectory import Motion, parse
from minwm.render.worlds import World

line = pytest.fixture(error_line)
WRITABLE = [name for name, known in FORMATS.items() if known.write]
SIZE = (48, 80)


def cameras(**changes: object) -> CameraFile:
    """Nine poses with roll, non-square pixels, the axis off the middle, and K that changes from frame to frame."""
    steps = np.linspace(0, 1, 9)
    c2w = np.stack([look_at((2 * np.sin(s), -0.5, -2 + s), (0.2, 0.1, 1 + s)) for s in steps])
    c2w[:, :3, :3] = c2w[:, :3, :3] @ so3_exp(np.array([[0, 0, 0.2]]) * steps[:, None])
    K = np.array([0.8, 1.4, 0.47, 0.52]) * (1 + 0.1 * steps[:, None])
    names = tuple(f"images/{i:02d}.png" for i in (*range(8, 11), *range(20, 26)))
    known = {"track": CameraTrack(c2w, K, 24.0, "metric"), "size": SIZE, "names": names, "source": "https://x.org/v"}
    return CameraFile(**(known | changes))  # type: ignore[arg-type]


def read_back(path: Path, name: str, given: Given) -> CameraFile:
    rate, size = (
        FORMATS[name].fps or given.fps,
        None if name in ("lingbot", "worldplay", "worldplay-training") else SIZE,
    )
    return read_cameras(path, name, Given(fps=rate, size=size, unit=given.unit))


@pytest.mark.parametrize("name", WRITABLE)
def test_every_format_gives_back_what_it_holds_and_names_the_rest(name: str, tmp_path: Path) -> None:
    given, keeps = cameras(), FORMATS[name].keeps
    if rate := FORMATS[name].fps:
        given = cameras(track=CameraTrack(given.track.c2w, given.track.K, rate, "metric"))
    lost = write_cameras(tmp_path / "x", name, given)
    back = read_back(tmp_path / "x", name, Given(fps=given.track.fps, unit="metric" if "unit" not in keeps else None))
    assert np.abs(back.track.c2w - given.track.c2w).max() < 1e-14
    k = given.track.K[:1] if FORMATS[name].one_lens else given.track.K
    assert np.abs(back.track.K[:, :2] - k[:, :2]).max() < 1e-14
    assert FORMATS[name].one_lens == any(text.startswith("K changes from frame to frame") for text in lost)
    assert back.track.fps == pytest.approx(given.track.fps)
    kept = {
        "principal point": np.abs(back.track.K - k).max() < 1e-14,
        "names": back.names == given.names,
        "source": back.source == given.source,
    }
    for part, same in kept.items():
        words = {"names": "the names of the pictures", "source": "the address of the video"}.get(part, "the principal")
        assert same == (part in keeps) == (not any(text.startswith(words) for text in lost))
    assert ("the unit of length, metric" in lost) == ("unit" not in keeps)


@pytest.mark.parametrize("name", WRITABLE)
def test_a_second_file_written_from_the_first_is_the_same(name: str, tmp_path: Path) -> None:
    write_cameras(tmp_path / "a", name, cameras())
    once = read_back(tmp_path / "a", name, Given(fps=24.0, unit="metric"))
    write_cameras(tmp_path / "b", name, once)
    again = read_back(tmp_path / "b", name, Given(fps=24.0, unit="metric"))
    assert np.abs(again.track.c2w - once.track.c2w).max() < 1e-15 * 4
    assert np.abs(again.track.K - once.track.K).max() < 1e-15 * 4
    assert (again.names, again.source, again.size) == (once.names, once.source, once.size)


@pytest.mark.parametrize("name", WRITABLE)
def test_a_rendered_clip_looks_the_same_through_every_format(name: str, tmp_path: Path) -> None:
    world = World(3)
    motion = Motion(move=1.0, turn=60.0, fps=FORMATS[name].fps or 8.0)
    track = parse("w+l*1,i*1").track(motion, intrinsics(70.0, 32, 24))
    start = world.spawn(np.random.default_rng(0), track)
    assert start is not None
    track = track.transformed(start)
    write_cameras(tmp_path / "x", name, CameraFile(track, size=SIZE))
    back = read_back(tmp_path / "x", name, Given(fps=track.fps)).track
    before, after = (world.render(cameras, 24, 32).frames.astype(int) for cameras in (track, back))
    assert before.std() > 10
    assert np.abs(before - after).max() <= 1


# ---------------------------------------------------------------------------------------------
# Files as they are published: a camera at (1, 2, 3) that looks along world x; K of 640x360 pictures

R = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
C2W = np.block([[R, np.array([[1.0], [2.0], [3.0]])], [np.zeros((1, 3)), np.ones((1, 1))]])
W2C = np.linalg.inv(C2W)
PIXELS = (320.0, 324.0, 330.0, 170.0)
K = (0.5, 0.9, 330 / 640, 170 / 360)
XYZW = (0.0, np.sqrt(0.5), 0.0, np.sqrt(0.5))
"""Of R: a quarter turn about y. That of its transpose has the opposite y."""


def expect(path: Path, name: str, count: int, k: tuple[float, ...] = K, **given: object) -> CameraFile:
    found = read_cameras(path, name, Given(**given))  # type: ignore[arg-type]
    assert found.track.c2w.shape == (count, 4, 4)
    assert np.abs(found.track.c2w - C2W).max() < 1e-6
    assert np.abs(found.track.K - k).max() < 1e-6
    return found


def test_nerfstudio_is_opengl_in_pixels_of_the_stored_size_sorted_by_name(tmp_path: Path) -> None:
    opengl = np.concatenate([C2W[:, :1], -C2W[:, 1:3], C2W[:, 3:]], 1)
    frames = [{"file_path": f"images/frame_{i}.png", "transform_matrix": opengl.tolist()} for i in (10, 9)]
    head = dict(zip(("fl_x", "fl_y", "cx", "cy"), PIXELS, strict=True))
    content = {"w": 640, "h": 360, **head, "k1": 0.0, "camera_model": "OPENCV", "frames": frames}
    file = tmp_path / "transforms.json"
    file.write_text(json.dumps(content))
    found = expect(tmp_path, "nerfstudio", 2, fps=30.0)
    assert found.names == ("images/frame_9.png", "images/frame_10.png")
    assert found.size == (360, 640)
    assert found.track.fps == 30
    own = {**frames[0], "fl_x": 160.0}
    file.write_text(json.dumps({**content, "frames": [own, frames[1]]}))
    assert read_cameras(file, "nerfstudio", Given(fps=1.0)).track.K[:, 0].tolist() == [0.5, 0.25]
    file.write_text(json.dumps({"camera_angle_x": 2 * np.arctan(1.0), "frames": frames}))
    expect(file, "nerfstudio", 2, (0.5, 0.5 * 640 / 360, 0.5, 0.5), fps=1.0, size=(360, 640))


def test_colmap_text_of_old_and_new_versions(tmp_path: Path) -> None:
    (tmp_path / "cameras.txt").write_text("# comment\n1 PINHOLE 640 360 320 324 330 170\n")
    q = f"{XYZW[3]} {XYZW[0]} {-XYZW[1]} {XYZW[2]}"  # w x y z of world-to-camera
    t = " ".join(map(repr, W2C[:3, 3].tolist()))
    images = [f"{i} {q} {t} 1 {name}\n\n" for i, name in ((1, "b10.png"), (2, "b9.png"))]
    (tmp_path / "images.txt").write_text("".join(images))
    (tmp_path / "points3D.txt").write_text("")
    found = expect(tmp_path, "colmap", 2, fps=24.0)
    assert found.names == ("b9.png", "b10.png")
    write_cameras(tmp_path / "new", "colmap-text", found)
    assert {"frames.txt", "rigs.txt"} <= {file.name for file in (tmp_path / "new").iterdir()}
    expect(tmp_path / "new", "colmap", 2, fps=24.0)


def test_realestate10k_is_world_to_camera_with_microseconds(tmp_path: Path) -> None:
    pose = " ".join(map(str, W2C[:3].ravel()))
    rows = [f"{t} {' '.join(map(str, K))} 0 0 {pose}" for t in (1_000_000, 1_033_333, 1_066_667, 1_100_000)]
    (tmp_path / "a.txt").write_text("\n".join(["https://youtu.be/x", *rows, ""]))
    found = expect(tmp_path / "a.txt", "re10k", 4)
    assert found.source == "https://youtu.be/x"
    assert found.track.fps == pytest.approx(30, rel=1e-4)
    assert not found.uneven()


def test_uneven_timestamps_are_kept_or_made_even_and_said(tmp_path: Path) -> None:
    """Frames 0 to 4 at x = t * 1 unit per second, of which one comes late."""
    c2w = np.tile(np.eye(4), (5, 1, 1))
    times = np.array([0.0, 1.0, 2.5, 3.0, 4.0])
    c2w[:, 0, 3] = times
    given = CameraFile(CameraTrack(c2w, np.array(K), 1.0), times)
    assert write_cameras(tmp_path / "a.txt", "re10k", given) == ["the unit of length, toy"]
    back = read_cameras(tmp_path / "a.txt", "re10k")
    assert back.seconds().tolist() == times.tolist()
    (said,) = write_cameras(tmp_path / "a.json", "track", back)
    assert said == "timestamps: they are uneven; poses are interpolated at an even rate"
    assert CameraTrack.load(tmp_path / "a.json").c2w[:, 0, 3] == pytest.approx([0, 1, 2, 3, 4])


@pytest.mark.parametrize("name", ["spatialvid", "lingbot"])
def test_folders_of_two_numpy_files(name: str, tmp_path: Path) -> None:
    vector = np.array([*W2C[:3, 3], XYZW[0], -XYZW[1], XYZW[2], XYZW[3]])
    poses, k = {
        "spatialvid": (vector, (0.5, 0.9, 0.5, 0.5)),
        "lingbot": (C2W, (416.0, 432.0, 416.0, 240.0)),
    }[name]
    np.save(tmp_path / "poses.npy", np.stack([poses] * 3).astype(np.float32))
    np.save(tmp_path / "intrinsics.npy", np.array([k] * 3, np.float32))
    found = expect(tmp_path, name, 3, (0.5, 0.9, 0.5, 0.5), **({"fps": 5.0} if name == "spatialvid" else {}))
    assert found.track.fps == {"spatialvid": 5, "lingbot": 16}[name]


@pytest.mark.parametrize(("name", "fps"), [("worldplay", 6.0), ("worldplay-training", 24.0)])
def test_worldplay_for_inference_and_for_training(name: str, fps: float, tmp_path: Path) -> None:
    k = [[969.6969696969696, 0.0, 960.0], [0.0, 969.6969696969696, 540.0], [0.0, 0.0, 1.0]]
    row = {"extrinsic": C2W.tolist(), "K": k} if fps == 6 else {"w2c": W2C.tolist(), "intrinsic": k}
    (tmp_path / "x.json").write_text(json.dumps({str(i): row for i in range(12)}))
    found = expect(tmp_path / "x.json", name, 12, (0.50505051, 0.89786756, 0.5, 0.5))
    assert found.track.fps == fps


def test_files_of_pose_estimators(tmp_path: Path) -> None:
    k = np.array([[320, 0, 330], [0, 324, 170], [0, 0, 1]], np.float32)
    images = np.zeros((2, 360, 640, 3), np.uint8)
    c2w = np.stack([C2W, C2W]).astype(np.float32)
    np.savez_compressed(tmp_path / "megasam.npz", cam_c2w=c2w, intrinsic=k, images=images)
    expect(tmp_path / "megasam.npz", "megasam", 2, fps=24.0)
    w2c = np.stack([W2C, W2C])[:, :3].astype(np.float32)
    images = np.zeros((2, 3, 360, 640), np.uint8)
    np.savez_compressed(tmp_path / "vggt.npz", extrinsic=w2c, intrinsic=np.stack([k, k]), images=images)
    expect(tmp_path / "vggt.npz", "vggt", 2, fps=24.0)
    for folder, data in (("pose", c2w), ("intrinsics", np.array([PIXELS, PIXELS], np.float32))):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "walk.npz", data=data, inds=np.arange(2))
    expect(tmp_path / "pose" / "walk.npz", "vipe", 2, fps=24.0, size=(360, 640))


def test_sekai_is_camera_to_world_with_one_k_divided_by_width_and_height(tmp_path: Path) -> None:
    k = np.array([[K[0], 0, K[2]], [0, K[1], K[3]], [0, 0, 1]], np.float32)
    np.savez(tmp_path / "x.npz", extrinsic=np.stack([C2W] * 3).astype(np.float32), intrinsic=k)
    assert expect(tmp_path / "x.npz", "sekai", 3).track.fps == 30


def test_training_data_of_minwm(tmp_path: Path) -> None:
    poses = np.array([[*W2C[:3, 3], XYZW[0], -XYZW[1], XYZW[2], XYZW[3]]] * 20, np.float32)
    k = np.array(K, np.float32)
    torch.save({"poses": torch.from_numpy(poses), "intrinsics": torch.from_numpy(k)}, tmp_path / "x.pt")
    assert expect(tmp_path / "x.pt", "minwm-pt", 20).track.fps == 4
    with lmdb.open(str(tmp_path / "db"), map_size=1 << 20) as database, database.begin(write=True) as rows:
        rows.put(b"poses_shape", b"2 20 7")
        for i, x in enumerate((poses + 1, poses)):
            rows.put(f"poses_{i}_data".encode(), x.tobytes())
            rows.put(f"intrinsics_{i}_data".encode(), k.tobytes())
    expect(tmp_path / "db", "minwm-lmdb", 20, clip=1)
    with pytest.raises(CameraError, match="clips 0 to 1; there is no clip 2"):
        read_cameras(tmp_path / "db", "minwm-lmdb", Given(clip=2))
    clips = [{"pose_str": "s-19"}, {"pose_str": "right-8, w-11"}]
    (tmp_path / "preencode_input.json").write_text(json.dumps(clips))
    track = read_cameras(tmp_path, "minwm-folder", Given(clip=1)).track
    assert len(track) == 20
    assert track.path_length() == pytest.approx(11 * 0.08)
    assert np.degrees(np.arcsin(track.c2w[-1, 0, 2])) == pytest.approx(24)


# ---------------------------------------------------------------------------------------------
# What is refused


def nerf(path: Path, **changes: object) -> Path:
    write_cameras(path, "nerfstudio", cameras())
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def saved(path: Path, array: object) -> Path:
    np.save(path / "poses.npy", np.asarray(array))
    np.save(path / "intrinsics.npy", np.full((2, 4), 300.0))
    return path


BAD: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "distortion": ("nerfstudio", lambda p: nerf(p / "x", k1=-0.05), r"k1 = -0\.05.*undistort"),
    "fisheye": ("nerfstudio", lambda p: nerf(p / "x", camera_model="OPENCV_FISHEYE"), "no pinhole; undistort"),
    "no frames": ("nerfstudio", lambda p: nerf(p / "x", frames=[]), "no list of frames"),
    "no pose": (
        "nerfstudio",
        lambda p: nerf(p / "x", frames=[{"file_path": "a"}], camera_angle_x=1),
        "a lacks 'transform_matrix'",
    ),
    "words": ("lingbot", lambda p: saved(p, ["a", "b"]), "of numbers"),
    "objects": ("lingbot", lambda p: saved(p, np.array([{}], object)), "of numbers"),
    "shape": ("lingbot", lambda p: saved(p, np.zeros((2, 4))), r"poses.npy has shape \(2, 4\), not \(n, 4, 4\)"),
    "nothing in it": ("lingbot", lambda p: saved(p, np.zeros((0, 4, 4))), "has shape"),
    "NaN": ("lingbot", lambda p: saved(p, np.full((2, 4, 4), np.nan)), "frame 0: the pose .* not finite"),
    "mirrored": ("lingbot", lambda p: saved(p, [np.diag([1.0, -1, 1, 1])] * 2), r"det\(R\) = -1"),
    "scaled": ("lingbot", lambda p: saved(p, [np.diag([2.0, 2, 2, 1])] * 2), "R is no rotation"),
    "not a quaternion": ("spatialvid", lambda p: saved(p, np.zeros((2, 7))), "no unit quaternion"),
    "no folder": ("colmap", lambda p: p / "missing", "lacks cameras.bin"),
    "images cut off": ("colmap", lambda p: cut(p, "images.bin", -3), "images.bin is damaged"),
    "one byte of images": ("colmap", lambda p: cut(p, "images.bin", 1), "images.bin is damaged"),
    "no frames in the rig": ("colmap", lambda p: cut(p, "frames.bin", 0), "pycolmap cannot read it"),
    "half of the lenses": ("colmap", lambda p: cut(p, "cameras.bin", 256), "pycolmap cannot read it"),
    "19 numbers": ("re10k", lambda p: written(p, "url\n1 2 3\n"), "line 2 has 3 numbers, not 19"),
    "no lines": ("re10k", lambda p: written(p, ""), "no line of 19 numbers"),
    "letters": ("re10k", lambda p: written(p, "url\n" + "a " * 19), "no array of numbers"),
    "backwards": ("re10k", lambda p: rows(p, (2, 1)), "timestamps do not increase"),
    "no archive": ("megasam", lambda p: written(p, "x"), "no .npz file"),
    "pixels": (
        "sekai",
        lambda p: archive(p, extrinsic=[C2W], intrinsic=np.diag([640.0, 640, 1])),
        "values in pixels must be divided",
    ),
    "other arrays": ("megasam", lambda p: archive(p, c2w=np.eye(4)), "lacks 'images'; it holds c2w"),
    "no lmdb": ("minwm-lmdb", lambda p: p, "no LMDB folder"),
    "another lmdb": ("minwm-lmdb", lambda p: empty_database(p / "x"), "lacks 'poses_shape'"),
    "a damaged pickle": ("minwm-pt", lambda p: written(p, "x"), "damaged"),
}


def written(path: Path, text: str) -> Path:
    (path / "x").write_text(text)
    return path / "x"


def cut(path: Path, name: str, end: int) -> Path:
    """A COLMAP model with one file cut off."""
    write_cameras(path / "model", "colmap", cameras())
    file = path / "model" / name
    file.write_bytes(file.read_bytes()[:end])
    return path / "model"


def archive(path: Path, **arrays: object) -> Path:
    np.savez(path / "x.npz", **arrays)  # type: ignore[arg-type]
    return path / "x.npz"


def rows(path: Path, times: tuple[int, ...]) -> Path:
    pose = " ".join(map(str, W2C[:3].ravel()))
    return written(path, "\n".join(["url", *(f"{t} 0.5 0.9 0.5 0.5 0 0 {pose}" for t in times)]))


def empty_database(path: Path) -> Path:
    lmdb.open(str(path), map_size=1 << 20).close()
    return path


@pytest.mark.parametrize("fault", BAD)
def test_other_files_are_refused_by_name(fault: str, tmp_path: Path) -> None:
    name, make, reason = BAD[fault]
    with pytest.raises(CameraError, match=reason) as caught:
        read_cameras(make(tmp_path), name, Given(fps=24.0))
    assert f" as {name}: " in str(caught.value)


def test_an_array_that_would_fill_the_memory_is_not_unpacked(tmp_path: Path) -> None:
    """Ten million poses of zeros are a small archive."""
    array = np.lib.format
    with (tmp_path / "poses.npy").open("wb") as file:
        array.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10_000_000, 4, 4)})
    with pytest.raises(CameraError, match=r"has shape \(10000000, 4, 4\)"):
        read_cameras(tmp_path, "lingbot")


def test_what_a_file_does_not_say_must_be_given(tmp_path: Path) -> None:
    write_cameras(tmp_path / "n.json", "nerfstudio", cameras())
    with pytest.raises(CameraError, match="nothing of time; give --fps"):
        read_cameras(tmp_path / "n.json", "nerfstudio")
    with pytest.raises(CameraError, match="pictures are 80x48, not 90x48"):
        read_cameras(tmp_path / "n.json", "nerfstudio", Given(fps=1.0, size=(48, 90)))
    write_cameras(tmp_path / "t.json", "track", cameras())
    with pytest.raises(CameraError, match="24 poses per second, not 30"):
        read_cameras(tmp_path / "t.json", "track", Given(fps=30.0))
    with pytest.raises(CameraError, match="give --size WIDTHxHEIGHT"):
        write_cameras(tmp_path / "m.json", "nerfstudio", cameras(size=None))


def test_cameras_are_converted_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: Callable[[], str]
) -> None:
    source = nerf(tmp_path / "transforms.json")
    words = ("camera", "convert", source, tmp_path / "x.txt", "--from", "nerfstudio", "--to", "re10k")
    assert run(*words) == 2
    assert "give --fps" in line()
    assert run(*words, "--fps", 24) == 0
    out = capsys.readouterr().out
    assert "x.txt: 9 poses at 24 per second, from nerfstudio to re10k" in out
    assert "lost: the names of the pictures, from images/08.png on" in out
    assert run(*words, "--fps", 24) == 2
    assert "exists; delete it" in line()
    for options, reason in (
        (("--from", "nerf"), "there is no camera format 'nerf'; did you mean 'nerfstudio'?"),
        (("--from", "nerfstudio", "--to", "vipe"), "vipe is only read"),
        (("--from", "nerfstudio", "--size", "12"), "--size 12: give width and height"),
    ):
        assert run("camera", "convert", source, tmp_path / "y", "--fps", 24, *options) == 2
        assert reason in line()
    assert run("camera", "convert", source, tmp_path / "y", "--from", "nerfstudio", "--to", "lingbot", "--fps", 24) == 0
    assert sorted(file.name for file in (tmp_path / "y").iterdir()) == ["intrinsics.npy", "poses.npy"]
    capsys.readouterr()
    assert run("camera", "convert", "--help") == 0
    listed = capsys.readouterr().out
    assert all(f"  {name}  " in listed for name in FORMATS)
