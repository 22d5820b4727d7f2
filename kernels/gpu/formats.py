# SPDX-License-Identifier: Apache-2.0
"""Which combinations of widths a compiled kernel can decode.

A format is what one loop over K is compiled for. It has a number, and a set of formats is an integer with one bit for
each: the kernels take it as a constant, so a plan of two schemes compiles two loops and not thirty-three.

    number   piece (128, 64, 32 columns) * 10 + activations (16, 8 bits) * 5 + stored width (2, 3, 4, 6, 8 bits)
             30, 31, 32   the weight itself in bf16, fp16, fp32

Activations are prepared once per kind, before the GEMM: int8 codes per group (`A8`, one kind per group size), or sums
per piece (`A16`, where the GEMM corrects for zero points with them). The kinds of a layer are an integer of bits, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..arena import FULL_PRECISION_DTYPES, Field, Layout
from .layout import DEPTH, STORED_BITS, count_pieces

STORED_WIDTHS = (2, 3, 4, 6, 8)
PIECE_DEPTHS = (128, 64, 32)
PLAIN_LAYOUTS = tuple(FULL_PRECISION_DTYPES)

#: Formats of codes; behind them come the plain ones.
NUM_CODE_FORMATS = len(PIECE_DEPTHS) * 2 * len(STORED_WIDTHS)
NUM_FORMATS = NUM_CODE_FORMATS + len(PLAIN_LAYOUTS)

#: Kinds of prepared activations, by number: int8 with a scale per group of this size (-1: a row), then sums per piece.
INT8_GROUPS = (-1, 32, 64, 128)
SUM_DEPTHS = (32, 64, 128)
NUM_KINDS = len(INT8_GROUPS) + len(SUM_DEPTHS)


class Format(NamedTuple):
    """A block of codes as a kernel sees it."""

    stored_bits: int
    act_bits: int
    depth: int

    @property
    def number(self) -> int:
        """Its bit in a set of formats."""
        act = 1 if self.act_bits == 8 else 0
        return PIECE_DEPTHS.index(self.depth) * 10 + act * 5 + STORED_WIDTHS.index(self.stored_bits)


def number_format(row: Sequence[int]) -> int | None:
    """The format of a row of a table, as a list; None where the kernels have none for its layout."""
    if row[Field.LAYOUT] == Layout.GPU_FRAGMENT:
        depth = DEPTH // count_pieces(row[Field.GROUP_SIZE])
        return Format(STORED_BITS[row[Field.WEIGHT_BITS]], row[Field.ACT_BITS], depth).number
    if row[Field.LAYOUT] in PLAIN_LAYOUTS and row[Field.ACT_BITS] == 16:
        return NUM_CODE_FORMATS + PLAIN_LAYOUTS.index(Layout(row[Field.LAYOUT]))
    return None


def collect_formats(rows: Iterable[Sequence[int]]) -> int | None:
    """The set of formats of rows of a table; None where one has none."""
    formats = 0
    for row in rows:
        number = number_format(row)
        if number is None:
            return None
        formats |= 1 << number
    return formats


def collect_kinds(rows: Iterable[Sequence[int]]) -> int:
    """The set of kinds of activations that blocks of codes can ask for: int8 ones, and sums for 16-bit ones."""
    kinds = 0
    for row in rows:
        if row[Field.LAYOUT] == Layout.GPU_FRAGMENT:
            group_size = row[Field.GROUP_SIZE]
            if row[Field.ACT_BITS] == 8:
                kinds |= 1 << INT8_GROUPS.index(group_size)
            else:
                depth = DEPTH // count_pieces(group_size)
                kinds |= 1 << (len(INT8_GROUPS) + SUM_DEPTHS.index(depth))
    return kinds


def keep_int8(kinds: int) -> int:
    """Without the sums."""
    return kinds & ((1 << len(INT8_GROUPS)) - 1)


def list_kinds(kinds: int) -> list[int]:
    """Numbers of the kinds in a set, in order: their places in the buffers of prepared activations."""
    return [kind for kind in range(NUM_KINDS) if kinds >> kind & 1]


def describe_kind(kind: int) -> tuple[bool, int, int]:
    """(int8, group size, columns of a piece) of a kind."""
    if kind < len(INT8_GROUPS):
        group_size = INT8_GROUPS[kind]
        return True, group_size, DEPTH // count_pieces(group_size)
    depth = SUM_DEPTHS[kind - len(INT8_GROUPS)]
    return False, depth, depth


def finest_depth(formats: int) -> int:
    """The smallest piece among the formats of codes in a set; `DEPTH` where there are none."""
    depths = [PIECE_DEPTHS[number // 10] for number in range(NUM_CODE_FORMATS) if formats >> number & 1]
    return min(depths, default=DEPTH)
