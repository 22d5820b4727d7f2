# SPDX-License-Identifier: Apache-2.0
"""A table is read once, and again where it is another; never while a graph is being captured."""

from __future__ import annotations

import gc

import pytest
import torch

from vllm_ext.kernels.arena import BlockFormat, Layout, place_block
from vllm_ext.kernels.gpu import tables
from vllm_ext.kernels.gpu.configurations import DECODE_TILE, SCALE_PRODUCTS, Tile
from vllm_ext.kernels.gpu.tables import TableFacts, derive_facts

CORRECTING = Tile(64, 16, 4, 3, tables.CORRECT_SUMS)


@pytest.fixture
def reads() -> list[object]:
    return []


@pytest.fixture
def facts(reads: list[object]) -> TableFacts[int]:
    def derive(rows: list[list[int]], arena: torch.Tensor, size: int) -> int:
        reads.append(rows)
        return sum(map(sum, rows)) * size

    return TableFacts("mixed_moe", derive)


def test_a_table_is_read_once_per_shape(facts: TableFacts[int], reads: list[object]) -> None:
    table, arena = torch.ones(2, 3, dtype=torch.int64), torch.zeros(8, dtype=torch.uint8)
    assert [facts.find(table, arena, (5,)) for _ in range(3)] == [30, 30, 30]
    assert len(reads) == 1
    assert facts.find(table, arena, (7,)) == 42
    assert len(reads) == 2


def test_a_changed_table_is_read_again(facts: TableFacts[int], reads: list[object]) -> None:
    table, arena = torch.ones(2, 3, dtype=torch.int64), torch.zeros(8, dtype=torch.uint8)
    assert facts.find(table, arena, (1,)) == 6
    table[0, 0] = 5
    assert facts.find(table, arena, (1,)) == 10
    with torch.inference_mode():
        made_there = torch.ones(2, 3, dtype=torch.int64)
    assert facts.find(made_there, arena, (1,)) == 6


def test_a_table_at_the_same_address_is_another(facts: TableFacts[int]) -> None:
    memory, arena = torch.ones(6, dtype=torch.int64), torch.zeros(8, dtype=torch.uint8)
    first = memory.view(2, 3)
    assert facts.find(first, arena, (1,)) == 6
    del first
    gc.collect()
    assert len(facts._known) == 0
    assert facts.find(memory.view(3, 2), arena, (1,)) == 6


def test_an_unknown_table_is_refused_during_capture(facts: TableFacts[int], monkeypatch: pytest.MonkeyPatch) -> None:
    table, arena = torch.ones(2, 3, dtype=torch.int64), torch.zeros(8, dtype=torch.uint8)
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"vllm_ext::mixed_moe meets a table \[2, 3\] for the first time"):
        facts.find(table, arena, (1,))
    monkeypatch.undo()
    expected = facts.find(table, arena, (1,))
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    assert facts.find(table, arena, (1,)) == expected


def test_facts_of_blocks() -> None:
    block = BlockFormat(4, 16, 32, layout=Layout.GPU_FRAGMENT)
    row, end = place_block(block, 64, 256, 0)
    other, end = place_block(block._replace(act_bits=8, group_size=-1), 64, 256, end)
    arena = torch.zeros(end, dtype=torch.uint8)
    found = derive_facts([row, other], arena, [(64, 256)] * 2)
    assert found is not None
    assert found.pieces_stride(256) == 8
    assert found.pieces_stride(40) == 4
    # int8 codes for whole rows, always; sums for groups of 32 only for a tile that corrects with them.
    assert found.kinds_for(DECODE_TILE) == 0b1
    assert DECODE_TILE.scaling == SCALE_PRODUCTS
    assert found.kinds_for(CORRECTING) == 0b10001
    plain, _ = place_block(BlockFormat(4, 16, 32), 64, 256, 0)
    assert derive_facts([row, plain], arena, [(64, 256)] * 2) is None
    with pytest.raises(ValueError, match="lies outside the arena"):
        derive_facts([row, other], arena[:-64], [(64, 256)] * 2)
