"""The noise convention: golden numbers of published schedules, and properties of the flow."""

import jaxtyping
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from hypothesis import given
from hypothesis import strategies as st

from minwm.core.flow import (
    bell_weight,
    euler,
    guide,
    interpolate,
    schedule,
    shift,
    velocity,
    x0_from_velocity,
)
from minwm.nets.layers import sinusoid

SHAPE = (2, 3, 4, 5, 6)


def clip(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_shapes_in_signatures_are_checked() -> None:
    """Of arguments against each other, of results, of what an argument says: tests/conftest.py sees to it."""
    assert sinusoid(torch.ones(1, 3), 4).shape == (1, 3, 4) and velocity(clip(0), clip(1)).shape == SHAPE
    for wrong in (lambda: velocity(clip(0), clip(1)[:, :1]), lambda: velocity(clip(0)[0], clip(1)[0])):
        with pytest.raises(BeartypeCallHintViolation):
            wrong()
    with pytest.raises(jaxtyping.TypeCheckError, match=r"(?s)return value.*b f \{width\}"):
        sinusoid(torch.ones(1, 3), 5)


def test_few_step_schedule() -> None:
    assert schedule(4, 5.0) == pytest.approx([1, 0.9375, 0.833333, 0.625, 0], abs=1e-6)


def test_consistency_schedule() -> None:
    times = schedule(50, 5.0)
    assert len(times) == 51
    first = [1, 0.995935, 0.991736, 0.987395, 0.982906, 0.978261, 0.973451]
    assert times[:7] == pytest.approx(first, abs=1e-6)
    assert times[25] == pytest.approx(0.833333, abs=1e-6)
    assert times[47:] == pytest.approx([0.241935, 0.172414, 0.092593, 0], abs=1e-6)


def test_a_fine_schedule_passes_through_the_students_times() -> None:
    assert schedule(48, 5.0)[::12] == pytest.approx(schedule(4, 5.0), abs=1e-12)


BELL = {
    1.0: 0, 0.995: 0.033, 0.990: 0.064, 0.980: 0.129, 0.950: 0.318, 0.9375: 0.398, 0.9: 0.631, 0.8333: 1.025,
    0.750: 1.456, 0.625: 1.914, 0.5: 2.076, 0.4: 1.974, 0.25: 1.464, 0.1: 0.638, 0.05: 0.307, 0.02: 0.126,
}  # fmt: skip
"""Wan's training weight at shift 5, looked up at the nearest of its 1000 times."""


def test_bell_weight() -> None:
    t, grid = torch.tensor(list(BELL), dtype=torch.float64), shift(torch.arange(1, 1001).double() / 1000, 5.0)
    nearest = grid[(grid[:, None] - t).abs().argmin(0)]
    assert bell_weight(nearest[None], 5.0)[0].tolist() == pytest.approx(list(BELL.values()), abs=6e-4)
    assert bell_weight(grid[None], 5.0).mean() == pytest.approx(1)


def test_from_clean_to_noise_and_back() -> None:
    x0, eps = clip(0), clip(1)
    t = torch.tensor([[0.0, 0.3, 1.0], [0.7, 0.7, 0.01]], dtype=torch.float64)
    x_t, v = interpolate(x0, eps, t), velocity(x0, eps)
    assert torch.equal(x_t[0, 0], x0[0, 0]) and torch.equal(x_t[0, 2], eps[0, 2])
    torch.testing.assert_close(x0_from_velocity(x_t, v, t), x0)
    later = interpolate(x0, eps, t + 1e-3)
    torch.testing.assert_close((later - x_t) / 1e-3, v, atol=1e-9, rtol=1e-9)


def test_one_exact_euler_step_crosses_the_whole_flow() -> None:
    x0, eps = clip(0), clip(1)
    torch.testing.assert_close(euler(eps, velocity(x0, eps), 1.0, 0.0), x0)
    half = interpolate(x0, eps, torch.full(SHAPE[:2], 0.5, dtype=torch.float64))
    torch.testing.assert_close(euler(eps, velocity(x0, eps), 1.0, 0.5), half)


@given(st.floats(0, 1), st.floats(0.2, 20), st.floats(0.2, 20))
def test_shifts_compose_and_undo(t: float, a: float, b: float) -> None:
    x = torch.tensor([0.0, t, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shift(shift(x, a), b), shift(x, a * b))
    torch.testing.assert_close(shift(shift(x, a), 1 / a), x)
    torch.testing.assert_close(shift(x, a)[[0, 2]], x[[0, 2]])


@given(st.integers(1, 60), st.floats(0.5, 15))
def test_schedules_fall_from_one_to_zero(steps: int, s: float) -> None:
    times = schedule(steps, s)
    assert len(times) == steps + 1 and (times[0], times[-1]) == (1, 0)
    assert times == sorted(set(times), reverse=True)


def test_guidance_one_is_none_and_zero_is_unconditional() -> None:
    cond, uncond = clip(0), clip(1)
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    assert torch.equal(guide(cond, uncond, 0.0), uncond)
    assert ((guide(cond, uncond, 3.0) - cond) * (cond - uncond) >= 0).all(), "away from the unconditional"
