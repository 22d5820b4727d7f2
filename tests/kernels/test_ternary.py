# SPDX-License-Identifier: Apache-2.0
"""Ternary codes, five a byte, and rows of weights: round trips, an independent definition, parts of a row, damage."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ext.kernels.ternary import (
    LARGEST_BYTE,
    count_codes,
    pack_codes,
    pack_ternary,
    packed_size,
    ternary_size,
    unpack_codes,
    unpack_ternary,
)


@given(st.lists(st.integers(0, 3), max_size=2), st.integers(0, 140), st.integers(0, 2**16))
def test_digits_round_trip(leading: list[int], K: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, (*leading, K), dtype=np.uint8))
    packed = pack_ternary(codes)
    assert packed.shape == (*leading, ternary_size(K))
    assert torch.equal(unpack_ternary(packed, K), codes)
    assert packed.numel() == 0 or int(packed.max()) <= LARGEST_BYTE


@given(st.lists(st.integers(0, 2), min_size=1, max_size=23))
def test_a_byte_is_a_number_in_base_three(codes: list[int]) -> None:
    padded = codes + [0] * (-len(codes) % 5)
    expected = [int("".join(map(str, padded[i : i + 5][::-1])), 3) for i in range(0, len(padded), 5)]
    assert pack_ternary(torch.tensor(codes, dtype=torch.uint8)).tolist() == expected


def test_any_byte_unpacks_to_digits() -> None:
    codes = unpack_ternary(torch.arange(256, dtype=torch.uint8).unsqueeze(-1), 5)
    assert int(codes.max()) == 2
    assert torch.equal(codes[:13], codes[243:])


def test_bad_digits_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="code 3 is not ternary"):
        pack_ternary(torch.tensor([0, 3], dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        pack_ternary(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        unpack_ternary(torch.zeros(1), 5)
    with pytest.raises(ValueError, match="K=11 ternary codes take 3 bytes a row, got 2"):
        unpack_ternary(torch.zeros(2, dtype=torch.uint8), 11)


#: Group size, columns of a run, bytes of a run.
RUNS = {32: (32, 7), 64: (64, 13), 96: (32, 7), 128: (64, 13), 256: (64, 13), -1: (64, 13)}


@st.composite
def code_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    group_size = draw(st.sampled_from(list(RUNS)))
    shape = (*draw(st.lists(st.integers(0, 3), max_size=2)), RUNS[group_size][0] * draw(st.integers(0, 6)))
    codes = np.random.default_rng(draw(st.integers(0, 2**16))).integers(1, 4, size=shape, dtype=np.uint8)
    return torch.from_numpy(codes), group_size


@settings(deadline=None)
@given(code_tensors())
def test_round_trip(case: tuple[torch.Tensor, int]) -> None:
    codes, group_size = case
    K = codes.shape[-1]
    packed = pack_codes(codes, group_size)
    run, size = RUNS[group_size]
    assert packed.shape == (*codes.shape[:-1], packed_size(K, group_size))
    assert packed.shape[-1] == K // run * size
    assert count_codes(packed.shape[-1], group_size) == K
    assert torch.equal(unpack_codes(packed, group_size, K), codes)


@settings(deadline=None)
@given(code_tensors())
def test_bytes_are_numbers_in_base_three(case: tuple[torch.Tensor, int]) -> None:
    codes, group_size = case
    run, size = RUNS[group_size]
    if not codes.numel():
        return
    rows, packed_rows = (t.reshape(-1, t.shape[-1]).tolist() for t in (codes, pack_codes(codes, group_size)))
    for row, packed in zip(rows, packed_rows, strict=True):
        expected = []
        for start in range(0, len(row), run):
            digits = [code - 1 for code in row[start : start + run]] + [0] * (5 * size - run)
            expected += [int("".join(map(str, digits[i : i + 5][::-1])), 3) for i in range(0, 5 * size, 5)]
        assert packed == expected


@settings(deadline=None)
@given(code_tensors(), st.integers(2, 4))
def test_a_part_of_whole_groups_is_a_part_of_the_bytes(case: tuple[torch.Tensor, int], ranks: int) -> None:
    """What tensor parallelism does along K."""
    codes, group_size = case
    whole = torch.cat([codes] * ranks, dim=-1)
    K, packed = codes.shape[-1], pack_codes(whole, group_size)
    for part in packed.chunk(ranks, dim=-1) if K else ():
        assert torch.equal(unpack_codes(part, group_size, K), codes)


def test_bad_arguments_are_refused_by_name() -> None:
    codes = torch.ones(2, 64, dtype=torch.uint8)
    for code in (0, 4):
        with pytest.raises(ValueError, match=f"code {code} is not ternary: codes must be 1 to 3"):
            pack_codes(codes.index_fill(1, torch.tensor([9]), code), 64)
    with pytest.raises(ValueError, match=r"codes must be uint8, got torch\.int64"):
        pack_codes(codes.long(), 64)
    with pytest.raises(ValueError, match="K=64 ternary codes take 13 bytes a row, got 14"):
        unpack_codes(torch.zeros(2, 14, dtype=torch.uint8), 64, 64)
    with pytest.raises(ValueError, match=r"K=96 ternary codes in groups of -1 .* a multiple of 64"):
        packed_size(96, -1)
    with pytest.raises(ValueError, match="group_size=24 does not fit ternary codes"):
        packed_size(48, 24)
    with pytest.raises(ValueError, match="14 bytes are not whole runs of 64 ternary codes in 13 bytes"):
        count_codes(14, 128)
    damaged = pack_codes(codes, 64)
    damaged[1, 3] = 243
    with pytest.raises(ValueError, match="byte 243 holds no five ternary codes"):
        unpack_codes(damaged, 64, 64)
