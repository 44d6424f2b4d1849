"""The verb that proves a machine."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from minwm.cli.base import Flag, Out, command, echo
from minwm.core.config import UserError


@command("selftest", resumable=True)
def selftest(
    gpu: Annotated[Flag, arg(help="on a CUDA GPU: device tests, speed, memory, training of large models")] = False,
    out: Out = Path("runs/selftest"),
) -> None:
    """Run all that a machine is judged by, each part in its own process; OUT/page.md says which targets are met.

    At most 8 minutes. Without --gpu all of it runs with a small model. What did not succeed is repeated when it is run
    again.
    """
    from minwm.bench.selftest import GPU, SMALL, gpu_memory_gib
    from minwm.bench.selftest import selftest as run_parts

    outcomes = run_parts(GPU if gpu else SMALL, out, gpu_memory_gib() if gpu else 0.0, echo)
    echo(f"page: {out / 'page.md'}")
    if bad := [f"{o.part.name} ({o.state})" for o in outcomes if o.state not in ("done", "left out")]:
        raise UserError(f"not all parts succeeded: {', '.join(bad)}; {out / 'page.md'} says why")
