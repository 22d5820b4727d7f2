# SPDX-License-Identifier: Apache-2.0
# Triton reads the annotations of its functions as its own.
# mypy: disallow-untyped-defs=False
"""One tile of weight times activations: [BLOCK_N rows] x [K] times [K] x [BLOCK_TOKENS], accumulated in float32.

The weight is the tensor core's first operand, not the second as in most GEMMs: it is decoded in registers, and only
the first operand may stay there. Every format of a plan is a loop over K of its own; which one a tile runs is decided
once, at run time, by its row of the table. Formats that the plan lacks are not compiled.

How scales and zero points are applied, `SCALING`, for 16-bit activations:

    SCALE_WEIGHTS   weight = (code - zero) * scale in the activations' type; the tensor core sums all of K by itself
    SCALE_PRODUCTS  weight = code - zero, exact; each piece's product is scaled in float32
    CORRECT_SUMS    weight = code + offset as it is decoded; each piece's product less (zero + offset) * sum of its
                    activations (activations.py), then scaled: the fewest instructions per weight

With 8-bit activations a piece's product is an integer, corrected by sums and scaled by both scales. Both follow
act_quant/reference.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import configurations, formats
from .decode import decode_words
from .planes import PLANE_TOKENS, multiply_planes, place_columns
from .scaling import find_base, multiply_half, round_to, scale_int8

SCALE_WEIGHTS = tl.constexpr(configurations.SCALE_WEIGHTS)
SCALE_PRODUCTS = tl.constexpr(configurations.SCALE_PRODUCTS)
CORRECT_SUMS = tl.constexpr(configurations.CORRECT_SUMS)

NUM_FORMATS = tl.constexpr(formats.NUM_FORMATS)
NUM_CODE_FORMATS = tl.constexpr(formats.NUM_CODE_FORMATS)
NUM_KINDS = tl.constexpr(formats.NUM_KINDS)
NUM_INT8_KINDS = tl.constexpr(len(formats.INT8_GROUPS))


@triton.jit
def store_rounded(target, values, mask, USE_ASM: tl.constexpr):
    """Store float32 values in the type that `target` points to: float32, or bf16 or fp16 by `round_to`."""
    if target.dtype.element_ty == tl.float32:
        tl.store(target, values, mask=mask)
    else:
        tl.store(target, round_to(values, target.dtype.element_ty == tl.float16, USE_ASM), mask=mask)


@triton.jit
def _take_piece(weights, PIECE: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr):
    """Columns of one piece of a chunk, [ROWS, 128 / PIECES]; a renaming of registers."""
    if PIECES == 1:
        return weights
    elif PIECES == 2:
        a, b = tl.split(tl.permute(tl.reshape(weights, (ROWS, 2, 64)), (0, 2, 1)))
        return a if PIECE == 0 else b
    else:
        even, odd = tl.split(tl.permute(tl.reshape(weights, (ROWS, 2, 2, 32)), (0, 1, 3, 2)))
        a, b = tl.split(tl.permute(even if PIECE % 2 == 0 else odd, (0, 2, 1)))
        return a if PIECE < 2 else b


@triton.jit
def _load_x(x, columns, token_mask, K, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(x + columns[:, None], mask=token_mask[None, :], other=0)
    else:
        return tl.load(x + columns[:, None], mask=token_mask[None, :] & (columns < K)[:, None], other=0)


@triton.jit
def _accumulate_codes(
    acc,
    arena,
    codes_offset,
    words_offset,
    rows,
    row_tiles,
    chunks,
    begin,
    end,
    x,
    x_scales,
    x_sums,
    token_mask,
    K,
    FORMAT: tl.constexpr,
    SCALING: tl.constexpr,
    EVEN_K: tl.constexpr,
    IS_FP16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """acc plus the chunks begin .. end of a GPU_FRAGMENT block.

    rows: int32 [BLOCK_N], in the order of layout.py; x: pointers [1, BLOCK_TOKENS] to rows of activations;
    x_scales, x_sums: pointers [BLOCK_TOKENS] to those of a row's first piece.
    """
    WIDTH: tl.constexpr = FORMAT % 5
    BITS: tl.constexpr = WIDTH + 2 if WIDTH < 2 else 2 * WIDTH
    ACT_BITS: tl.constexpr = 8 if (FORMAT // 5) % 2 == 1 else 16
    PIECES: tl.constexpr = 1 << (FORMAT // 10)
    DEPTH: tl.constexpr = 128 // PIECES
    TWO_PLANES: tl.constexpr = BITS == 3 or BITS == 6
    LOW_BITS: tl.constexpr = 2 * BITS // 3 if TWO_PLANES else BITS
    # Words of a row in a chunk.
    LOW: tl.constexpr = 128 * LOW_BITS // (8 if ACT_BITS == 8 else 16)
    HIGH: tl.constexpr = LOW // 2
    BLOCK_TOKENS: tl.constexpr = acc.shape[1]
    HAS_PLANES: tl.constexpr = not TWO_PLANES and (BITS < 8 if ACT_BITS == 8 else SCALING != SCALE_WEIGHTS)
    BY_PLANES: tl.constexpr = BLOCK_TOKENS <= PLANE_TOKENS and PIECES == 1 and HAS_PLANES
    PLANE_COLUMNS: tl.constexpr = 256 // ACT_BITS

    word_type = tl.pointer_type(tl.int8) if ACT_BITS == 8 else tl.pointer_type(tl.int16)
    first = (rows // 64) * chunks
    row_in_section = first.to(tl.int64) * 64 + rows % 64
    codes = arena + codes_offset
    low_words = codes.to(word_type) + row_in_section[:, None] * LOW + tl.arange(0, LOW)[None, :]
    high_words = low_words
    if TWO_PLANES:
        high_plane = codes + row_tiles.to(tl.int64) * chunks * (64 * 128 * LOW_BITS // 8)
        high_words = high_plane.to(word_type) + row_in_section[:, None] * HIGH + tl.arange(0, HIGH)[None, :]
    words = (arena + words_offset).to(tl.pointer_type(tl.int32)) + first * (64 * PIECES) + rows % 64
    if BY_PLANES:
        low_words = codes.to(word_type) + row_in_section[:, None] * LOW + tl.arange(0, PLANE_COLUMNS)[None, :]
        columns = place_columns(PLANE_COLUMNS, LOW // PLANE_COLUMNS * 2, ACT_BITS // BITS)

    for chunk in tl.range(begin, end, num_stages=STAGES, loop_unroll_factor=UNROLL):
        if not BY_PLANES:
            low = tl.load(low_words + chunk * (64 * LOW))
            high = low
            if TWO_PLANES:
                high = tl.load(high_words + chunk * (64 * HIGH))
            if BITS == 8 and ACT_BITS == 8:
                weights = low
            else:
                weights = decode_words(low, high, BITS, ACT_BITS, IS_FP16, BLOCK_N, USE_ASM)
        for piece in tl.static_range(PIECES):
            place = chunk * PIECES + piece
            word = tl.load(words + place * 64)
            scale = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            zero = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            if BY_PLANES:
                base = find_base(zero, BITS, ACT_BITS, IS_FP16)
                product = multiply_planes(
                    low_words + chunk * (64 * LOW),
                    x,
                    columns + chunk * 128,
                    token_mask,
                    K,
                    base,
                    BITS,
                    ACT_BITS,
                    ACT_BITS == 16 and SCALING == SCALE_PRODUCTS,
                    EVEN_K,
                    IS_FP16,
                    BLOCK_N,
                    BLOCK_TOKENS,
                    USE_ASM,
                )
                if ACT_BITS == 8:
                    acc = scale_int8(acc, product, base, scale, x_scales + place, x_sums + place, token_mask)
                elif SCALING == CORRECT_SUMS:
                    sums = tl.load(x_sums + place, mask=token_mask, other=0)
                    acc += (product - base[:, None] * sums[None, :]) * scale[:, None]
                else:
                    acc += product * scale[:, None]
            elif ACT_BITS == 8:
                part = _take_piece(weights, piece, PIECES, BLOCK_N)
                values = _load_x(x, place * DEPTH + tl.arange(0, DEPTH), token_mask, K, EVEN_K)
                product = tl.dot(part, values, out_dtype=tl.int32)
                base = find_base(zero, BITS, ACT_BITS, IS_FP16)
                acc = scale_int8(acc, product, base, scale, x_scales + place, x_sums + place, token_mask)
            else:
                part = _take_piece(weights, piece, PIECES, BLOCK_N)
                values = _load_x(x, place * DEPTH + tl.arange(0, DEPTH), token_mask, K, EVEN_K)
                acc = multiply_half(
                    acc, part, values, scale, zero, x_sums + place, token_mask, BITS, SCALING, IS_FP16, USE_ASM
                )
    return acc


@triton.jit
def _accumulate_plain(
    acc,
    weight,
    rows,
    num_rows,
    begin,
    end,
    x,
    token_mask,
    K,
    FORMAT: tl.constexpr,
    GATE_UP: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """acc plus the chunks begin .. end of a weight [num_rows, K] kept as it is. rows: as in `_accumulate_codes`."""
    if FORMAT == NUM_CODE_FORMATS:
        elements = weight.to(tl.pointer_type(tl.bfloat16))
    elif FORMAT == NUM_CODE_FORMATS + 1:
        elements = weight.to(tl.pointer_type(tl.float16))
    else:
        elements = weight.to(tl.pointer_type(tl.float32))
    if GATE_UP:
        # The same order as that of codes: eights of gate and of up in turn.
        half = num_rows // 2
        channels = (rows // 16) * 8 + rows % 8
        row_mask = channels < half
        source = channels + ((rows // 8) % 2) * half
    else:
        row_mask = rows < num_rows
        source = rows
    columns = tl.arange(0, 128)
    weight_rows = elements + tl.where(row_mask, source, 0).to(tl.int64)[:, None] * K
    for chunk in tl.range(begin, end, num_stages=STAGES):
        here = chunk * 128 + columns
        mask = row_mask[:, None] if EVEN_K else row_mask[:, None] & (here < K)[None, :]
        weights = tl.load(weight_rows + here[None, :], mask=mask, other=0)
        values = _load_x(x, here, token_mask, K, EVEN_K)
        if USE_ASM:
            weights = weights.to(values.dtype)
        else:
            weights = weights.to(tl.float32)
            values = values.to(tl.float32)
        acc = tl.dot(weights, values, acc)
    return acc


@triton.jit
def _place_kind(act_bits, group_size, KINDS: tl.constexpr):
    """Where the activations that a block of codes asks for stand among the prepared ones (formats.list_kinds)."""
    by_group = tl.where(group_size == 32, 0, tl.where(group_size == 64, 1, 2))
    int8_kind = tl.where(group_size == -1, 0, by_group + 1)
    kind = tl.where(act_bits == 8, int8_kind, by_group + NUM_INT8_KINDS)
    place = kind * 0
    for lower in tl.static_range(NUM_KINDS):
        if (KINDS >> lower) & 1:
            place += (kind > lower).to(tl.int32)
    return place


@triton.jit
def accumulate_block(
    arena,
    row,
    rows,
    num_rows,
    row_tiles,
    begin,
    end,
    tokens,
    token_mask,
    x,
    x_codes,
    x_scales,
    x_sums,
    num_x_rows,
    pieces_stride,
    K,
    GATE_UP: tl.constexpr,
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
    """float32 [BLOCK_N, BLOCK_TOKENS]: the chunks begin .. end of a block, times rows of activations.

    row                          pointer to the block's row of the table (arena.Field)
    rows, num_rows, row_tiles    int32 [BLOCK_N] rows of the tile, as layout.py orders them; the block's rows; row tiles
    tokens, token_mask           int32 [BLOCK_TOKENS] rows of x, and which of them are there
    x                            bf16 or fp16 [num_x_rows, K]
    x_codes, x_scales, x_sums    int8 [kinds, num_x_rows, K], float32 [kinds, num_x_rows, pieces_stride]: activations.py
    FORMATS, KINDS               sets, of formats and of prepared kinds: formats.py
    """
    IS_FP16: tl.constexpr = x.dtype.element_ty == tl.float16
    bits = tl.load(row).to(tl.int32)
    act_bits = tl.load(row + 1).to(tl.int32)
    group_size = tl.load(row + 2).to(tl.int32)
    # Sections start on 64-byte lines; said here, or loads would be split into small ones.
    codes_offset = tl.multiple_of(tl.load(row + 3), 64)
    words_offset = tl.multiple_of(tl.load(row + 4), 64)
    layout = tl.load(row + 6).to(tl.int32)

    # formats.Format.number, from what the row says; 5-bit codes are stored in 6 bits.
    width = tl.where(bits < 4, bits - 2, (bits + 1) // 2)
    pieces = tl.where(group_size == 32, 2, tl.where(group_size == 64, 1, 0))
    coded = pieces * 10 + tl.where(act_bits == 8, 5, 0) + width
    is_plain = (layout >= 1) & (layout <= 3)
    number = tl.where(is_plain, NUM_CODE_FORMATS + layout - 1, coded)

    chunks = tl.cdiv(K, 128)
    values = x + tokens.to(tl.int64)[None, :] * K
    prepared = (_place_kind(act_bits, group_size, KINDS) * num_x_rows + tokens).to(tl.int64)
    codes = x_codes + prepared[None, :] * K
    scales = x_scales + prepared * pieces_stride
    sums = x_sums + prepared * pieces_stride

    acc = tl.zeros((BLOCK_N, BLOCK_TOKENS), tl.float32)
    for f in tl.static_range(NUM_CODE_FORMATS):
        if (FORMATS >> f) & 1:  # noqa: SIM102 - a constant, and a branch at run time
            if number == f:
                acc = _accumulate_codes(
                    acc,
                    arena,
                    codes_offset,
                    words_offset,
                    rows,
                    row_tiles,
                    chunks,
                    begin,
                    end,
                    codes if (f // 5) % 2 == 1 else values,
                    scales,
                    sums,
                    token_mask,
                    K,
                    f,
                    SCALING,
                    EVEN_K,
                    IS_FP16,
                    BLOCK_N,
                    STAGES,
                    UNROLL,
                    USE_ASM,
                )
    # A chunk of plain weights takes four times the shared memory of 4-bit codes.
    PLAIN_STAGES: tl.constexpr = 2 if BLOCK_TOKENS > 64 else (STAGES if STAGES < 3 else 3)
    for f in tl.static_range(NUM_CODE_FORMATS, NUM_FORMATS):
        if (FORMATS >> f) & 1:  # noqa: SIM102 - a constant, and a branch at run time
            if number == f:
                acc = _accumulate_plain(
                    acc,
                    arena + codes_offset,
                    rows,
                    num_rows,
                    begin,
                    end,
                    values,
                    token_mask,
                    K,
                    f,
                    GATE_UP,
                    EVEN_K,
                    PLAIN_STAGES,
                    USE_ASM,
                )
    return acc
