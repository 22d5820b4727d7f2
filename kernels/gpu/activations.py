# SPDX-License-Identifier: Apache-2.0
# Triton reads the annotations of its functions as its own.
# mypy: disallow-untyped-defs=False
"""What the GEMMs want of activations beforehand: int8 codes with a scale per group, and sums per piece of K.

The rounding is that of act_quant/reference.py. The sum of a piece takes off the zero points: sum of w * x =
scale * (sum of code * x - zero * sum of x). Pieces are the layout's: a group of 32 or 64 columns, else 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..act_quant.reference import INT8_MAX
from ..arena import NUM_FIELDS, Layout
from ..mixed_moe.layout import Block
from .formats import INT8_GROUPS, describe_kind, list_kinds
from .layout import DEPTH
from .sorting import SortedPairs

LARGEST_CODE = tl.constexpr(float(INT8_MAX))
FRAGMENT = tl.constexpr(int(Layout.GPU_FRAGMENT))
FIELDS = tl.constexpr(NUM_FIELDS)
BLOCKS = tl.constexpr(len(Block))
DOWN_BLOCK = tl.constexpr(int(Block.DOWN))

#: Adding it to a float32 below 2**22 rounds that to an integer, ties to even.
ROUND = tl.constexpr(12582912.0)

#: Elements of a row from which on twice the warps share it.
LONG_ROW = 8192


@triton.jit
def prepare_kernel(
    x,
    codes,
    scales,
    sums,
    table,
    experts,
    segment_ends,
    num_experts,
    K,
    pieces_stride,
    BY_EXPERT: tl.constexpr,
    INT8: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
):
    """One row of x, [K]: its codes and scales where INT8, and its sums.

    BY_EXPERT: rows are sorted pairs, and only those are prepared whose expert's down block asks for this kind.
    """
    row = tl.program_id(0)
    if BY_EXPERT:
        last = tl.load(segment_ends + num_experts - 1)
        expert = tl.load(experts + row, mask=row < last, other=0)
        fields = table + (expert.to(tl.int64) * BLOCKS + DOWN_BLOCK) * FIELDS
        group_size = tl.load(fields + 2)
        asked = (row < last) & (tl.load(fields + 6) == FRAGMENT) & (tl.load(fields + 1) == (8 if INT8 else 16))
        if INT8 or PIECE < 128:
            asked = asked & (group_size == GROUP_SIZE)
        else:
            # Whole rows are summed by pieces of 128, too.
            asked = asked & ((group_size == 128) | (group_size == -1))
        if not asked:
            return
    pieces = tl.arange(0, BLOCK_PIECES)
    columns = pieces[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    source = row.to(tl.int64) * K + columns
    values = tl.load(x + source, mask=columns < K, other=0).to(tl.float32)
    num_pieces = tl.cdiv(K, 128) * (128 // PIECE)
    target = row.to(tl.int64) * pieces_stride + pieces
    if not INT8:
        tl.store(sums + target, tl.sum(values, 1), mask=pieces < num_pieces)
        return
    magnitude = tl.abs(values)
    is_finite = magnitude < float("inf")
    largest = tl.max(tl.where(is_finite, magnitude, 0.0), 1)
    broken = tl.max(tl.where(is_finite, 0, 1), 1)
    if GROUP_SIZE == -1:
        largest = tl.zeros_like(largest) + tl.max(largest, 0)
        broken = tl.zeros_like(broken) + tl.max(broken, 0)
    scale = tl.div_rn(largest, LARGEST_CODE)
    usable = (scale > 0) & (broken == 0)
    divisor = tl.where(usable, scale, 1.0)[:, None] + tl.zeros_like(values)
    ratio = tl.where(usable[:, None], tl.div_rn(values, divisor), 0.0)
    rounded = (ratio + ROUND) - ROUND
    rounded = tl.minimum(tl.maximum(rounded, -LARGEST_CODE), LARGEST_CODE)
    tl.store(codes + source, rounded.to(tl.int8), mask=columns < K)
    tl.store(scales + target, tl.where(broken == 0, scale, float("nan")), mask=pieces < num_pieces)
    tl.store(sums + target, tl.sum(rounded, 1), mask=pieces < num_pieces)


def prepare_activations(
    x: torch.Tensor, kinds: int, pieces_stride: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every kind of a set (formats.py), for all rows of x [rows, K].

    Returns (codes int8 [int8 kinds, rows, K], scales and sums float32 [kinds, rows, pieces_stride]), for
    `accumulate_block`; kinds in the order of `formats.list_kinds`.
    """
    listed = list_kinds(kinds)
    codes, scales, sums = _allocate(x, sum(kind < len(INT8_GROUPS) for kind in listed), len(listed), pieces_stride)
    for place, kind in enumerate(listed):
        _launch(x, codes, scales, sums, place, kind, pieces_stride, None, None)
    return codes, scales, sums


def prepare_by_expert(
    hidden: torch.Tensor, table: torch.Tensor, order: SortedPairs, kinds: int, pieces_stride: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `prepare_activations` of rows in sorted order, each for the down block of its expert: one kind a row."""
    listed = list_kinds(kinds)
    has_int8 = any(kind < len(INT8_GROUPS) for kind in listed)
    codes, scales, sums = _allocate(hidden, int(has_int8), int(bool(listed)), pieces_stride)
    for kind in listed:
        _launch(hidden, codes, scales, sums, 0, kind, pieces_stride, table, order)
    return codes, scales, sums


def _allocate(
    x: torch.Tensor, num_int8: int, num_kinds: int, pieces_stride: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.empty((num_int8, *x.shape), dtype=torch.int8, device=x.device)
    factors = torch.empty((2, num_kinds, x.shape[0], pieces_stride), dtype=torch.float32, device=x.device)
    return codes, factors[0], factors[1]


def _launch(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    sums: torch.Tensor,
    place: int,
    kind: int,
    pieces_stride: int,
    table: torch.Tensor | None,
    order: SortedPairs | None,
) -> None:
    rows, K = x.shape
    int8, group_size, depth = describe_kind(kind)
    pieces = -(-K // DEPTH) * (DEPTH // depth)
    prepare_kernel[(rows,)](
        x,
        codes[place] if int8 else codes,
        scales[place],
        sums[place],
        table,
        None if order is None else order.experts,
        None if order is None else order.segment_ends,
        0 if order is None else order.num_experts,
        K,
        pieces_stride,
        BY_EXPERT=order is not None,
        INT8=int8,
        GROUP_SIZE=group_size,
        PIECE=depth,
        BLOCK_PIECES=triton.next_power_of_2(pieces),
        num_warps=4 if pieces * depth <= LONG_ROW else 8,
    )
