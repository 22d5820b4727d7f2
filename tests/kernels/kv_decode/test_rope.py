# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding: complex multiplication, and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.kernels.kv_decode.rope import rotate


def make_case(seed: int, rotary: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 3, 24, generator=generator)
    angle = torch.rand(5, rotary // 2, generator=generator) * 6.3
    return x, torch.cat([angle.cos(), angle.sin()], -1)


@given(st.integers(0, 2**16), st.sampled_from([4, 16, 24]))
def test_pairs_are_complex_numbers(seed: int, rotary: int) -> None:
    x, cos_sin = make_case(seed, rotary)
    a, b = x[..., :rotary].chunk(2, -1)
    phase = torch.complex(*cos_sin.chunk(2, -1)).unsqueeze(-2)
    product = torch.complex(a, b) * phase
    expected = x.clone()
    expected[..., :rotary] = torch.cat([product.real, product.imag], -1)
    assert torch.allclose(rotate(x, cos_sin), expected, atol=1e-5)


@given(st.integers(0, 2**16), st.sampled_from([4, 24]), st.sampled_from([1.0, 1.3]))
def test_inverse_undoes(seed: int, rotary: int, magnitude: float) -> None:
    x, cos_sin = make_case(seed, rotary)
    there = rotate(x, cos_sin * magnitude)
    back = rotate(there, cos_sin * magnitude, inverse=True)
    assert torch.allclose(back, x, atol=1e-5)


@pytest.mark.parametrize("rotary", [7, 26])
def test_sizes_that_do_not_fit_are_refused(rotary: int) -> None:
    with pytest.raises(ValueError, match=f"rotary size {rotary} must be even and at most head_dim=24"):
        rotate(torch.zeros(1, 1, 24), torch.zeros(1, rotary))
