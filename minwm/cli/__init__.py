"""The command line: every verb is a typed function that parses, builds and makes one call.

Heavy modules are imported inside the verbs, so that `minwm --help` is quick.
"""

import io
import os
import sys
from collections.abc import Sequence

from minwm.cli import (  # noqa: F401  (their verbs register themselves)
    cameras,
    evaluate,
    models,
    plan,
    play,
    selftest,
    tools,
    video,
    weights,
)
from minwm.cli.base import check_outputs, goes_on, parse
from minwm.cli.slurm import place_in_step
from minwm.core.config import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a prompt may hold what the console's encoding does not
            stream.reconfigure(errors="backslashreplace")
    os.environ.update(place_in_step(os.environ))
    resumable = False
    try:
        verb = parse(list(sys.argv[1:] if argv is None else argv))
        resumable = goes_on(verb)
        check_outputs(verb)
        verb()
    except SystemExit:  # help was asked for, and printed
        return 0
    except BrokenPipeError:  # whoever reads the output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or python complains when it ends
        return 141
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code if isinstance(error, UserError) else 2
    except KeyboardInterrupt:
        again = "continues" if resumable else "starts over"
        way_out = f"nothing half-written is left; the same command again {again}"
        print(f"interrupted: {way_out}", file=sys.stderr)  # noqa: T201
        return 130
    return 0
