# SPDX-License-Identifier: Apache-2.0
# Triton reads the annotations of its functions as its own.
# mypy: disallow-untyped-defs=False
"""Products of one piece of K, scaled and added to a tile's sums; accumulate.py says in which ways."""

from __future__ import annotations

import triton
import triton.language as tl

from . import configurations
from .decode import BF16_OFFSET, FP16_OFFSET, SIGNED_OFFSET

SCALE_WEIGHTS = tl.constexpr(configurations.SCALE_WEIGHTS)
CORRECT_SUMS = tl.constexpr(configurations.CORRECT_SUMS)

#: Triton before 3.9 compiles two things badly that 3.9 compiles well; 3.6 is the one that was tried.
IS_OLD_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)

#: Triton 3.6 has each thread fetch every value that it is going to use from a tensor that has fewer elements than the
#: thread block has threads: of scales and sums of activations up to 64 copies of 4 bytes a chunk. One tensor of both,
#: with each value as often as it takes to give every thread one, costs it one copy. Triton 3.9 needs no such help.
JOINT_FACTORS = tl.constexpr(IS_OLD_TRITON)


@triton.jit
def round_to(values, IS_FP16: tl.constexpr, USE_ASM: tl.constexpr):
    """float32 to bf16 or fp16, ties to even, which the interpreter would cut off instead for bf16."""
    if IS_FP16:
        return values.to(tl.float16)
    elif USE_ASM:
        return values.to(tl.bfloat16)
    else:
        bits = values.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        # A NaN must not be carried over into another number.
        rounded = tl.where(values == values, even, bits)
        return rounded.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def find_base(zero, BITS: tl.constexpr, ACT_BITS: tl.constexpr, IS_FP16: tl.constexpr):
    """What a decoded code is more than the code less its zero point."""
    if ACT_BITS == 8:
        return zero + SIGNED_OFFSET if BITS == 8 else zero
    elif IS_FP16:
        return zero + FP16_OFFSET
    else:
        return zero + (SIGNED_OFFSET if BITS == 8 else BF16_OFFSET)


@triton.jit
def multiply_half(
    acc,
    weights,
    values,
    scale,
    zero,
    x_sums,
    token_mask,
    BITS: tl.constexpr,
    SCALING: tl.constexpr,
    IS_FP16: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """acc plus one piece with 16-bit activations."""
    base = find_base(zero, BITS, 16, IS_FP16)
    if not USE_ASM:
        # The interpreter multiplies bf16 as if it were integers.
        weights = weights.to(tl.float32)
        values = values.to(tl.float32)
    if SCALING == CORRECT_SUMS:
        sums = tl.load(x_sums, mask=token_mask, other=0)
        acc += (tl.dot(weights, values) - base[:, None] * sums[None, :]) * scale[:, None]
    elif USE_ASM:
        centred = weights - base.to(weights.dtype)[:, None]
        if SCALING == SCALE_WEIGHTS:
            acc = tl.dot(centred * scale.to(weights.dtype)[:, None], values, acc)
        else:
            acc += tl.dot(centred, values) * scale[:, None]
    else:
        centred = weights - base[:, None]
        if SCALING == SCALE_WEIGHTS:
            step = round_to(scale, IS_FP16, USE_ASM).to(tl.float32)
            centred = round_to(centred * step[:, None], IS_FP16, USE_ASM).to(tl.float32)
            acc = tl.dot(centred, values, acc)
        else:
            acc += tl.dot(centred, values) * scale[:, None]
    return acc


@triton.jit
def load_factors(x_scales, x_sums, token_mask, BLOCK_N: tl.constexpr, BLOCK_TOKENS: tl.constexpr, JOINT: tl.constexpr):
    """(scales, sums) of a piece, float32 [BLOCK_TOKENS] each. JOINT: by one load (JOINT_FACTORS)."""
    if not JOINT:
        return tl.load(x_scales, mask=token_mask, other=0), tl.load(x_sums, mask=token_mask, other=0)
    else:
        # The tiles that ship have two threads for a row of the weight.
        RATIO: tl.constexpr = BLOCK_N // BLOCK_TOKENS
        WIDTH: tl.constexpr = 2 * RATIO if RATIO > 1 else 2
        HALVINGS: tl.constexpr = (RATIO > 1) + (RATIO > 2) + (RATIO > 4) + (RATIO > 8) + (RATIO > 16)
        is_sum = tl.arange(0, WIDTH) >= WIDTH // 2
        both = tl.load(tl.where(is_sum[None, :], x_sums[:, None], x_scales[:, None]), mask=token_mask[:, None], other=0)
        for halving in tl.static_range(HALVINGS):
            both, _ = tl.split(tl.reshape(both, (BLOCK_TOKENS, WIDTH >> (halving + 1), 2)))
        return tl.split(both)


@triton.jit
def scale_int8(acc, product, base, scale, x_scales, x_sums, token_mask):
    """acc plus one piece's integer products with 8-bit activations."""
    x_scale, sums = load_factors(x_scales, x_sums, token_mask, acc.shape[0], acc.shape[1], JOINT_FACTORS)
    return acc + ((product.to(tl.float32) - base[:, None] * sums[None, :]) * x_scale[None, :]) * scale[:, None]
