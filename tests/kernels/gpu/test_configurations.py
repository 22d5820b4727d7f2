# SPDX-License-Identifier: Apache-2.0
"""The choice of tiles, the split of K, and bounds that hold for every spread of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
    list_choices,
)

HOPPER, AMPERE = Device((9, 0), 132), Device((8, 0), 108)
#: sm_100 and sm_103 in servers, sm_120 and sm_121 elsewhere.
LARGE_BLACKWELLS = Device((10, 0), 148), Device((10, 3), 160)
SMALL_BLACKWELLS = Device((12, 0), 170), Device((12, 1), 48)


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
    for wide in LARGE_BLACKWELLS:
        assert choose_tile(8192 * 8, 128, False, wide) == LARGE_TILE
    for narrow in (AMPERE, *SMALL_BLACKWELLS):
        assert choose_tile(8192 * 8, 128, False, narrow) == PREFILL_TILE
    assert choose_layer_tiles(64, 128, False, HOPPER).block_tokens == DECODE_TILE.block_tokens


@pytest.mark.parametrize("num_weights", [1, 8, 128])
def test_listed_batches_get_every_tile_that_any_batch_gets(num_weights: int) -> None:
    for device in (HOPPER, AMPERE):
        for max_rows in (1, 40 * num_weights, 500 * num_weights):
            listed = {choose_tile(rows, num_weights, False, device) for rows in list_batch_sizes(max_rows, num_weights)}
            assert listed == {choose_tile(rows, num_weights, False, device) for rows in range(1, max_rows + 1)}


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("device", [HOPPER, AMPERE, *SMALL_BLACKWELLS], ids=lambda device: str(device.capability))
def test_listed_choices_are_those_that_batches_get(device: Device, int8: bool) -> None:
    assert set(list_choices(int8, device)) == {choose_tile(rows, 2, int8, device) for rows in range(1, 600)}


def test_k_is_split_only_where_processors_are_idle_and_chunks_are_many() -> None:
    assert choose_split(32, 4096, HOPPER) == 8
    assert choose_split(200, 4096, HOPPER) == 2
    assert choose_split(264, 4096, HOPPER) == 1
    assert choose_split(1, 768, HOPPER) == 1
    assert choose_split(1, 1024, HOPPER) == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("block_n", 96, "block_n=96 is not one of 64, 128, 256: the layout's row tile"),
        ("block_n", 192, "block_n=192 is not one of 64, 128, 256"),
        ("block_n", True, "block_n=True is not an integer"),
        ("block_tokens", 24, "block_tokens=24 is not a power of two"),
        ("num_warps", 3, "num_warps=3 is not one of 1, 2, 4, 8, 16"),
        ("num_warps", "4", "num_warps='4' is not an integer"),
        ("num_stages", 0, "num_stages=0 is less than 1"),
        ("num_stages", 2.0, r"num_stages=2\.0 is not an integer"),
        ("scaling", 3, "scaling=3 is not SCALE_WEIGHTS"),
        ("unroll", 0, "unroll=0 is less than 1"),
    ],
)
def test_impossible_tiles_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DECODE_TILE, **{name: value})


def test_tiles_of_a_layer_share_their_tokens() -> None:
    with pytest.raises(ValueError, match="gate_up has tiles of 16 tokens and down of 64: both must have the same"):
        LayerTiles(Tile(64, 16, 4, 3, SCALE_PRODUCTS), Tile(64, 64, 4, 3, SCALE_WEIGHTS))
