# SPDX-License-Identifier: Apache-2.0
"""Which weights of one MoE layer stand where in its arena (`kernels/arena.py` draws the arena itself).

The table, int64 [local experts, 2 blocks, 7 fields], has one row per block (`Block`, `arena.Field`). An expert has
two blocks; each has its own widths:

    GATE_UP  N = 2 * intermediate, gate rows first, then up rows;  K = hidden
    DOWN     N = hidden;                                           K = intermediate
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch

from ..arena import NUM_FIELDS, BlockFormat, place_block
from ..blocks import copy_block


class Block(IntEnum):
    """Second index of the table."""

    GATE_UP = 0
    DOWN = 1


class ArenaPlan(NamedTuple):
    """The table (on the CPU), the arena's size, and what each block takes of it, padding included."""

    table: torch.Tensor
    num_bytes: int
    block_bytes: list[list[int]]


def block_shape(block: int, hidden_size: int, intermediate_size: int) -> tuple[int, int]:
    """(N, K) of a block of one expert."""
    if block == Block.GATE_UP:
        return 2 * intermediate_size, hidden_size
    return hidden_size, intermediate_size


def plan_arena(
    formats: Sequence[tuple[BlockFormat, BlockFormat]], hidden_size: int, intermediate_size: int
) -> ArenaPlan:
    """Give every block of a layer its place.

    formats: one (gate_up, down) pair per local expert. Raises ValueError, naming expert and block, for a
    format its shape cannot take.
    """
    table = torch.full((len(formats), len(Block), NUM_FIELDS), -1, dtype=torch.int64, device="cpu")
    block_bytes: list[list[int]] = []
    end = 0
    for expert, pair in enumerate(formats):
        block_bytes.append([])
        for block, block_format in zip(Block, pair, strict=True):
            N, K = block_shape(block, hidden_size, intermediate_size)
            start = end
            try:
                row, end = place_block(block_format, N, K, start, block == Block.GATE_UP)
            except ValueError as error:
                raise ValueError(f"expert {expert}, {block.name.lower()}: {error}") from error
            table[expert, block] = torch.tensor(row, device="cpu")
            block_bytes[-1].append(end - start)
    return ArenaPlan(table, end, block_bytes)


def copy_arena(
    source: torch.Tensor,
    source_table: torch.Tensor,
    target: torch.Tensor,
    target_table: torch.Tensor,
    hidden_size: int,
    intermediate_size: int,
) -> None:
    """Copy the weights of a layer from one arena to another, whose table may give them other layouts."""
    for source_rows, target_rows in zip(source_table.tolist(), target_table.tolist(), strict=True):
        for block in Block:
            shape = block_shape(block, hidden_size, intermediate_size)
            copy_block(source, source_rows[block], target, target_rows[block], *shape, block == Block.GATE_UP)
