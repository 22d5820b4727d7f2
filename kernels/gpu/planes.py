# SPDX-License-Identifier: Apache-2.0
# Triton reads the annotations of its functions as its own.
# mypy: disallow-untyped-defs=False
"""A chunk of codes times activations, plane by plane: for `mma.sync` where Triton cannot join decoded words.

Which column of the weight meets which number of a dot product does not matter, as long as the activations come in the
same order. So 16 halfwords of GPU_FRAGMENT that lie next to each other (for 8-bit activations, 32 bytes), shifted by
the same number of bits, are 16 (32) columns for one instruction of the tensor core: a plane. Nothing is joined,
permuted or reshaped; the addresses of the activations do it. 4 bits, 16-bit activations:

    a row's first 16 halfwords      lane 0: w0 w0' w1 w1' w2 w2' w3 w3'    lane 1: w0 w0' w1 w1' w2 w2' w3 w3'
    their bits 4p .. 4p + 3         columns 8 * (4w + p) + 2 * lane, and the next for w'

Triton 3.6 moves decoded weights through shared memory, or from thread to thread, where it multiplies joined words by
`mma.sync`; planes it does not. Triton 3.9 has no such trouble, and `wgmma` is better off with whole chunks. Counts:
docs/gpu-kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import (
    BF16_2,
    BF16_4,
    BF16_8,
    FP16_2,
    FP16_4,
    FP16_8,
    HALF_ARGS_2,
    HALF_ARGS_4,
    HALF_ARGS_8,
    INT8_2,
    INT8_4,
    INT8_ARGS_2,
    INT8_ARGS_4,
    decode_plainly,
)
from .scaling import IS_OLD_TRITON

#: The most tokens of a tile that goes by planes: 3.6 multiplies so few by `mma.sync` on every GPU.
PLANE_TOKENS = tl.constexpr(8 if IS_OLD_TRITON else 0)


@triton.jit
def place_columns(COLUMNS: tl.constexpr, LANE_WORDS: tl.constexpr, FIELDS: tl.constexpr):
    """Columns of a chunk that the lowest fields of its first COLUMNS words stand for: [lane][word][element]."""
    ELEMENTS: tl.constexpr = COLUMNS // 8
    here = tl.arange(0, COLUMNS)
    slot = (here // ELEMENTS) % LANE_WORDS * FIELDS
    return 4 * ELEMENTS * slot + ELEMENTS * (here // (ELEMENTS * LANE_WORDS)) + here % ELEMENTS


@triton.jit
def _run_asm(packed, BITS: tl.constexpr, ACT_BITS: tl.constexpr, IS_FP16: tl.constexpr):
    """The planes of a tile of words, lowest first, as a tuple."""
    if ACT_BITS == 8:
        if BITS == 2:
            return tl.inline_asm_elementwise(INT8_2, INT8_ARGS_2, [packed], (tl.int8,) * 4, True, 4)
        else:
            return tl.inline_asm_elementwise(INT8_4, INT8_ARGS_4, [packed], (tl.int8,) * 2, True, 4)
    elif IS_FP16:
        if BITS == 2:
            return tl.inline_asm_elementwise(FP16_2, HALF_ARGS_2, [packed], (tl.float16,) * 8, True, 2)
        elif BITS == 4:
            return tl.inline_asm_elementwise(FP16_4, HALF_ARGS_4, [packed], (tl.float16,) * 4, True, 2)
        else:
            return tl.inline_asm_elementwise(FP16_8, HALF_ARGS_8, [packed], (tl.float16,) * 2, True, 2)
    else:
        if BITS == 2:
            return tl.inline_asm_elementwise(BF16_2, HALF_ARGS_2, [packed], (tl.bfloat16,) * 8, True, 2)
        elif BITS == 4:
            return tl.inline_asm_elementwise(BF16_4, HALF_ARGS_4, [packed], (tl.bfloat16,) * 4, True, 2)
        else:
            return tl.inline_asm_elementwise(BF16_8, HALF_ARGS_8, [packed], (tl.bfloat16,) * 2, True, 2)


@triton.jit
def multiply_planes(
    words,
    x,
    columns,
    token_mask,
    K,
    base,
    BITS: tl.constexpr,
    ACT_BITS: tl.constexpr,
    CENTRED: tl.constexpr,
    EVEN_K: tl.constexpr,
    IS_FP16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Products of a chunk of 128 columns: float32 (8-bit activations: int32) [BLOCK_N, BLOCK_TOKENS].

    Of codes of one plane of bits, as they are decoded (decode_asm.code_offset), or, where CENTRED, less `base`.
    words: pointers [BLOCK_N, 16 or 32] to the chunk's first words of each row; x: pointers [1, BLOCK_TOKENS] to rows of
    activations; columns: of the chunk's first words, `place_columns` plus the chunk's own; base: float32 [BLOCK_N].
    """
    COLUMNS: tl.constexpr = 256 // ACT_BITS
    FIELDS: tl.constexpr = ACT_BITS // BITS
    TILES: tl.constexpr = BITS // 2
    product = tl.zeros((BLOCK_N, BLOCK_TOKENS), tl.int32 if ACT_BITS == 8 else tl.float32)
    for tile in tl.static_range(TILES):
        packed = tl.load(words + tile * COLUMNS)
        if USE_ASM:
            planes = _run_asm(packed, BITS, ACT_BITS, IS_FP16)
        else:
            planes = decode_plainly(packed, BITS, ACT_BITS, IS_FP16, BLOCK_N, COLUMNS)
        for plane in tl.static_range(FIELDS):
            # A tile further the lanes are further, and a plane further the slots.
            here = columns + (plane * (COLUMNS // 2) + tile * (COLUMNS // 2 // TILES))
            mask = token_mask[None, :] if EVEN_K else token_mask[None, :] & (here < K)[:, None]
            values = tl.load(x + here[:, None], mask=mask, other=0)
            if USE_ASM:
                weights = planes[plane]
            else:
                # The interpreter takes no tuple, and multiplies bf16 as if it were integers.
                chosen = (tl.arange(0, FIELDS) == plane)[None, None, :]
                weights = tl.sum(tl.where(chosen, planes.to(tl.float32), 0.0), 2)
                weights = weights.to(tl.int8) if ACT_BITS == 8 else weights
                values = values if ACT_BITS == 8 else values.to(tl.float32)
            if CENTRED:
                weights = weights - base.to(weights.dtype)[:, None]
            product = tl.dot(weights, values, product, out_dtype=product.dtype)
    return product
