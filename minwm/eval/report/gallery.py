"""Clips side by side, with the keys that are held and a sheet of their frames."""

import base64
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from jaxtyping import UInt8

from minwm.cameras.trajectory import parse
from minwm.core.config import UserError
from minwm.core.media import Frame, contact_sheet, mp4_bytes, png_bytes
from minwm.eval.cases import BASELINES
from minwm.eval.report.page import Section
from minwm.eval.run import Evaluation

VIDEO_PIXELS = 192
"""Small videos are enlarged (without smoothing) to about this height: colours survive the compression."""
EXAMPLES = 6


@dataclass(frozen=True)
class Example:
    """A held-out clip: the true video first if there is one, then one of each model."""

    caption: str
    trajectory: str
    keys: Sequence[Collection[str]]
    """Keys held down in each frame (w a s d i j k l ...)."""
    videos: Mapping[str, UInt8[np.ndarray, "n h w 3"]]


def examples(result: Evaluation, names: Sequence[str]) -> list[Example]:
    """The first clips, by the models and baselines of those names."""
    cases, stride = result.cases[:EXAMPLES], result.config.motion.stride
    videos = {name: result.videos(name)[:EXAMPLES] for name in names}
    return [
        Example(
            case.scene.caption,
            case.trajectory,
            parse(case.trajectory, stride=stride).keys_per_frame(),
            {name: np.ascontiguousarray(made[i]) for name, made in videos.items()},
        )
        for i, case in enumerate(cases)
    ]


def gallery(shown: Sequence[Example], fps: float, title: str = "Held-out clips") -> Section:
    controls = (
        '<div class="controls"><button id="play" type="button">Pause</button>'
        '<input id="scrub" type="range" min="0" max="1000" value="0" aria-label="position in all clips">'
        "</div>"
    )
    html = controls + "".join(_example(example, fps) for example in shown) if shown else ""
    return Section("gallery", title, html)


def _example(example: Example, fps: float) -> str:
    figures = [
        video_figure(frames, fps, escape(name), "truth" * (name == BASELINES[0]))
        for name, frames in example.videos.items()
    ]
    every = max(1, (len(next(iter(example.videos.values()))) - 1) // 8)
    sheet = contact_sheet([*example.videos.values()], every, [*example.videos])
    keys = escape(json.dumps([sorted(held) for held in example.keys]), quote=True)
    return (
        f'<article class="example" data-keys="{keys}"><h3>{escape(example.caption)}</h3>'
        f'<p class="route"><code>{escape(example.trajectory)}</code><span class="pad"></span></p>'
        f'<div class="clips">{"".join(figures)}</div>'
        f'<details><summary>One in {every} frames</summary><div class="wide">'
        f'<img alt="frames of all clips" src="{_data("image/png", png_bytes(sheet))}"></div></details>'
        "</article>"
    )


def video_figure(frames: UInt8[np.ndarray, "n h w 3"], fps: float, text: str, kind: str = "", crf: int = 18) -> str:
    """A video that plays, over a text (HTML). `kind` is a class of the style sheet."""
    source = _data("video/mp4", mp4_bytes(frames, fps, crf, scale=max(1, round(VIDEO_PIXELS / frames.shape[1]))))
    return (
        f'<figure class="{kind}"><video autoplay loop muted playsinline preload="auto" src="{source}"></video>'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def best_and_worst(result: Evaluation, name: str, each: int = 2) -> Frame:
    """A contact sheet of a model's clips that follow their cameras best and worst, each below the truth."""
    follow = result.rows[name].follow
    if follow is None:
        raise UserError(f"{name} starts from text: no clip of it follows its camera better than another")
    parts = (follow.rot_err_per_clip, follow.static_rot_deg), (follow.trans_err_per_clip, follow.static_trans_u)
    missed = sum(np.array(errors) / max(still, 1e-6) for errors, still in parts)
    order, truth, videos = np.argsort(missed), result.videos(BASELINES[0]), result.videos(name)
    rows, labels = [], []
    for kind, clips in (("best", order[:each]), ("worst", order[-each:])):
        for i in clips:
            rows += [truth[i], videos[i]]
            labels += [result.cases[i].trajectory, f"{name}: {kind}"]
    return contact_sheet(rows, every=2 * result.config.motion.stride, labels=labels)
