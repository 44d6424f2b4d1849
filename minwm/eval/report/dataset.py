"""The page of `minwm data report`: what a folder of raw clips holds, what was dropped on the way, and what it cost."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from minwm.cameras.check import steps
from minwm.cameras.trajectory import Motion
from minwm.core.media import reduced
from minwm.data.clips import ClipFolder, ClipRecord
from minwm.data.ingest import notes
from minwm.eval.report.charts import duration, histogram, number
from minwm.eval.report.gallery import VIDEO_PIXELS, video_figure
from minwm.eval.report.page import Section, table, write_page

SHOWN = 24
"""Clips that play on the page, spread over the folder."""
EXAMPLES = 3
"""Examples of every rule."""


@dataclass(frozen=True)
class _Dataset:
    folder: ClipFolder
    records: Sequence[ClipRecord]
    counts: Mapping[str, Any]
    """`clips.report`."""
    ingested: Sequence[Mapping[str, Any]]
    """What became of each video, where the clips come from videos."""
    bytes: int


def write_dataset_page(path: Path, folder: Path, counts: Mapping[str, Any], motion: Motion | None = None) -> Path:
    """Write the page. `counts`: `clips.report`; `motion`: that of the model to be trained."""
    clips = ClipFolder(folder)
    files = [file.stat().st_size for file in clips.clips.iterdir()]
    found = _Dataset(clips, [clips.record(clip) for clip in clips.ids()], counts, [*notes(folder)], sum(files))
    manifest = clips.manifest()
    facts = {"folder": str(folder), "made by": manifest["command"], "commit": str(manifest.get("commit"))}
    sections = [_clips(found), _motion(found, motion), _captions(found), _dropped(found), _terms(found), _cost(found)]
    sentence = f"{counts['clips']} clips of {counts['scenes']} scenes or videos, made by “{manifest['kind']}”."
    return write_page(path, folder.name, sentence, facts, _tiles(found), sections)


def _tiles(found: _Dataset) -> list[tuple[str, str]]:
    counts = found.counts
    tiles = [
        (str(counts["clips"]), "clips"),
        (duration(counts["seconds"]), "of video"),
        (", ".join(counts["sizes"]), "pixels"),
        (f"{found.bytes / 1e6:.3g} MB", "on disk"),
        (", ".join(counts["licences"]), "licences"),
    ]
    if found.ingested:
        tiles.insert(1, (str(sum(len(note["dropped"]) for note in found.ingested)), "reasons to drop others"))
    return tiles


def _clips(found: _Dataset) -> Section:
    at = np.unique(np.linspace(0, len(found.records) - 1, SHOWN).round().astype(int))
    figures = []
    for record in (found.records[i] for i in at):
        frames = np.stack([reduced(frame, VIDEO_PIXELS) for frame in found.folder.frames(record.id)])
        words = f"{escape(record.caption)}<br><code>{escape(record.source_id)}</code>"
        figures.append(video_figure(frames, record.track.fps, words, crf=26))
    return Section("clips", f"{len(figures)} of the clips", f'<div class="clips">{"".join(figures)}</div>')


def _motion(found: _Dataset, motion: Motion | None) -> Section:
    moves, turns = zip(*(steps(record.track) for record in found.records), strict=True)
    fps = np.concatenate(
        [np.full(len(move), record.track.fps) for move, record in zip(moves, found.records, strict=True)]
    )
    units = ", ".join(sorted({record.track.unit for record in found.records}))
    speed, turn = np.concatenate(moves) * fps, np.concatenate(turns) * fps
    charts = "".join(
        f"<div>{histogram(values.tolist(), x_label=label, marks=marks)}</div>"
        for values, label, marks in (
            (speed, f"units per second ({units})", {"the model's keys": motion.move} if motion else {}),
            (turn, "degrees per second", {"the model's keys": motion.turn} if motion else {}),
        )
    )
    words = "Steps of the camera from frame to frame."
    if motion:
        fast = float(np.mean((speed > 2 * motion.move) | (turn > 2 * motion.turn)))
        words += f" {fast:.1%} of them are over twice as fast as the keys of the model."
    total = sum(found.counts["actions"].values())
    rows = {name: [str(n), f"{n / total:.1%}"] for name, n in list(found.counts["actions"].items())[:12]}
    actions = table(["motion over a latent", "times", "share"], rows)
    return Section("motion", "How the cameras move", f'<p>{words}</p><div class="pair">{charts}</div>{actions}')


def _captions(found: _Dataset) -> Section:
    captions = Counter(record.caption for record in found.records)
    sources = Counter(record.caption_source for record in found.records)
    lengths = [float(len(record.caption.split())) for record in found.records]
    rows = {text or "(none)": [str(n)] for text, n in captions.most_common(10)}
    words = f"{len(captions)} different ones; written by {escape(', '.join(f'{s} ({n})' for s, n in sources.items()))}."
    parts = histogram(lengths, x_label="words per caption"), table(["the most frequent", "clips"], rows)
    html = "".join(f"<div>{part}</div>" for part in parts)
    return Section("captions", "Captions", f'<p>{words}</p><div class="pair">{html}</div>')


def _dropped(found: _Dataset) -> Section:
    """Every rule with how often it dropped something and the first examples; every video that was refused."""
    examples: dict[str, list[str]] = {}
    for note in found.ingested:
        for line in note["dropped"]:
            where = f"<code>{escape(Path(note['video']).name)}</code> at {line['seconds']:g} s"
            examples.setdefault(line["rule"], []).append(f"{where}: {escape(line['reason'])}")
        if note["refused"]:
            examples.setdefault("refused videos", []).append(escape(note["refused"]))
    order = sorted(examples, key=lambda rule: -len(examples[rule]))
    html = "".join(
        f"<h3>{escape(rule)}: {len(examples[rule])}</h3><ul>"
        + "".join(f"<li>{text}</li>" for text in examples[rule][:EXAMPLES])
        + "</ul>"
        for rule in order
    )
    return Section("dropped", "What was dropped, by rule", html)


def _terms(found: _Dataset) -> Section:
    kinds = Counter(
        ", ".join(filter(None, (r.source, r.source_license, r.parent_model, f"poses {r.pose_kind.replace('_', ' ')}")))
        for r in found.records
    )
    rows = {kind: [str(n)] for kind, n in kinds.items()}
    return Section("terms", "Sources and licences", table(["source, licence, model, poses", "clips"], rows))


def _cost(found: _Dataset) -> Section:
    count = len(found.records)
    rows = {"disk": [f"{found.bytes / 1e6:.4g} MB", f"{found.bytes / count / 1e3:.4g} kB"]}
    if found.ingested:
        seconds = sum(note["seconds"] for note in found.ingested)
        rows["time of ingest, all processes"] = [duration(seconds), f"{number(seconds / count)} s"]
    return Section("cost", "What it costs", table(["", "all", "per clip"], rows))
