# SPDX-License-Identifier: Apache-2.0
"""Five ternary codes a byte: round trips at every length, and agreement with an independent definition."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.kernels.kv_store.ternary import LARGEST_BYTE, pack_ternary, ternary_size, unpack_ternary


@given(st.lists(st.integers(0, 3), max_size=2), st.integers(0, 140), st.integers(0, 2**16))
def test_ternary_round_trips(leading: list[int], K: int, seed: int) -> None:
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


def test_any_byte_unpacks_to_ternary_codes() -> None:
    codes = unpack_ternary(torch.arange(256, dtype=torch.uint8).unsqueeze(-1), 5)
    assert int(codes.max()) == 2
    assert torch.equal(codes[:13], codes[243:])


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="code 3 is not ternary"):
        pack_ternary(torch.tensor([0, 3], dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        pack_ternary(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        unpack_ternary(torch.zeros(1), 5)
    with pytest.raises(ValueError, match="K=11 ternary codes take 3 bytes a row, got 2"):
        unpack_ternary(torch.zeros(2, dtype=torch.uint8), 11)
