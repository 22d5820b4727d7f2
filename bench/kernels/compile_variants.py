# SPDX-License-Identifier: Apache-2.0
# Triton reads the annotations of its functions as its own.
# mypy: disallow-untyped-defs=False
"""A main loop with variants that do not ship, for compile_study.py to compare with loops that do.

The loop of kernels/gpu/accumulate.py for one format, in which activations may be FP8 (e4m3), the other type of 8 bits.
An e4m3 byte from 0 to 16 stands for itself times 2**-9: first as a subnormal number, then with the smallest exponent.
So the codes of 2, 3 and 4 bits are FP8 numbers as they are masked out, in no more instructions than for int8; 2**9 goes
into the scales of the activations. Products come as float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_ext.kernels.gpu.decode import BF16_OFFSET, decode_words
from vllm_ext.kernels.gpu.scaling import JOINT_FACTORS, load_factors


@triton.jit
def _split_word(word):
    """(scale, zero point) of a word as GPU_FRAGMENT stores them, in float32."""
    scale = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, zero


@triton.jit
def _load_both(x_scales, x_sums, token_mask, BLOCK_N: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    return load_factors(x_scales, x_sums, token_mask, BLOCK_N, BLOCK_TOKENS, JOINT_FACTORS)


@triton.jit
def _load_sums(x_sums, token_mask, BLOCK_N: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    sums, _ = load_factors(x_sums, x_sums, token_mask, BLOCK_N, BLOCK_TOKENS, JOINT_FACTORS)
    return sums


@triton.jit
def fragment_kernel(
    codes, high_codes, words, x, x_scales, x_sums, out, N, K, num_tokens,
    BITS: tl.constexpr, ACT_BITS: tl.constexpr, FP8: tl.constexpr, BY_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_TOKENS: tl.constexpr, STAGES: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """out float32 [num_tokens, N], of K = a multiple of 128 columns and N = a multiple of BLOCK_N rows.

    codes, high_codes: the planes of GPU_FRAGMENT, int8 words (int16 for 16-bit activations); words: its scales and zero
    points. x [num_tokens, K] bf16, or int8 or (FP8) e4m3 with x_scales; x_scales, x_sums float32 [num_tokens, K/128].
    BY_TOKEN: a row of x has one scale, its first.
    """
    TWO_PLANES: tl.constexpr = BITS == 3
    LOW_BITS: tl.constexpr = 2 if TWO_PLANES else BITS
    LOW: tl.constexpr = 128 * LOW_BITS // ACT_BITS
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token_mask = tokens < num_tokens
    chunks = K // 128
    first = (rows // 64) * chunks * 64 + rows % 64
    low_words = codes + first[:, None] * LOW + tl.arange(0, LOW)[None, :]
    high_words = high_codes + first[:, None] * (LOW // 2) + tl.arange(0, LOW // 2)[None, :]
    values = x + tokens[None, :] * K + tl.arange(0, 128)[:, None]
    scales, sums = x_scales + tokens * chunks, x_sums + tokens * chunks
    acc = tl.zeros((BLOCK_N, BLOCK_TOKENS), tl.float32)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        low = tl.load(low_words + chunk * (64 * LOW))
        high = low
        if TWO_PLANES:
            high = tl.load(high_words + chunk * (32 * LOW))
        weights = decode_words(low, high, BITS, ACT_BITS, False, BLOCK_N, USE_ASM)
        scale, zero = _split_word(tl.load(words + first + chunk * 64))
        part = tl.load(values + chunk * 128, mask=token_mask[None, :], other=0.0)
        if ACT_BITS == 16:
            if not USE_ASM:
                # The interpreter multiplies bf16 as if it were integers.
                weights = weights.to(tl.float32)
                part = part.to(tl.float32)
            x_sum = tl.load(sums + chunk, mask=token_mask, other=0)
            acc += (tl.dot(weights, part) - (zero + BF16_OFFSET)[:, None] * x_sum[None, :]) * scale[:, None]
        else:
            if FP8:
                product = tl.dot(weights.to(tl.float8e4nv, bitcast=True), part, out_dtype=tl.float32)
            else:
                product = tl.dot(weights, part, out_dtype=tl.int32).to(tl.float32)
            if BY_TOKEN:
                x_sum = _load_sums(sums + chunk, token_mask, BLOCK_N, BLOCK_TOKENS)
                acc += (product - zero[:, None] * x_sum[None, :]) * scale[:, None]
            else:
                x_scale, x_sum = _load_both(scales + chunk, sums + chunk, token_mask, BLOCK_N, BLOCK_TOKENS)
                acc += ((product - zero[:, None] * x_sum[None, :]) * x_scale[None, :]) * scale[:, None]
    if BY_TOKEN:
        acc = acc * tl.load(scales, mask=token_mask, other=0)[None, :]
    tl.store(out + tokens[None, :] * N + rows[:, None], acc, mask=token_mask[None, :])
