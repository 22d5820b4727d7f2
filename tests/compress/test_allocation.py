# SPDX-License-Identifier: Apache-2.0
"""Allocation under a byte budget: never above it, monotone, and within one upgrade of the optimum."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.compress.allocation import (
    AllocationError,
    allocate,
    allocate_exactly,
    allocate_within_time,
    choose_uniform,
    measure_range,
)


@st.composite
def problems(draw: st.DrawFn, max_units: int = 12, max_options: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Costs and sizes; some options do not fit, costs need not fall with size, and ties are common."""
    shape = draw(st.integers(1, max_units)), draw(st.integers(1, max_options))
    numbers = st.integers(0, 20) if draw(st.booleans()) else st.floats(0, 1e6)
    costs = np.array(draw(st.lists(numbers, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])), float)
    costs = costs.reshape(shape)
    sizes = np.array(draw(st.lists(st.integers(1, 50), min_size=costs.size, max_size=costs.size)), np.int64).reshape(
        shape
    )
    for unit, option in draw(
        st.lists(st.tuples(st.integers(0, shape[0] - 1), st.integers(0, shape[1] - 1)), max_size=4)
    ):
        if np.isfinite(costs[unit]).sum() > 1:
            costs[unit, option] = np.inf
    return costs, sizes


def draw_budget(data: st.DataObject, costs: np.ndarray, sizes: np.ndarray) -> int:
    smallest, largest = measure_range(costs, sizes)
    return data.draw(st.integers(smallest, largest + 5))


def brute_force(costs: np.ndarray, sizes: np.ndarray, budget: int) -> float:
    rows = range(len(costs))
    return min(
        float(sum(costs[row, option] for row, option in zip(rows, choice, strict=True)))
        for choice in itertools.product(range(costs.shape[1]), repeat=len(costs))
        if sum(sizes[row, option] for row, option in zip(rows, choice, strict=True)) <= budget
    )


@given(problems(), st.data())
def test_never_exceeds_the_budget_and_reports_what_it_chose(
    problem: tuple[np.ndarray, np.ndarray], data: st.DataObject
) -> None:
    costs, sizes = problem
    budget = draw_budget(data, costs, sizes)
    found = allocate(costs, sizes, budget)
    rows = np.arange(len(costs))
    assert found.size == sizes[rows, found.choice].sum() <= budget
    assert np.isfinite(costs[rows, found.choice]).all()
    assert found.cost == pytest.approx(costs[rows, found.choice].sum())
    # Nothing that helps was left out although it fits.
    gain = costs[rows, found.choice][:, None] - costs
    extra = sizes - sizes[rows, found.choice][:, None]
    assert not ((gain > 0) & (extra <= budget - found.size)).any()


@given(problems(), st.data())
def test_more_bytes_never_cost_more(problem: tuple[np.ndarray, np.ndarray], data: st.DataObject) -> None:
    costs, sizes = problem
    budgets = sorted(draw_budget(data, costs, sizes) for _ in range(2))
    less, more = (allocate(costs, sizes, budget).cost for budget in budgets)
    assert more <= less * (1 + 1e-9) + 1e-9


@given(problems(max_units=4, max_options=4), st.data())
def test_within_one_upgrade_of_the_optimum(problem: tuple[np.ndarray, np.ndarray], data: st.DataObject) -> None:
    costs, sizes = problem
    budget = draw_budget(data, costs, sizes)
    found = allocate(costs, sizes, budget)
    optimum = brute_force(costs, sizes, budget)
    slack = 1e-9 * (1 + optimum)
    assert found.lower_bound <= optimum + slack
    assert found.cost >= optimum - slack
    finite = np.where(np.isfinite(costs), costs, -np.inf)
    largest_gain = max(row.max() - row[np.isfinite(row)].min() for row in finite)
    assert found.cost <= found.lower_bound + largest_gain + slack


def test_gap_on_realistic_instances() -> None:
    """Widths with errors that fall fourfold a bit: the gap to the bound shrinks with the number of units."""
    generator = np.random.default_rng(0)
    for units, limit in ((12, 0.05), (160, 0.01), (5000, 0.0005)):
        scale = generator.lognormal(0, 1.5, (units, 1))
        costs = scale * 4.0 ** -np.array([2, 3, 4, 5, 6, 8])
        sizes = np.outer(generator.choice([32768, 65536], units), [2.1875, 3.1875, 4.1875, 5.1875, 6.1875, 8.1875])
        sizes = (sizes / 8).astype(np.int64)
        budget = int(sizes[:, 1].sum() * 3.25 / 3.1875)
        found = allocate(costs, sizes, budget)
        assert (found.cost - found.lower_bound) / found.lower_bound < limit
        assert 0 <= budget - found.size <= sizes[:, 1].max() - sizes[:, 0].max()
        if units >= 160:
            assert budget - found.size <= 0.001 * budget
        assert found.cost < choose_uniform(costs, sizes, budget).cost


def test_unreachable_budget_gives_the_smallest() -> None:
    costs, sizes = np.array([[1.0, 0.5], [1.0, np.inf]]), np.array([[10, 20], [5, 1]])
    assert measure_range(costs, sizes) == (15, 25)
    with pytest.raises(AllocationError, match="budget of 14 bytes is below the smallest possible size, 15 bytes"):
        allocate(costs, sizes, 14)
    assert allocate(costs, sizes, 15).size == 15


def test_uniform_is_the_largest_from_below_of_what_fits_everything() -> None:
    costs = np.array([[4.0, 2.0, 3.0, 1.0], [4.0, 2.0, 1.5, np.inf]])
    sizes = np.array([[10, 20, 20, 21], [10, 20, 20, 21]])
    found = choose_uniform(costs, sizes, 45)
    # Options 1 and 2 have equal sizes; 1 costs less. Option 3 is larger, but does not fit unit 1.
    assert found.choice.tolist() == [1, 1]
    assert (found.size, found.cost) == (40, 4.0)
    assert choose_uniform(costs, sizes, 39).choice.tolist() == [0, 0]
    with pytest.raises(AllocationError, match="below the smallest uniform size, 20 bytes"):
        choose_uniform(costs, sizes, 19)
    with pytest.raises(AllocationError, match="no option fits every unit"):
        choose_uniform(np.array([[1.0, np.inf], [np.inf, 1.0]]), np.ones((2, 2)), 10)


@pytest.mark.parametrize(
    ("costs", "sizes", "message"),
    [
        (np.ones((2, 2)), np.ones((2, 3)), "must be equal"),
        (np.ones(2), np.ones(2), "[units, options]"),
        (np.array([[1.0, np.nan]]), np.ones((1, 2)), "no cost may be NaN"),
        (np.array([[np.inf, np.inf]]), np.ones((1, 2)), "an option with a finite cost"),
    ],
)
def test_malformed_arrays(costs: np.ndarray, sizes: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        allocate(costs, sizes, 100)


@given(problems(max_units=5, max_options=4), st.data())
def test_exact_is_the_optimum(problem: tuple[np.ndarray, np.ndarray], data: st.DataObject) -> None:
    costs, sizes = problem
    budget = draw_budget(data, costs, sizes)
    found = allocate_exactly(costs, sizes, budget)
    optimum = brute_force(costs, sizes, budget)
    assert found.cost == pytest.approx(optimum, rel=1e-6, abs=1e-9)
    assert found.size <= budget
    assert found.lower_bound <= optimum * (1 + 1e-6) + 1e-9


def test_gap_to_the_exact_optimum() -> None:
    """Sizes of one layer of 16 experts; the Lagrangian choice is within half a percent of the exact one."""
    generator = np.random.default_rng(1)
    scale = generator.lognormal(0, 1.5, (32, 1))
    costs = scale * 4.0 ** -np.array([2, 3, 4, 5, 6, 8])
    sizes = (
        np.outer(np.tile([65536, 32768], 16), [2.1875, 3.1875, 4.1875, 5.1875, 6.1875, 8.1875]).astype(np.int64) // 8
    )
    budget = int(sizes[:, 1].sum() * 1.02)
    near, exact = allocate(costs, sizes, budget), allocate_exactly(costs, sizes, budget)
    assert near.lower_bound <= exact.cost <= near.cost <= exact.cost * 1.03
    assert exact.cost - exact.lower_bound <= 1e-4 * exact.cost


def test_time_is_kept_and_costs_no_more_loss_than_needed() -> None:
    generator = np.random.default_rng(2)
    losses = generator.lognormal(0, 1, (60, 1)) * 4.0 ** -np.array([2, 3, 4])
    times = generator.lognormal(0, 0.3, (60, 1)) * np.array([1.0, 1.4, 1.9])
    sizes = np.tile(np.array([2, 3, 4]), (60, 1))
    budget = 60 * 3
    free = allocate(losses, sizes, budget)
    rows = np.arange(60)
    longest, shortest = times[rows, free.choice].sum(), times.min(axis=1).sum()
    found, multiplier = allocate_within_time(losses, times, sizes, budget, longest)
    assert (found.choice.tolist(), multiplier) == (free.choice.tolist(), 0.0)
    before = np.inf
    for share in (0.05, 0.3, 0.6, 0.9):
        limit = shortest + share * (longest - shortest)
        found, multiplier = allocate_within_time(losses, times, sizes, budget, limit)
        assert times[rows, found.choice].sum() <= limit
        assert multiplier > 0
        assert free.cost <= found.cost <= before
        assert found.lower_bound <= found.cost
        before = found.cost
    with pytest.raises(AllocationError, match=r"a time of .* is below the least within 180 bytes"):
        allocate_within_time(losses, times, sizes, budget, shortest * 0.99)


def test_exact_with_costs_of_any_size() -> None:
    found = allocate_exactly(np.array([[4.0, 2.2e-308]]), np.array([[1, 1]]), 1)
    assert found.choice.tolist() == [1]
