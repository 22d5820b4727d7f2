# SPDX-License-Identifier: Apache-2.0
"""What the loop over K loads beside weights and activations."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from vllm_ext.kernels.gpu.scaling import load_factors


@triton.jit
def _copy_factors(  # type: ignore[no-untyped-def]
    x_scales, x_sums, out, num_tokens, BLOCK_N: tl.constexpr, BLOCK_TOKENS: tl.constexpr, JOINT: tl.constexpr
):
    tokens = tl.arange(0, BLOCK_TOKENS)
    mask = tokens < num_tokens
    scales, sums = load_factors(x_scales + tokens * 3, x_sums + tokens * 3, mask, BLOCK_N, BLOCK_TOKENS, JOINT)
    tl.store(out + tokens, scales)
    tl.store(out + BLOCK_TOKENS + tokens, sums)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    ("block_n", "block_tokens"), [(64, 8), (64, 16), (64, 64), (128, 8), (128, 32), (128, 64), (128, 128), (64, 256)]
)
def test_scales_and_sums_come_in_one_load_or_in_two(block_n: int, block_tokens: int, joint: bool) -> None:
    num_tokens = block_tokens - 3
    scales, sums = torch.randn(2, block_tokens, 3)
    out = torch.full((2, block_tokens), torch.nan)
    _copy_factors[(1,)](scales, sums, out, num_tokens, block_n, block_tokens, joint)
    expected = torch.stack([scales[:, 0], sums[:, 0]])
    expected[:, num_tokens:] = 0
    assert torch.equal(out, expected)
