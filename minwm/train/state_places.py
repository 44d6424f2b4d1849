"""Where training states are: folders of this machine, or a store (s3://...). A state is there whole or not at all.

A folder is written beside its place and renamed. In a store, which cannot rename a folder at once, `state.json` is
written last and removed first: what has none is no state.
"""

import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from minwm.core.files import read_text, write_json
from minwm.data.remote import opened

RECORD = "state.json"
"""In every state: what is saved beside the tensors."""


class Place(Protocol):
    """The states of one run, by the steps done. OSError or UserError for what cannot be read or written."""

    def steps(self) -> list[int]: ...

    def name(self, step: int) -> str:
        """Path or address of a state."""
        ...

    def writer(self, step: int) -> FileSystemWriter:
        """What writes the tensors of a new state."""
        ...

    def reader(self, step: int) -> FileSystemReader: ...

    def clear(self, step: int) -> None:
        """Remove what is written of an unfinished state."""
        ...

    def files(self, step: int) -> list[str]: ...

    def open(self, step: int, file: str) -> AbstractContextManager[Any]:
        """A file of a state, to be read."""
        ...

    def finish(self, step: int, record: Mapping[str, Any]) -> None:
        """Let a new state appear, with its record."""
        ...

    def record(self, step: int) -> str:
        """Text of `state.json`."""
        ...

    def remove(self, step: int) -> None: ...


class StateFolder:
    """States in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdigit())

    def name(self, step: int) -> str:
        return str(self._path(step, True))

    def _path(self, step: int, finished: bool) -> Path:
        return self.folder / (f"{step:06d}" if finished else f".{step:06d}.tmp")

    def writer(self, step: int) -> FileSystemWriter:
        return FileSystemWriter(self._path(step, False))

    def clear(self, step: int) -> None:
        shutil.rmtree(self._path(step, False), ignore_errors=True)

    def files(self, step: int) -> list[str]:
        return [path.name for path in self._path(step, True).iterdir()]

    def open(self, step: int, file: str) -> AbstractContextManager[Any]:
        return (self._path(step, True) / file).open("rb")

    def finish(self, step: int, record: Mapping[str, Any]) -> None:
        partial, target = self._path(step, False), self._path(step, True)
        write_json(partial / RECORD, record)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)

    def record(self, step: int) -> str:
        return read_text(self._path(step, True) / RECORD)

    def reader(self, step: int) -> FileSystemReader:
        return FileSystemReader(self._path(step, True))

    def remove(self, step: int) -> None:
        half = self._path(step, False)  # never seen half removed
        shutil.rmtree(self._path(step, True).rename(half))


class StateStore:
    """States at an address that fsspec opens."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def steps(self) -> list[int]:
        with self._opened() as (fs, root):
            found = [path.split("/")[-2] for path in fs.glob(f"{root}/*/{RECORD}")]
        return sorted(int(name) for name in found if name.isdigit())

    def name(self, step: int) -> str:
        return f"{self.address}/{step:06d}"

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, str]]:
        with opened(self.address) as (fs, root):
            fs.invalidate_cache()
            yield fs, root

    def writer(self, step: int) -> FileSystemWriter:
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        return FsspecWriter(self.name(step), sync_files=False)

    def clear(self, step: int) -> None:
        self.remove(step)

    def files(self, step: int) -> list[str]:
        with self._opened() as (fs, root):
            return [path.rpartition("/")[2] for path in fs.find(f"{root}/{step:06d}")]

    @contextmanager
    def open(self, step: int, file: str) -> Iterator[Any]:
        with self._opened() as (fs, root), fs.open(f"{root}/{step:06d}/{file}", "rb") as stream:
            yield stream

    def finish(self, step: int, record: Mapping[str, Any]) -> None:
        with self._opened() as (fs, root):
            fs.pipe_file(f"{root}/{step:06d}/{RECORD}", json.dumps(record).encode())

    def record(self, step: int) -> str:
        with self._opened() as (fs, root):
            return fs.cat_file(f"{root}/{step:06d}/{RECORD}").decode()

    def reader(self, step: int) -> FileSystemReader:
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        return FsspecReader(self.name(step))

    def remove(self, step: int) -> None:
        with self._opened() as (fs, root):
            folder = f"{root}/{step:06d}"
            if fs.exists(f"{folder}/{RECORD}"):
                fs.rm_file(f"{folder}/{RECORD}")
            if fs.exists(folder):
                fs.rm(folder, recursive=True)


class Summed:
    """A stream that is written from its start to its end, with the CRC-32 of what was written."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.crc = stream, 0

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        return self.stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def sum_files(writer: FileSystemWriter) -> dict[str, int]:
    """CRC-32 of every file that a writer makes from now on, by its name, once it is written."""
    sums, create = dict[str, int](), writer.fs.create_stream

    @contextmanager
    def create_stream(path: Any, mode: str) -> Iterator[Any]:
        with create(path, mode) as stream:
            yield (summed := Summed(stream))
        sums[Path(path).name.removesuffix(".tmp")] = summed.crc  # the writer renames its metadata

    writer.fs.create_stream = create_stream
    return sums
