# SPDX-License-Identifier: Apache-2.0
"""Tiles that a GPU has no room for are replaced by smaller ones, once, before anything is served by them."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from tests.child import run_child
from vllm_ext.kernels.gpu.configurations import (
    DECODE_TILE,
    LARGE_TILE,
    MIDDLE_TILE,
    PREFILL_TILE,
    SHIPPED_TILES,
    LayerTiles,
    Tile,
)

pytest.importorskip("triton", reason="triton has wheels for Linux on x86-64 and arm64 processors only")

from triton.runtime.errors import OutOfResources

from vllm_ext.kernels.gpu.fitting import FittingTiles, find_smaller

SMALL_TILE = replace(DECODE_TILE, block_tokens=8, num_warps=2)
DEEP_TILE = replace(PREFILL_TILE, num_stages=5)


@pytest.mark.parametrize(
    ("tiles", "expected"),
    [
        ([LARGE_TILE], PREFILL_TILE),
        ([PREFILL_TILE], MIDDLE_TILE),
        ([MIDDLE_TILE, MIDDLE_TILE], DECODE_TILE),
        ([DECODE_TILE], None),
        # Of a table: as large as one of the rule's, smaller than all of them, of two sizes.
        ([DEEP_TILE], PREFILL_TILE),
        ([DEEP_TILE, PREFILL_TILE], PREFILL_TILE),
        ([SMALL_TILE], DECODE_TILE),
        ([MIDDLE_TILE, PREFILL_TILE], PREFILL_TILE),
    ],
)
def test_the_next_smaller_tile_is_the_rules(tiles: list[Tile], expected: Tile | None) -> None:
    assert find_smaller(*tiles) == expected


@pytest.mark.parametrize("tile", [*SHIPPED_TILES, DEEP_TILE, SMALL_TILE])
def test_replacing_comes_to_an_end(tile: Tile) -> None:
    seen = [tile]
    while (smaller := find_smaller(seen[-1])) is not None:
        assert smaller not in seen
        seen.append(smaller)
    assert seen[-1] == DECODE_TILE


def test_what_does_not_fit_is_remembered_for_its_kernels(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[LayerTiles] = []

    def launch(tiles: LayerTiles) -> torch.Tensor:
        tried.append(tiles)
        if tiles.block_tokens > 16:
            raise OutOfResources(132096, 101376, "shared memory")
        return torch.ones(1)

    fitting: FittingTiles[LayerTiles] = FittingTiles("mixed_moe", lambda tile: LayerTiles(tile, tile))
    large, small = LayerTiles(PREFILL_TILE, MIDDLE_TILE), LayerTiles(DECODE_TILE, DECODE_TILE)
    with caplog.at_level(logging.WARNING, logger="vllm.vllm_ext.kernels"):
        assert fitting.run("widths", large, launch).item() == 1
    uniform = [LayerTiles(tile, tile) for tile in (PREFILL_TILE, MIDDLE_TILE, DECODE_TILE)]
    assert tried == [large, *uniform]
    first = caplog.records[0].getMessage()
    assert "mixed_moe: tiles of 128 by 64 (8 warps, 3 stages) and 64 by 64 (4 warps, 3 stages) do not fit" in first
    assert "shared memory, Required: 132096, Hardware limit: 101376" in first
    assert "so tiles of 128 by 64 (8 warps, 3 stages) serve it" in first
    tried.clear()
    caplog.clear()
    fitting.run("widths", large, launch)
    fitting.run("widths", uniform[1], launch)
    assert tried == [small, small]
    assert caplog.records == []
    # Other widths may fit.
    tried.clear()
    fitting.run("one width", large, lambda tiles: tried.append(tiles) or torch.ones(1))
    assert tried == [large]


def test_where_nothing_fits_the_error_says_so() -> None:
    def launch(tile: Tile) -> torch.Tensor:
        raise OutOfResources(2, 1, "shared memory")

    fitting: FittingTiles[Tile] = FittingTiles("mixed_linear", lambda tile: tile)
    with pytest.raises(OutOfResources, match="Required: 2, Hardware limit: 1"):
        fitting.run("widths", MIDDLE_TILE, launch)


#: The kernels are replaced by notes of their tiles; those of gate_up and linear layers do not fit beyond 64 by 16.
CODE = """
import json
import torch
from triton.runtime.errors import OutOfResources
from vllm_ext.kernels.arena import BlockFormat, Layout
from vllm_ext.kernels.gpu import activations, combine, configurations, sorting
from vllm_ext.kernels.mixed_linear import triton as linear
from vllm_ext.kernels.mixed_linear.layout import plan_linear
from vllm_ext.kernels.mixed_moe import triton as moe
from vllm_ext.kernels.mixed_moe.layout import plan_arena

tiles = {}

class Noting:
    def __init__(self, name):
        self.name = name

    def __getitem__(self, grid):
        return self.note

    def note(self, *arguments, BLOCK_N=None, BLOCK_TOKENS=None, **constants):
        if BLOCK_N is not None:
            tiles.setdefault(self.name, []).append((BLOCK_N, BLOCK_TOKENS))
        if self.name in ("gate_up_kernel", "linear_kernel") and (BLOCK_N, BLOCK_TOKENS) != (64, 16):
            raise OutOfResources(2, 1, "shared memory")

for module in (activations, combine, linear, moe, sorting):
    for name, value in list(vars(module).items()):
        if name.endswith("_kernel"):
            setattr(module, name, Noting(name))

block = BlockFormat(4, 16, 64, layout=Layout.GPU_FRAGMENT)
found = {}
plan = plan_arena([(block, block)] * 2, 128, 128)
arena = torch.zeros(plan.num_bytes, dtype=torch.uint8)
moe.warm_up(arena, plan.table, 128, 128, 2, 300, torch.bfloat16)
found["warmed"], tiles = tiles, {}
x, ids = torch.empty(300, 128, dtype=torch.bfloat16), torch.zeros(300, 2, dtype=torch.int32)
call = (x, ids, torch.ones(300, 2), arena, plan.table, None, 128, "silu", False)
moe.mixed_moe(*call)
found["served"], tiles = tiles, {}
try:
    middle = configurations.MIDDLE_TILE
    moe.mixed_moe(*call, tiles=configurations.LayerTiles(middle, middle))
    found["given"] = "no error"
except OutOfResources as error:
    found["given"] = str(error)
tiles = {}
plan = plan_linear([(block, 64)], 128)
arena = torch.zeros(plan.num_bytes, dtype=torch.uint8)
linear.warm_up(arena, plan.table, 128, 64, 300, torch.bfloat16)
tiles = {}
linear.mixed_linear(torch.empty(300, 128, dtype=torch.bfloat16), arena, plan.table, 64, None)
found["linear"] = tiles
print(json.dumps(found))
"""


def test_the_launchers_serve_a_layer_by_tiles_that_fit() -> None:
    child = run_child(CODE, TRITON_INTERPRET=None)
    assert child.value is not None, child.stderr
    found = child.value
    # Each tile of the rule was tried once for the batches that get it, and then never again.
    tried = [tuple(tile) for tile in found["warmed"]["gate_up_kernel"]]
    assert sorted(set(tried)) == [(64, 16), (64, 64), (128, 64), (128, 128)]
    assert all(tried.count(tile) == 1 for tile in set(tried) - {(64, 16)})
    # Both GEMMs share the tokens of a tile.
    assert {tuple(tile) for tile in found["warmed"]["down_kernel"]} == {(64, 16)}
    assert found["served"] == {"gate_up_kernel": [[64, 16]], "down_kernel": [[64, 16]]}
    assert "out of resource: shared memory, Required: 2" in found["given"]
    assert found["linear"] == {"linear_kernel": [[64, 16]]}
