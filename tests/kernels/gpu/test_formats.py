# SPDX-License-Identifier: Apache-2.0
"""Sets of formats and kinds: what a kernel is compiled for is what is in the table."""

from __future__ import annotations

import itertools

import torch

from vllm_ext.kernels.arena import BlockFormat, Layout, place_block
from vllm_ext.kernels.gpu import formats
from vllm_ext.kernels.gpu.formats import Format
from vllm_ext.kernels.gpu.layout import GROUP_SIZES


def make_row(bits: int, act_bits: int, group_size: int) -> list[int]:
    return place_block(BlockFormat(bits, act_bits, group_size, layout=Layout.GPU_FRAGMENT), 64, 128, 0)[0]


def test_numbers_are_those_of_the_drawing() -> None:
    every = itertools.product(formats.PIECE_DEPTHS, (16, 8), formats.STORED_WIDTHS)
    numbers = [Format(bits, act_bits, depth).number for depth, act_bits, bits in every]
    assert numbers == list(range(formats.NUM_CODE_FORMATS))
    plain = [BlockFormat.full_precision(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    rows = [place_block(block, 64, 128, 0)[0] for block in plain]
    assert [formats.number_format(row) for row in rows] == [30, 31, 32]
    # accumulate.py finds them by the layout's number.
    assert [int(block.layout) for block in plain] == [1, 2, 3]


def test_a_row_is_numbered_as_it_is_stored() -> None:
    assert formats.number_format(make_row(4, 16, 128)) == Format(4, 16, 128).number
    assert formats.number_format(make_row(4, 16, -1)) == Format(4, 16, 128).number
    assert formats.number_format(make_row(5, 8, 64)) == Format(6, 8, 64).number
    assert formats.number_format(place_block(BlockFormat(4, 16, 64), 64, 128, 0)[0]) is None
    plain_int8 = place_block(BlockFormat.full_precision(torch.bfloat16)._replace(act_bits=8), 64, 128, 0)[0]
    assert formats.number_format(plain_int8) is None


def test_sets_hold_what_the_rows_have() -> None:
    rows = [make_row(4, 16, 128), make_row(4, 16, -1), make_row(2, 8, 32), make_row(3, 8, -1)]
    expected = {Format(4, 16, 128).number, Format(2, 8, 32).number, Format(3, 8, 128).number}
    collected = formats.collect_formats(rows)
    assert collected is not None
    assert {number for number in range(formats.NUM_FORMATS) if collected >> number & 1} == expected
    assert formats.finest_depth(collected) == 32
    assert formats.finest_depth(1 << 30) == 128
    assert formats.collect_formats([*rows, place_block(BlockFormat(4, 16, 64), 64, 128, 0)[0]]) is None


def test_kinds_are_described_as_they_are_asked_for() -> None:
    for act_bits, group_size in itertools.product((8, 16), GROUP_SIZES):
        (kind,) = formats.list_kinds(formats.collect_kinds([make_row(4, act_bits, group_size)]))
        int8, described, depth = formats.describe_kind(kind)
        assert int8 == (act_bits == 8)
        assert depth == (128 if group_size == -1 else group_size)
        assert described == (group_size if int8 else depth)
    every = formats.collect_kinds([make_row(4, *pair) for pair in itertools.product((8, 16), GROUP_SIZES)])
    assert formats.list_kinds(every) == list(range(formats.NUM_KINDS))
    assert formats.list_kinds(formats.keep_int8(every)) == [0, 1, 2, 3]
