# SPDX-License-Identifier: Apache-2.0
"""The budget of probes: what is spent was earned, and a change for the better may borrow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.speculation.probing import (
    DEBT,
    FEWEST_AGAIN,
    HOPE,
    LEAST_LOSS,
    LONGEST_WAIT,
    PROBE_EVERY,
    PROBE_SHARE,
    PROBE_WANTED,
    ProbeBudget,
)


def idle(budget: ProbeBudget, steps: int, each: float, milliseconds: float = 10.0) -> None:
    for _ in range(steps):
        budget.earn(milliseconds, each)
        budget.wait()


@given(st.integers(1, 64), st.floats(0.001, 40.0), st.floats(0.0, 5.0), st.lists(st.floats(0.0, 8.0), min_size=1))
def test_no_more_is_spent_than_earned_and_borrowed(count: int, each: float, common: float, hopes: list[float]) -> None:
    """Whatever looks hopeful whenever: the rest is one probe, and what may be owed."""
    budget, spent, steps = ProbeBudget(), 0.0, 400
    for step in range(steps):
        budget.earn(10.0, common + each)
        budget.wait()
        width = budget.find_width(count, 10.0, common, each, hopes[step % len(hopes)])
        assert 0 <= width <= count
        if width:
            spent += common + each * width
            budget.pay(common + each * width, width)
            budget.hear()
    assert spent <= PROBE_SHARE * 10.0 * steps + DEBT * 10.0 + common + each + 1e-6


def test_a_cheap_probe_comes_at_its_interval_and_asks_as_many_as_are_paid_for() -> None:
    budget, each = ProbeBudget(), 0.1
    idle(budget, PROBE_EVERY - 1, each)
    assert budget.find_width(64, 10.0, 0.0, each, 0.0) == 0
    idle(budget, 1, each)
    assert budget.find_width(64, 10.0, 0.0, each, 0.0) == int(PROBE_SHARE * 10.0 * PROBE_EVERY / each)
    budget.pay(0.6, 6)
    budget.hear()
    # Twice the interval from then on.
    idle(budget, PROBE_WANTED - 1, each)
    assert budget.find_width(64, 10.0, 0.0, each, 0.0) == 0
    idle(budget, 1, each)
    assert budget.find_width(64, 10.0, 0.0, each, 0.0) == int(PROBE_SHARE * 10.0 * PROBE_WANTED / each)


def test_a_dear_probe_waits_until_it_is_earned() -> None:
    budget, each = ProbeBudget(), 20.0
    waited = 0
    while not budget.find_width(4, 10.0, 0.0, each, 0.0):
        idle(budget, 1, each)
        waited += 1
    assert waited == pytest.approx(each / (PROBE_SHARE * 10.0), abs=1)


def test_nothing_is_saved_up_while_requests_speculate() -> None:
    budget, each = ProbeBudget(), 0.1
    for _ in range(10_000):
        budget.earn(10.0, each)
        budget.rest()
    idle(budget, PROBE_EVERY, each)
    assert budget.find_width(1000, 10.0, 0.0, each, 0.0) == int(PROBE_SHARE * 10.0 * PROBE_WANTED / each)


def test_hope_is_looked_after_at_once_and_by_more_and_more() -> None:
    budget, each = ProbeBudget(), 0.1
    idle(budget, PROBE_EVERY, each)
    budget.pay(each, 1)
    idle(budget, 1, each)
    # The last outcome is still on its way.
    assert budget.find_width(64, 10.0, 0.0, each, HOPE + 1) == 0
    widths = []
    for _ in range(4):
        budget.hear()
        idle(budget, 1, each)
        widths.append(budget.find_width(64, 10.0, 0.0, each, HOPE + 1))
        budget.pay(each * widths[-1], widths[-1])
    assert widths == [FEWEST_AGAIN, 2 * FEWEST_AGAIN, 4 * FEWEST_AGAIN, 8 * FEWEST_AGAIN]


def test_an_outcome_that_never_comes_is_not_waited_for() -> None:
    budget, each = ProbeBudget(), 0.1
    idle(budget, PROBE_EVERY, each)
    budget.pay(each, 1)
    idle(budget, LONGEST_WAIT, each)
    assert budget.find_width(8, 10.0, 0.0, each, HOPE + 1)


def test_what_a_probe_brings_is_no_loss_but_never_all_of_it() -> None:
    assert ProbeBudget.find_loss(2.0, 0.5) == 1.5
    assert ProbeBudget.find_loss(2.0, 5.0) == LEAST_LOSS * 2.0
