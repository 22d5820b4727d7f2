# SPDX-License-Identifier: Apache-2.0
# Triton reads the annotations of its functions as its own.
# mypy: disallow-untyped-defs=False
"""Words of codes to operands of the tensor core, as a Triton function: by the PTX of decode_asm.py, or in plain Triton.

The plain form computes the same values and is what the interpreter runs, which has no inline PTX. On a GPU it would
take several times the instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_asm import BF16, FP16, INT8, code_offset, write_body


def _text(stored_bits: int, element: str) -> tl.constexpr:
    return tl.constexpr(write_body(stored_bits, element).text)


def _constraints(stored_bits: int, element: str) -> tl.constexpr:
    return tl.constexpr(write_body(stored_bits, element).constraints)


# Triton functions see globals only where they are constants, and a dictionary is none.
BF16_2, BF16_3, BF16_4, BF16_6, BF16_8 = (_text(bits, BF16) for bits in (2, 3, 4, 6, 8))
FP16_2, FP16_3, FP16_4, FP16_6, FP16_8 = (_text(bits, FP16) for bits in (2, 3, 4, 6, 8))
INT8_2, INT8_3, INT8_4, INT8_6 = (_text(bits, INT8) for bits in (2, 3, 4, 6))
# bf16 and fp16 differ in their masks only.
HALF_ARGS_2, HALF_ARGS_3, HALF_ARGS_4, HALF_ARGS_6, HALF_ARGS_8 = (_constraints(bits, BF16) for bits in (2, 3, 4, 6, 8))
INT8_ARGS_2, INT8_ARGS_3, INT8_ARGS_4, INT8_ARGS_6 = (_constraints(bits, INT8) for bits in (2, 3, 4, 6))

BF16_OFFSET = tl.constexpr(code_offset(4, BF16))
FP16_OFFSET = tl.constexpr(code_offset(4, FP16))
SIGNED_OFFSET = tl.constexpr(code_offset(8, BF16))


@triton.jit
def _join_2(parts):
    return tl.join(parts[0], parts[1])


@triton.jit
def _join_4(parts):
    joined = tl.join(tl.join(parts[0], parts[1]), tl.join(parts[2], parts[3]))
    return tl.permute(joined, (0, 1, 3, 2))


@triton.jit
def _join_8(parts):
    first = tl.join(tl.join(parts[0], parts[1]), tl.join(parts[2], parts[3]))
    second = tl.join(tl.join(parts[4], parts[5]), tl.join(parts[6], parts[7]))
    return tl.permute(tl.join(first, second), (0, 1, 4, 3, 2))


@triton.jit
def _join_16(parts):
    a = tl.join(tl.join(parts[0], parts[1]), tl.join(parts[2], parts[3]))
    b = tl.join(tl.join(parts[4], parts[5]), tl.join(parts[6], parts[7]))
    c = tl.join(tl.join(parts[8], parts[9]), tl.join(parts[10], parts[11]))
    d = tl.join(tl.join(parts[12], parts[13]), tl.join(parts[14], parts[15]))
    return tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 1, 5, 4, 3, 2))


@triton.jit
def _run_asm(first, second, high, BITS: tl.constexpr, ACT_BITS: tl.constexpr, IS_FP16: tl.constexpr):
    """[rows, words] -> [rows, words, ...slots]. first, second: the words of the low plane in turn."""
    # The element types are written out: Triton takes no constant in their place.
    if ACT_BITS == 8:
        if BITS == 2:
            return _join_4(tl.inline_asm_elementwise(INT8_2, INT8_ARGS_2, [first], (tl.int8,) * 4, True, 4))
        elif BITS == 3:
            return _join_8(
                tl.inline_asm_elementwise(INT8_3, INT8_ARGS_3, [first, second, high], (tl.int8,) * 8, True, 4)
            )
        elif BITS == 4:
            return _join_2(tl.inline_asm_elementwise(INT8_4, INT8_ARGS_4, [first], (tl.int8,) * 2, True, 4))
        else:
            return _join_4(
                tl.inline_asm_elementwise(INT8_6, INT8_ARGS_6, [first, second, high], (tl.int8,) * 4, True, 4)
            )
    elif IS_FP16:
        if BITS == 2:
            return _join_8(tl.inline_asm_elementwise(FP16_2, HALF_ARGS_2, [first], (tl.float16,) * 8, True, 2))
        elif BITS == 3:
            return _join_16(
                tl.inline_asm_elementwise(FP16_3, HALF_ARGS_3, [first, second, high], (tl.float16,) * 16, True, 2)
            )
        elif BITS == 4:
            return _join_4(tl.inline_asm_elementwise(FP16_4, HALF_ARGS_4, [first], (tl.float16,) * 4, True, 2))
        elif BITS == 6:
            return _join_8(
                tl.inline_asm_elementwise(FP16_6, HALF_ARGS_6, [first, second, high], (tl.float16,) * 8, True, 2)
            )
        else:
            return _join_2(tl.inline_asm_elementwise(FP16_8, HALF_ARGS_8, [first], (tl.float16,) * 2, True, 2))
    else:
        if BITS == 2:
            return _join_8(tl.inline_asm_elementwise(BF16_2, HALF_ARGS_2, [first], (tl.bfloat16,) * 8, True, 2))
        elif BITS == 3:
            return _join_16(
                tl.inline_asm_elementwise(BF16_3, HALF_ARGS_3, [first, second, high], (tl.bfloat16,) * 16, True, 2)
            )
        elif BITS == 4:
            return _join_4(tl.inline_asm_elementwise(BF16_4, HALF_ARGS_4, [first], (tl.bfloat16,) * 4, True, 2))
        elif BITS == 6:
            return _join_8(
                tl.inline_asm_elementwise(BF16_6, HALF_ARGS_6, [first, second, high], (tl.bfloat16,) * 8, True, 2)
            )
        else:
            return _join_2(tl.inline_asm_elementwise(BF16_8, HALF_ARGS_8, [first], (tl.bfloat16,) * 2, True, 2))


@triton.jit
def _shift_fields(words, NUM_FIELDS: tl.constexpr, FIELD_BITS: tl.constexpr):
    """[rows, words] -> int32 [rows, words, NUM_FIELDS], lowest field first."""
    shifts = tl.arange(0, NUM_FIELDS) * FIELD_BITS
    return (words.to(tl.int32)[:, :, None] >> shifts[None, None, :]) & ((1 << FIELD_BITS) - 1)


@triton.jit
def _run_plain(
    first,
    second,
    high,
    BITS: tl.constexpr,
    ACT_BITS: tl.constexpr,
    IS_FP16: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """As `_run_asm`, slots in one dimension."""
    TWO_PLANES: tl.constexpr = BITS == 3 or BITS == 6
    HIGH_BITS: tl.constexpr = BITS // 3
    if TWO_PLANES:
        LOW_BITS: tl.constexpr = 2 * HIGH_BITS
        a = _shift_fields(first, NUM_OUTPUTS // 2, LOW_BITS)
        b = _shift_fields(second, NUM_OUTPUTS // 2, LOW_BITS)
        low = tl.reshape(tl.permute(tl.join(a, b), (0, 1, 3, 2)), (ROWS, WORDS, NUM_OUTPUTS))
        codes = low | (_shift_fields(high, NUM_OUTPUTS, HIGH_BITS) << LOW_BITS)
    else:
        codes = _shift_fields(first, NUM_OUTPUTS, BITS)
    if ACT_BITS == 8:
        return codes.to(tl.int8)
    elif BITS == 8:
        # Stored as signed bytes, code - 128; the fp16 form gives 1024 + code.
        flipped = codes ^ 0x80
        values = flipped + FP16_OFFSET if IS_FP16 else flipped + SIGNED_OFFSET
    else:
        values = codes + FP16_OFFSET if IS_FP16 else codes + BF16_OFFSET
    return values.to(tl.float32).to(tl.float16) if IS_FP16 else values.to(tl.float32).to(tl.bfloat16)


@triton.jit
def decode_plainly(
    words, BITS: tl.constexpr, ACT_BITS: tl.constexpr, IS_FP16: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr
):
    """Words [ROWS, WORDS] of codes of one plane -> [ROWS, WORDS, fields], as `decode_words` does without PTX."""
    return _run_plain(words, words, words, BITS, ACT_BITS, IS_FP16, ACT_BITS // BITS, ROWS, WORDS)


@triton.jit
def decode_words(
    low,
    high,
    BITS: tl.constexpr,
    ACT_BITS: tl.constexpr,
    IS_FP16: tl.constexpr,
    ROWS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Weights [ROWS, 128] of a chunk: code plus `decode_asm.code_offset`, exact.

    low, high: the planes of a chunk, int16 (int8 for 8-bit activations) [ROWS, words * elements of four lanes]; high is
    read where BITS is 3 or 6. Not for 8 bits with 8-bit activations. Returns bf16, fp16 or int8.
    """
    ELEMENTS: tl.constexpr = 4 if ACT_BITS == 8 else 2
    WORD_BITS: tl.constexpr = 8 if ACT_BITS == 8 else 16
    TWO_PLANES: tl.constexpr = BITS == 3 or BITS == 6
    LOW_BITS: tl.constexpr = 2 * BITS // 3 if TWO_PLANES else BITS
    NUM_OUTPUTS: tl.constexpr = (WORD_BITS // LOW_BITS) * (2 if TWO_PLANES else 1)
    LANE_WORDS: tl.constexpr = 128 // (4 * ELEMENTS * NUM_OUTPUTS)
    WORDS: tl.constexpr = 4 * LANE_WORDS * ELEMENTS
    first = low
    second = low
    if TWO_PLANES:
        # Words 2w and 2w + 1 of the low plane belong to word w of the high one.
        pairs = tl.permute(tl.reshape(low, (ROWS, 4, LANE_WORDS, 2, ELEMENTS)), (0, 1, 2, 4, 3))
        first, second = tl.split(pairs)
        first = tl.reshape(first, (ROWS, WORDS))
        second = tl.reshape(second, (ROWS, WORDS))
    if USE_ASM:
        slots = _run_asm(first, second, high, BITS, ACT_BITS, IS_FP16)
    else:
        slots = _run_plain(first, second, high, BITS, ACT_BITS, IS_FP16, NUM_OUTPUTS, ROWS, WORDS)
    by_lane = tl.reshape(slots, (ROWS, 4, LANE_WORDS, ELEMENTS, NUM_OUTPUTS))
    return tl.reshape(tl.permute(by_lane, (0, 2, 4, 1, 3)), (ROWS, 128))
