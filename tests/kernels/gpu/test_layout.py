# SPDX-License-Identifier: Apache-2.0
"""GPU_FRAGMENT: round trips, single codes found where the drawing puts them, and the arena around it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.mixed_moe_cases import make_layer
from vllm_ext.kernels import blocks
from vllm_ext.kernels.arena import BlockFormat, Field, Layout, place_block
from vllm_ext.kernels.blocks import copy_block, dequantize_block, write_codes
from vllm_ext.kernels.gpu import layout
from vllm_ext.kernels.mixed_moe.layout import copy_arena, plan_arena
from vllm_ext.kernels.packing import CODE_BITS


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, int, bool]:
    """(codes, scales, zeros, bits, activation bits, group size, gate_up) of a random weight with odd sizes."""
    bits, gate_up = draw(st.sampled_from(CODE_BITS)), draw(st.booleans())
    group_size = draw(st.sampled_from(layout.GROUP_SIZES))
    K = draw(st.integers(1, 5)) * (8 if group_size == -1 else group_size)
    N = draw(st.integers(1, 40)) * (2 if gate_up else 1)
    groups = 1 if group_size == -1 else K // group_size
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    codes = torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
    largest = 255 if bits == 8 else layout.LARGEST_ZERO
    zeros = torch.randint(0, largest + 1, (N, groups), generator=generator, dtype=torch.uint8)
    scales = torch.randn(N, groups, generator=generator).half()
    return codes, scales, zeros, bits, draw(st.sampled_from((8, 16))), group_size, gate_up


@given(weights())
def test_fragments_round_trip(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, int, bool]) -> None:
    codes, scales, zeros, bits, act_bits, group_size, gate_up = case
    packed, words = layout.pack_fragments(codes, scales, zeros, bits, act_bits, group_size, gate_up)
    sizes = layout.section_bytes(bits, group_size, *codes.shape, gate_up)
    assert (packed.numel(), words.numel() * words.element_size()) == sizes
    found = layout.unpack_fragments(packed, words, bits, act_bits, group_size, *codes.shape, gate_up)
    for got, expected in zip(found, (codes, scales, zeros), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@settings(max_examples=40)
@given(weights())
def test_arena_gives_the_same_weight_in_both_layouts(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, int, bool],
) -> None:
    codes, scales, zeros, bits, act_bits, group_size, gate_up = case
    shape = tuple(codes.shape)
    if shape[1] * bits % 8:
        return
    plain = BlockFormat(bits, act_bits, group_size)
    row, end = place_block(plain, *shape, 0)
    target_row, target_end = place_block(plain._replace(layout=Layout.GPU_FRAGMENT), *shape, end, gate_up)
    assert target_row[Field.ZEROS_OFFSET] == -1
    memory = torch.full((target_end,), 0xA5, dtype=torch.uint8)
    write_codes(memory, row, codes, scales, zeros)
    copy_block(memory, row, memory, target_row, *shape, gate_up)
    expected = dequantize_block(memory, row, *shape)
    assert torch.equal(dequantize_block(memory, target_row, *shape, gate_up), expected)


def find_code(bits: int, act_bits: int, row: int, column: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Halfwords (bytes for 8-bit activations) of a weight [64, 128] of zeros but for one code: where the code is."""
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    codes[row, column] = 2**bits - 1
    packed, _ = layout.pack_fragments(codes, torch.ones(64, 1).half(), None, bits, act_bits, 128)
    words = packed.view(torch.int16 if act_bits == 16 else torch.int8)
    (places,) = words.nonzero(as_tuple=True)
    return bits, places, words[places]


def test_a_code_is_where_the_drawing_puts_it() -> None:
    # 4 bits, 16-bit activations: column 77 = 8 * slot 9 + 2 * lane 2 + element 1; slot 9 is place 1 of word 2.
    _, places, values = find_code(4, 16, row=5, column=77)
    assert places.tolist() == [((5 * 4 + 2) * 4 + 2) * 2 + 1]
    assert values.tolist() == [0xF << 4]
    # 2 bits, 8-bit activations: column 77 = 16 * slot 4 + 4 * lane 3 + element 1; slot 4 is place 0 of word 1.
    _, places, values = find_code(2, 8, row=5, column=77)
    assert places.tolist() == [((5 * 4 + 3) * 2 + 1) * 4 + 1]
    assert values.tolist() == [3]
    # 3 bits: two low bits in a word of eight slots, then the high ones of all sixteen slots in another plane.
    _, places, values = find_code(3, 16, row=5, column=77)
    low, high = ((5 * 4 + 2) * 2 + 1) * 2 + 1, 64 * 128 * 2 // 16 + (5 * 4 + 2) * 2 + 1
    assert places.tolist() == [low, high]
    assert values.tolist() == [3 << 2, 1 << 9]


def test_gate_and_up_alternate_in_eights() -> None:
    half = 24
    codes = torch.arange(2 * half, dtype=torch.uint8)[:, None].expand(-1, 128).contiguous()
    packed, words = layout.pack_fragments(codes, torch.ones(2 * half, 1).half(), None, 8, 8, 128, gate_up=True)
    rows = (packed.view(64, 128)[:, 0] ^ 0x80).tolist()
    eights = [list(range(start, start + 8)) for start in (0, half, 8, half + 8, 16, half + 16)]
    assert rows == [row for eight in eights for row in eight] + [0] * (64 - 2 * half)
    assert (words[2 * half :] == 0).all()


@pytest.mark.parametrize("bits", CODE_BITS)
def test_symmetric_zero_points_are_those_of_the_codes(bits: int) -> None:
    """Also where codes are stored wider: a symmetric 5-bit code of 16 is 0, not one of 32."""
    codes = torch.zeros(8, 32, dtype=torch.uint8)
    sections = layout.pack_fragments(codes, torch.ones(8, 1).half(), None, bits, 16, 32)
    _, _, zeros = layout.unpack_fragments(*sections, bits, 16, 32, 8, 32)
    assert (zeros == 2 ** (bits - 1)).all()


def test_ternary_layers_become_two_bits() -> None:
    ternary = BlockFormat.ternary(16, 32)
    layer = make_layer([(ternary, ternary)], 64, 32)
    plan = plan_arena([(ternary._replace(layout=Layout.GPU_FRAGMENT),) * 2], 64, 32)
    memory = torch.zeros(plan.num_bytes, dtype=torch.uint8)
    copy_arena(layer.arena, layer.table, memory, plan.table, 64, 32)
    for block, (N, K) in enumerate(((64, 64), (64, 32))):
        found = dequantize_block(memory, plan.table[0, block].tolist(), N, K, gate_up=block == 0)
        assert torch.equal(found.double(), torch.from_numpy(layer.weights[0][block]))


def test_what_the_layout_lacks_is_refused() -> None:
    block = BlockFormat(4, 16, 8, layout=Layout.GPU_FRAGMENT)
    with pytest.raises(ValueError, match="expert 0, gate_up: group_size=8 does not fit chunks of 128: use 32, 64, 128"):
        plan_arena([(block, block)], 64, 32)
    row, end = place_block(block._replace(group_size=32), 48, 64, 0)
    memory = torch.zeros(end, dtype=torch.uint8)
    codes, scales = torch.zeros(48, 64, dtype=torch.uint8), torch.ones(48, 2).half()
    zeros = torch.zeros(48, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="code 16 does not fit in bits=4"):
        write_codes(memory, row, codes.fill_(16), scales, zeros)
    with pytest.raises(ValueError, match="zero point 128 of bits=4 is past 127: codes end at 15"):
        write_codes(memory, row, codes.fill_(0), scales, zeros.fill_(128))
    with pytest.raises(ValueError, match=r"scales must be torch\.float16 \[48, 2\]"):
        write_codes(memory, row, codes, scales.float(), None)
    with pytest.raises(ValueError, match="lies outside the arena"):
        blocks.read_codes(memory[:64], row, 48, 64)
    with pytest.raises(ValueError, match=r"does not describe a weight \[48, 192\]"):
        blocks.read_codes(memory, row, 48, 192)
    with pytest.raises(ValueError, match="bits=7 is not a code width"):
        place_block(block._replace(weight_bits=7, group_size=32), 48, 64, 0)
