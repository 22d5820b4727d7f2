# SPDX-License-Identifier: Apache-2.0
"""Which scheme every block gets: least total cost under a budget of bytes, over all layers at once.

    minimize  sum_u cost[u, choice_u]   subject to  sum_u size[u, choice_u] <= budget

a multiple-choice knapsack. The Lagrangian, cost + lambda * size, falls apart into one minimum per unit; bisection
finds the smallest lambda whose choice fits, and its dual value bounds what any choice can reach. What is left of the
budget is filled by the upgrades with the largest gain per byte that fit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

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


def choose_uniform(costs: np.ndarray, sizes: np.ndarray, budget: int) -> Allocation:
    """The same option for every unit: the largest one within the budget, of equal sizes the one of least cost.

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
    best = min(within, key=lambda option: (-totals[option], losses[option]))
    cost = float(losses[best])
    return Allocation(np.full(len(costs), best), int(totals[best]), cost, cost)


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
