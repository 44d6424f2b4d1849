"""Configs are frozen dataclasses; this file converts them to JSON and back, strictly.

An unknown key or `kind` and a value of another type raise ConfigError with the field, the value and what is valid.
The dataclasses of a union carry a `kind: ClassVar[str]`, written as `{"kind": ...}`, that tells which one it is.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

T = TypeVar("T")
V = TypeVar("V")


class UserError(Exception):
    """A mistake that the user can correct; the command line prints only the message and exits with `exit_code`."""

    exit_code = 2


class ConfigError(UserError):
    """A config names something that does not exist or holds a value of the wrong type."""


def lookup(table: Mapping[str, V], name: str, what: str) -> V:
    """The entry `name` of a table; ConfigError with the nearest name, or with all, if there is none.

    `what` says in the error what the table holds.
    """
    return table[_one_of(name, list(table), f"there is no {what} {name!r}")]


def to_dict(cfg: Any) -> dict[str, Any]:
    """A dataclass as JSON values: tuples become lists, paths strings; its `kind` comes first."""
    cls = type(cfg)
    tag = {"kind": _kind(cls)} if _kind(cls) else {}
    return tag | {name: _encode(getattr(cfg, name), f"{cls.__name__}.{name}") for name in _names(cls)}


def from_dict(cls: type[T] | types.UnionType, d: Mapping[str, Any]) -> T:
    """Build `cls` (a dataclass, or a union of dataclasses with a `kind`) from JSON values; the inverse of `to_dict`."""
    return cast(T, _decode(cls, d, _name(cls)))


def dumps(cfg: Any) -> str:
    """A config as JSON text with one field per line."""
    return json.dumps(to_dict(cfg), indent=2) + "\n"


def loads(cls: type[T] | types.UnionType, text: str) -> T:
    """The inverse of `dumps`; ConfigError for text that is not JSON or does not match `cls`."""
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{_name(cls)} is not JSON: {error}") from error
    return from_dict(cls, values)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError if it is not JSON or is nested too deep for Python."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("brackets are nested too deep") from error


def override(cfg: T, values: Mapping[str, Any]) -> T:
    """A copy of `cfg` with dotted fields replaced: `override(run, {"optim.lr": "1e-4"})`.

    Strings are parsed as the field's type (`true`, `none`, `1,2,3`, JSON); other values are used as they are. The
    fields of one dataclass are replaced at once, so it validates only the result. `x=name` or `x.kind=name` switches a
    union to that class with its defaults; the other `x.` values then apply to it. Values that were set and that both
    classes have must be given again: ConfigError lists them.
    """
    cls = type(cfg)
    groups: dict[str, Any] = {}
    for key, value in values.items():
        head, _, rest = key.partition(".")
        groups.setdefault(head, {})[rest] = value
    for name, group in groups.items():
        _one_of(name, _names(cls), f"{cls.__name__} has no field {name!r}")
        groups[name] = _override_field(_hints(cls)[name], getattr(cfg, name), group, f"{cls.__name__}.{name}")
    return cast(T, dataclasses.replace(cast(Any, cfg), **groups))


def _override_field(hint: Any, current: Any, group: dict[str, Any], where: str) -> Any:
    inner = {key: value for key, value in group.items() if key not in ("", "kind")}
    kind = group.get("kind", group.get(""))
    if "kind" in group or kind in [_kind(m) for m in _members(hint) if isinstance(m, type)]:
        if kind != _kind(type(current)):
            new = _decode(hint, {"kind": kind}, where)
            _refuse_reset(current, new, {key.partition(".")[0] for key in inner}, where)
            current = new
    elif "" in group:
        current = _decode_text(hint, group[""], where)
    if inner and current is None and any(map(dataclasses.is_dataclass, _members(hint))):
        current = _decode(hint, {}, where)
    if inner and not dataclasses.is_dataclass(current):
        raise ConfigError(f"{where} = {current!r} has no field {next(iter(inner))!r}")
    return override(current, inner) if inner else current


def _refuse_reset(old: Any, new: Any, given: set[str], where: str) -> None:
    """Raise ConfigError if `new`, with its defaults, resets values of `old` that were set and are not `given` anew."""
    if not dataclasses.is_dataclass(old):
        return
    default = {f.name: f.default for f in dataclasses.fields(old)}
    both = [name for name in _names(type(new)) if name in default and name not in given]
    lost = [name for name in both if getattr(old, name) not in (default[name], getattr(new, name))]
    if lost:
        values = ", ".join(f"{name}={getattr(old, name)!r}" for name in lost)
        raise ConfigError(f"{where} of kind {_kind(type(new))!r} would reset {values}; give these fields, too")


def _decode_text(hint: Any, text: Any, where: str) -> Any:
    """A command-line string as a value of type `hint`: the first parse that is valid, plain text last."""
    if not isinstance(text, str):
        return _decode(hint, text, where)
    readings: list[Any] = [{"kind": text} for m in _members(hint) if isinstance(m, type) and _kind(m) == text]
    lower = "null" if text.lower() == "none" else text.lower()
    for read, form in ((parse_json, text), (parse_json, lower), (float, text), (parse_json, f"[{text}]")):
        with contextlib.suppress(ValueError):
            readings.append(read(form))
    readings = [reading for reading in readings if reading == reading]  # NaN is no value of a field
    for reading in [*readings, text.split(",")]:
        try:
            return _decode(hint, reading, where)
        except ConfigError:
            if isinstance(reading, dict):  # a JSON object has no other reading: show its error
                raise
    return _decode(hint, text, where)


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if len(_members(hint)) > 1:
        return _decode_union(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(cast(type, hint), value, where)
    if origin is Literal and (type(value), value) in [(type(option), option) for option in args]:
        return value
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        items = args[:1] * len(value) if origin is list or args[-1] is Ellipsis else args
        if len(items) == len(value):
            return origin(_decode(items[i], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {_decode(args[0], k, where): _decode(args[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if hint is Any or type(value) is hint:  # not isinstance: True would pass for an int
        return value
    raise ConfigError(f"{where} = {value!r}: expected {_name(hint)}, got {type(value).__name__}")


def _decode_dataclass(cls: type, value: Any, where: str) -> Any:
    if type(value) is cls:
        return value
    if not isinstance(value, Mapping) or value.get("kind", _kind(cls)) != _kind(cls):
        raise ConfigError(f"{where} = {value!r}: expected the fields of {cls.__name__}, kind {_kind(cls)!r}")
    values = {key: v for key, v in value.items() if key != "kind"}
    for name in values:
        _one_of(name, _names(cls), f"{cls.__name__} has no field {name!r}")
    for f in dataclasses.fields(cls):
        if f.name not in values and f.default is f.default_factory:  # both MISSING
            raise ConfigError(f"{cls.__name__} needs a value for {f.name!r}, which has no default")
    return cls(**{key: _decode(_hints(cls)[key], v, f"{cls.__name__}.{key}") for key, v in values.items()})


def _decode_union(hint: Any, value: Any, where: str) -> Any:
    members = _members(hint)
    classes = {str(_kind(m)): m for m in members if dataclasses.is_dataclass(m) and isinstance(m, type)}
    if isinstance(value, Mapping) and classes:
        if len(classes) > 1 and "kind" not in value:
            raise ConfigError(f"{where} needs a 'kind', one of {', '.join(map(repr, classes))}")
        cls = lookup(classes, str(value.get("kind", next(iter(classes)))), f"{where} of kind")
        return _decode(cls, value, where)
    for member in sorted(members, key=lambda m: m is not type(value)):  # 3 for `float | int` stays an int
        with contextlib.suppress(ConfigError):
            return _decode(member, value, where)
    raise ConfigError(f"{where} = {value!r}: expected {_name(hint)}, got {type(value).__name__}")


def _encode(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_encode(item, where) for item in value]
    if isinstance(value, dict):
        return {key: _encode(item, where) for key, item in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    raise ConfigError(f"{where} = {value!r}: a {type(value).__name__} cannot be written to a config")


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _one_of(name: str, known: list[str], problem: str) -> str:
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise ConfigError(f"{problem}; did you mean {close[0]!r}?" if close else f"{problem} ({', '.join(known)})")


def _kind(cls: type) -> str | None:
    return vars(cls).get("kind")


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


_hints = functools.cache(typing.get_type_hints)
