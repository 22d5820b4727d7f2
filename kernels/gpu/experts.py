# SPDX-License-Identifier: Apache-2.0
# Triton reads the annotations of its functions as its own.
# mypy: disallow-untyped-defs=False
"""The two GEMMs of a MoE layer, each one launch for all experts and all their widths.

A thread block takes one tile: some tokens of one expert (sorting.py) and some rows of its weight. The grid is as large
as the worst spread of tokens needs; thread blocks past the last tile read one number and leave.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..arena import NUM_FIELDS
from ..mixed_moe.layout import Block
from .accumulate import accumulate_block, store_rounded

FIELDS = tl.constexpr(NUM_FIELDS)
BLOCKS = tl.constexpr(len(Block))
GATE_UP_BLOCK = tl.constexpr(int(Block.GATE_UP))
DOWN_BLOCK = tl.constexpr(int(Block.DOWN))


@triton.jit(do_not_specialize=["num_x_rows", "top_k"], do_not_specialize_on_alignment=["routing"])
def gate_up_kernel(
    x,
    x_codes,
    x_scales,
    x_sums,
    arena,
    table,
    pairs,
    tile_experts,
    tile_starts,
    segment_ends,
    num_tiles,
    routing,
    hidden,
    num_x_rows,
    top_k,
    pieces_stride,
    K,
    intermediate_size,
    WEIGHT_ON_INPUT: tl.constexpr,
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
    """hidden[position] = silu(gate) * up of the pair at that sorted position.

    x, x_codes, x_scales, x_sums    activations [num_x_rows, K] and what is prepared of them: accumulate.py
    pairs ... num_tiles             sorting.py; routing: weights of the pairs, [tokens, top_k]
    hidden                          bf16 or fp16 [pairs, intermediate_size], as x

    A tile of BLOCK_N rows is BLOCK_N / 2 outputs. Grid: tiles of rows, times the most tiles of tokens.
    """
    row_tiles = tl.cdiv(tl.cdiv(intermediate_size, 8) * 16, 64)
    tiles_n = tl.cdiv(row_tiles * 64, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n
    tile = tl.program_id(0) // tiles_n
    # Read before the number of tiles is known to reach here: the three loads go out together.
    expert = tl.load(tile_experts + tile)
    start = tl.load(tile_starts + tile)
    if tile >= tl.load(num_tiles):
        return
    positions = start + tl.arange(0, BLOCK_TOKENS)
    token_mask = positions < tl.load(segment_ends + expert)
    pair = tl.load(pairs + positions, mask=token_mask, other=0)
    # Rows past the last tile of an odd number of tiles are read from the last row, and never stored.
    rows = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), row_tiles * 64 - 1)
    acc = accumulate_block(
        arena,
        table + (expert.to(tl.int64) * BLOCKS + GATE_UP_BLOCK) * FIELDS,
        rows,
        2 * intermediate_size,
        row_tiles,
        0,
        tl.cdiv(K, 128),
        pair // top_k,
        token_mask,
        x,
        x_codes,
        x_scales,
        x_sums,
        num_x_rows,
        pieces_stride,
        K,
        True,
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
    if WEIGHT_ON_INPUT:
        # The GEMM is linear, and int8 rounding scales along: weighting its result is weighting its input.
        acc = acc * tl.load(routing + pair, mask=token_mask, other=0).to(tl.float32)[None, :]
    # Eights of gate and of up in turn: rows of one thread, so this moves nothing between threads.
    eights = tl.permute(tl.reshape(acc, (BLOCK_N // 16, 2, 8, BLOCK_TOKENS)), (0, 2, 3, 1))
    gate, up = tl.split(eights)
    gate = tl.reshape(gate, (BLOCK_N // 2, BLOCK_TOKENS))
    up = tl.reshape(up, (BLOCK_N // 2, BLOCK_TOKENS))
    outputs = gate * tl.sigmoid(gate) * up
    channels = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    target = hidden + positions.to(tl.int64)[:, None] * intermediate_size + channels[None, :]
    mask = token_mask[:, None] & (channels < intermediate_size)[None, :]
    store_rounded(target, tl.trans(outputs), mask, USE_ASM)


@triton.jit(do_not_specialize=["num_pairs", "split"], do_not_specialize_on_alignment=["routing"])
def down_kernel(
    hidden,
    x_codes,
    x_scales,
    x_sums,
    arena,
    table,
    pairs,
    tile_experts,
    tile_starts,
    segment_ends,
    num_tiles,
    routing,
    parts,
    num_pairs,
    split,
    pieces_stride,
    K,
    hidden_size,
    WEIGHT_ON_INPUT: tl.constexpr,
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
    """parts[part, pair] = down(hidden) of the pair, weighted, over one part of K.

    hidden ... x_sums    by sorted position: bf16 or fp16 [num_pairs, K], and what is prepared of it
    parts                float32, bf16 or fp16 [split, num_pairs, hidden_size], by pair: combine.py sums it

    Pairs of no expert here are left as they are. Grid: tiles of rows, times split, times the most tiles of tokens.
    """
    row_tiles = tl.cdiv(hidden_size, 64)
    tiles_n = tl.cdiv(hidden_size, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n
    part = (tl.program_id(0) // tiles_n) % split
    tile = tl.program_id(0) // (tiles_n * split)
    expert = tl.load(tile_experts + tile)
    start = tl.load(tile_starts + tile)
    if tile >= tl.load(num_tiles):
        return
    positions = start + tl.arange(0, BLOCK_TOKENS)
    token_mask = positions < tl.load(segment_ends + expert)
    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    chunks = tl.cdiv(K, 128)
    share = tl.cdiv(chunks, split)
    acc = accumulate_block(
        arena,
        table + (expert.to(tl.int64) * BLOCKS + DOWN_BLOCK) * FIELDS,
        tl.minimum(outputs, row_tiles * 64 - 1),
        hidden_size,
        row_tiles,
        part * share,
        tl.minimum(chunks, (part + 1) * share),
        positions,
        token_mask,
        hidden,
        x_codes,
        x_scales,
        x_sums,
        num_pairs,
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
    pair = tl.load(pairs + positions, mask=token_mask, other=0)
    if not WEIGHT_ON_INPUT:
        acc = acc * tl.load(routing + pair, mask=token_mask, other=0).to(tl.float32)[None, :]
    target = parts + (part.to(tl.int64) * num_pairs + pair)[:, None] * hidden_size + outputs[None, :]
    mask = token_mask[:, None] & (outputs < hidden_size)[None, :]
    store_rounded(target, tl.trans(acc), mask, USE_ASM)
