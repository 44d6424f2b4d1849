"""Recorded clips as the truth: what a model makes from their starts, along their cameras.

Of raw clips the pixels are the truth; of latent shards what the model's codec decodes from them, which is as near as a
model on these latents can come.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from minwm.cameras.track import CameraTrack
from minwm.core.media import to_frames, write_image
from minwm.data.clips import LATENT_SHARDS, RENDERED, ClipRecord, DataError, read_manifest
from minwm.data.dataset import RawDataset, ShardDataset, Split
from minwm.data.encode import identity
from minwm.data.rerender import reproduce
from minwm.eval.cases import reconstruct
from minwm.eval.source import Frames, Video, VideoSource, folder_source
from minwm.eval.suite import chunks_of
from minwm.nets.codec import VideoCodec
from minwm.render.place import SCENES
from minwm.session.batch import Request, generate_all
from minwm.session.views import Viewpoint
from minwm.store.model import Model, ModelConfig
from minwm.train.parallel import first_process_first, wait_for_all

RECORDING, STATIC, CODEC = "recording", "static camera", "codec"
"""Baselines: the clips themselves, their first frames held, and the clips encoded and decoded."""


class Recordings(VideoSource):
    """Videos of recorded clips, and what is known of each without reading, decoding or rendering any picture."""

    def __init__(
        self, names: Sequence[str], video: Callable[[str], Video], record: Callable[[str], ClipRecord]
    ) -> None:
        super().__init__(names, video)
        self.record = record


def recordings(data: Path, model: Model, split: Split, limit: int | None = None) -> Recordings:
    """The clips of one split with their cameras and captions; `limit`: so many, spread over it.

    The model is as loaded: another type of numbers (`Model.ready`) changes its codec's identity. DataError if the codec
    is another than that of the latents, and when a clip is read that is not of the model's size, rate or lens; clips
    that are longer than those of training are for models that stream.
    """
    encoded, config = _encoded(data), model.config  # or the source would keep the network in memory
    read = (
        _of_shards(ShardDataset(data, split, cache_bytes=0), model.codec)
        if encoded
        else _of_raw(RawDataset(data, split))
    )
    names = [*read]
    if limit is not None:
        names = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, limit).round().astype(int))]

    def record(name: str) -> ClipRecord:
        found = read[name].record()
        _check(found, config, f"{data}: clip {name}")
        return found

    def video(name: str) -> Video:
        found = record(name)
        task = {"prompt": found.caption, "clip": name}
        known = {"first_depth": _first_depth(found), "viewpoint": _viewpoint(found)}
        return Video(name, read[name].frames(), found.track.fps, found.track, task=task, **known)

    return Recordings(names, video, record)


def _viewpoint(record: ClipRecord) -> Viewpoint | None:
    if record.source not in RENDERED or record.seed is None or record.origin is None:
        return None
    return Viewpoint(SCENES[RENDERED[record.source]](record.seed), record.origin)


def _first_depth(record: ClipRecord) -> Float[np.ndarray, "h w"] | None:
    """Of a clip that can be rendered again."""
    return reproduce(record, record.track.slice(0, 1)).depth[0] if record.source in RENDERED else None


@dataclass(frozen=True)
class Read:
    """How a clip is read."""

    record: Callable[[], ClipRecord]
    frames: Callable[[], Frames]


def _of_raw(dataset: RawDataset) -> dict[str, Read]:
    folder = dataset.folder
    return {name: Read(partial(folder.record, name), partial(folder.frames, name)) for name in dataset.ids}


def _of_shards(dataset: ShardDataset, codec: VideoCodec) -> dict[str, Read]:
    made, has = dataset.manifest["codec"], identity(codec)
    if made["hash"] != has["hash"]:
        raise DataError(
            f"{dataset.path} was encoded by the codec {made['id']} {made['hash']}, the model has {has['id']} "
            f"{has['hash']}; give the raw clips instead"
        )

    @torch.inference_mode()
    def frames(index: int) -> Frames:
        return to_frames(codec.decode(dataset[index].latents[None].to(next(codec.parameters()))))[0]

    def record(index: int) -> ClipRecord:
        return dataset[index].record

    return {name: Read(partial(record, index), partial(frames, index)) for index, name in enumerate(dataset.ids)}


def _encoded(data: Path) -> bool:
    return read_manifest(data, "minwm data ingest")["kind"] == LATENT_SHARDS


def _check(record: ClipRecord, config: ModelConfig, where: str) -> None:
    spec = config.clip_spec
    if config.sampler.causal:
        spec = replace(spec, latents=1 + (len(record.track) - 1) // config.motion.stride)
    spec.check_clip(record, where)


def recorded_source(
    model: Model, recorded: Recordings, folder: Path, about: Mapping[str, str], part: tuple[int, int] = (0, 1)
) -> VideoSource:
    """The videos of a model along the cameras of recordings, made in `folder` unless they are there; `part` (i, n): by
    n processes, which wait for each other, and of which the first alone reads the recordings' pixels.

    They start from the first frames, with the recordings as reference; those of a model that starts from text show
    other scenes, and have none: only the sets of both are compared. `about` is what the manifest of the folder
    says.
    """
    config, tracks, wanted = model.config, dict[str, CameraTrack](), list[Request]()
    with first_process_first(part):
        for seed, name in enumerate(recorded.names):
            record = recorded.record(name)
            tracks[name] = record.track.relative_to_first()
            image = folder / "starts" / f"{name}.png" if config.image_start else None
            if image and not image.exists():
                write_image(image, recorded.video(name).frames[0])
            poses = folder / "starts" / f"{name}.json"
            tracks[name].save(poses)
            known = {"image": image, "viewpoint": _viewpoint(record)}
            wanted.append(Request(name=name, prompt=record.caption, trajectory=str(poses), seed=seed, **known))
    generate_all(model, wanted, lambda request: tracks[request.name], folder, about, part)
    wait_for_all(part)
    made = folder_source(folder)

    def scored(name: str) -> Video:
        truth = recorded.video(name)
        reference, depth = (truth.frames, truth.first_depth) if config.image_start else (None, None)
        chunks = chunks_of(config, len(truth.frames))
        frames = made.video(name).frames
        known = {"reference": reference, "first_depth": depth, "truth": truth.frames}
        return replace(truth, frames=frames, chunks=chunks, **known)

    return VideoSource(recorded.names, scored)


def baselines(data: Path, recorded: VideoSource, model: Model) -> dict[str, VideoSource]:
    """Sources by name; those of `STATIC` and, of raw clips, `CODEC` have the recordings as reference. A model that
    starts from text, whose videos have none, is given neither."""
    remade = dict[str, Callable[[Frames], Frames]]()
    if model.config.image_start:
        remade[STATIC] = lambda frames: np.repeat(frames[:1], len(frames), 0)
    if model.config.image_start and not _encoded(data):
        remade[CODEC] = lambda frames: reconstruct(model.codec, frames[None])[0]

    def source(change: Callable[[Frames], Frames]) -> VideoSource:
        def video(name: str) -> Video:
            truth = recorded.video(name)
            return replace(truth, frames=change(truth.frames), reference=truth.frames, truth=truth.frames)

        return VideoSource(recorded.names, video)

    return {RECORDING: recorded, **{name: source(change) for name, change in remade.items()}}
