"""Verbs about cameras: convert between formats, check, show."""

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from minwm.cli.base import Flag, Json, command, echo, numbers, read_track, refuse_existing, write_numbers
from minwm.core.config import UserError

if TYPE_CHECKING:
    from minwm.cameras.check import Fault
    from minwm.cameras.formats.base import CameraFile
    from minwm.cameras.track import CameraTrack

Cameras = Annotated[Positional[Path], arg(metavar="FILE|DIR")]
From = Annotated[str, arg(name="from", metavar="FORMAT", help="how the file is written; --help lists the formats")]
Rate = Annotated[float | None, arg(metavar="N", help="poses per second, for formats that say nothing of time")]
Size = Annotated[str | None, arg(metavar="WxH", help="pixels of the pictures, for formats whose K needs it")]
Unit = Annotated[str | None, arg(metavar="UNIT", help="of the translations: toy, metric or sfm (arbitrary scale)")]
ClipNumber = Annotated[int, arg(name="clip", metavar="N", help="which clip, in files of many")]


def list_formats(_words: list[str]) -> None:
    from minwm.cameras.formats.table import FORMATS

    echo("formats:")
    for name, known in FORMATS.items():
        echo(f"  {name:<20}{known.about}{'' if known.write else ' (only read)'}")


def read_camera_file(
    file: Path, from_: str, fps: float | None, size: str | None, unit: str | None, clip: int
) -> "CameraFile":
    from minwm.cameras.formats.base import Given
    from minwm.cameras.formats.table import read_cameras

    match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", size or "1x1")
    if not match:
        raise UserError(f"--size {size}: give width and height in pixels, such as 1280x720")
    pixels = (int(match[2]), int(match[1])) if size else None
    return read_cameras(file, from_, Given(fps=fps, size=pixels, unit=unit, clip=clip))


@command("camera", "convert", details=list_formats)
def camera_convert(
    source: Annotated[Positional[Path], arg(metavar="SRC")],
    target: Annotated[Positional[Path], arg(metavar="DST")],
    from_: From = "track",
    to: Annotated[str, arg(metavar="FORMAT", help="how to write DST")] = "track",
    fps: Rate = None,
    size: Size = None,
    unit: Unit = None,
    clip: ClipNumber = 0,
) -> None:
    """Turn a camera file of one format into another; what that cannot hold is named."""
    from minwm.cameras.formats.table import write_cameras

    cameras = read_camera_file(source, from_, fps, size, unit, clip)
    lost = write_cameras(target, to, cameras)
    echo(f"{target}: {len(cameras.track)} poses at {cameras.track.fps:g} per second, from {from_} to {to}")
    for line in lost:
        echo(f"lost: {line}")


@command("camera", "check", details=list_formats)
def camera_check(
    file: Cameras,
    from_: From = "track",
    video: Annotated[Path | None, arg(metavar="FILE.mp4", help="the video that they belong to")] = None,
    model: Annotated[Path | None, arg(metavar="DIR", help="compare them with what this model is trained on")] = None,
    plot: Annotated[Path | None, arg(metavar="PNG", help="draw the path and what the cameras see")] = None,
    view: Annotated[Flag, arg(help="show them in the browser, until Ctrl+C (extra `view`)")] = False,
    fps: Rate = None,
    size: Size = None,
    unit: Unit = None,
    clip: ClipNumber = 0,
    json: Json = None,
) -> None:
    """Say in words what a camera does, and what is wrong with its poses."""
    from minwm.cameras.check import differences, faults
    from minwm.cameras.frusta import picture
    from minwm.core.media import write_image
    from minwm.store.folder import load_config

    cameras = read_camera_file(file, from_, fps, size, unit, clip)
    track, values, found, notes = cameras.even(), describe(cameras.even()), [], []
    if video:
        fit, found, notes = check_against(video, track)
        values |= fit
    found += faults(track, cameras.size)
    if "latents" not in values:
        notes.append("models take 4 * k + 1 frames")
    if model:
        cfg = load_config(model)
        notes += differences(track, cfg.motion, cfg.intrinsics)
    if values["share_of_motion_straight_ahead"] < -0.5 and not video:
        notes.append("it moves backwards; if it should not, --video tells whether the poses are in another convention")
    numbers(values, None)
    write_numbers({**values, "faults": list(map(str, found)), "notes": notes}, json)
    if plot:
        write_image(plot, picture(track))
    if view:
        _show(track)
    for note in notes:
        echo(f"note: {note}")
    for fault in found:
        echo(f"fault: {fault}")
    if found:
        raise UserError(f"{file}: faults found, {len(found)} in all (listed above)")


def _show(track: "CameraTrack") -> None:
    from minwm.cameras.frusta import serve

    server = serve(track)
    echo(f"http://127.0.0.1:{server.get_port()} shows them; Ctrl+C goes on")
    with contextlib.suppress(KeyboardInterrupt):
        server.sleep_forever()
    server.stop()


def describe(track: "CameraTrack") -> dict[str, Any]:
    """What the camera of a track does, in numbers."""
    import numpy as np

    from minwm.cameras.check import jitter, steps

    move, turn = (values * track.fps for values in steps(track))
    ahead = float(track.relative()[:, 2, 3].sum() * track.fps / max(move.sum(), 1e-9))
    values = {
        "frames": len(track),
        "fps": track.fps,
        "field_of_view_deg": np.degrees(2 * np.arctan(0.5 / track.K[0, :2])).tolist(),
        f"path_length_{track.unit}": track.path_length(),
        f"fastest_{track.unit}_per_second": float(move.max(initial=0)),
        "fastest_degrees_per_second": float(turn.max(initial=0)),
        "jitter_degrees": jitter(track),
        "share_of_motion_straight_ahead": ahead,
    }
    if (len(track) - 1) % 4 == 0:
        from minwm.data.clips import actions

        values |= {"latents": (len(track) - 1) // 4 + 1, "motion": list(dict.fromkeys(actions(track)))}
    return values


def check_against(video: Path, track: "CameraTrack") -> "tuple[dict[str, Any], list[Fault], list[str]]":
    """What a video says of its cameras: numbers, faults and notes."""
    from minwm.cameras.check import check_video
    from minwm.core.media import read_grey

    frames, rate = read_grey(video)
    result = check_video(track, frames, rate)
    if result.fit is None:
        return {}, result.faults, result.notes
    return {"residual_pixels": result.fit.residual, "in_front": result.fit.in_front}, result.faults, result.notes


@command("camera", "show")
def camera_show(
    trajectory: Annotated[Positional[str], arg(metavar='"KEYS"|FILE.json')],
    model: Annotated[Path | None, arg(metavar="DIR", help="take the speeds of this model's keys")] = None,
    out: Annotated[Path | None, arg(metavar="FILE.json", help="save the poses")] = None,
    json: Json = None,
) -> None:
    """Print where a trajectory leads, latent by latent."""
    import numpy as np

    from minwm.experiments.presets.demo import tiny_model
    from minwm.store.folder import load_config

    if out:
        refuse_existing(out, ".json")
    cfg = load_config(model) if model else tiny_model()
    track, route = read_track(trajectory, cfg)
    c2w = track.at_latent_rate(cfg.motion.stride).c2w
    x, y, z = c2w[:, :3, 2].T  # where the camera looks
    table: dict[str, list[float]] = {
        **dict(zip(("right", "down", "forward"), c2w[:, :3, 3].T.tolist(), strict=True)),
        "heading": np.degrees(np.arctan2(x, z)).tolist(),
        "elevation": np.degrees(np.arcsin((0 - y).clip(-1, 1))).tolist(),
    }
    echo(f"{route.describe() if route else trajectory}: {len(track)} frames at {track.fps:g} per second")
    echo("".join(f"{name:>11}" for name in ("latent", *table)))
    for latent, row in enumerate(zip(*table.values(), strict=True)):
        echo(f"{latent:>11}" + "".join(f"{value:>11.3f}" for value in row))
    write_numbers(table, json)
    if out:
        track.save(out)
