# SPDX-License-Identifier: Apache-2.0
# Triton reads the annotations of its functions as its own.
# mypy: disallow-untyped-defs=False
"""One linear layer of stacked row blocks, each with its own widths, as one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from ..mixed_linear import layout
from .accumulate import accumulate_block, store_rounded

NUM_COLUMNS = tl.constexpr(layout.NUM_COLUMNS)
NUM_ROWS = tl.constexpr(layout.NUM_ROWS)


@triton.jit(do_not_specialize=["num_x_rows", "split", "tiles_n"])
def linear_kernel(
    x,
    x_codes,
    x_scales,
    x_sums,
    arena,
    table,
    bias,
    out,
    num_x_rows,
    split,
    tiles_n,
    pieces_stride,
    K,
    out_features,
    NUM_BLOCKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORMATS: tl.constexpr,
    KINDS: tl.constexpr,
    SCALING: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """out[part] = x times the weight over one part of K, plus bias where HAS_BIAS.

    x, x_codes, x_scales, x_sums    activations [num_x_rows, K] and what is prepared of them: accumulate.py
    table                           NUM_BLOCKS rows of mixed_linear/layout.py
    out                             float32, bf16 or fp16 [split, num_x_rows, out_features]
    tiles_n                         tiles of rows over all row blocks

    Grid: tiles_n, times split, times tiles of tokens.
    """
    tile_n = tl.program_id(0) % tiles_n
    part = (tl.program_id(0) // tiles_n) % split
    tile = tl.program_id(0) // (tiles_n * split)
    # The row block that the tile is in: each starts with a tile of its own.
    block = tile_n * 0
    first_output = tile_n * 0
    for b in tl.static_range(NUM_BLOCKS - 1):
        rows_here = tl.load(table + b * NUM_COLUMNS + NUM_ROWS).to(tl.int32)
        tiles_here = tl.cdiv(rows_here, BLOCK_N)
        passed = (block == b) & (tile_n >= tiles_here)
        block += passed.to(tl.int32)
        tile_n -= tl.where(passed, tiles_here, 0)
        first_output += tl.where(passed, rows_here, 0)
    row = table + block * NUM_COLUMNS
    num_rows = tl.load(row + NUM_ROWS).to(tl.int32)
    row_tiles = tl.cdiv(num_rows, 64)
    tokens = tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token_mask = tokens < num_x_rows
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    chunks = tl.cdiv(K, 128)
    share = tl.cdiv(chunks, split)
    acc = accumulate_block(
        arena,
        row,
        tl.minimum(rows, row_tiles * 64 - 1),
        num_rows,
        row_tiles,
        part * share,
        tl.minimum(chunks, (part + 1) * share),
        tokens,
        token_mask,
        x,
        x_codes,
        x_scales,
        x_sums,
        num_x_rows,
        pieces_stride,
        K,
        False,
        FORMATS,
        KINDS,
        SCALING,
        EVEN_K,
        BLOCK_N,
        BLOCK_TOKENS,
        STAGES,
        UNROLL,
        USE_ASM,
    )
    outputs = first_output + rows
    row_mask = rows < num_rows
    if HAS_BIAS:
        acc += tl.load(bias + outputs, mask=row_mask, other=0).to(tl.float32)[:, None]
    target = out + (part.to(tl.int64) * num_x_rows + tokens)[:, None] * out_features + outputs[None, :]
    mask = token_mask[:, None] & row_mask[None, :]
    store_rounded(target, tl.trans(acc), mask, USE_ASM)
