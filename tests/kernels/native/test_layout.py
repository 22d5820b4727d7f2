# SPDX-License-Identifier: Apache-2.0
"""Records: every bit of a line used once, round trips, and single codes found where the drawing puts them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ext.kernels.arena import BlockFormat, Field, Layout, place_block
from vllm_ext.kernels.blocks import copy_block, dequantize_block, write_codes
from vllm_ext.kernels.native import layout
from vllm_ext.kernels.packing import CODE_BITS


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, bool]:
    """(codes, scales, zeros, bits, group size, gate_up) of a random weight with odd sizes."""
    bits, gate_up = draw(st.sampled_from(CODE_BITS)), draw(st.booleans())
    group_size = draw(st.sampled_from((32, 64, 128, 256, -1)))
    K = draw(st.integers(1, 5)) * (8 if group_size == -1 else group_size)
    N = draw(st.integers(1, 40)) * (2 if gate_up else 1)
    groups = 1 if group_size == -1 else K // group_size
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    codes = torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 256, (N, groups), generator=generator, dtype=torch.uint8)
    return codes, torch.randn(N, groups, generator=generator).half(), zeros, bits, group_size, gate_up


@pytest.mark.parametrize("bits", CODE_BITS)
def test_lines_have_no_unused_and_no_shared_bit(bits: int) -> None:
    used = [(p.line, p.line_bit + i) for p in layout.list_pieces(bits) for i in range(p.width)]
    assert sorted(used) == [(line, bit) for line in range(4 * bits) for bit in range(8)]
    of_codes = [(p.vector, p.code_bit + i) for p in layout.list_pieces(bits) for i in range(p.width)]
    assert sorted(of_codes) == [(v, bit) for v in range(layout.VECTORS) for bit in range(bits)]


@given(weights())
def test_records_round_trip(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, bool]) -> None:
    codes, scales, zeros, bits, group_size, gate_up = case
    records = layout.pack_records(codes, scales, zeros, bits, group_size, gate_up)
    assert records.shape == (*layout.count_records(*codes.shape, gate_up), layout.record_bytes(bits, group_size))
    found = layout.unpack_records(records, bits, group_size, *codes.shape, gate_up)
    for got, expected in zip(found, (codes, scales, zeros), strict=True):
        assert torch.equal(got, expected)


@settings(max_examples=40)
@given(weights())
def test_arena_gives_the_same_weight_in_both_layouts(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, bool],
) -> None:
    codes, scales, zeros, bits, group_size, gate_up = case
    K = codes.shape[1]
    if K * bits % 8:
        return
    plain = BlockFormat(bits, 16, group_size, layout=Layout.PLAIN_CODES)
    row, end = place_block(plain, *codes.shape, 0)
    record_row, record_end = place_block(plain._replace(layout=Layout.CPU_RECORD), *codes.shape, end, gate_up)
    assert record_row[Field.SCALES_OFFSET : Field.LAYOUT] == [-1, -1]
    arena = torch.full((record_end,), 0xA5, dtype=torch.uint8)
    write_codes(arena, row, codes, scales, zeros)
    copy_block(arena, row, arena, record_row, *codes.shape, gate_up)
    expected = dequantize_block(arena, row, *codes.shape)
    assert torch.equal(dequantize_block(arena, record_row, *codes.shape, gate_up), expected)


#: (bits, row, k, code) -> (line behind the header, byte, value of the byte when all other codes are 0)
PLACES = [
    (2, 0, 0, 3, 0, 0, 0b11),
    (2, 5, 127, 2, 7, 23, 0b10_00_00_00),
    (3, 1, 4, 7, 0, 4, 0b00_111_000),
    (3, 0, 24, 0b111, 0, 0, 0b11_000_000),
    (3, 2, 28, 0b100, 2, 8, 0b1_0_000_000),
    (4, 15, 9, 0xF, 1, 61, 0x0F),
    (5, 3, 0, 0b10001, 0, 12, 0b0001),
    (6, 0, 12, 0b110110, 0, 0, 0b11_000000),
    (8, 4, 6, 0xC3, 1, 18, 0xC3),
]


@pytest.mark.parametrize(("bits", "row", "k", "code", "line", "byte", "value"), PLACES)
def test_a_code_stands_where_the_drawing_says(
    bits: int, row: int, k: int, code: int, line: int, byte: int, value: int
) -> None:
    codes = torch.zeros(16, 128, dtype=torch.uint8)
    codes[row, k] = code
    scales, zeros = torch.zeros(16, 1).half(), torch.zeros(16, 1, dtype=torch.uint8)
    record = layout.pack_records(codes, scales, zeros, bits, 128).flatten()
    assert int(record[64 * (1 + line) + byte]) == value


def test_header_holds_scales_then_zero_points() -> None:
    codes = torch.zeros(16, 128, dtype=torch.uint8)
    scales = torch.arange(64).view(16, 4).half()
    record = layout.pack_records(codes, scales, None, 4, 32).flatten()
    header = record[: 4 * 64].view(torch.float16).view(4, 2, 16)
    assert torch.equal(header[:, 0], scales.T)
    assert torch.equal(header[:, 1], torch.full((4, 16), 8.0).half())


def test_gate_and_up_stand_in_turn_and_short_blocks_are_padded() -> None:
    codes = torch.full((2 * 20, 128), 1, dtype=torch.uint8)
    codes[20:] = 2
    records = layout.pack_records(codes, torch.ones(40, 1).half(), None, 8, 128, gate_up=True)
    assert records.shape == (4, 1, 64 * 33)
    assert [int(block[0, 64]) for block in records] == [1, 2, 1, 2]
    # 4 rows of the last blocks; scale 0 and code 0 behind.
    assert records[2, 0, 64:].view(32, 16, 4)[:, 4:].sum() == 0
    assert records[3, 0, :32].view(torch.float16).tolist() == [1.0] * 4 + [0.0] * 12


def test_what_records_cannot_hold_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="group_size=8 does not fit records of 128"):
        layout.record_bytes(4, 8)
    with pytest.raises(ValueError, match="bits=7 is not a code width"):
        layout.record_bytes(7, 128)
    block = BlockFormat(4, 16, 128, layout=Layout.CPU_RECORD)
    with pytest.raises(ValueError, match="group_size=128 does not divide K=136"):
        place_block(block, 16, 136, 0)
    row, end = place_block(block, 16, 128, 0)
    arena = torch.zeros(end, dtype=torch.uint8)
    codes, scales = torch.zeros(16, 128, dtype=torch.uint8), torch.zeros(16, 1).half()
    with pytest.raises(ValueError, match=r"scales must be torch.float16 \[16, 1\], got torch.float32"):
        write_codes(arena, row, codes, scales.float(), None)
    with pytest.raises(ValueError, match="code 16 does not fit in bits=4"):
        write_codes(arena, row, codes + 16, scales, None)
    with pytest.raises(ValueError, match="the arena is truncated"):
        write_codes(arena[:-1], row, codes, scales, None)
