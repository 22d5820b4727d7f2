# SPDX-License-Identifier: Apache-2.0
"""The choice of tiles, the split of K, and bounds that hold for every spread of tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.kernels.gpu.configurations import (
    DECODE_TILE,
    LARGE_TILE,
    PREFILL_TILE,
    SCALE_PRODUCTS,
    SCALE_WEIGHTS,
    SHIPPED_TILES,
    Device,
    LayerTiles,
    Tile,
    bound_tiles,
    choose_layer_tiles,
    choose_split,
    choose_tile,
    list_batch_sizes,
)

HOPPER, AMPERE = Device((9, 0), 132), Device((8, 0), 108)


@given(st.lists(st.integers(0, 70), min_size=1, max_size=40), st.sampled_from((8, 16, 64)))
def test_no_spread_needs_more_tiles_than_the_bound(counts: list[int], block_tokens: int) -> None:
    needed = sum(-(-count // block_tokens) for count in counts)
    assert needed <= bound_tiles(sum(counts), len(counts), block_tokens)


def test_the_bound_is_reached() -> None:
    counts = [17, 1, 1, 1]
    assert bound_tiles(sum(counts), len(counts), 16) == sum(-(-count // 16) for count in counts)


def test_more_tokens_get_larger_tiles() -> None:
    places = [SHIPPED_TILES.index(choose_tile(rows, 8, False, HOPPER)) for rows in range(1, 2000)]
    assert places == sorted(places)
    assert set(places) == set(range(len(SHIPPED_TILES)))
    assert choose_tile(8, 128, False, HOPPER) == DECODE_TILE
    assert choose_tile(8192 * 8, 128, False, HOPPER) == LARGE_TILE
    assert choose_tile(8192 * 8, 128, True, HOPPER) == PREFILL_TILE
    assert choose_tile(8192 * 8, 128, False, AMPERE) == PREFILL_TILE
    assert choose_layer_tiles(64, 128, False, HOPPER).block_tokens == DECODE_TILE.block_tokens


@pytest.mark.parametrize("num_weights", [1, 8, 128])
def test_listed_batches_get_every_tile_that_any_batch_gets(num_weights: int) -> None:
    for device in (HOPPER, AMPERE):
        for max_rows in (1, 40 * num_weights, 500 * num_weights):
            listed = {choose_tile(rows, num_weights, False, device) for rows in list_batch_sizes(max_rows, num_weights)}
            assert listed == {choose_tile(rows, num_weights, False, device) for rows in range(1, max_rows + 1)}


def test_k_is_split_only_where_processors_are_idle_and_chunks_are_many() -> None:
    assert choose_split(32, 4096, HOPPER) == 8
    assert choose_split(200, 4096, HOPPER) == 2
    assert choose_split(264, 4096, HOPPER) == 1
    assert choose_split(1, 768, HOPPER) == 1
    assert choose_split(1, 1024, HOPPER) == 2


def test_impossible_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="block_n=96 is not a multiple of the layout's row tile, 64"):
        Tile(96, 16, 4, 3, SCALE_WEIGHTS)
    with pytest.raises(ValueError, match="block_tokens=24 is not a power of two"):
        Tile(64, 24, 4, 3, SCALE_WEIGHTS)
    with pytest.raises(ValueError, match="scaling=3 is not SCALE_WEIGHTS"):
        Tile(64, 16, 4, 3, 3)
    with pytest.raises(ValueError, match="gate_up has tiles of 16 tokens and down of 64: both must have the same"):
        LayerTiles(Tile(64, 16, 4, 3, SCALE_PRODUCTS), Tile(64, 64, 4, 3, SCALE_WEIGHTS))
