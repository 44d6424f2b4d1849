"""Every test runs on one thread, from a fixed seed, with the shapes in minwm's signatures checked."""

import os
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch start their threads

import numpy as np
import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook


def checked(function: Callable) -> Callable:
    """Check arguments and results; an int passes for a float, and constructors have errors of their own."""
    if function.__name__ == "__init__":
        return function
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)


pytest.register_assert_rewrite("browsing", "commands", "planning", "releases", "talking")  # their asserts, too
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
