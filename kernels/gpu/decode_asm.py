# SPDX-License-Identifier: Apache-2.0
"""PTX that turns words of codes (layout.py) into operands of the tensor core, two or four weights per instruction.

For 16-bit activations a register holds two halfwords. Masking a field and setting the bits of a power of two beneath
it is one `lop3`, and makes a bf16 of value 128 + code (seven bits below 128), or an fp16 of value 1024 + code:

    word >> shift        | . . . . . . . . . . . . c c c c |   twice, for elements e = 0 and 1
    & 0x000F             | 0 0 0 0 0 0 0 0 0 0 0 0 c c c c |
    | 0x4300             | 0 1 0 0 0 0 1 1 0 0 0 0 c c c c |   bf16 128 + code

Who multiplies takes the offset off again, together with the zero point (`code_offset`).

For 8-bit activations a register holds four bytes, and a field becomes an int8 by shifting and masking alone. 8-bit
codes need nothing there: they are stored as signed bytes.

The bodies are pure: no memory, no state. tests/kernels/gpu/test_decode_asm.py checks them bit by bit in an emulation.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from .layout import PLANES

#: Element types of decoded weights.
BF16, FP16, INT8 = "bf16", "fp16", "int8"

#: Halfwords whose value is a power of two, and that power; lower bits count in units of one.
MAGIC = {BF16: 0x4300, FP16: 0x6400}
MAGIC_VALUE = {BF16: 128, FP16: 1024}

#: lop3 tables of (a & b) | c and (a & b) ^ c.
AND_OR, AND_XOR = 0xEA, 0x6A


class Body(NamedTuple):
    """An inline body: PTX text, and the constraints of its operands, outputs first."""

    text: str
    constraints: str


def code_offset(stored_bits: int, element: str) -> int:
    """Decoded value minus code."""
    if stored_bits == 8 and element != FP16:
        # Stored as signed bytes, and bf16 has no room for 128 + 255.
        return -128
    return 0 if element == INT8 else MAGIC_VALUE[element]


def count_outputs(stored_bits: int, element: str) -> int:
    """Registers that a body writes: slots of the word that it reads, or of both where the low plane has two."""
    word_bits = 8 if element == INT8 else 16
    planes = PLANES[stored_bits]
    return word_bits // planes[0] * len(planes)


@functools.cache
def write_body(stored_bits: int, element: str) -> Body:
    """The body for a width and an element type.

    Operands: one output per slot; then the word, or, where the code has two planes, two words of the low plane and
    one of the high plane. Raises ValueError for signed bytes, which are operands as they are.
    """
    if element == INT8 and stored_bits == 8:
        raise ValueError("8-bit codes for 8-bit activations are stored as they are multiplied: no body")
    num_outputs = count_outputs(stored_bits, element)
    if len(PLANES[stored_bits]) == 2:
        lines = _combine_planes(stored_bits, element, num_outputs)
        num_inputs = 3
    elif stored_bits == 8:
        lines = _convert_bytes(element)
        num_inputs = 1
    else:
        lines = _mask_fields(stored_bits, element, num_outputs)
        num_inputs = 1
    text = "{\n.reg .b32 t, u, m;\n" + "\n".join(lines) + "\n}"
    # Early clobber: an output is written while inputs are still read.
    return Body(text, ",".join(["=&r"] * num_outputs + ["r"] * num_inputs))


def _mask_fields(bits: int, element: str, num_outputs: int) -> list[str]:
    lines = []
    for slot in range(num_outputs):
        lines.append(_shift("t", f"${num_outputs}", bits * slot))
        mask = _repeat((1 << bits) - 1, element)
        if element == INT8:
            lines.append(f"and.b32 ${slot}, t, {mask:#010x};")
        else:
            lines.append(_lop3(f"${slot}", "t", mask, f"{_repeat(MAGIC[element], element):#010x}", AND_OR))
    return lines


def _combine_planes(stored_bits: int, element: str, num_outputs: int) -> list[str]:
    low, high = PLANES[stored_bits]
    low_mask, high_mask = _repeat((1 << low) - 1, element), _repeat(((1 << high) - 1) << low, element)
    per_word = num_outputs // 2
    lines = []
    for slot in range(num_outputs):
        word, place = divmod(slot, per_word)
        lines.append(_shift("t", f"${num_outputs + word}", low * place))
        if element == INT8:
            lines.append(f"and.b32 t, t, {low_mask:#010x};")
        else:
            lines.append(_lop3("t", "t", low_mask, f"{_repeat(MAGIC[element], element):#010x}", AND_OR))
        # The high bits come from above or from below their place over the low ones.
        lines.append(_shift("u", f"${num_outputs + 2}", high * slot - low))
        lines.append(_lop3(f"${slot}", "u", high_mask, "t", AND_OR))
    return lines


def _convert_bytes(element: str) -> list[str]:
    """Signed bytes, code - 128, in halves of halfwords."""
    # The multiplier -1, twice: sub.bf16x2 is not there before sm_90.
    lines = ["mov.b32 m, 0xBF80BF80;"] if element == BF16 else []
    for slot in range(2):
        lines.append(_shift("t", "$2", 8 * slot))
        if element == FP16:
            # Flipping the sign gives the code again.
            lines.append(_lop3(f"${slot}", "t", 0x00FF00FF, "0x64806480", AND_XOR))
            continue
        # Seven bits fit below 128; the sign beneath it makes 256, or 128 without: 128 + low - (128 or 256).
        lines.append(_lop3("u", "t", 0x007F007F, "0x43004300", AND_OR))
        lines.append(_lop3("t", "t", 0x00800080, "0x43004300", AND_OR))
        lines.append(f"fma.rn.bf16x2 ${slot}, t, m, u;")
    return lines


def _repeat(field: int, element: str) -> int:
    """The same in every element of a register."""
    return field * (0x01010101 if element == INT8 else 0x00010001)


def _shift(target: str, source: str, right: int) -> str:
    if right == 0:
        return f"mov.b32 {target}, {source};"
    return f"shr.u32 {target}, {source}, {right};" if right > 0 else f"shl.b32 {target}, {source}, {-right};"


def _lop3(target: str, a: str, b: int, c: str, table: int) -> str:
    return f"lop3.b32 {target}, {a}, {b:#010x}, {c}, {table:#x};"
