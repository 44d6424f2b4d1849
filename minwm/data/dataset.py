"""Latent shards as batches of `Clip`: index in memory, seeded shuffle, exact resume.

The order of records is one endless stream: epoch after epoch, each a new permutation of all records. A step takes the
next `batch * world` records, and rank r the r-th part of them. The order does not depend on how records are laid out in
shards, and the position in the data is two integers (epoch, index).
"""

import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from minwm.cameras.track import latent_cameras
from minwm.control.action import with_action_labels
from minwm.core.config import UserError
from minwm.core.files import check_shape
from minwm.core.media import to_pixels
from minwm.core.runtime import generator
from minwm.core.types import Clip, Condition, Views
from minwm.data.clips import LATENT_SHARDS, ClipFolder, ClipRecord, DataError, read_manifest, split_of
from minwm.data.noise import PoseNoise
from minwm.data.shards import HINT, IndexEntry, list_shards, read_index, read_record
from minwm.data.spec import ClipSpec

Split = Literal["train", "val"]
AHEAD = 4
"""Batches of a dataset larger than memory that are read while another one is used."""
OTHERS = ("glyphs", "image_states")
"""Parts of a `Condition` that some text encoders give besides text."""
T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One decoded record of a shard."""

    id: str
    latents: Float[Tensor, "f c h w"]
    states: dict[str, Float[Tensor, "l d"]]
    """Of caption and first frame, without zero padding: parts of a `Condition`."""
    record: ClipRecord
    """Cameras at pixel rate, caption and provenance."""
    trajectory: Float[Tensor, "k f c h w"] | None = None
    """States along the teacher's ODE trajectory, if they were collected (`data/trajectories.py`)."""


class ShardDataset:
    """Records of one split, sorted by id, readable in any order."""

    def __init__(
        self,
        path: Path,
        split: Split,
        *,
        image_start: bool = True,
        null: Float[Tensor, "l d"] | None = None,
        noise: PoseNoise | None = None,
        spec: ClipSpec | None = None,
        views: Mapping[str, Views] | None = None,
        cache_bytes: int = 2**30,
    ) -> None:
        """Open a folder of latent shards; DataError if it is unfinished or has no records in `split`.

        Clips that differ from `spec` are refused: the folder and its first record here, the others when they are read.

        `image_start` gives the first frame as a condition. `null` holds the text states of the unconditional
        branch of guidance (default: zeros). `noise` perturbs the cameras of batches. `views` are known of the clips'
        worlds, by `ClipRecord.world`. Decoded records stay in memory if all of them fit into `cache_bytes`.
        """
        self.path, self.image_start, self.null, self.noise, self.spec = path, image_start, null, noise, spec
        self.views = views
        self.manifest = read_manifest(path, "minwm data encode")
        if self.manifest["kind"] != LATENT_SHARDS:
            kind = self.manifest["kind"]
            raise DataError(f"{path} holds {kind!r} and not latent shards; run `minwm data encode` on it")
        if not self.manifest["complete"]:
            raise DataError(f"{path} is unfinished; to go on, run again what makes it: {self.manifest['command']}")
        text = self.manifest["text"]
        self.shapes = {"text": (text["length"], text["dim"]), **{name: text[name] for name in OTHERS if name in text}}
        """Rows and width of the states, padded."""
        self.entries: list[tuple[Path, IndexEntry]] = []
        for shard in list_shards(path):
            if shard.name.startswith(split):
                self.entries += [(shard, entry) for entry in read_index(shard).records]
        self.entries.sort(key=lambda pair: pair[1].id)
        if not self.entries:
            raise DataError(f"{path}: no records in split {split!r}; encode more scenes, or with another `val`")
        self.ids = [entry.id for _, entry in self.entries]
        for one, two in zip(self.ids, self.ids[1:], strict=False):
            if one == two:
                raise DataError(f"{path}: record {one} is in two shards; {HINT}")
        self.fingerprint = zlib.crc32("\n".join(self.ids).encode())
        size = sum(entry.tensors.size for _, entry in self.entries)
        self._cache: dict[int, Sample] | None = {} if size <= cache_bytes else None
        if spec:
            spec.check_shards(self.manifest, str(path))
            self[0]

    @property
    def in_memory(self) -> bool:
        """Whether decoded records stay in memory."""
        return self._cache is not None

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> Sample:
        if self._cache is not None and i in self._cache:
            return self._cache[i]
        example = self._read(*self.entries[i])
        if self._cache is not None:
            self._cache[i] = example
        return example

    def _read(self, shard: Path, entry: IndexEntry) -> Sample:
        meta, tensors = read_record(shard, entry)
        where = f"{shard}: record {entry.id}"
        missing = {"latent", "c2w", "K", *self.shapes} - set(tensors)
        if missing:
            raise DataError(f"{where}: {', '.join(sorted(missing))} missing; {HINT}")
        cameras = {"c2w": tensors["c2w"].numpy(), "K": tensors["K"].numpy()}
        record = ClipRecord.from_json(meta | cameras, where)
        latents, stride = tensors["latent"].float(), self.manifest["codec"]["stride"]
        if len(record.track) != stride * (len(latents) - 1) + 1:
            sizes = f"{len(record.track)} cameras, {len(latents)} latents of {stride} frames"
            raise DataError(f"{where}: {sizes} do not fit; {HINT}")
        if self.spec:
            self.spec.check_clip(record, where)
        trajectory = tensors["trajectory"].float() if "trajectory" in tensors else None
        return Sample(entry.id, latents, {name: tensors[name].float() for name in self.shapes}, record, trajectory)

    def batch(self, indices: Sequence[int]) -> Clip:
        """The records at `indices` as one Clip on the CPU; DataError unless they have one latent shape."""
        examples = [self[i] for i in indices]
        for example in examples[1:]:
            if example.latents.shape != examples[0].latents.shape:
                one, two = (f"{e.id} {tuple(e.latents.shape)}" for e in (examples[0], example))
                raise DataError(f"{self.path}: latents of {one} and {two}; give each size a folder of its own")
        latents = torch.stack([e.latents for e in examples])
        tracks = [e.record.track for e in examples]
        if self.noise:
            tracks = [self.noise(track, e.id) for track, e in zip(tracks, examples, strict=True)]
        w2c, K = latent_cameras(tracks, self.manifest["codec"]["stride"])
        states = {name: torch.zeros(len(examples), *shape) for name, shape in self.shapes.items()}
        for name, rows in states.items():
            for row, example in zip(rows, examples, strict=True):
                row[: len(example.states[name])] = example.states[name]
        trajectories = [e.trajectory for e in examples if e.trajectory is not None]
        trajectory = torch.stack(trajectories, dim=1) if len(trajectories) == len(examples) else None
        null = None if self.null is None else self.null.expand_as(states["text"])
        cond = Condition(**states, w2c=w2c, K=K, first_latents=latents[:, :1], null=null)
        cond = with_action_labels(cond if self.image_start else cond.without_image())
        return Clip(
            latents, cond, trajectory, tuple(self._views(example) for example in examples) if self.views else ()
        )

    def _views(self, example: Sample) -> Views:
        """What is known of the world of a record, in its clip's frame."""
        assert self.views is not None
        record = example.record
        if record.world not in self.views or record.origin is None:
            raise DataError(f"{self.path}: no views of {record.world!r}, the world of {example.id}; render them too")
        return self.views[record.world].transformed(torch.from_numpy(record.origin))


class RawDataset:
    """Pixels of the raw clips of one split, for training a codec. `val` has to be that of `EncodeConfig`."""

    def __init__(
        self, path: Path, split: Split, *, val: float = 0.1, spec: ClipSpec | None = None, cache_bytes: int = 2**30
    ) -> None:
        """DataError for clips that differ from `spec`. Decoded clips stay in memory, up to `cache_bytes`."""
        self.folder = ClipFolder(path)
        records = [self.folder.record(clip) for clip in self.folder.ids()]
        self.ids = [record.id for record in records if split_of(record.split_key, val) == split]
        if spec:
            for record in records:
                spec.check_clip(record, f"{path}: clip {record.id}")
        if not self.ids:
            raise DataError(f"{path}: no clips in split {split!r}; run `minwm data render` with more scenes")
        self.fingerprint = zlib.crc32("\n".join(self.ids).encode())
        self._cache: dict[int, Tensor] = {}
        self._cache_left = cache_bytes

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Tensor:
        """Frames of clip i: n h w 3 uint8."""
        if i in self._cache:
            return self._cache[i]
        clip = torch.from_numpy(self.folder.frames(self.ids[i]))
        if clip.nbytes <= self._cache_left:
            self._cache[i] = clip
            self._cache_left -= clip.nbytes
        return clip

    def batch(self, indices: Sequence[int]) -> Float[Tensor, "b n 3 H W"]:
        """The clips at `indices` as pixels in [-1, 1]."""
        return to_pixels(torch.stack([self[i] for i in indices]))


@runtime_checkable
class BatchSource(Protocol[T_co]):
    """What `Loader` reads from: indexed records that form batches."""

    fingerprint: int
    """A hash of the record ids; `Loader.load` refuses another one."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> T_co:
        """The records at `indices` as one batch."""
        ...


class Loader(Generic[T]):
    """Endless iterator over batches, resumed exactly through `state` and `load`."""

    def __init__(
        self,
        dataset: BatchSource[T],
        batch: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        ahead: int = 0,
    ) -> None:
        """`batch` is the number of records per rank and step. `ahead` batches are read while another one is used."""
        if batch < 1 or not 0 <= rank < world:
            raise DataError(f"loader: batch={batch}, rank={rank}, world={world}; need batch > 0, rank < world")
        self.dataset, self.batch, self.seed, self.rank, self.world = dataset, batch, seed, rank, world
        self._readers = ThreadPoolExecutor(ahead) if ahead else None
        self._ahead = ahead
        self._start(0, 0)

    def _start(self, epoch: int, position: int) -> None:
        self.epoch, self.position = self._next = epoch, position
        self._order = self._shuffled(epoch)
        self._read = deque[tuple[Callable[[], T], tuple[int, int]]]()
        """What gives each batch that is read ahead, and the position after it."""

    def __iter__(self) -> "Loader[T]":
        return self

    def __next__(self) -> T:
        while len(self._read) <= self._ahead:
            indices = self._take()
            if self._readers:
                read = self._readers.submit(self.dataset.batch, indices).result
            else:
                read = partial(self.dataset.batch, indices)
            self._read.append((read, self._next))
        read, (self.epoch, self.position) = self._read.popleft()
        return read()

    def _take(self) -> list[int]:
        """The indices of this rank's next batch."""
        (epoch, position), taken = self._next, list[int]()
        while len(taken) < self.batch * self.world:
            if position == len(self._order):
                epoch, position = epoch + 1, 0
                self._order = self._shuffled(epoch)
            stop = position + self.batch * self.world - len(taken)
            taken += self._order[position:stop]
            position = min(stop, len(self._order))
        self._next = epoch, position
        return taken[self.rank * self.batch : (self.rank + 1) * self.batch]

    def _shuffled(self, epoch: int) -> list[int]:
        return torch.randperm(len(self.dataset), generator=generator(self.seed, "shuffle", epoch)).tolist()

    def state(self) -> dict[str, int]:
        """The position in the data, the same on every rank, as JSON values."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "fingerprint": self.dataset.fingerprint,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`. Raises DataError if the data or the seed are not the same."""
        check_shape(state, dict.fromkeys(self.state(), int), "resume: the position in the data")
        for name, value in (("fingerprint", self.dataset.fingerprint), ("seed", self.seed)):
            if state[name] != value:
                raise DataError(
                    f"resume: the {name} of the data was {state[name]} and is {value}; "
                    "restore the dataset and the seed, or start a new run"
                )
        if state["epoch"] < 0 or not 0 <= state["position"] <= len(self.dataset):
            raise DataError(f"resume: there is no position {state} in data of {len(self.dataset)} records")
        self._start(state["epoch"], state["position"])


def loader(dataset: BatchSource[T], batch: int, seed: int = 0, rank: int = 0, world: int = 1) -> Loader[T]:
    """The stream of batches of rank `rank`; see `Loader`. Shards that do not fit into memory are read ahead."""
    source: object = dataset
    ahead = AHEAD if isinstance(source, ShardDataset) and not source.in_memory else 0
    return Loader(dataset, batch, seed=seed, rank=rank, world=world, ahead=ahead)


def check_shards(path: Path) -> list[str]:
    """The problems of all shards in a folder, one line each with file and record; empty if there are none."""
    problems: list[str] = []
    for shard in list_shards(path):
        try:
            index = read_index(shard)
        except UserError as error:
            problems.append(str(error))
            continue
        problems += _record_problems(shard, index.records)
    return problems


def check_fit(path: Path, spec: ClipSpec) -> list[str]:
    """How the clips of a sound folder, raw or encoded, differ from those of a model, a line for each that does."""
    manifest, problems = read_manifest(path, "minwm data encode"), list[str]()
    if manifest["kind"] == LATENT_SHARDS:
        problems += _refusals(lambda: spec.check_shards(manifest, str(path)))
        splits: tuple[Split, ...] = ("train", "val")
        parts = [ShardDataset(path, split, cache_bytes=0) for split in splits if manifest["counts"].get(split)]
        records = (part[i].record for part in parts for i in range(len(part)))
    else:
        records = map(ClipFolder(path).record, ClipFolder(path).ids())
    for record in records:
        problems += _refusals(lambda record=record: spec.check_clip(record, record.id))
    return problems


def _refusals(check: Callable[[], None]) -> list[str]:
    try:
        check()
    except DataError as error:
        return [str(error)]
    return []


def _record_problems(shard: Path, entries: Sequence[IndexEntry]) -> list[str]:
    problems = []
    for entry in entries:
        try:
            _, tensors = read_record(shard, entry)
        except UserError as error:
            problems.append(str(error))
            continue
        where = f"{shard}: record {entry.id}"
        latent = tensors["latent"].float()
        if not latent.isfinite().all():
            problems.append(f"{where}: latents are not finite; {HINT}")
        elif latent.abs().mean() > 10 or latent.std() < 1e-3:
            size, spread = latent.abs().mean(), latent.std()
            problems.append(f"{where}: latents of mean size {size:.3g}, std {spread:.3g}")
    return problems
