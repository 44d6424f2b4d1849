"""All camera formats by name, and reading and writing them."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from minwm.cameras.formats import (
    colmap,
    estimators,
    folders,
    minwm_data,
    nerfstudio,
    realestate10k,
    sekai,
    worldplay,
)
from minwm.cameras.formats.base import CameraFile, CameraFormat, Given
from minwm.cameras.track import CameraError, CameraTrack
from minwm.core.config import UserError, lookup


def _read_track(path: Path, given: Given) -> CameraFile:
    track = CameraTrack.load(path)
    given.rate(track.fps)
    return CameraFile(track, size=given.size)


def _write_track(path: Path, cameras: CameraFile) -> None:
    cameras.even().save(path)


FORMATS: dict[str, CameraFormat] = {
    "track": CameraFormat(
        "our own .json: camera-to-world, OpenCV axes, K divided by width and height",
        *(_read_track, _write_track, frozenset({"fps", "unit", "principal point"})),
    ),
    "nerfstudio": CameraFormat(
        "transforms.json of nerfstudio, DL3DV, Blender: camera-to-world, OpenGL axes, K in pixels",
        *(nerfstudio.read, nerfstudio.write, frozenset({"size", "names", "principal point"})),
    ),
    "colmap": CameraFormat(
        "a COLMAP model, read as text or binary, written as binary: world-to-camera, OpenCV axes, K in pixels",
        *(colmap.read, colmap.writer(text=False), frozenset({"size", "names", "principal point"})),
    ),
    "colmap-text": CameraFormat(
        "the same, written as text",
        *(colmap.read, colmap.writer(text=True), frozenset({"size", "names", "principal point"})),
    ),
    "re10k": CameraFormat(
        "a .txt of RealEstate10K: timestamps, K divided by width and height, world-to-camera, OpenCV axes",
        *(realestate10k.read, realestate10k.write),
        frozenset({"fps", "times", "source", "principal point"}),
    ),
    "spatialvid": CameraFormat(
        "a folder of SpatialVid: poses.npy n 7, world-to-camera, OpenCV axes; K divided by twice its principal point",
        *(folders.read_spatialvid, folders.write_spatialvid, frozenset()),
    ),
    "lingbot": CameraFormat(
        "a folder of LingBot-World: poses.npy n 4 4, camera-to-world, OpenCV axes; K in pixels of 832x480",
        *(folders.read_lingbot, folders.write_lingbot, frozenset({"fps", "principal point"}), 16.0),
    ),
    "sekai": CameraFormat(
        "a .npz of Sekai: camera-to-world, OpenCV axes, one K for all frames, divided by width and height",
        *(sekai.read, sekai.write, frozenset({"fps", "principal point"}), 30.0, True),
    ),
    "worldplay": CameraFormat(
        "a .json for HY-WorldPlay's inference: camera-to-world per latent, OpenCV axes, K in pixels of 1920x1080",
        *(worldplay.reader("extrinsic", "K"), worldplay.writer("extrinsic", "K"), frozenset({"fps"}), 6.0),
    ),
    "worldplay-training": CameraFormat(
        "a .json for HY-WorldPlay's training: world-to-camera per frame, OpenCV axes, K in pixels of 1920x1080",
        *(worldplay.reader("w2c", "intrinsic"), worldplay.writer("w2c", "intrinsic")),
        *(frozenset({"fps"}), 24.0),
    ),
    "megasam": CameraFormat("MegaSaM's .npz: camera-to-world, OpenCV axes, K in pixels", estimators.read_megasam),
    "vggt": CameraFormat("VGGT's predictions.npz: world-to-camera, OpenCV axes, K in pixels", estimators.read_vggt),
    "vipe": CameraFormat("ViPE's pose/NAME.npz: camera-to-world, OpenCV axes, K in pixels", estimators.read_vipe),
    "minwm-folder": CameraFormat(
        "minWM's folder with preencode_input.json: keys per latent", minwm_data.read_folder, fps=4.0
    ),
    "minwm-lmdb": CameraFormat(
        "minWM's LMDB for Wan: world-to-camera n 7 per latent, OpenCV axes", minwm_data.read_lmdb, fps=4.0
    ),
    "minwm-pt": CameraFormat(
        "minWM's .pt for HunyuanVideo: world-to-camera n 7 per latent, OpenCV axes", minwm_data.read_pt, fps=4.0
    ),
}
"""By the name that the command line knows them by."""
NOTHING_GIVEN = Given()


def read_cameras(path: Path, name: str = "track", given: Given = NOTHING_GIVEN) -> CameraFile:
    """The cameras in a file of the named format; CameraError, with path and format, if they cannot be read."""
    known = lookup(FORMATS, name, "camera format")
    if given.fps is None:
        given = replace(given, fps=known.fps)
    try:
        return known.read(path, given)
    except (UserError, OSError) as error:
        what = path if name == "track" else f"{path} as {name}"
        raise CameraError(f"{what}: {str(error).removeprefix(f'{path}: ')}") from error


def write_cameras(path: Path, name: str, cameras: CameraFile) -> list[str]:
    """Write a file of the named format; returns a line for each thing that it cannot hold.

    Raises UserError for formats that are only read, and for a path that exists.
    """
    known = lookup(FORMATS, name, "camera format")
    if known.write is None:
        writable = ", ".join(key for key, value in FORMATS.items() if value.write)
        raise UserError(f"{name} is only read; cameras are written as {writable}")
    if path.exists():
        raise UserError(f"{path} exists; delete it, or give another name")
    lost = losses(known, cameras)
    if known.fps and abs(known.fps / cameras.track.fps - 1) > 1e-9:
        cameras = CameraFile(cameras.even().resample(known.fps), size=cameras.size, source=cameras.source)
    known.write(path, cameras)
    return lost


def losses(target: CameraFormat, cameras: CameraFile) -> list[str]:
    """What of these cameras a format cannot hold, one line each."""
    track, lost = cameras.track, []
    if cameras.uneven() and "times" not in target.keeps:
        how = "poses are interpolated at an even rate" if "fps" in target.keeps else "poses have no time any more"
        lost.append(f"timestamps: they are uneven; {how}")
    if target.fps and abs(target.fps / track.fps - 1) > 1e-9:
        lost.append(f"the rate of {track.fps:g} poses per second: resampled to {target.fps:g}")
    elif not {"fps", "times"} & target.keeps:
        lost.append(f"the rate: give --fps {track.fps:g} to read it")
    if cameras.size and "size" not in target.keeps:
        lost.append(f"the size of the pictures, {cameras.size[1]}x{cameras.size[0]}")
    if cameras.names and "names" not in target.keeps:
        lost.append(f"the names of the pictures, from {cameras.names[0]} on")
    if cameras.source and "source" not in target.keeps:
        lost.append(f"the address of the video, {cameras.source}")
    if track.unit != "sfm" and "unit" not in target.keeps:
        lost.append(f"the unit of length, {track.unit}")
    if target.one_lens and np.ptp(track.K, axis=0).max() > 1e-9:
        lost.append(f"K changes from frame to frame: that of the first, {np.round(track.K[0], 4).tolist()}, is kept")
    centre = track.K[:, 2:]
    if np.abs(centre - 0.5).max() > 1e-9 and "principal point" not in target.keeps:
        lost.append(f"the principal point, {np.round(centre[0], 4).tolist()} of width and height: taken for the middle")
    return lost
