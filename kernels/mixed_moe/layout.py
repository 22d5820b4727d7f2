# SPDX-License-Identifier: Apache-2.0
"""How the expert weights of one MoE layer lie in memory: one byte arena and one table that describes it.

The table, int64 [local experts, 2 blocks, 7 fields], has one row per block (`Block`, `Field`). An expert has
two blocks; each has its own widths:

    GATE_UP  N = 2 * intermediate, gate rows first, then up rows;  K = hidden
    DOWN     N = hidden;                                           K = intermediate

The arena, uint8 [bytes], holds the blocks one after the other. Every section starts on a 64-byte line (one
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

    layouts PLAIN_BF16, PLAIN_FP16, PLAIN_FP32: the weight itself, [N, K] row-major at codes_offset; no scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch

from ..packing import pack_codes, packed_size, unpack_codes

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


class Block(IntEnum):
    """Second index of the table."""

    GATE_UP = 0
    DOWN = 1


class Layout(IntEnum):
    """How a block is stored; the drawings are in the module docstring."""

    PLAIN_CODES = 0
    PLAIN_BF16 = 1
    PLAIN_FP16 = 2
    PLAIN_FP32 = 3


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
    def full_precision(cls, dtype: torch.dtype) -> BlockFormat:
        """A block kept as it is. Raises ValueError for an element type without a layout."""
        for layout, element in FULL_PRECISION_DTYPES.items():
            if element == dtype:
                return cls(weight_bits=8 * element.itemsize, layout=layout)
        supported = ", ".join(str(element) for element in FULL_PRECISION_DTYPES.values())
        raise ValueError(f"no layout stores expert weights of {dtype}; use one of {supported}")


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


def num_groups(K: int, group_size: int) -> int:
    """Groups in a row of K. Raises ValueError where `group_size` does not divide K."""
    if group_size == -1:
        return 1
    if group_size <= 0 or K % group_size:
        raise ValueError(f"group_size={group_size} does not divide K={K}")
    return K // group_size


def section_bytes(block: BlockFormat, N: int, K: int) -> tuple[int, int, int]:
    """Bytes of (codes, scales, zeros) of a block, before alignment. Raises ValueError for a bad format."""
    if block.layout in FULL_PRECISION_DTYPES:
        return N * K * FULL_PRECISION_DTYPES[block.layout].itemsize, 0, 0
    groups = num_groups(K, block.group_size)
    return N * packed_size(K, block.weight_bits), 2 * N * groups, 0 if block.symmetric else N * groups


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
            try:
                sizes = section_bytes(block_format, N, K)
            except ValueError as error:
                raise ValueError(f"expert {expert}, {block.name.lower()}: {error}") from error
            start = end
            offsets = []
            for size in sizes:
                offsets.append(end if size else -1)
                end += -(-size // ALIGNMENT) * ALIGNMENT
            bits, act_bits, group_size, _, layout = block_format
            table[expert, block] = torch.tensor([bits, act_bits, group_size, *offsets, layout], device="cpu")
            block_bytes[-1].append(end - start)
    return ArenaPlan(table, end, block_bytes)


def write_codes(
    arena: torch.Tensor,
    row: Sequence[int],
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
) -> None:
    """Write a PLAIN_CODES block at its place.

    row: the block's row of the table, as a list. codes uint8 [N, K], one code an element; scales fp16
    [N, K/g]; zeros uint8 [N, K/g], or None for a symmetric block.
    Raises ValueError where the tensors do not agree with the row.
    """
    if row[Field.LAYOUT] != Layout.PLAIN_CODES:
        raise ValueError(f"layout {row[Field.LAYOUT]} does not hold codes")
    N, K = codes.shape
    groups = (N, num_groups(K, row[Field.GROUP_SIZE]))
    if scales.dtype != torch.float16 or scales.shape != groups:
        raise ValueError(f"scales must be torch.float16 {list(groups)}, got {scales.dtype} {list(scales.shape)}")
    if (zeros is None) != (row[Field.ZEROS_OFFSET] < 0):
        raise ValueError("zeros are given exactly for asymmetric blocks")
    packed = pack_codes(codes, row[Field.WEIGHT_BITS])
    _section(arena, row[Field.CODES_OFFSET], packed.numel()).copy_(packed.reshape(-1))
    scale_bytes = scales.contiguous().view(torch.uint8).reshape(-1)
    _section(arena, row[Field.SCALES_OFFSET], scale_bytes.numel()).copy_(scale_bytes)
    if zeros is not None:
        if zeros.dtype != torch.uint8 or zeros.shape != groups:
            raise ValueError(f"zeros must be torch.uint8 {list(groups)}, got {zeros.dtype} {list(zeros.shape)}")
        _section(arena, row[Field.ZEROS_OFFSET], zeros.numel()).copy_(zeros.reshape(-1))


def read_codes(
    arena: torch.Tensor, row: Sequence[int], N: int, K: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Read a PLAIN_CODES block back: (codes uint8 [N, K], scales fp16 [N, K/g], zeros uint8 [N, K/g] or None).

    scales and zeros are views of the arena. Raises ValueError for a table row that points past its end.
    """
    bits, groups = row[Field.WEIGHT_BITS], num_groups(K, row[Field.GROUP_SIZE])
    size = packed_size(K, bits)
    codes = unpack_codes(_section(arena, row[Field.CODES_OFFSET], N * size).view(N, size), bits, K)
    scales = _section(arena, row[Field.SCALES_OFFSET], 2 * N * groups).view(torch.float16).view(N, groups)
    if row[Field.ZEROS_OFFSET] < 0:
        return codes, scales, None
    return codes, scales, _section(arena, row[Field.ZEROS_OFFSET], N * groups).view(N, groups)


def write_full_precision(arena: torch.Tensor, row: Sequence[int], weight: torch.Tensor) -> None:
    """Write a block that is kept as it is: weight [N, K] of the layout's element type."""
    dtype = _full_precision_dtype(row)
    if weight.dtype != dtype:
        raise ValueError(f"layout {Layout(row[Field.LAYOUT]).name} holds {dtype}, got {weight.dtype}")
    data = weight.contiguous().view(torch.uint8).reshape(-1)
    _section(arena, row[Field.CODES_OFFSET], data.numel()).copy_(data)


def read_full_precision(arena: torch.Tensor, row: Sequence[int], N: int, K: int) -> torch.Tensor:
    """Read a block that is kept as it is: [N, K] of the layout's element type, a view of the arena."""
    dtype = _full_precision_dtype(row)
    return _section(arena, row[Field.CODES_OFFSET], N * K * dtype.itemsize).view(dtype).view(N, K)


def _full_precision_dtype(row: Sequence[int]) -> torch.dtype:
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
