# SPDX-License-Identifier: Apache-2.0
"""One allocation problem, loss, time and bytes of every option of every unit, and the ways of solving it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllm_ext.compress.allocation import Allocation, AllocationError, allocate, allocate_exactly, allocate_within_time
from vllm_ext.compress.layer_allocation import allocate_per_layer, allocate_product_per_layer


class Problem(NamedTuple):
    """losses float64 [units, options], inf where an option does not fit; times float64 [tiles, units, options],
    microseconds of a batch, inf where there is no kernel; sizes int64 [units, options], bytes; weights int64 [units];
    layers [units]."""

    losses: np.ndarray
    times: np.ndarray
    sizes: np.ndarray
    weights: np.ndarray
    layers: Sequence[int | None]


class Choice(NamedTuple):
    """options int64 [units]; tile of most layers; bytes, loss, a bound of any choice's loss, and microseconds."""

    options: np.ndarray
    tile: int
    size: int
    loss: float
    lower_bound: float
    time_us: float


def choose_globally(
    problem: Problem, budget: int, *, time_weight: float = 0.0, max_time_us: float | None = None, exact: bool = False
) -> Choice:
    """Least loss + time_weight * time over all layers within bytes and time, with one tile for all.

    exact: by mixed-integer programming, without max_time_us. Raises AllocationError where no tile keeps the time, and
    as `allocation.allocate`.
    """
    solve = allocate_exactly if exact else allocate
    if time_weight == 0 and max_time_us is None:
        return time_choice(problem, solve(problem.losses, problem.sizes, budget))
    best: Choice | None = None
    least, reasons = np.inf, []
    for tile, times in enumerate(problem.times):
        # A scheme that has no kernel with this tile is no option.
        losses = np.where(np.isfinite(times), problem.losses, np.inf)
        costs = losses + time_weight * np.where(np.isfinite(losses), times, 0.0)
        if not np.isfinite(costs).any(axis=1).all():
            reasons.append("some block has no kernel with this tile")
            continue
        try:
            if max_time_us is None:
                found = solve(costs, problem.sizes, budget)
            else:
                found, _ = allocate_within_time(costs, times, problem.sizes, budget, max_time_us)
        except AllocationError as error:
            reasons.append(str(error))
            continue
        if found.cost < least:
            rows = np.arange(len(losses))
            loss, time = float(losses[rows, found.choice].sum()), float(times[rows, found.choice].sum())
            # Time is part of the cost that the bound belongs to; its least part is the least time.
            bound = float(problem.losses.min(axis=1).sum())
            least, best = found.cost, Choice(found.choice, tile, found.size, loss, min(bound, loss), time)
    if best is None:
        raise AllocationError("; ".join(dict.fromkeys(reasons)))
    return best


def choose_by_layer(problem: Problem, budget: int, exponent: float = 1.0) -> Choice:
    """MxMoE's choice: every layer alone, by loss**exponent * time**(1 - exponent); see `layer_allocation`."""
    if exponent == 1:
        found = allocate_per_layer(problem.losses, problem.sizes, problem.weights, problem.layers, budget)
        return time_choice(problem, found)
    found, tiles = allocate_product_per_layer(
        problem.losses, problem.times, problem.sizes, problem.weights, problem.layers, budget, exponent
    )
    tile_of = np.array([tiles[layer] for layer in problem.layers])
    time = float(problem.times[tile_of, np.arange(len(tile_of)), found.choice].sum())
    usual = Counter(tiles.values()).most_common(1)[0][0]
    return Choice(found.choice, usual, found.size, found.cost, found.lower_bound, time)


def time_choice(problem: Problem, allocation: Allocation) -> Choice:
    """An allocation by loss with the tile that is fastest for it."""
    times = problem.times[:, np.arange(len(problem.losses)), allocation.choice].sum(axis=1)
    tile = int(times.argmin())
    return Choice(allocation.choice, tile, allocation.size, allocation.cost, allocation.lower_bound, float(times[tile]))
