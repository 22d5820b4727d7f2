# SPDX-License-Identifier: Apache-2.0
"""MxMoE's allocation, for comparison: the same budget for every layer, and loss**r * time**(1 - r) as its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllm_ext.compress.allocation import Allocation, AllocationError, allocate

#: Vertices of the lower hull of (loss, time) that are tried for each tile.
MAX_VERTICES = 256


class TiledAllocation(NamedTuple):
    """An allocation by loss, the tile its time was taken with, and that time."""

    allocation: Allocation
    tile: int
    time: float


def allocate_per_layer(
    costs: np.ndarray, sizes: np.ndarray, weights: np.ndarray, layers: Sequence[int | None], budget: int
) -> Allocation:
    """Solve every layer alone, each with the same bits per weight.

    costs, sizes: as `allocation.allocate`. weights: int64 [units], weights of each unit. layers: of each unit.
    Raises AllocationError, naming the layer, where its share is below its smallest size.

    Source: MxMoE (arXiv:2505.05799, section 4.3) with r = 1, which needs no time.
    """
    choice = np.zeros(len(costs), np.int64)
    size, cost, bound = 0, 0.0, 0.0
    for layer, rows, share in _split(weights, layers, budget):
        try:
            found = allocate(costs[rows], sizes[rows], share)
        except AllocationError as error:
            raise AllocationError(f"layer {layer}: {error}") from error
        choice[rows] = found.choice
        size, cost, bound = size + found.size, cost + found.cost, bound + found.lower_bound
    return Allocation(choice, size, cost, bound)


def allocate_product(
    losses: np.ndarray, times: np.ndarray, sizes: np.ndarray, budget: int, exponent: float
) -> TiledAllocation:
    """Least loss**exponent * time**(1 - exponent) within the budget, one tile for all units.

    losses: float64 [units, options], inf where an option does not fit. times: float64 [tiles, units, options].
    exponent: 0 (time alone) to 1 (loss alone). The product is quasi-concave in (loss, time), so its least value lies
    on a vertex of their lower hull: each vertex is the optimum of loss + lambda * time for some lambda. For each
    tile the vertices are enumerated, and the best of all is kept. The lower bound is the sum of the least losses.
    Raises AllocationError as `allocate`, ValueError for an exponent outside 0 to 1 and times that are not positive.

    Source: MxMoE (arXiv:2505.05799, section 4.3, equations 5 to 7). Its released program lets every matrix take its
    time from another tile, though one kernel has one; here the tile is fixed outside and shared.
    """
    if not 0 <= exponent <= 1:
        raise ValueError(f"the exponent must be from 0 to 1, got {exponent}")
    if times.ndim != 3 or times.shape[1:] != losses.shape or not (times[:, np.isfinite(losses)] > 0).all():
        raise ValueError(f"times must be positive and [tiles, {losses.shape[0]}, {losses.shape[1]}]")
    best: TiledAllocation | None = None
    least, reasons = np.inf, []
    for tile, tile_times in enumerate(times):
        # A scheme that has no kernel with this tile is no option.
        possible = np.where(np.isfinite(tile_times), losses, np.inf)
        if not np.isfinite(possible).any(axis=1).all():
            reasons.append("some block has no kernel with this tile")
            continue
        try:
            vertices = _list_vertices(possible, tile_times, sizes, budget, exponent)
        except AllocationError as error:
            reasons.append(str(error))
            continue
        for found in vertices:
            if best is None or found.score < least:
                least = found.score
                bound = min(float(losses.min(axis=1).sum()), found.loss)
                allocation = Allocation(found.allocation.choice, found.allocation.size, found.loss, bound)
                best = TiledAllocation(allocation, tile, found.time)
    if best is None:
        raise AllocationError("; ".join(dict.fromkeys(reasons)))
    return best


def allocate_product_per_layer(
    losses: np.ndarray,
    times: np.ndarray,
    sizes: np.ndarray,
    weights: np.ndarray,
    layers: Sequence[int | None],
    budget: int,
    exponent: float,
) -> tuple[Allocation, dict[int | None, int]]:
    """`allocate_product` for every layer alone with the same bits per weight; returns also {layer: its tile}."""
    choice = np.zeros(len(losses), np.int64)
    size, cost, bound = 0, 0.0, 0.0
    tiles: dict[int | None, int] = {}
    for layer, rows, share in _split(weights, layers, budget):
        try:
            found = allocate_product(losses[rows], times[:, rows], sizes[rows], share, exponent)
        except AllocationError as error:
            raise AllocationError(f"layer {layer}: {error}") from error
        tiles[layer] = found.tile
        choice[rows] = found.allocation.choice
        size, cost = size + found.allocation.size, cost + found.allocation.cost
        bound += found.allocation.lower_bound
    return Allocation(choice, size, cost, bound), tiles


class _Vertex(NamedTuple):
    allocation: Allocation
    loss: float
    time: float
    score: float


def _list_vertices(
    losses: np.ndarray, times: np.ndarray, sizes: np.ndarray, budget: int, exponent: float
) -> list[_Vertex]:
    """Vertices of the lower hull of (loss, time), between the least loss and the least time."""
    rows = np.arange(len(losses))
    masked = np.where(np.isfinite(losses), times, np.inf)
    # Zero times infinity is no number.
    finite = np.where(np.isfinite(losses), times, 0.0)

    def solve(costs: np.ndarray) -> _Vertex:
        allocation = allocate(costs, sizes, budget)
        loss = float(losses[rows, allocation.choice].sum())
        time = float(times[rows, allocation.choice].sum())
        # Logarithms: a product of powers underflows. A loss of zero is the best there is.
        score = exponent * np.log(loss) if loss > 0 else (-np.inf if exponent > 0 else 0.0)
        score += (1 - exponent) * np.log(time)
        return _Vertex(allocation, loss, time, float(score))

    vertices = [solve(losses)]
    if exponent == 1:
        return vertices
    vertices.append(solve(masked))
    pending = [(vertices[0], vertices[1])]
    while pending and len(vertices) < MAX_VERTICES:
        accurate, fast = pending.pop()
        if not (fast.time < accurate.time and accurate.loss < fast.loss):
            continue
        slope = (fast.loss - accurate.loss) / (accurate.time - fast.time)
        middle = solve(losses + slope * finite)
        vertices.append(middle)
        ends = min(end.loss + slope * end.time for end in (accurate, fast))
        if middle.loss + slope * middle.time < ends * (1 - 1e-12):
            pending += [(accurate, middle), (middle, fast)]
    return vertices


def _split(weights: np.ndarray, layers: Sequence[int | None], budget: int) -> list[tuple[int | None, np.ndarray, int]]:
    """(layer, its units, its bytes) with bytes in proportion to weights."""
    of_unit = np.array([-1 if layer is None else layer for layer in layers])
    total = int(weights.sum())
    parts = []
    for layer in np.unique(of_unit):
        rows = np.flatnonzero(of_unit == layer)
        parts.append((None if layer < 0 else int(layer), rows, budget * int(weights[rows].sum()) // total))
    return parts
