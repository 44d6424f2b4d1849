"""The verb that proves a machine."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from minwm.cli.base import Flag, Out, command, echo
from minwm.core.config import UserError


@command("selftest", resumable=True)
def selftest(
    gpu: Annotated[Flag, arg(help="on a CUDA GPU: device tests, speed, memory, training of large models")] = False,
    reference: Annotated[
        Path | None, arg(metavar="DIR", help="a checkout of minWM with its weights: its own inference beside ours")
    ] = None,
    out: Out = Path("runs/selftest"),
) -> None:
    """Run all that a machine is judged by, each part in its own process; OUT/page.md says which targets are met.

    At most 8 minutes, and 9 more with --reference. Without --gpu all of it runs with a small model. What did not
    succeed is repeated when it is run again.
    """
    from minwm.bench.parts import GPU, GPU_REFERENCE, SMALL, SMALL_REFERENCE
    from minwm.bench.selftest import BUDGET, gpu_memory_gib
    from minwm.bench.selftest import selftest as run_parts

    if reference and not reference.is_dir():
        raise UserError(f"--reference {reference}: there is no such folder")
    parts, besides = (GPU, GPU_REFERENCE) if gpu else (SMALL, SMALL_REFERENCE)
    besides = besides if reference else ()
    budget = BUDGET + sum(part.seconds for part in besides)
    memory = gpu_memory_gib() if gpu else 0.0
    outcomes = run_parts((*parts, *besides), out, memory, echo, budget, reference or Path())
    echo(f"page: {out / 'page.md'}")
    if bad := [f"{o.part.name} ({o.state})" for o in outcomes if o.state not in ("done", "left out")]:
        raise UserError(f"not all parts succeeded: {', '.join(bad)}; {out / 'page.md'} says why")
