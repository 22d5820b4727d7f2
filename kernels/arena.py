# SPDX-License-Identifier: Apache-2.0
"""How quantized weights lie in memory: one byte arena, and rows of a table that say where each weight is.

A row (`Field`) describes one weight [N, K]: its widths, its offsets, its layout. Who uses an arena decides which
weights are in it and how the rows are arranged: `mixed_moe/layout.py`, `mixed_linear/layout.py`. blocks.py writes and
reads the weights.

The arena, uint8 [bytes], holds the weights one after the other. Every section starts on a 64-byte line (one
cache line, one AVX-512 register, and more than any GPU vector load asks for):

    layout PLAIN_CODES  weight[n, k] = scales[n, k // g] * (code[n, k] - zeros[n, k // g])

       codes_offset            scales_offset          zeros_offset (-1: symmetric)
       |                       |                      |
       v                       v                      v
       +-----------------------+--+-------------------+--+------------------+--+
       | codes, uint8          |..| scales, fp16      |..| zeros, uint8     |..|      .. = padding to 64 bytes
       | [N, K*bits/8]         |  | [N, K/g]          |  | [N, K/g]         |  |
       | row n: bit stream of  |  | g = group_size,   |  | symmetric: every |  |
       | kernels/packing.py    |  | -1 = K            |  | zero 2**(bits-1) |  |
       +-----------------------+--+-------------------+--+------------------+--+

    layout PLAIN_TERNARY  the same for ternary weights: codes of WEIGHT_BITS 2, symmetric, of which a row is packed five
    to a byte (ternary.py).

    layouts PLAIN_BF16, PLAIN_FP16, PLAIN_FP32: the weight itself, [N, K] row-major at codes_offset; no scales.

    layout CPU_RECORD: records of 16 rows and 128 columns with their scales and zero points, one section at
    codes_offset; native/layout.py draws them. For the compiled CPU kernels; loaders write the plain layouts.

    layout GPU_FRAGMENT: codes in the order of a tensor core's registers at codes_offset, each scale with its zero point
    in one word at scales_offset; gpu/layout.py draws them. For the Triton kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch

from . import ternary
from .gpu import layout as fragments
from .native import layout as records
from .packing import packed_size

#: Activation widths: as they are, or int8.
ACT_BITS = (8, 16)

#: Every section of the arena starts on a multiple of this many bytes.
ALIGNMENT = 64


class Field(IntEnum):
    """Columns of the table, in this order."""

    WEIGHT_BITS = 0
    ACT_BITS = 1  # 16: activations as they are; 8: dynamic int8 per (token, group)
    GROUP_SIZE = 2  # along K, for weights and for int8 activations; -1: the whole row
    CODES_OFFSET = 3  # bytes into the arena
    SCALES_OFFSET = 4  # bytes into the arena; -1: none
    ZEROS_OFFSET = 5  # bytes into the arena; -1: symmetric, or none
    LAYOUT = 6


NUM_FIELDS = len(Field)


class Layout(IntEnum):
    """How a block is stored; the drawings are in the module docstring."""

    PLAIN_CODES = 0
    PLAIN_BF16 = 1
    PLAIN_FP16 = 2
    PLAIN_FP32 = 3
    CPU_RECORD = 4
    PLAIN_TERNARY = 5
    GPU_FRAGMENT = 6


#: Layouts in which checkpoints bring codes.
STORED_CODES = (Layout.PLAIN_CODES, Layout.PLAIN_TERNARY)

#: Layouts in which kernels want codes.
REPACKED_CODES = (Layout.CPU_RECORD, Layout.GPU_FRAGMENT)

#: Layouts that hold the weight itself, with its element type.
FULL_PRECISION_DTYPES = {
    Layout.PLAIN_BF16: torch.bfloat16,
    Layout.PLAIN_FP16: torch.float16,
    Layout.PLAIN_FP32: torch.float32,
}


class BlockFormat(NamedTuple):
    """What has to be known about one block before its place in the arena can be planned."""

    weight_bits: int
    act_bits: int = 16
    group_size: int = -1
    symmetric: bool = False
    layout: Layout = Layout.PLAIN_CODES

    @classmethod
    def ternary(cls, act_bits: int = 16, group_size: int = -1) -> BlockFormat:
        """A block of ternary codes: 2-bit ones once they are unpacked."""
        return cls(ternary.CODE_BITS, act_bits, group_size, symmetric=True, layout=Layout.PLAIN_TERNARY)

    @classmethod
    def full_precision(cls, dtype: torch.dtype) -> BlockFormat:
        """A block kept as it is. Raises ValueError for an element type without a layout."""
        for layout, element in FULL_PRECISION_DTYPES.items():
            if element == dtype:
                return cls(weight_bits=8 * element.itemsize, layout=layout)
        supported = ", ".join(str(element) for element in FULL_PRECISION_DTYPES.values())
        raise ValueError(f"no layout stores weights of {dtype}; use one of {supported}")


def num_groups(K: int, group_size: int) -> int:
    """Groups in a row of K. Raises ValueError where `group_size` does not divide K."""
    if group_size == -1:
        return 1
    if group_size <= 0 or K % group_size:
        raise ValueError(f"group_size={group_size} does not divide K={K}")
    return K // group_size


def section_bytes(block: BlockFormat, N: int, K: int, gate_up: bool = False) -> tuple[int, int, int]:
    """Bytes of (codes, scales, zeros) of a block, before alignment. Raises ValueError for a bad format.

    gate_up: the weight is gate and up one after the other, which CPU_RECORD and GPU_FRAGMENT store in turn.
    """
    if block.layout in FULL_PRECISION_DTYPES:
        return N * K * FULL_PRECISION_DTYPES[block.layout].itemsize, 0, 0
    groups = num_groups(K, block.group_size)
    if block.layout == Layout.CPU_RECORD:
        num_records = math.prod(records.count_records(N, K, gate_up))
        return num_records * records.record_bytes(block.weight_bits, block.group_size), 0, 0
    if block.layout == Layout.GPU_FRAGMENT:
        return *fragments.section_bytes(block.weight_bits, block.group_size, N, K, gate_up), 0
    zeros = 0 if block.symmetric else N * groups
    return N * _packed_size(block.layout, block.weight_bits, block.group_size, K), 2 * N * groups, zeros


def place_block(block: BlockFormat, N: int, K: int, start: int, gate_up: bool = False) -> tuple[list[int], int]:
    """Row of the table (in `Field`'s order) of a weight [N, K] whose sections begin at byte `start`, and their end.

    gate_up: as in `section_bytes`. Raises ValueError for a format its shape cannot take.
    """
    offsets, end = [], start
    for size in section_bytes(block, N, K, gate_up):
        offsets.append(end if size else -1)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return [block.weight_bits, block.act_bits, block.group_size, *offsets, block.layout], end


def view_block(
    arena: torch.Tensor, row: Sequence[int], N: int, K: int, gate_up: bool = False
) -> dict[str, torch.Tensor]:
    """Views of the arena that hold a weight [N, K], by the names its tensors have in checkpoints.

    "qweight" uint8 [N, bytes of K codes], "scales" fp16 [N, K/g] and, for an asymmetric block, "zeros" uint8 [N, K/g];
    or "weight" [N, K] of the layout's element type; or, which no checkpoint has, "records" uint8 [row blocks, records
    along K, bytes], or "fragments" uint8 [bytes] with "scale_zeros" int32 [words]. Raises ValueError for a row that
    points past the arena's end, for unknown widths and layouts, and for sections that do not lie as those of a weight
    [N, K] do. gate_up: as in `section_bytes`.
    """
    if row[Field.ACT_BITS] not in ACT_BITS:
        raise ValueError(f"act_bits={row[Field.ACT_BITS]} is not one of {', '.join(map(str, ACT_BITS))}")
    if row[Field.LAYOUT] == Layout.CPU_RECORD:
        num_groups(K, row[Field.GROUP_SIZE])
        size = records.record_bytes(row[Field.WEIGHT_BITS], row[Field.GROUP_SIZE])
        shape = (*records.count_records(N, K, gate_up), size)
        return {"records": _section(arena, row[Field.CODES_OFFSET], math.prod(shape)).view(shape)}
    if row[Field.LAYOUT] == Layout.GPU_FRAGMENT:
        widths = row[Field.WEIGHT_BITS], row[Field.ACT_BITS], row[Field.GROUP_SIZE]
        block = BlockFormat(*widths, layout=Layout.GPU_FRAGMENT)
        _check_row(row, block, N, K, gate_up)
        num_codes, num_words, _ = section_bytes(block, N, K, gate_up)
        words = _section(arena, row[Field.SCALES_OFFSET], num_words).view(torch.int32)
        return {"fragments": _section(arena, row[Field.CODES_OFFSET], num_codes), "scale_zeros": words}
    if row[Field.LAYOUT] not in STORED_CODES:
        dtype = find_element_type(row)
        weight = _section(arena, row[Field.CODES_OFFSET], N * K * dtype.itemsize)
        return {"weight": weight.view(dtype).view(N, K)}
    layout, groups = Layout(row[Field.LAYOUT]), num_groups(K, row[Field.GROUP_SIZE])
    size = _packed_size(layout, row[Field.WEIGHT_BITS], row[Field.GROUP_SIZE], K)
    widths = row[Field.WEIGHT_BITS], row[Field.ACT_BITS], row[Field.GROUP_SIZE]
    block = BlockFormat(*widths, symmetric=row[Field.ZEROS_OFFSET] < 0, layout=layout)
    _check_row(row, block, N, K, gate_up)
    scales = _section(arena, row[Field.SCALES_OFFSET], 2 * N * groups)
    views = {
        "qweight": _section(arena, row[Field.CODES_OFFSET], N * size).view(N, size),
        "scales": scales.view(torch.float16).view(N, groups),
    }
    if row[Field.ZEROS_OFFSET] >= 0:
        views["zeros"] = _section(arena, row[Field.ZEROS_OFFSET], N * groups).view(N, groups)
    return views


def _check_row(row: Sequence[int], block: BlockFormat, N: int, K: int, gate_up: bool) -> None:
    if place_block(block, N, K, row[Field.CODES_OFFSET], gate_up)[0] != list(row[:NUM_FIELDS]):
        raise ValueError(f"the table's row {list(row)} does not describe a weight [{N}, {K}]: table and shapes differ")


def _packed_size(layout: Layout, bits: int, group_size: int, K: int) -> int:
    """Bytes of a row of stored codes. Raises ValueError for a width that the layout does not have."""
    if layout != Layout.PLAIN_TERNARY:
        return packed_size(K, bits)
    if bits != ternary.CODE_BITS:
        raise ValueError(f"ternary codes are codes of {ternary.CODE_BITS} bits, got {bits}")
    return ternary.packed_size(K, group_size)


def find_element_type(row: Sequence[int]) -> torch.dtype:
    """The element type of a block that is kept as it is. Raises ValueError for another layout."""
    layout = row[Field.LAYOUT]
    for known, dtype in FULL_PRECISION_DTYPES.items():
        if layout == known:
            return dtype
    names = ", ".join(f"{known.value} {known.name}" for known in Layout)
    raise ValueError(f"layout {layout} is not a full-precision layout; known layouts: {names}")


def _section(arena: torch.Tensor, offset: int, size: int) -> torch.Tensor:
    """Bytes [offset, offset + size) of the arena; never a shorter slice, which would read a neighbour's bytes."""
    if offset < 0 or offset + size > arena.numel():
        raise ValueError(
            f"section [{offset}, {offset + size}) lies outside the arena of {arena.numel()} bytes: "
            f"the table does not belong to this arena, or the arena is truncated"
        )
    return arena[offset : offset + size]
