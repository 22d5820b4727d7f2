# SPDX-License-Identifier: Apache-2.0
"""Which scheme every block gets: least total cost under a budget of bytes, over all layers at once.

    minimize  sum_u cost[u, choice_u]   subject to  sum_u size[u, choice_u] <= budget

a multiple-choice knapsack. The Lagrangian, cost + lambda * size, falls apart into one minimum per unit; bisection
finds the smallest lambda whose choice fits, and its dual value bounds what any choice can reach. What is left of the
budget is filled by the upgrades with the largest gain per byte that fit. Time enters as part of the cost, loss +
lambda * time: it is a sum over units too. Small instances can be solved exactly, which shows how near this comes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

#: Halvings of the interval of lambda; float64 has no more digits to give.
BISECTIONS = 200


class AllocationError(ValueError):
    """A budget that cannot be met; the message gives what can."""


class Allocation(NamedTuple):
    """choice int64 [units]: an option each; their size and cost; and a bound that no choice within budget beats."""

    choice: np.ndarray
    size: int
    cost: float
    lower_bound: float


def allocate(costs: np.ndarray, sizes: np.ndarray, budget: int) -> Allocation:
    """Choose one option for every unit.

    costs: float64 [units, options], inf where an option does not fit the unit. sizes: int64 [units, options], bytes.
    budget: bytes. The result never exceeds the budget, never gets worse as the budget grows, and its cost exceeds the
    lower bound by less than the gain of one upgrade: the first that did not fit.
    Raises AllocationError for a budget below the smallest possible size, ValueError for malformed arrays.

    Source: Everett's generalized Lagrange multipliers and the greedy heuristic of Sinha and Zoltners for the
    multiple-choice knapsack. MxMoE (arXiv:2505.05799, section 4.3) solves one integer program per layer, each with
    the same budget; this spends one budget where it helps most.
    """
    costs, sizes = np.asarray(costs, np.float64), np.asarray(sizes, np.int64)
    if costs.shape != sizes.shape or costs.ndim != 2 or not costs.size:
        raise ValueError(f"costs {list(costs.shape)} and sizes {list(sizes.shape)} must be equal and [units, options]")
    if np.isnan(costs).any() or not np.isfinite(costs).any(axis=1).all():
        raise ValueError("every unit needs an option with a finite cost, and no cost may be NaN")
    possible = np.isfinite(costs)
    smallest = int(np.where(possible, sizes, np.iinfo(np.int64).max).min(axis=1).sum())
    if budget < smallest:
        raise AllocationError(f"budget of {budget} bytes is below the smallest possible size, {smallest} bytes")
    multiplier, choice = _bisect(costs, sizes, budget)
    lower_bound = float(_evaluate(costs + multiplier * sizes, choice)) - multiplier * budget
    choice = _fill(costs, sizes, budget, choice)
    cost = float(_evaluate(costs, choice))
    return Allocation(choice, int(_evaluate(sizes, choice)), cost, min(lower_bound, cost))


def allocate_exactly(costs: np.ndarray, sizes: np.ndarray, budget: int, *, seconds: float = 30.0) -> Allocation:
    """The optimum, by mixed-integer programming: hundreds of units take seconds, thousands too long.

    Arguments and errors as `allocate`. seconds: when to stop; the lower bound then is below the cost, and the choice
    is never worse than that of `allocate`. Solver: HiGHS, as in `scipy.optimize.milp`.
    """
    start = allocate(costs, sizes, budget)
    costs, sizes = np.asarray(costs, np.float64), np.asarray(sizes, np.int64)
    units, options = costs.shape
    possible = np.isfinite(costs)
    unit_of = np.repeat(np.arange(units), options)
    one_each = coo_array((np.ones(costs.size), (unit_of, np.arange(costs.size))), shape=(units, costs.size))
    # Divided by their own totals: the solver's tolerances are absolute. What alone costs more than the whole start is
    # in no optimum, however much more: the ratio may be infinite.
    unit_cost = start.cost if start.cost > 0 else 1.0
    with np.errstate(over="ignore"):
        ratios = np.minimum(np.where(possible, costs, 0.0) / unit_cost, 2.0 if start.cost > 0 else np.inf)
    found = milp(
        ratios.reshape(-1),
        integrality=np.ones(costs.size),
        bounds=Bounds(0, possible.reshape(-1).astype(np.float64)),
        constraints=(
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(sizes.reshape(1, -1) / budget, -np.inf, 1),
        ),
        options={"time_limit": seconds, "mip_rel_gap": 1e-9},
    )
    if found.x is None:
        return start
    choice = found.x.reshape(units, options).argmax(axis=1)
    size, cost = int(_evaluate(sizes, choice)), float(_evaluate(costs, choice))
    if size > budget or cost >= start.cost:  # beyond the budget by the solver's tolerance alone
        choice, size, cost = start.choice, start.size, start.cost
    bound = max(start.lower_bound, found.mip_dual_bound * unit_cost)
    return Allocation(choice, size, cost, min(bound, cost))


def allocate_within_time(
    losses: np.ndarray, times: np.ndarray, sizes: np.ndarray, budget: int, limit: float
) -> tuple[Allocation, float]:
    """Least loss within a budget of bytes and one of time; returns the allocation by loss and lambda, loss per time.

    losses, times: float64 [units, options], inf in losses where an option does not fit. The smallest lambda found by
    bisection whose loss + lambda * time keeps the limit. The lower bound is that of the bytes alone.
    Raises AllocationError where even the fastest choice within the bytes takes longer.
    """
    free = allocate(losses, sizes, budget)
    if _evaluate(times, free.choice) <= limit:
        return free, 0.0
    masked = np.where(np.isfinite(losses), times, np.inf)
    fastest = allocate(masked, sizes, budget)
    if fastest.cost > limit:
        raise AllocationError(f"a time of {limit:g} is below the least within {budget} bytes, {fastest.cost:g}")
    low, high = 0.0, max(free.cost, np.finfo(float).tiny) / fastest.cost
    best = fastest
    for _ in range(BISECTIONS):
        found = allocate(losses + high * times, sizes, budget)
        if _evaluate(times, found.choice) <= limit:
            best = found
            break
        low, high = high, 2 * high
    # Past six digits of lambda the choice no longer changes but for ties.
    for _ in range(40):
        middle = (low + high) / 2
        found = allocate(losses + middle * times, sizes, budget)
        if _evaluate(times, found.choice) > limit:
            low = middle
        else:
            high, best = middle, found
    cost = float(_evaluate(losses, best.choice))
    return Allocation(best.choice, int(_evaluate(sizes, best.choice)), cost, min(free.lower_bound, cost)), high


def choose_uniform(costs: np.ndarray, sizes: np.ndarray, budget: int) -> Allocation:
    """The same option for every unit: of those within the budget the one of least cost, of equal costs the smallest.

    Arguments and errors as `allocate`; options that do not fit every unit are left out.
    """
    totals = np.asarray(sizes, np.int64).sum(axis=0)
    losses = np.asarray(costs, np.float64).sum(axis=0)
    usable = np.flatnonzero(np.isfinite(losses))
    if not usable.size:
        raise AllocationError("no option fits every unit")
    within = [option for option in usable if totals[option] <= budget]
    if not within:
        raise AllocationError(
            f"budget of {budget} bytes is below the smallest uniform size, {totals[usable].min()} bytes"
        )
    best = min(within, key=lambda option: (losses[option], totals[option]))
    cost = float(losses[best])
    # No choice beats this bound, not even a mixed one.
    bound = allocate(costs, sizes, budget).lower_bound
    return Allocation(np.full(len(costs), best), int(totals[best]), cost, min(bound, cost))


def measure_range(costs: np.ndarray, sizes: np.ndarray) -> tuple[int, int]:
    """(smallest, largest) total size that some choice of fitting options has."""
    possible = np.isfinite(costs)
    smallest = np.where(possible, sizes, np.iinfo(np.int64).max).min(axis=1).sum()
    return int(smallest), int(np.where(possible, sizes, 0).max(axis=1).sum())


def _bisect(costs: np.ndarray, sizes: np.ndarray, budget: int) -> tuple[float, np.ndarray]:
    """The smallest multiplier whose choice fits the budget, and that choice."""
    choice = _minimize(costs, sizes, 0.0)
    if _evaluate(sizes, choice) <= budget:
        return 0.0, choice
    low, high = 0.0, 1.0
    while _evaluate(sizes, choice := _minimize(costs, sizes, high)) > budget:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        candidate = _minimize(costs, sizes, middle)
        if _evaluate(sizes, candidate) > budget:
            low = middle
        else:
            high, choice = middle, candidate
    return high, choice


def _minimize(costs: np.ndarray, sizes: np.ndarray, multiplier: float) -> np.ndarray:
    """The option of least cost + multiplier * size of every unit; of equal ones the smallest."""
    totals = costs + multiplier * sizes
    tied = totals == totals.min(axis=1, keepdims=True)
    return np.where(tied, sizes, np.iinfo(np.int64).max).argmin(axis=1)


def _fill(costs: np.ndarray, sizes: np.ndarray, budget: int, choice: np.ndarray) -> np.ndarray:
    """Spend what is left: again and again the upgrade with the largest gain per byte that fits."""
    choice = choice.copy()
    rows = np.arange(len(costs))
    left = budget - int(_evaluate(sizes, choice))
    # An unfit option's gain is -inf, below every threshold.
    gain = costs[rows, choice][:, None] - costs
    extra = sizes - sizes[rows, choice][:, None]
    while True:
        fits = (gain > 0) & (extra <= left)
        if not fits.any():
            return choice
        rate = np.where(fits, gain / np.maximum(extra, 1), -1.0)
        unit, option = divmod(int(rate.argmax()), costs.shape[1])
        left -= int(extra[unit, option])
        choice[unit] = option
        gain[unit] = costs[unit, option] - costs[unit]
        extra[unit] = sizes[unit] - sizes[unit, option]


def _evaluate(values: np.ndarray, choice: np.ndarray) -> np.number:
    return values[np.arange(len(values)), choice].sum()
