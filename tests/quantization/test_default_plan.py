# SPDX-License-Identifier: Apache-2.0
"""The plan of a bare `--quantization mxmoe`: half and half, by error, per block."""

from collections import Counter

import pytest
import torch

from vllm_ext.quantization.default_plan import choose_group_size, choose_schemes, measure_error
from vllm_ext.quantization.scheme import Scheme


@pytest.mark.parametrize(("num_experts", "num_high"), [(1, 1), (2, 1), (5, 3), (16, 8)])
def test_half_of_the_experts_get_more_bits(num_experts: int, num_high: int) -> None:
    schemes = choose_schemes(torch.randn(num_experts, 16, 128))
    assert Counter(map(str, schemes)) == Counter({"w4a16_g128": num_high, "w3a16_g128": num_experts - num_high})


def test_the_experts_with_the_largest_error_get_them() -> None:
    torch.manual_seed(0)
    weights = torch.randn(6, 16, 128)
    weights[1] *= 3
    weights[4, 0, 0] = 100
    weights[5] *= 2
    schemes = choose_schemes(weights)
    assert [scheme.weight_bits for scheme in schemes] == [3, 4, 3, 3, 4, 4]
    low = Scheme.parse("w3a16_g128")
    errors = [measure_error(weight, low) for weight in weights]
    assert min(errors[1], errors[4], errors[5]) > max(errors[0], errors[2], errors[3])


def test_equal_errors_go_by_index() -> None:
    weights = torch.randn(1, 8, 64).expand(4, 8, 64)
    assert [scheme.weight_bits for scheme in choose_schemes(weights)] == [4, 4, 3, 3]


@pytest.mark.parametrize(("K", "group_size"), [(2048, 128), (192, 64), (96, 32), (40, -1), (8, -1)])
def test_groups_fall_back_to_what_divides(K: int, group_size: int) -> None:
    assert choose_group_size(K) == group_size
    assert {scheme.group_size for scheme in choose_schemes(torch.randn(2, 8, K))} == {group_size}


def test_blocks_that_do_not_fill_bytes_stay_in_16_bits() -> None:
    assert [str(scheme) for scheme in choose_schemes(torch.randn(3, 8, 20))] == ["w16a16"] * 3


def test_damaged_experts_are_named() -> None:
    weights = torch.randn(3, 8, 64)
    weights[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts, down, expert 1 has 1 NaN .* at \[2, 3\]"):
        choose_schemes(weights, "layers.0.mlp.experts, down")
