# SPDX-License-Identifier: Apache-2.0
"""Which weights of one linear layer stand where in its arena (`kernels/arena.py` draws the arena itself).

The table, int64 [row blocks, 8 fields], has one row per block of consecutive outputs, in their order: the fields of
`arena.Field`, then the number of outputs.

    table[0]  weight bits, ..., layout, N0       outputs 0 .. N0-1
    table[1]  weight bits, ..., layout, N1       outputs N0 .. N0+N1-1

A layer of one scheme has one row. Several rows are for layers that vLLM fuses from differently quantized parts
(q, k and v) and for widths chosen per range of outputs; the op computes them, no loader of ours makes them yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..arena import NUM_FIELDS, BlockFormat, place_block

#: Column of the number of outputs, behind those of `arena.Field`.
NUM_ROWS = NUM_FIELDS

NUM_COLUMNS = NUM_FIELDS + 1


class LinearPlan(NamedTuple):
    """The table (on the CPU), and the arena's size, padding included."""

    table: torch.Tensor
    num_bytes: int


def plan_linear(blocks: Sequence[tuple[BlockFormat, int]], K: int) -> LinearPlan:
    """Give every row block of a layer its place.

    blocks: (format, number of outputs) in the order of the outputs. K: inputs of the layer. Raises ValueError for
    a format its shape cannot take.
    """
    rows, end = [], 0
    for block_format, num_rows in blocks:
        row, end = place_block(block_format, num_rows, K, end)
        rows.append([*row, num_rows])
    return LinearPlan(torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, NUM_COLUMNS), end)
