"""What all verbs share: registration, parsing, common arguments and output.

A verb is a typed function. Parsing only binds its arguments, so errors of parsing and of running stay apart.
"""

import contextlib
import functools
import inspect
import io
import json as jsonlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import tyro
from tyro.conf import (
    AvoidSubcommands,
    Fixed,
    FlagConversionOff,
    FlagCreatePairsOff,
    Positional,
    Suppress,
    arg,
    subcommand,
)

from minwm.core.config import UserError, from_dict, lookup
from minwm.core.files import check_writable

if TYPE_CHECKING:
    from minwm.cameras.track import CameraTrack
    from minwm.cameras.trajectory import Trajectory
    from minwm.store.model import Model, ModelConfig
    from minwm.stream.accelerate import EngineConfig

DESCRIPTION = """Camera-controlled, streaming video world models: data, training, generation, measurement.

  minwm pipeline demo                            every stage on a laptop, then a report
  minwm train demo/camera --optim.lr 5e-4 --out runs/mine
  minwm generate --model runs/demo/dmd --world 7 --trajectory "w*4,j*4" --out walk.mp4

Bad input gives one line and the exit code 2. An interrupted pipeline, train, ablate, eval --out, generate --list, data
render, data ingest, data splat, data record, data generate, data encode, data copy or data trajectories continues when
it is run again."""

Json = Annotated[Path | None, arg(metavar="FILE", help="write the numbers here too")]
ModelFolder = Annotated[Path, arg(metavar="DIR|USER/NAME", help="model folder, such as runs/demo/dmd, or on the Hub")]
Folder = Annotated[Positional[Path], arg(metavar="DIR")]
File = Annotated[Positional[Path], arg(metavar="FILE.json")]
Out = Annotated[Path, arg(metavar="DIR", help="folder to write; what is finished in it is kept")]
Route = Annotated[str, arg(metavar='"KEYS"|FILE.json', help='keys such as "w*4,j*4", or a pose file')]
Count = Annotated[int, arg(metavar="N")]
Flag = FlagCreatePairsOff[bool]
Steps = Annotated[int | None, arg(metavar="N", help="denoising passes per chunk; the model's own if not given")]
Show = Annotated[Flag, arg(help="print every field with its value, and stop")]
Fields = Annotated[tuple[str, ...], Suppress, Fixed]
"""Options beside those that a verb declares; `parse_fields` reads them."""


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """How streams run (docs/performance.md); without any, in the plain form."""

    compile: Annotated[Flag, arg(help="compile the blocks of the network")] = False
    kernels: Annotated[Flag, arg(help="use the Triton kernel (needs minwm[fast])")] = False
    graphs: Annotated[Flag, arg(help="launch chunks as CUDA graphs")] = False
    attention: Annotated[str, arg(metavar="KERNEL", help="torch, fastest, cudnn, flash, efficient or math")] = "torch"
    decode: Annotated[str, arg(metavar="HOW", help="plain, channels_last, or compile (which is both)")] = "plain"
    overlap: Annotated[Flag, arg(help="decode on a second CUDA stream, during the cache update")] = False
    fp8: Annotated[str, arg(metavar="WHAT", help="none, linears, cache or all; checked with a trial first")] = "none"
    fp8_limit: Annotated[float, arg(metavar="ERROR", help="of the trial's latents, above which FP8 is refused")] = 0.1

    def config(self) -> "EngineConfig":
        from minwm.stream.accelerate import EngineConfig

        return from_dict(EngineConfig, asdict(self))


PLAIN = EngineFlags()
Engine = Annotated[EngineFlags, arg(name="")]
Decoder = Annotated[
    str | None,
    arg(metavar="FILE", help="tiny decoder, such as taew2_1.pth (with --random-weights: taew2_1 or taehv1_5)"),
]

Verb = Callable[..., None]
BoundVerb = functools.partial[None]
Details = Callable[[list[str]], None]
OUTPUTS = ("out", "json", "html", "sheet", "svg", "plot")
"""Names of options that are files or folders to write."""
VERBS: dict[tuple[str, ...], Callable[..., BoundVerb]] = {}
"""By the words that call them. Called by tyro they do not run: they return themselves with their arguments bound."""
DETAILS: dict[tuple[str, ...], Details] = {}
"""What follows the help of some verbs: functions that print it, given the other words on the command line."""
RESUMABLE: dict[Verb, str | None] = {}
"""Verbs that go on where an interrupted call of them ended; all such calls, or those with this option."""
GROUPS = {
    "data": "Training clips: render, ingest, splat, record, generate, encode, trajectories, copy, check, report.",
    "camera": "Poses and trajectories: check or convert a file, show a path.",
}


def command(*words: str, details: Details | None = None, resumable: bool | str = False) -> Callable[[Verb], Verb]:
    """Register a function as the verb `words`. One with a parameter `fields` gets the options that it does not have.

    `resumable`: whether an interrupted call goes on when it is made again; or the option with which it does.
    """

    def register(function: Verb) -> Verb:
        @functools.wraps(function)
        def bind(*args: Any, **kwargs: Any) -> BoundVerb:
            return functools.partial(function, *args, **kwargs)

        VERBS[words] = bind
        if details:
            DETAILS[words] = details
        if resumable:
            RESUMABLE[function] = resumable if isinstance(resumable, str) else None
        return function

    return register


def parse(argv: list[str]) -> BoundVerb:
    """The verb with its arguments bound; UserError for bad ones. Asked for help, it prints that and exits."""
    if argv and not argv[0].startswith("-"):
        lookup({words[0]: words for words in VERBS}, argv[0], "command")
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            verb, others = tyro.cli(
                _subcommands(), prog="minwm", description=DESCRIPTION, args=argv, return_unknown_args=True
            )
    except SystemExit as stop:
        if stop.code:
            raise UserError(_one_line(errors.getvalue())) from None
        if words := next((words for words in DETAILS if tuple(argv[: len(words)]) == words), None):
            DETAILS[words]([word for word in argv[len(words) :] if word not in ("-h", "--help")])
        raise
    options = _options(verb.func)
    if "--fields" in options:
        return functools.partial(verb, fields=tuple(others))
    for option in others:
        lookup(dict.fromkeys(options), option.partition("=")[0], "option")
    return verb


def _options(verb: Verb) -> list[str]:
    """The options of a verb; those in a dataclass stand beside the others."""
    names: list[str] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        names += vars(parameter.default) if is_dataclass(parameter.default) else [name]
    return [f"--{name.replace('_', '-')}" for name in names]


def _subcommands(group: tuple[str, ...] = ()) -> Any:
    """The verbs of a group as a type that tyro parses: a union with a member for each."""
    members = []
    for name in dict.fromkeys(words[len(group)] for words in VERBS if words[: len(group)] == group):
        words = (*group, name)
        if words in VERBS:
            members.append(Annotated[Any, subcommand(name, constructor=VERBS[words])])
        else:
            members.append(Annotated[Any, subcommand(name, description=GROUPS[name], constructor=_subcommands(words))])
    return Union[tuple(members)]  # noqa: UP007  (they are known at run time only)


def _one_line(box: str) -> str:
    """tyro's message without the box around it, for which tyro has no public form."""
    lines = (line.strip("│| ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:])
    words = " ".join(line for line in lines if line.strip("─╰╯-+")).split()
    problem, _, help_command = " ".join(words).partition(" For full helptext, ")
    return f"{problem.rstrip('.')}; {help_command or 'run minwm --help'}"


def goes_on(verb: BoundVerb) -> bool:
    """Whether this call goes on where an interrupted one ended."""
    option = RESUMABLE.get(verb.func, "")
    return option is None or verb.keywords.get(option) is not None


def parse_fields(options: tuple[str, ...]) -> dict[str, str]:
    """The values of fields in `--name value`, `--name=value` or `name=value`: {"optim.lr": "1e-4"}."""
    fields, rest = {}, iter(options)
    for option in rest:
        name, equals, value = option.removeprefix("--").partition("=")
        if not equals and not option.startswith("--"):
            raise UserError(f"{option!r} is no field; write --FIELD VALUE, such as --steps 200")
        if not equals and (value := next(rest, "--")).startswith("--"):
            raise UserError(f"{option} needs a value")
        fields[name.replace("-", "_")] = value
    return fields


def print_fields(config: Any, verb: str) -> None:
    """Print every field of a config with what it is and its value, as the help of the verb that sets them."""
    markers = (AvoidSubcommands, FlagConversionOff)
    with contextlib.suppress(SystemExit):
        tyro.cli(type(config), default=config, prog=f"minwm {verb}", args=["--help"], config=markers)


def open_model(folder: Path) -> "Model":
    """The model of a folder or of the Hub, on this machine's GPU if it has one."""
    from minwm.store.hub import load

    return load(folder).ready()


def read_track(text: str, cfg: "ModelConfig", picture: Path | None = None) -> "tuple[CameraTrack, Trajectory | None]":
    """A pixel-rate track that starts at the identity, from keys or a pose file; and the keys, if any.

    `picture`: the one that the video starts from, whose K the file has, unless it has the model's.
    Prints how the cameras of a file differ from those that the model was trained on.
    """
    import numpy as np

    from minwm.cameras.check import differences
    from minwm.cameras.track import CameraTrack
    from minwm.cameras.trajectory import parse
    from minwm.core.media import read_first_frame

    if not (suffix := re.search(r"\.([a-z]\w*)$", text, re.IGNORECASE)):
        route = parse(text, stride=cfg.motion.stride)
        return route.track(cfg.motion, cfg.intrinsics), route
    if suffix[1].lower() != "json":
        raise UserError(f"{text}: poses are read from .json files (CameraTrack.save), not from .{suffix[1]}")
    track = CameraTrack.load(text).relative_to_first()
    if track.fps < 1:
        raise UserError(f"{text}: {track.fps:g} poses per second say nothing of the path between them; give 1 or more")
    if picture and not np.allclose(track.K, cfg.intrinsics, rtol=0.02):
        height, width = read_first_frame(picture).shape[:2]
        track = track.cropped((height, width), (cfg.height, cfg.width))
        echo(f"{text}: its K is taken for that of {picture}, {width}x{height} pixels, and cropped with it")
    for difference in differences(track, cfg.motion, cfg.intrinsics):
        echo(f"note: {text}: {difference}")
    if track.fps != cfg.motion.fps:
        echo(f"{text}: {track.fps:g} poses per second, resampled to the model's {cfg.motion.fps:g}")
        track = track.resample(cfg.motion.fps)
    return track, None


def refuse_existing(path: Path, suffix: str, option: str = "out") -> None:
    """Refuse, before any work, a file that would be overwritten or whose name says another format."""
    if path.suffix.lower() != suffix:
        raise UserError(f"--{option} {path}: the name must end in {suffix}")
    if path.exists():
        raise UserError(f"--{option} {path} exists; delete it, or give another name")


def check_outputs(verb: BoundVerb) -> None:
    """Refuse, before any work, outputs of a verb that cannot be written."""
    for name in OUTPUTS:
        if isinstance(path := verb.keywords.get(name), Path):
            if name != "out" and path.is_dir():
                raise UserError(f"--{name} {path} is a folder; give the name of a file")
            check_writable(path)


def echo(text: str) -> None:
    print(text, flush=True)  # noqa: T201  (the command line prints)


def command_line() -> str:
    return shlex.join(["minwm", *sys.argv[1:]])


def numbers(values: Mapping[str, Any], file: Path | None) -> None:
    """Print values with four digits, a line each, and write them in full to `file`."""
    rounded = jsonlib.loads(jsonlib.dumps(values), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    for line in _flat(rounded, ""):
        echo(line)
    write_numbers(values, file)


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}: {value}"


def write_numbers(values: Mapping[str, Any], file: Path | None) -> None:
    """Write values to `file`, if there is one, with what is needed to get them again."""
    from minwm.core.files import write_json
    from minwm.core.runtime import git_commit, versions

    if file:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"command": command_line(), "date": date, "commit": git_commit(), "versions": versions()}
        write_json(file, {**about, **values})
