"""One function over many items: in this process, or on a Ray cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from minwm.core.config import UserError
from minwm.core.runtime import progress, require

T = TypeVar("T")
R = TypeVar("R")
RETRIES = 3
"""How often an item is given to another worker when the one that had it died."""
QUEUED = 2
"""Tasks per CPU of the cluster that are handed over at a time."""


def each(work: Callable[[T], R], items: Sequence[T], label: str, ray: bool = False, gpus: int = 0) -> Iterator[R]:
    """What `work` makes of every item, in any order; `work` must give the same again when an item is done twice.

    `ray`: on the cluster that RAY_ADDRESS names, else on one of this machine, a CPU and `gpus` GPUs for each item.
    Files that `work` reads and writes must have the same paths on all its machines.
    """
    with progress(len(items), label) as bar:
        for result in _on_ray(work, items, gpus) if ray else map(work, items):
            yield result
            bar.advance()


def _on_ray(work: Callable[[T], R], items: Sequence[T], gpus: int) -> Iterator[R]:
    """Raises what `work` raises; at the end UserError for items whose workers died, and the rest is done."""
    ray = require("ray", "ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    shared = ray.put(work)
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_apply)
    waiting, running, died = iter(items), dict[Any, T](), list[T]()
    while True:
        room = QUEUED * max(1, int(ray.cluster_resources().get("CPU", 1))) - len(running)
        running |= {task.remote(shared, item): item for _, item in zip(range(room), waiting, strict=False)}
        if not running:
            break
        (done,), _ = ray.wait(list(running))
        item = running.pop(done)
        try:
            yield ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError:
            died.append(item)
    if died:
        names = ", ".join(map(str, died[:5]))
        raise UserError(f"workers died {RETRIES + 1} times on {names} ({len(died)} in all); the rest is done")


def _apply(work: Callable[[T], R], item: T) -> R:
    return work(item)
