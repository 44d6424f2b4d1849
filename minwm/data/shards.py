"""Shards: tar files of `{id}.json` and `{id}.safetensors`, each with an index file of byte offsets.

{split}-0000-{n:06d}.tar             an ordinary tar file, read by seeking
{split}-0000-{n:06d}.tar.idx.json    offsets, sizes, crc32; written last: a tar without it is ignored

Other numbers than 0000 are read, too: once every rank counted its own shards.
"""

import io
import json
import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from minwm.core.config import ConfigError, UserError, from_dict, to_dict
from minwm.core.files import atomic, read_json, write_json
from minwm.data.clips import DataError
from minwm.data.remote import read_range, size_of

SCHEMA = 1
SHARD_NAME = re.compile(r"(train|val)-\d{4}-\d{6}\.tar")
HINT = "delete the shard with its .idx.json and run `minwm data encode` again"


@dataclass(frozen=True)
class ByteRange:
    """Where one file lies in the tar, in bytes."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class IndexEntry:
    """One record of a shard: its id and its two files."""

    id: str
    meta: ByteRange
    tensors: ByteRange


@dataclass(frozen=True)
class ShardStats:
    """Statistics of one shard, which the manifest of its folder sums up."""

    values: int
    """Number of latent values per channel."""
    total: tuple[float, ...]
    """Sum of the latent values, per channel."""
    square: tuple[float, ...]
    """Sum of their squares, per channel."""
    psnr: float
    """PSNR in dB of one clip of the shard after encoding and decoding."""
    licences: tuple[str, ...]
    """Licences of the clips."""


@dataclass(frozen=True)
class ShardIndex:
    """Content of the index file."""

    schema: int
    bytes: int
    """Size of the tar; a smaller file was truncated."""
    summary: ShardStats
    records: tuple[IndexEntry, ...]


@dataclass(frozen=True)
class ShardRecord:
    """A record to be written into a shard."""

    id: str
    meta: dict[str, Any]
    tensors: dict[str, Tensor]


def shard_stats(records: Sequence[ShardRecord], psnr: float) -> ShardStats:
    """Statistics of records, summed in float64."""
    latents = [record.tensors["latent"].double().transpose(0, 1).flatten(1) for record in records]  # c (f h w)
    return ShardStats(
        values=sum(x.shape[1] for x in latents),
        total=tuple(torch.stack([x.sum(1) for x in latents]).sum(0).tolist()),
        square=tuple(torch.stack([x.square().sum(1) for x in latents]).sum(0).tolist()),
        psnr=psnr,
        licences=tuple(sorted({record.meta["source_license"] for record in records})),
    )


def write_shard(path: Path, records: Sequence[ShardRecord], summary: ShardStats) -> ShardIndex:
    """Write the tar, then its index, each atomically."""
    entries = []
    with atomic(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for record in records:
                meta = _add(tar, f"{record.id}.json", json.dumps(record.meta).encode())
                tensors = _add(tar, f"{record.id}.safetensors", safetensors.torch.save(record.tensors))
                entries.append(IndexEntry(record.id, meta, tensors))
        size = temporary.stat().st_size
    index = ShardIndex(SCHEMA, size, summary, tuple(entries))
    write_json(index_path(path), to_dict(index), indent=None)
    return index


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> ByteRange:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    blocks = -(-len(data) // tarfile.BLOCKSIZE)
    return ByteRange(tar.offset - blocks * tarfile.BLOCKSIZE, len(data), zlib.crc32(data))


def index_path(shard: Path) -> Path:
    """Path of the index file of a shard."""
    return shard.with_name(shard.name + ".idx.json")


def list_shards(folder: Path) -> list[Path]:
    """Paths of all tars that have an index, sorted."""
    indexed = (p.with_name(p.name.removesuffix(".idx.json")) for p in folder.glob("*.tar.idx.json"))
    return sorted(p for p in indexed if SHARD_NAME.fullmatch(p.name))


def read_index(shard: Path) -> ShardIndex:
    """The index of a shard; DataError if index or tar is missing, unreadable, truncated or of another schema."""
    path = index_path(shard)
    try:
        values = read_json(path)
    except (OSError, UserError) as error:
        raise DataError(f"{path}: not readable ({error}); {HINT}") from error
    if values.get("schema") != SCHEMA:
        raise DataError(f"{path}: schema {values.get('schema')!r}, this version reads {SCHEMA}; {HINT}")
    try:
        index = from_dict(ShardIndex, values)
    except ConfigError as error:
        raise DataError(f"{path}: {error}; {HINT}") from error
    if (size := size_of(shard)) is None:
        raise DataError(f"{shard}: missing though its index is there; {HINT}")
    if size != index.bytes:
        raise DataError(f"{shard}: {size} bytes, its index says {index.bytes} (cut off?); {HINT}")
    return index


def read_record(shard: Path, entry: IndexEntry) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of one record; DataError if a checksum is wrong."""
    first, last = entry.meta, entry.tensors
    try:
        record = read_range(shard, first.offset, last.offset + last.size)
    except OSError as error:
        raise DataError(f"{shard}: record {entry.id}: {error}; {HINT}") from error
    meta, tensors = record[: first.size], record[last.offset - first.offset :]
    for data, span, suffix in ((meta, entry.meta, "json"), (tensors, entry.tensors, "safetensors")):
        if len(data) != span.size or zlib.crc32(data) != span.crc32:
            raise DataError(f"{shard}: record {entry.id}: wrong checksum of its {suffix}; {HINT}")
    return json.loads(meta), safetensors.torch.load(tensors)
