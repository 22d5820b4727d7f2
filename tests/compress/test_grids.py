# SPDX-License-Identifier: Apache-2.0
"""Searched ranges: never worse than the whole range, much better at two bits, stored values only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ext.compress.grids import Grid, make_grid, round_to_grid, search_grid
from vllm_ext.quantization.scheme import Scheme


def measure(weights: torch.Tensor, grid: Grid, scheme: Scheme, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted squared error per group, written apart from the code under test."""
    groups = weights.unflatten(-1, (grid.scales.shape[-1], -1))
    scales, zeros = grid.scales.float().unsqueeze(-1), grid.zeros.unsqueeze(-1)
    levels = torch.arange(scheme.lowest_code, scheme.highest_code + 1)
    values = (levels - zeros) * scales
    nearest = (groups.unsqueeze(-1) - values.unsqueeze(-2)).abs().amin(-1)
    counts = 1.0 if importance is None else importance.unflatten(-1, (grid.scales.shape[-1], -1)).unsqueeze(-3)
    return (nearest.square() * counts).sum(-1)


@given(
    seed=st.integers(0, 2**16), bits=st.sampled_from([1.6, 2, 3, 4, 5]), group_size=st.sampled_from([32, 64, -1]),
    symmetric=st.booleans(), weighted=st.booleans(), scale=st.sampled_from([1e-6, 1.0, 1e2]),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_never_worse_than_the_whole_range(
    seed: int, bits: float, group_size: int, symmetric: bool, weighted: bool, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, 3, 128, generator=generator) ** 3 * scale
    importance = torch.rand(2, 128, generator=generator) if weighted else None
    scheme = Scheme(bits, 16, group_size, symmetric or bits == 1.6)
    found = search_grid(weights, scheme, importance)
    groups = weights.unflatten(-1, (scheme.num_groups(128), -1))
    whole = make_grid(groups.amin(-1).clamp_max(0.0), groups.amax(-1).clamp_min(0.0), scheme)
    counted = None if importance is None else importance + importance.mean(-1, keepdim=True) * 1e-4
    before, after = (measure(weights, grid, scheme, counted) for grid in (whole, found))
    assert bool((after <= before * (1 + 1e-5)).all())
    assert found.scales.dtype == torch.float16
    assert bool((found.scales > 0).all())
    assert torch.equal(found.zeros, found.zeros.round())
    assert bool(((found.zeros >= 0) & (found.zeros <= scheme.highest_code)).all())


def test_two_bits_of_gaussian_weights() -> None:
    """The error of the best two-bit range is known: 0.1188 of the variance for a normal distribution, ours is near."""
    weights = torch.randn(1, 64, 1024, generator=torch.Generator().manual_seed(0))
    scheme = Scheme(2, 16, 128, symmetric=False)
    groups = weights.unflatten(-1, (8, -1))
    whole = make_grid(groups.amin(-1), groups.amax(-1), scheme)
    error = float(measure(weights, search_grid(weights, scheme), scheme).sum() / weights.numel())
    assert error < 0.6 * float(measure(weights, whole, scheme).sum() / weights.numel())
    # A zero among the levels costs a little against the best symmetric placement of four levels.
    assert error < 0.135


def test_columns_that_matter_decide() -> None:
    """An outlier in a column of no importance is clipped, in an important one it is kept."""
    weights = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    weights[:, :, 5] = 12.0
    scheme = Scheme(3, 16, 64)
    low, high = torch.ones(1, 64), torch.ones(1, 64)
    low[:, 5], high[:, 5] = 1e-6, 1e3
    clipped, kept = search_grid(weights, scheme, low), search_grid(weights, scheme, high)
    top = [float(((7 - grid.zeros) * grid.scales.float()).mean()) for grid in (clipped, kept)]
    assert top[0] < 6
    assert top[1] == pytest.approx(12, rel=0.1)


def test_ternary_scales_are_the_best_by_importance() -> None:
    """No scale of a fine grid does better by the weighted error; and another importance gives another scale."""
    generator = torch.Generator().manual_seed(0)
    weights, scheme = torch.randn(2, 4, 128, generator=generator), Scheme(1.6, 16, 64, symmetric=True)
    importance = torch.rand(2, 128, generator=generator) ** 4
    found = search_grid(weights, scheme, importance)
    assert not torch.equal(found.scales, search_grid(weights, scheme).scales)
    error = measure(weights, found, scheme, importance)
    for share in torch.linspace(0.05, 1.0, 100):
        largest = weights.unflatten(-1, (2, 64)).abs().amax(-1)
        other = Grid((largest * share).half(), found.zeros)
        assert bool((error <= measure(weights, other, scheme, importance) * (1 + 1e-3)).all())


@pytest.mark.parametrize("symmetric", [False, True])
def test_small_weights_keep_their_digits(symmetric: bool) -> None:
    """At a deviation of 1e-5 four bits still give what they give at one: a tenth of the norm."""
    weights = torch.randn(1, 8, 256, generator=torch.Generator().manual_seed(0)) * 1e-5
    scheme = Scheme(4, 16, 128, symmetric)
    error = measure(weights, search_grid(weights, scheme), scheme).sum()
    assert float((error / weights.square().sum()).sqrt()) < 0.13


def test_empty_and_one_sided_groups() -> None:
    scheme = Scheme(3, 16, 32)
    weights = torch.zeros(1, 2, 64)
    weights[0, 1, 32:] = torch.linspace(0.5, 1.0, 32)
    grid = search_grid(weights, scheme, torch.zeros(1, 64))
    assert grid.scales[0, 0].tolist() == [1, 1]
    assert grid.zeros[0, 1].tolist() == [0, 0]
    scales, zeros = (part.float().repeat_interleave(32, -1) for part in grid)
    codes = round_to_grid(weights, scales, zeros, scheme)
    values = (codes - zeros) * scales
    assert bool((values[0, 0] == 0).all())
    assert float((values - weights).abs().max()) < 0.08
