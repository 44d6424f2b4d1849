"""A camera path and what its cameras look at: a picture from above and from the side, or a page in 3D (viser)."""

from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from minwm.cameras.track import CameraTrack
from minwm.core.config import UserError

SIDE = 480
"""Pixels of each of the two views."""
MARGIN = 40
CAMERAS = 13
"""Frusta that are drawn, evenly spread over the track."""
VIEWS = (
    ("from above", 0, 2, -1),
    ("from the right", 2, 1, 1),
)
"""Caption, world axis that points right on the picture, the one along its columns, and the sign of that."""


def picture(track: CameraTrack) -> UInt8[np.ndarray, "h w 3"]:
    """The path relative to its first camera, from blue to red, with the pyramid that each camera sees."""
    track = track.relative_to_first()
    centres = track.c2w[:, :3, 3]
    extent = float(np.ptp(centres, axis=0).max()) or 1.0
    shown = np.unique(np.linspace(0, len(track) - 1, CAMERAS).round().astype(int)).tolist()
    pyramids = np.stack([_corners(track, i, 0.12 * extent) for i in shown])
    every = np.concatenate([centres, pyramids.reshape(-1, 3)])
    middle, reach = (every.max(0) + every.min(0)) / 2, float(np.ptp(every, axis=0).max())
    image = Image.new("RGB", (2 * SIDE, SIDE), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    for view, (caption, across, along, sign) in enumerate(VIEWS):
        scale = np.array([1, sign]) * (SIDE - 2 * MARGIN) / reach
        offset = SIDE / 2 - middle[[across, along]] * scale + [view * SIDE, 0]
        for i, pyramid in zip(shown, pyramids, strict=True):
            outline = np.concatenate([centres[i : i + 1], pyramid[:2], centres[i : i + 1], pyramid[2:], pyramid[[0]]])
            flat = outline[:, [across, along]] * scale + offset
            draw.line([*flat[:3].ravel(), *flat[3:].ravel(), *flat[5], *flat[2]], fill=_colour(i, len(track)))
        path = centres[:, [across, along]] * scale + offset
        for i, (a, b) in enumerate(pairwise(path)):
            draw.line([*a, *b], fill=_colour(i, len(track)), width=3)
        draw.text((view * SIDE + 8, 6), caption, "black", font)
    text = f"{len(track)} poses, {track.path_length():.3g} {track.unit} units long"
    draw.text((8, SIDE - 22), text, "black", font)
    return np.array(image)


def serve(track: CameraTrack) -> Any:
    """A `viser.ViserServer` that shows the same in the browser, where one turns it; its `stop` ends it.

    At any free port. UserError without viser (extra `view`).
    """
    try:
        import viser
        from viser.transforms import SO3
    except ImportError as error:
        raise UserError('--view needs viser: pip install "minwm[view]"') from error
    track = track.relative_to_first()
    size = 0.06 * (float(np.ptp(track.c2w[:, :3, 3], axis=0).max()) or 1.0)
    server = viser.ViserServer(host="127.0.0.1", port=0, verbose=False)
    server.scene.set_up_direction("-y")
    for i in np.unique(np.linspace(0, len(track) - 1, CAMERAS).round().astype(int)).tolist():
        fx, fy, *_ = track.K[i].tolist()
        server.scene.add_camera_frustum(
            f"/cameras/{i}", fov=2 * np.arctan(0.5 / fy), aspect=fy / fx, scale=size, color=_colour(i, len(track)),
            wxyz=SO3.from_matrix(track.c2w[i, :3, :3]).wxyz, position=track.c2w[i, :3, 3],
        )  # fmt: skip
    segments = np.stack([track.c2w[:-1, :3, 3], track.c2w[1:, :3, 3]], axis=1)
    if len(segments):
        colours = np.array([[_colour(i, len(track))] * 2 for i in range(len(segments))], np.uint8)
        server.scene.add_line_segments("/path", points=segments, colors=colours)
    return server


def _corners(track: CameraTrack, frame: int, depth: float) -> np.ndarray:
    """Corners of what one camera sees at a depth: 4 3, in the world."""
    fx, fy, cx, cy = track.K[frame]
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    rays = np.concatenate([(uv - [cx, cy]) / [fx, fy], np.ones((4, 1))], 1)
    return depth * rays @ track.c2w[frame, :3, :3].T + track.c2w[frame, :3, 3]


def _colour(frame: int, count: int) -> tuple[int, int, int]:
    part = frame / max(1, count - 1)
    return int(255 * part), 60, int(255 * (1 - part))
