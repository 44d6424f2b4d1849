"""The one way in which minwm writes files and folders: they appear whole or not at all."""

import contextlib
import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

from minwm.core.config import ConfigError, UserError, loads, parse_json

T = TypeVar("T")

FOLDERS_OPEN = os.name == "posix"
"""Whether folders can be opened, to be synced: not on Windows."""


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on any failure removed.

    Makes missing parent folders. The temporary name ends in `.tmp`: a writer that infers the format from the suffix
    has to be given the format. Raises UserError for a folder, and on a full disk with the path and the free bytes.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors would make the file readable by its owner alone
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if _disk_full(error):
            folder = next(p for p in path.absolute().parents if p.exists())
            free = shutil.disk_usage(folder).free
            raise UserError(f"no space left to write {path}: {free} bytes are free in {folder}") from error
        raise
    if FOLDERS_OPEN:
        _sync(path.parent)  # the rename itself must survive a power cut


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs only what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: Path) -> None:
    """Raise UserError unless a file or folder can be made, or replaced, at `path`; nothing is left there."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise UserError(f"{str(path)!r} is no file name ({error.reason}); give another place") from error
    path = path.absolute()
    place = next(p for p in (path, *path.parents) if p.is_dir() or (p != path and p.exists()))
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written ({place}: {error.strerror}); give another place") from error


def _disk_full(error: BaseException) -> bool:
    """Whether a write failed for lack of space; safetensors reports that only in the error's text."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write a JSON file atomically; `indent=None` writes one line."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; UserError for another encoding."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}, byte {error.start}); save it as UTF-8") from error


def read_config(cls: type[T] | UnionType, path: Path) -> T:
    """The config in a JSON file; ConfigError, with the path, for a file that does not match `cls`."""
    try:
        return loads(cls, read_text(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_json(path: Path, shape: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The object in a JSON file; UserError if it holds anything else, or lacks what `shape` says (`check_shape`)."""
    return json_object(read_text(path), str(path), shape)


def json_object(text: str, where: str, shape: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The object that a JSON text holds; UserError as by `read_json`, which names `where`."""
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} holds a JSON {type(content).__name__}, not an object")
    check_shape(content, shape, where)
    return content


def check_shape(values: Mapping[str, Any], shape: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless values of the given types, or nested shapes, stand under all keys of `shape`.

    >>> check_shape({"step": 3, "data": {"seed": 0}}, {"step": int, "data": {"seed": int}}, "state.json")
    """
    for key, kind in shape.items():
        wanted = dict if isinstance(kind, Mapping) else kind
        value: Any = values.get(key)
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            found = f"has {value!r:.80} for {key!r}" if key in values else f"lacks {key!r}"
            raise UserError(f"{where} {found}, where {wanted.__name__} is expected: it is damaged")
        if isinstance(kind, Mapping):
            check_shape(values[key], kind, f"{where}: {key}")


def find_files(folder: Path, suffixes: tuple[str, ...], what: str) -> list[Path]:
    """All files of these kinds below a folder, sorted; links to folders are not followed. UserError if there is none,
    which says `what` they are."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of {what}")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    if not found:
        raise UserError(f"{folder} holds no {what} ({', '.join(suffixes)})")
    return found


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the only lock on an output folder, made if missing, until the process ends at the latest.

    Raises UserError if another process holds it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise UserError(f"{folder}: another process writes here; wait for it, or give another --out") from error


def locked_together(folder: Path) -> contextlib.AbstractContextManager[None]:
    """`locked` for all processes of torchrun: the first one holds it."""
    from minwm.core.runtime import rank  # which imports torch, too slow for --help

    return locked(folder) if rank() == 0 else contextlib.nullcontext()


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it is renamed to `target`, on any failure removed.

    Raises UserError if `target` exists.
    """
    if target.exists():
        raise UserError(f"{target} exists; delete it, or give another name")
    partial = target.absolute().with_name(f".{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
