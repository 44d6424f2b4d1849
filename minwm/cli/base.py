"""What all verbs share: how they are registered, parsed and heard.

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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from minwm.core.config import UserError, from_dict

if TYPE_CHECKING:
    from minwm.cameras.track import CameraTrack
    from minwm.cameras.trajectory import Trajectory
    from minwm.store.model import ModelConfig
    from minwm.stream.accelerate import EngineConfig

DESCRIPTION = """Camera-controlled, streaming video world models: data, training, generation, measurement.

  minwm pipeline demo                            every stage on a laptop, then a report
  minwm train demo/camera --optim.lr 5e-4 --out runs/mine
  minwm generate --model runs/demo/dmd --world 7 --trajectory "w*4,j*4" --out walk.mp4

Bad input gives one line and the exit code 2. An interrupted command continues when it is run again."""

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
Fields = Annotated[
    Positional[tuple[str, ...]],
    arg(metavar="[--FIELD VALUE ...]", help="any field, dotted if nested: --optim.lr 1e-4; --show lists them"),
]


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """How streams run (docs/performance.md); without any, in the plain form."""

    compile: Annotated[Flag, arg(help="compile the blocks of the network")] = False
    kernels: Annotated[Flag, arg(help="use the Triton kernel (needs minwm[fast])")] = False
    graphs: Annotated[Flag, arg(help="launch chunks as CUDA graphs")] = False
    attention: Annotated[str, arg(metavar="KERNEL", help="torch, race, cudnn, flash, efficient or math")] = "torch"
    decode: Annotated[str, arg(metavar="HOW", help="plain, channels_last, or compile (which is both)")] = "plain"
    overlap: Annotated[Flag, arg(help="decode on a second CUDA stream, beside the commit")] = False
    fp8: Annotated[str, arg(metavar="WHAT", help="none, linears, cache or all; judged by a trial first")] = "none"
    fp8_limit: Annotated[float, arg(metavar="ERROR", help="of the trial's latents, beyond which FP8 is refused")] = 0.1

    def config(self) -> "EngineConfig":
        from minwm.stream.accelerate import EngineConfig

        return from_dict(EngineConfig, asdict(self))


PLAIN = EngineFlags()
Engine = Annotated[EngineFlags, arg(name="")]
Decoder = Annotated[
    str | None, arg(metavar="FILE", help="tiny decoder, such as taew2_1.pth (with --random-weights: taew2_1)")
]

app, data, camera = (tyro.extras.SubcommandApp() for _ in range(3))
app.command(data, name="data", help="Training clips: render, encode, check, report.")
app.command(camera, name="camera", help="Poses and trajectories: check a file, show a path.")


Verb = Callable[..., None]
OPEN: dict[tuple[str, ...], Verb] = {}
"""Verbs with `Fields`."""


def command(group: tyro.extras.SubcommandApp, *words: str) -> Callable[[Verb], Verb]:
    """Register a function as the verb `words`; parsing returns it with arguments bound, not yet called."""

    def register(function: Verb) -> Verb:
        @functools.wraps(function)
        def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
            return functools.partial(function, *args, **kwargs)

        group.command(name=words[-1])(bind)
        if "fields" in inspect.signature(function).parameters:
            OPEN[words] = function
        return function

    return register


def parse(argv: list[str]) -> Callable[[], None]:
    """The command with its arguments bound. What tyro says about bad ones is a box; it becomes one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return app.cli(prog="minwm", description=DESCRIPTION, args=_fields_as_pairs(argv))
    except SystemExit as stop:
        if not stop.code:
            raise  # help was asked for, and printed
        plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]+", " ", said.getvalue().partition("\n")[2])
        problem, _, way_out = " ".join(plain.split()).partition(" For full helptext, ")
        raise UserError(f"{problem}; {way_out or 'run minwm --help'}") from None


def _fields_as_pairs(argv: list[str]) -> list[str]:
    """For verbs with `Fields`: each `--name value` that is no option of the verb becomes one `name=value`."""
    words = next((words for words in OPEN if tuple(argv[: len(words)]) == words), None)
    if words is None:
        return argv
    own = inspect.signature(OPEN[words]).parameters
    positionals, options, pairs = [], [], []
    rest = iter(argv[len(words) :])
    for token in rest:
        name, equals, value = token.removeprefix("--").partition("=")
        if token in ("-h", "--help") or (name in own and own[name].default is False):
            options.append(token)
        elif not token.startswith("--"):
            positionals.append(token)
        elif not equals and (value := next(rest, "--")).startswith("--"):
            raise UserError(f"{token} needs a value")
        elif name in own:
            options += [f"--{name}", value]
        else:
            pairs.append(f"{name.replace('-', '_')}={value}")
    return [*words, *positionals, *pairs, *options]


def changes(fields: tuple[str, ...]) -> dict[str, str]:
    for field in fields:
        if "=" not in field:
            raise UserError(f"{field!r} is no field; write --FIELD VALUE, such as --steps 200")
    return dict(field.split("=", 1) for field in fields)


def read_track(text: str, cfg: "ModelConfig") -> "tuple[CameraTrack, Trajectory | None]":
    """A pixel-rate track that starts at the identity, from keys or a pose file; and the keys, if any."""
    from minwm.cameras.track import CameraTrack
    from minwm.cameras.trajectory import parse

    if not text.endswith(".json"):
        route = parse(text, stride=cfg.motion.stride)
        return route.track(cfg.motion, cfg.intrinsics), route
    track = CameraTrack.load(text).relative_to_first()
    if track.fps != cfg.motion.fps:
        say(f"{text}: {track.fps:g} poses per second, resampled to the model's {cfg.motion.fps:g}")
        track = track.resample(cfg.motion.fps)
    return track, None


def refuse_existing(path: Path, suffix: str) -> None:
    """Refuse, before any work, a file that would be overwritten or whose name says another format."""
    if path.suffix.lower() != suffix:
        raise UserError(f"--out {path}: the name must end in {suffix}")
    if path.exists():
        raise UserError(f"--out {path} exists; delete it, or give another name")


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  (the command line prints)


def command_line() -> str:
    return shlex.join(["minwm", *sys.argv[1:]])


def numbers(values: Mapping[str, Any], file: Path | None) -> None:
    """Print values with four digits, a line each, and write them in full to `file`."""
    rounded = jsonlib.loads(jsonlib.dumps(values), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    for line in _flat(rounded, ""):
        say(line)
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
