# SPDX-License-Identifier: Apache-2.0
"""Refined codes: never a higher error, much lower at two bits, and no single change of a code that lowers it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ext.compress.grids import Grid, round_to_grid, search_grid
from vllm_ext.compress.refine import refine_codes
from vllm_ext.quantization.scheme import Scheme


def measure(target: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Error of every row, float64 [experts, N]."""
    size = target.shape[-1] // grid.scales.shape[-1]
    scales, zeros = (part.double().repeat_interleave(size, -1) for part in grid)
    difference = (codes.double() - zeros) * scales - target.double()
    return torch.einsum("eni,eij,enj->en", difference, hessian.double(), difference)


def start(seed: int, scheme: Scheme, K: int = 128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Grid]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(2, 5, K, generator=generator)
    inputs = torch.randn(2, 3 * K, K, generator=generator) @ torch.randn(2, K, K, generator=generator)
    hessian = inputs.mT @ inputs / (3 * K)
    hessian += 0.01 * torch.diagonal(hessian, dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(K)
    grid = search_grid(target, scheme)
    size = K // scheme.num_groups(K)
    scales, zeros = (part.float().repeat_interleave(size, -1) for part in grid)
    return target, hessian, round_to_grid(target, scales, zeros, scheme).to(torch.uint8), grid


@given(
    seed=st.integers(0, 2**16), bits=st.sampled_from([1.6, 2, 3, 4, 8]), group_size=st.sampled_from([32, 64, 128, -1]),
    symmetric=st.booleans(), K=st.sampled_from([128, 256, 384]),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_never_a_higher_error(seed: int, bits: float, group_size: int, symmetric: bool, K: int) -> None:
    scheme = Scheme(bits, 16, group_size, symmetric or bits == 1.6)
    target, hessian, codes, grid = start(seed, scheme, K)
    error = measure(target, hessian, codes, grid)
    for sweeps in (1, 2):
        refined, fitted = refine_codes(target, hessian, codes, grid, scheme, sweeps)
        lower = measure(target, hessian, refined, fitted)
        assert bool((lower <= error * (1 + 1e-4) + 1e-6).all())
        error = lower
        assert fitted.scales.dtype == torch.float16
        assert bool((fitted.scales > 0).all())
        assert torch.equal(fitted.zeros, grid.zeros)
        assert scheme.lowest_code <= int(refined.min()) <= int(refined.max()) <= scheme.highest_code


def test_much_lower_at_two_bits() -> None:
    scheme = Scheme(2, 16, 64)
    target, hessian, codes, grid = start(0, scheme)
    before = codes.clone(), grid.scales.clone()
    refined, fitted = refine_codes(target, hessian, codes, grid, scheme)
    error, lower = (float(measure(target, hessian, *pair).sum()) for pair in ((codes, grid), (refined, fitted)))
    assert lower < 0.6 * error
    assert torch.equal(codes, before[0])
    assert torch.equal(grid.scales, before[1])


@pytest.mark.parametrize("group_size", [32, -1])
def test_no_single_code_is_better(group_size: int) -> None:
    """After enough passes every code is the best for its place, the others as they are."""
    scheme = Scheme(3, 16, group_size)
    target, hessian, codes, grid = start(1, scheme, 64)
    refined, fitted = refine_codes(target, hessian, codes, grid, scheme, 200)
    best = measure(target, hessian, refined, fitted)
    for column in range(64):
        for level in range(8):
            changed = refined.clone()
            changed[:, :, column] = level
            assert bool((measure(target, hessian, changed, fitted) >= best * (1 - 1e-4)).all())


def test_groups_of_zeros_stay() -> None:
    scheme = Scheme(2, 16, 32)
    target, hessian, _, _ = start(2, scheme)
    target[:, :, :32] = 0.0
    hessian = torch.diag_embed(torch.diagonal(hessian, dim1=-2, dim2=-1))
    grid = search_grid(target, scheme)
    scales, zeros = (part.float().repeat_interleave(32, -1) for part in grid)
    codes = round_to_grid(target, scales, zeros, scheme).to(torch.uint8)
    refined, fitted = refine_codes(target, hessian, codes, grid, scheme)
    assert torch.equal(refined[:, :, :32], codes[:, :, :32])
    assert bool(torch.isfinite(fitted.scales).all())
