# SPDX-License-Identifier: Apache-2.0
"""The bit stream: round trips at every width, and byte-for-byte agreement with an independent definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ext.kernels.packing import CODE_BITS, pack_codes, packed_size, unpack_codes


@st.composite
def code_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits = draw(st.sampled_from(CODE_BITS))
    smallest = 8 // np.gcd(8, bits)
    shape = (*draw(st.lists(st.integers(0, 3), max_size=2)), smallest * draw(st.integers(0, 9)))
    seed = draw(st.integers(0, 2**16))
    codes = np.random.default_rng(seed).integers(0, 2**bits, size=shape, dtype=np.uint8)
    return torch.from_numpy(codes), bits


@settings(deadline=None)
@given(code_tensors())
def test_pack_codes_round_trips(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    packed = pack_codes(codes, bits)
    assert packed.shape == (*codes.shape[:-1], codes.shape[-1] * bits // 8)
    assert torch.equal(unpack_codes(packed, bits, codes.shape[-1]), codes)


@settings(deadline=None)
@given(code_tensors())
def test_code_i_occupies_bits_i_times_width(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    one_bit_each = (codes.numpy()[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    stream = one_bit_each.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    expected = np.packbits(stream, axis=-1, bitorder="little")
    assert np.array_equal(pack_codes(codes, bits).numpy(), expected)


def test_32_three_bit_codes_fill_three_little_endian_words() -> None:
    codes = torch.arange(32, dtype=torch.uint8) % 8
    stream = sum(int(code) << (3 * i) for i, code in enumerate(codes))
    words = np.frombuffer(pack_codes(codes, 3).numpy().tobytes(), dtype="<u4")
    assert [int(word) for word in words] == [(stream >> shift) & 0xFFFFFFFF for shift in (0, 32, 64)]


def test_non_contiguous_codes_pack_like_their_copy() -> None:
    codes = torch.randint(0, 8, (16, 6), dtype=torch.uint8).T
    assert torch.equal(pack_codes(codes, 3), pack_codes(codes.contiguous(), 3))


@pytest.mark.parametrize(("bits", "K"), [(3, 12), (5, 4), (2, 3), (4, 1), (6, 6)])
def test_partial_bytes_are_refused_by_name(bits: int, K: int) -> None:
    with pytest.raises(ValueError, match=rf"K={K} codes of bits={bits}"):
        packed_size(K, bits)
    with pytest.raises(ValueError, match=rf"K={K} codes of bits={bits}"):
        pack_codes(torch.zeros(2, K, dtype=torch.uint8), bits)


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="bits=7 is not a code width"):
        pack_codes(torch.zeros(8, dtype=torch.uint8), 7)
    with pytest.raises(ValueError, match="code 8 does not fit in bits=3"):
        pack_codes(torch.tensor([0, 1, 2, 3, 4, 5, 6, 8], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match=r"codes must be uint8, got torch\.int64"):
        pack_codes(torch.zeros(8, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="take 6 bytes a row, got 5"):
        unpack_codes(torch.zeros(5, dtype=torch.uint8), 3, 16)
