"""Every test runs on one thread, from a fixed seed, with the shapes in minwm's signatures checked."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, get_type_hints

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch start their threads

import jaxtyping
import numpy as np
import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook, jaxtyped

typed = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int passes for a float


def checked(function: Callable) -> Callable:
    """Check arguments and results, and that dimensions of one name are equal; constructors have errors of their own.

    As jaxtyping's own wrapper, which binds a signature in every call and checks arguments again with the result: that
    took a quarter of the time of all tests. It is left with what needs it: generators, which begin later, `{name}` of
    arguments, and hints that name what is not there yet.
    """
    if isinstance(function, type) or function.__name__ == "__init__":
        return function
    try:
        function.__annotations__ = get_type_hints(function, include_extras=True)
        plain = not (inspect.isgeneratorfunction(function) or "{" in repr(function.__annotations__.values()))
    except NameError:
        plain = False
    if not plain:
        return jaxtyped(function, typechecker=typed)
    inner = typed(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):
            return inner(*args, **kwargs)

    return call


pytest.register_assert_rewrite("browsing", "commands", "planning", "releases", "talking")  # their asserts, too
jaxtyping.jaxtyped = lambda *, typechecker: typechecker  # pyright: ignore  # by which the hook decorates
install_import_hook("minwm", "conftest.checked")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """A test that draws without a generator of its own still draws the same every time."""
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
