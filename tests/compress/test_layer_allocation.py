# SPDX-License-Identifier: Apache-2.0
"""MxMoE's allocation against all choices there are: equal bits per layer, one tile, the product's least value."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ext.compress.allocation import AllocationError, allocate
from vllm_ext.compress.layer_allocation import allocate_per_layer, allocate_product, allocate_product_per_layer


def list_choices(losses: np.ndarray, times: np.ndarray) -> list[tuple[float, float]]:
    rows = np.arange(len(losses))
    return [
        (float(losses[rows, list(choice)].sum()), float(times[rows, list(choice)].sum()))
        for choice in itertools.product(range(losses.shape[1]), repeat=len(losses))
    ]


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
def test_product_is_the_least_of_all_choices(seed: int, exponent: float) -> None:
    """Without a limit of bytes the vertices of the hull hold the optimum exactly."""
    generator = np.random.default_rng(seed)
    units, options, tiles = 4, 3, 2
    losses = generator.lognormal(0, 1, (units, options))
    times = generator.lognormal(0, 1, (tiles, units, options))
    sizes = np.ones((units, options), np.int64)
    found = allocate_product(losses, times, sizes, units, exponent)
    rows = np.arange(units)
    assert found.time == pytest.approx(times[found.tile, rows, found.allocation.choice].sum())
    assert found.allocation.cost == pytest.approx(losses[rows, found.allocation.choice].sum())
    reached = found.allocation.cost**exponent * found.time ** (1 - exponent)
    least = min(loss**exponent * time ** (1 - exponent) for tile in times for loss, time in list_choices(losses, tile))
    assert reached == pytest.approx(least, rel=1e-9)


def test_all_units_share_a_tile() -> None:
    """Each tile is fast for one unit only: mixing tiles would cost 2, the best shared one costs 6."""
    times = np.array([[[1.0], [9.0]], [[5.0], [1.0]]])
    losses, sizes = np.ones((2, 1)), np.ones((2, 1), np.int64)
    found = allocate_product(losses, times, sizes, 2, 0.5)
    assert (found.tile, found.time) == (1, 6.0)


def test_layers_get_equal_bits_even_where_one_needs_more() -> None:
    losses = np.array([[8.0, 4.0, 0.0], [8.0, 4.0, 0.0], [0.8, 0.4, 0.0], [0.8, 0.4, 0.0]])
    sizes = np.tile(np.array([2, 3, 4]), (4, 1))
    weights, layers = np.full(4, 8), [0, 0, 1, 1]
    found = allocate_per_layer(losses, sizes, weights, layers, 12)
    assert sizes[np.arange(4), found.choice].reshape(2, 2).sum(axis=1).tolist() == [6, 6]
    assert (found.size, found.cost) == (12, pytest.approx(8.8))
    assert found.lower_bound <= found.cost
    # All layers together spend the bytes where the loss is.
    assert allocate(losses, sizes, 12).cost == pytest.approx(1.6)
    timed, tiles = allocate_product_per_layer(losses, np.ones((1, 4, 3)), sizes, weights, layers, 12, 1.0)
    assert timed.choice.tolist() == found.choice.tolist()
    assert tiles == {0: 0, 1: 0}


def test_options_without_a_kernel_are_no_options() -> None:
    losses, sizes = np.array([[3.0, 1.0, 0.1], [4.0, 2.0, 0.1]]), np.tile(np.array([1, 2, 3]), (2, 1))
    slow = np.tile(np.array([np.inf, 1.0, 2.0]), (2, 1))
    fast = np.tile(np.array([1.0, np.inf, np.inf]), (2, 1))
    none = np.full((2, 3), np.inf)
    found = allocate_product(losses, np.stack([none, slow]), sizes, 6, 0.5)
    # Both at 200: the square root of 3 * 2; both at 300: of 0.2 * 4.
    assert (found.tile, found.time, found.allocation.choice.tolist()) == (1, 4.0, [2, 2])
    assert found.allocation.lower_bound <= found.allocation.cost
    # Too few bytes for what the first tile has.
    found = allocate_product(losses, np.stack([slow, fast]), sizes, 3, 0.5)
    assert (found.tile, found.allocation.choice.tolist()) == (1, [0, 0])
    with pytest.raises(AllocationError, match=r"no kernel with this tile; budget of 3 bytes is below .* 4 bytes"):
        allocate_product(losses, np.stack([none, slow]), sizes, 3, 0.5)


def test_errors_name_the_layer_and_the_value() -> None:
    losses, sizes = np.ones((2, 1)), np.array([[2], [4]])
    with pytest.raises(AllocationError, match="layer 1: budget of 3 bytes is below the smallest possible size, 4"):
        allocate_per_layer(losses, sizes, np.array([8, 8]), [0, 1], 6)
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        allocate_product(losses, np.ones((1, 2, 1)), sizes, 6, 1.5)
    with pytest.raises(ValueError, match="times must be positive"):
        allocate_product(losses, np.zeros((1, 2, 1)), sizes, 6, 0.5)
