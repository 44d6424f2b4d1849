"""COLMAP models, text or binary, of any version: a folder of cameras, images and points3D, lately frames and rigs too.

World-to-camera, OpenCV axes; K in pixels. Images are in the order of their file names. pycolmap reads and writes them.
"""

import struct
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Float

from minwm.cameras.formats.base import (
    CameraFile,
    Given,
    Write,
    in_pixels,
    inverted,
    normalised,
    refuse_distortion,
    square,
)
from minwm.cameras.formats.nerfstudio import natural
from minwm.cameras.track import CameraError, CameraTrack, quaternion
from minwm.core.files import new_folder
from minwm.core.runtime import require


def load_pycolmap() -> ModuleType:
    """The library, which is imported nowhere else; MissingExtraError without it."""
    return require("pycolmap", "sfm")


def read(path: Path, given: Given) -> CameraFile:
    """A model folder."""
    return from_reconstruction(_open(path), given)


def read_points(path: Path) -> Float[np.ndarray, "m 3"]:
    """The points of a model folder, in its world."""
    return points_of(_open(path))


def points_of(model: "pycolmap.Reconstruction") -> Float[np.ndarray, "m 3"]:  # noqa: F821
    """The points of a pycolmap model."""
    return np.array([point.xyz for point in model.points3D.values()]).reshape(-1, 3)


def points_seen(model: "pycolmap.Reconstruction", name: str) -> Float[np.ndarray, "m 3"]:  # noqa: F821
    """The points that an image of a pycolmap model shows, in the coordinates of its camera."""
    image = next(image for image in model.images.values() if image.name == name)
    points = [model.points3D[point.point3D_id].xyz for point in image.points2D if point.has_point3D()]
    return np.array([image.cam_from_world() * point for point in points]).reshape(-1, 3)


def _open(path: Path) -> "pycolmap.Reconstruction":  # noqa: F821
    pycolmap = load_pycolmap()
    if not any((path / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt")):
        raise CameraError(
            "it is no COLMAP model (it lacks cameras.bin and cameras.txt); give a folder such as sparse/0"
        )
    if (path / "images.bin").is_file():
        _check_images(path / "images.bin")
    try:
        return pycolmap.Reconstruction(str(path))
    except (ValueError, RuntimeError, IndexError) as error:
        raise CameraError(f"pycolmap cannot read it: {str(error).splitlines()[0]}") from error


def _check_images(file: Path) -> None:
    """CameraError unless images.bin ends where its last image does; pycolmap would read on for ever."""
    data = file.read_bytes()
    try:
        (count,) = struct.unpack_from("<Q", data)
        at = 8
        for _ in range(count):
            at = data.index(b"\0", at + 64) + 1  # id, quaternion, translation, camera; then the name
            (points,) = struct.unpack_from("<Q", data, at)
            at += 8 + 24 * points
    except (struct.error, ValueError):
        at = len(data) + 1
    if at != len(data):
        raise CameraError(f"its images.bin is damaged ({len(data)} bytes, not those of its images); copy it again")


def from_reconstruction(model: "pycolmap.Reconstruction", given: Given) -> CameraFile:  # noqa: F821
    """The cameras of the registered images of a pycolmap model."""
    images = [image for image in model.images.values() if image.has_pose]
    if not images:
        raise CameraError("none of its images has a pose")
    images.sort(key=lambda image: natural(image.name))
    cameras = [model.cameras[image.camera_id] for image in images]
    if len(sizes := sorted({(camera.height, camera.width) for camera in cameras})) > 1:
        raise CameraError(f"its pictures have different sizes (h, w): {sizes}; resize them to one")
    K = []
    for camera in cameras:
        values = [float(value) for value in camera.params]
        extra = [*camera.extra_params_idxs()]
        names = [name.strip() for name in camera.params_info.split(",")]
        refuse_distortion({names[i]: values[i] for i in extra}, camera.model_name)
        if not camera.is_perspective_pinhole():
            raise CameraError(f"its camera model {camera.model_name} is no pinhole; undistort the pictures first")
        K.append([camera.focal_length_x, camera.focal_length_y, camera.principal_point_x, camera.principal_point_y])
    w2c = square(np.stack([image.cam_from_world().matrix() for image in images]))
    track = CameraTrack(inverted(w2c), normalised(np.array(K), sizes[0]), given.rate(), given.unit or "sfm")
    return CameraFile(track, size=sizes[0], names=tuple(image.name for image in images))


def writer(text: bool) -> Write:
    """Writes a model without points, which COLMAP can triangulate (point_triangulator)."""

    def write(path: Path, cameras: CameraFile) -> None:
        pycolmap = load_pycolmap()
        height, width = Given(size=cameras.size).pixels()
        names = cameras.names or tuple(f"frame_{i + 1:05d}.png" for i in range(len(cameras.track)))
        model, known = pycolmap.Reconstruction(), dict[tuple[float, ...], int]()
        for i, (name, w2c, K) in enumerate(zip(names, cameras.track.w2c(), cameras.track.K, strict=True), start=1):
            params = tuple(in_pixels(K, (height, width)).tolist())
            if params not in known:
                known[params] = len(known) + 1
                camera = pycolmap.Camera(
                    camera_id=known[params], model="PINHOLE", width=width, height=height, params=params
                )
                model.add_camera_with_trivial_rig(camera)
            image = pycolmap.Image(name=name, camera_id=known[params], image_id=i)
            pose = pycolmap.Rigid3d(pycolmap.Rotation3d(quaternion(w2c[:3, :3])), w2c[:3, 3])
            model.add_image_with_trivial_frame(image, pose)
        with new_folder(path) as folder:
            (model.write_text if text else model.write_binary)(str(folder))

    return write
