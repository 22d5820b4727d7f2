# SPDX-License-Identifier: Apache-2.0
"""For how many steps a plan stands: neither what it takes nor its age costs more than need be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.speculation.pace import HOLD_STEPS, LOSS, SHARE, Pace

TIMES = st.floats(0.0, 1e4, allow_nan=False)


def test_every_step_has_its_own_plan_until_something_was_measured() -> None:
    assert Pace().steps == 1


@pytest.mark.parametrize(
    ("control", "step", "steps"), [(0.5, 100.0, 1), (0.5, 20.0, 10), (0.5, 10.0, 14), (0.5, 1.0, HOLD_STEPS)]
)
def test_the_shorter_the_step_the_longer_a_plan_stands(control: float, step: float, steps: int) -> None:
    pace = Pace()
    pace.observe(control, step)
    assert pace.steps == steps


@given(st.integers(1, 20), st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=50))
def test_whatever_is_measured_stays_within_bounds(most: int, measured: list[tuple[float, float]]) -> None:
    pace = Pace(most)
    for control, step in measured:
        pace.observe(control, step)
        assert 1 <= pace.steps <= most


@given(st.floats(0.01, 10.0), st.floats(1.0, 1000.0))
def test_no_other_number_of_steps_costs_less(control: float, step: float) -> None:
    pace = Pace(most=10_000)
    pace.observe(control, step)

    def cost(steps: int) -> float:
        return control / (steps * step) + LOSS * steps

    if control <= SHARE * step:
        assert pace.steps == 1
    else:
        assert cost(pace.steps) <= min(cost(steps) for steps in range(1, 400)) * 1.001


def test_one_long_pause_is_soon_forgotten() -> None:
    pace = Pace()
    for _ in range(50):
        pace.observe(0.5, 10.0)
    assert pace.steps == 14
    pace.observe(0.5, 5000.0)
    assert pace.steps == 1
    for _ in range(60):
        pace.observe(0.5, 10.0)
    assert pace.steps == 14


def test_senseless_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        Pace(0)


def test_trimming_takes_a_part_of_a_plan_where_plans_stand() -> None:
    pace = Pace()
    pace.observe_plan(0.1)
    assert pace.trim_time == 0
    pace.observe(0.4, 5.0)
    assert pace.trim_time == pytest.approx(0.06)
    pace.observe_plan(0.2)
    assert 0.06 < pace.trim_time < 0.08
    for _ in range(100):
        pace.observe(0.4, 500.0)
    assert pace.trim_time == 0
