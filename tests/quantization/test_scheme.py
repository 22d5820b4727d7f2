# SPDX-License-Identifier: Apache-2.0
"""The scheme grammar: every name round-trips, every other text is refused with the nearest name."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.quantization.scheme import GROUP_SIZES, Scheme, list_schemes


def test_every_scheme_round_trips() -> None:
    names = list_schemes()
    assert len(names) == len(set(names)) == 6 * 2 * 4 * 2 + 2 * 4 + 1
    for name in names:
        assert str(Scheme.parse(name)) == name
        assert Scheme.parse(name) == Scheme.parse(name)


def test_parse_reads_every_part() -> None:
    assert Scheme.parse("w3a8_g-1_sym") == Scheme(3, 8, -1, symmetric=True)
    assert Scheme.parse("w6a16_g64") == Scheme(6, 16, 64)
    assert not Scheme.parse("w16a16").is_quantized
    ternary = Scheme.parse("w1.6a8_g128_sym")
    assert ternary == Scheme(1.6, 8, 128, symmetric=True)
    assert ternary.is_ternary
    assert (ternary.code_bits, ternary.lowest_code, ternary.fixed_zero, ternary.highest_code) == (2, 1, 2, 3)
    five = Scheme.parse("w5a16_g32")
    assert (five.code_bits, five.lowest_code, five.fixed_zero, five.highest_code) == (5, 0, 16, 31)


@given(st.text(alphabet="wa_gsymx0123468-. ", max_size=16))
def test_other_texts_are_refused(text: str) -> None:
    if text in list_schemes():
        assert str(Scheme.parse(text)) == text
    else:
        with pytest.raises(ValueError, match="known schemes are"):
            Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w4a16_g127", "scheme 'w4a16_g127': group_size=127 is not one of 32, 64, 128, -1; nearest is w4a16_g128"),
        ("w7a16_g128", "weight_bits=7 is not one of 1.6, 2, 3, 4, 5, 6, 8, 16; nearest is"),
        ("w4a4_g64", "act_bits=4 is not one of 8, 16; nearest is w4a8_g64"),
        ("w04a16_g64", "unknown scheme 'w04a16_g64': nearest is w4a16_g64"),
        ("w4a16", "unknown scheme 'w4a16': nearest is w16a16"),
        ("w16a16_g128", "w16a16 takes no a8, no group and no _sym"),
        ("w16a8", "w16a16 takes no a8"),
        ("W4A16_G128", "unknown scheme 'W4A16_G128'"),
        ("", "unknown scheme ''"),
        ("w1.6a16_g128", "ternary weights have no zero point: the name ends in _sym; nearest is w1.6a16_g128_sym"),
        ("w1.5a16_g128_sym", "weight_bits=1.5 is not one of 1.6, 2, 3, 4, 5, 6, 8, 16; nearest is w1.6a16_g128_sym"),
        ("w1.60a16_g128_sym", "unknown scheme 'w1.60a16_g128_sym': nearest is w1.6a16_g128_sym"),
        ("w2.0a16_g128", "unknown scheme 'w2.0a16_g128': nearest is w2a16_g128"),
    ],
)
def test_errors_name_text_and_nearest(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Scheme.parse(text)


@pytest.mark.parametrize("name", list_schemes())
def test_tensor_table_splits_without_a_gap(name: str) -> None:
    scheme = Scheme.parse(name)
    N, K, ranks = 12, 512, 2
    total = 0
    for spec in scheme.tensors.values():
        shape = spec.shape(N, K)
        total += math.prod(shape) * (2 if spec.dtype is None else spec.dtype.itemsize)
        for split_dim, shard_shape in zip(
            spec.split_dims, (spec.shape(N // ranks, K), spec.shape(N, K // ranks)), strict=True
        ):
            expected = list(shape)
            if split_dim is not None:
                expected[split_dim] //= ranks
            assert list(shard_shape) == expected
    assert scheme.stored_bytes(N, K) == total


def test_tensors_of_the_integer_schemes() -> None:
    tensors = Scheme.parse("w3a16_g64").tensors
    assert {suffix: (spec.dtype, spec.shape(10, 128)) for suffix, spec in tensors.items()} == {
        "qweight": (torch.uint8, (10, 48)),
        "scales": (torch.float16, (10, 2)),
        "zeros": (torch.uint8, (10, 2)),
    }
    assert set(Scheme.parse("w3a16_g64_sym").tensors) == {"qweight", "scales"}
    assert set(Scheme.parse("w16a16").tensors) == {"weight"}


def test_true_bits_count_scales_and_zeros() -> None:
    assert Scheme.parse("w4a16_g128").bits_per_weight(256, 1024) == 4 + 24 / 128
    assert Scheme.parse("w3a16_g32_sym").bits_per_weight(256, 1024) == 3 + 16 / 32
    assert Scheme.parse("w8a8_g-1").bits_per_weight(256, 1024) == 8 + 24 / 1024
    assert Scheme.parse("w16a16").bits_per_weight(256, 1024) == 16
    # 26 bytes for 128 ternary codes, 7 for 32: the padding counts.
    assert Scheme.parse("w1.6a16_g128_sym").bits_per_weight(256, 1024) == 26 * 8 / 128 + 16 / 128
    assert Scheme.parse("w1.6a16_g32_sym").bits_per_weight(256, 1024) == 7 * 8 / 32 + 16 / 32
    assert Scheme.parse("w1.6a16_g-1_sym").bits_per_weight(256, 1024) == 13 * 8 / 64 + 16 / 1024


@pytest.mark.parametrize("name", [name for name in list_schemes() if "a16_" in name])
def test_codes_round_trip_and_tell_their_number(name: str) -> None:
    scheme = Scheme.parse(name)
    codes = torch.randint(scheme.lowest_code, scheme.highest_code + 1, (3, 256), dtype=torch.uint8)
    packed = scheme.pack_codes(codes)
    assert packed.shape == (3, scheme.packed_size(256)) == scheme.tensors["qweight"].shape(3, 256)
    assert scheme.count_inputs(packed.shape[1]) == 256
    assert torch.equal(scheme.unpack_codes(packed), codes)


def test_rows_of_no_whole_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 4 bytes hold no whole number of 3-bit codes"):
        Scheme.parse("w3a16_g32").count_inputs(4)
    with pytest.raises(ValueError, match="15 bytes are not whole runs of 32 ternary codes in 7 bytes"):
        Scheme.parse("w1.6a16_g32_sym").unpack_codes(torch.zeros(2, 15, dtype=torch.uint8))


def test_group_that_does_not_divide_is_named_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"w4a16_g128: group size 128 does not divide K=96; .*: 32, -1"):
        Scheme.parse("w4a16_g128").stored_bytes(8, 96)
    with pytest.raises(ValueError, match="K=12 codes of bits=3"):
        Scheme.parse("w3a16_g-1").stored_bytes(8, 12)
    with pytest.raises(ValueError, match=r"K=96 ternary codes in groups of -1 .* K must be a multiple of 64"):
        Scheme.parse("w1.6a16_g-1_sym").stored_bytes(8, 96)
    assert -1 in GROUP_SIZES
