"""Datasets in stores: S3 and what is compatible with it, the Hub, whatever else fsspec opens.

    s3://bucket/latents             with AWS_ENDPOINT_URL for a server that is not Amazon's
    hf://datasets/USER/NAME/latents

A folder of raw clips or of shards is copied there and back. Latent shards are also read where they lie: manifest and
indices are kept on this machine, and a record is one range of bytes.
"""

import functools
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minwm.core.config import UserError
from minwm.core.files import atomic, read_json, write_json
from minwm.core.runtime import MissingExtraError, cache_folder, progress, require

NOTE = "store.json"
"""In the local copy of manifest and indices: where the shards are, and their sizes."""
BLOCK = 2**24
"""Bytes of a file that are copied at a time."""
LAST = "manifest.json"
"""Copied last: a folder without one is unfinished."""


class StoreError(UserError):
    """A store cannot be read or written; the message names it."""


def data_folder(place: str) -> Path:
    """The folder of a dataset to read: a path as it is; for the address of latent shards, `mirror`."""
    return mirror(place) if "://" in place else Path(place)


def mirror(address: str) -> Path:
    """Manifest and indices of latent shards in a store, fetched where they are new; StoreError if there are none."""
    folder = cache_folder() / "data" / hashlib.sha256(address.encode()).hexdigest()[:16]
    with opened(address) as (fs, root):
        sizes = _files(fs, root)
        if LAST not in sizes:
            raise StoreError(
                f"{address} holds no dataset (no {LAST}); copy one there: minwm data copy FOLDER {address}"
            )
        manifest = fs.cat_file(f"{root}/{LAST}")
        known = folder / LAST
        same = known.exists() and known.read_bytes() == manifest
        for gone in {file.name for file in folder.glob("*.idx.json")} - sizes.keys():
            (folder / gone).unlink()
        for name in sizes:
            if name.endswith(".idx.json") and not (same and (folder / name).exists()):
                _write(folder / name, fs.cat_file(f"{root}/{name}"))
    shards = {name: size for name, size in sizes.items() if name.endswith(".tar")}
    write_json(folder / NOTE, {"address": address, "sizes": shards})
    _write(known, manifest)
    _note.cache_clear()
    return folder


def size_of(file: Path) -> int | None:
    """Bytes of a shard, here or in the store that its folder mirrors; None if it is nowhere."""
    if file.exists():
        return file.stat().st_size
    note = _note(file.parent)
    return note["sizes"].get(file.name) if note else None


def read_range(file: Path, start: int, stop: int) -> bytes:
    """Bytes of a shard, here or in the store that its folder mirrors. OSError or StoreError if they cannot be read."""
    note = None if file.exists() else _note(file.parent)
    if note is None:
        with file.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)
    with opened(note["address"]) as (fs, root):
        return bytes(fs.cat_file(f"{root}/{file.name}", start=start, end=stop))


def copy(source: str, target: str) -> int:
    """Copy a dataset between folders and stores; returns the number of files that were not there yet.

    Files of the same size are taken as copied. An interrupted copy has no manifest, and goes on when called again.
    """
    with opened(source) as (fs, root), opened(target) as (fs_out, root_out):
        sizes, there = _files(fs, root), _files(fs_out, root_out)
        if LAST not in sizes:
            raise StoreError(f"{source} holds no dataset (no {LAST})")
        new = sorted((name for name, size in sizes.items() if there.get(name) != size and name != LAST), key=_order)
        with progress(len(new) + 1, "files") as bar:
            for name in [*new, LAST]:
                with fs.open(f"{root}/{name}", "rb") as stream, _written(fs_out, f"{root_out}/{name}") as out:
                    shutil.copyfileobj(stream, out, BLOCK)
                bar.advance()
    return len(new)


def _order(name: str) -> tuple[bool, str]:
    """Indices and records of clips after what they speak of."""
    return name.endswith(".json"), name


@contextmanager
def _written(fs: Any, path: str) -> Iterator[Any]:
    """A new file of a store or of this machine, which here appears whole or not at all; in stores see `copy`."""
    if "file" in fs.protocol:
        with atomic(path) as temporary, temporary.open("wb") as stream:
            yield stream
    else:
        with fs.open(path, "wb") as stream:
            yield stream


def _write(path: Path, content: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def _files(fs: Any, root: str) -> dict[str, int]:
    """Sizes of all files below a folder by their path in it, hidden ones left out; empty if there is no such folder."""
    found = fs.find(root, detail=True) if fs.exists(root) else {}
    names = {path: path.removeprefix(root).lstrip("/") for path in found}
    return {name: found[path]["size"] for path, name in names.items() if not any(p[:1] == "." for p in name.split("/"))}


@contextmanager
def opened(place: str) -> Iterator[tuple[Any, str]]:
    """The file system of an address or path, and the path in it; StoreError for whatever goes wrong there."""
    try:
        fs, root = _filesystem(place)
        yield fs, root.rstrip("/")
    except (OSError, ValueError) as error:
        raise StoreError(f"{place}: {type(error).__name__}: {error}") from error


@functools.cache
def _filesystem(place: str) -> tuple[Any, str]:
    fsspec = require("fsspec", "data")
    try:
        return fsspec.url_to_fs(place)
    except ImportError as error:
        raise MissingExtraError(f"{place}: {error}") from error


@functools.cache
def _note(folder: Path) -> dict[str, Any] | None:
    file = folder / NOTE
    return read_json(file, {"address": str, "sizes": dict}) if file.exists() else None
