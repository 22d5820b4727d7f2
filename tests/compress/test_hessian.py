# SPDX-License-Identifier: Apache-2.0
"""Moments equal their definition, token by token."""

from __future__ import annotations

import pytest
import torch

from vllm_ext.compress.hessian import Moments, measure_moments, minimum_tokens, spread_rows, weigh_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 7, 20_000])
def test_definition(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    inputs, reference = (torch.randn(tokens, 6, generator=generator) for _ in range(2))
    routing = torch.rand(tokens, generator=generator)
    weights = weigh_tokens(routing, 2.0)
    assert torch.equal(weights, routing.square())
    moments = measure_moments(inputs, weights, reference, dtype)
    x, y, c = inputs.double(), reference.double(), weights.double()
    hessian = torch.einsum("t,ti,tj->ij", c, x, x) / c.sum()
    drift = torch.einsum("t,ti,tj->ij", c, y - x, x) / c.sum()
    assert moments.hessian.dtype == dtype
    assert moments.drift is not None
    torch.testing.assert_close(moments.hessian.double(), hessian, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.drift.double(), drift, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measure_moments(inputs).hessian, (inputs.T @ inputs / tokens), rtol=1e-4, atol=1e-5)


def test_no_token_and_no_weight_give_zero() -> None:
    assert torch.equal(measure_moments(torch.zeros(0, 4), torch.zeros(0)).hessian, torch.zeros(4, 4))
    assert torch.equal(measure_moments(torch.ones(3, 4), torch.zeros(3)).hessian, torch.zeros(4, 4))


def test_mix_is_a_weighted_mean() -> None:
    one, other = Moments(torch.ones(2, 2), torch.ones(2, 2)), Moments(torch.zeros(2, 2), 3 * torch.ones(2, 2))
    mixed = one.mix(other, 0.25)
    assert torch.equal(mixed.hessian, torch.full((2, 2), 0.25))
    assert mixed.drift is not None
    assert torch.equal(mixed.drift, torch.full((2, 2), 2.5))
    assert one.mix(Moments(torch.zeros(2, 2)), 0.5).drift is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_activations(value: float) -> None:
    inputs = torch.ones(5, 3)
    inputs[2, 1] = value
    with pytest.raises(ValueError, match="gives layer 3 NaN or infinite inputs"):
        measure_moments(inputs, name="layer 3")


def test_rows_are_spread_over_all() -> None:
    assert spread_rows(10, 5, torch.device("cpu")).tolist() == [0, 2, 4, 6, 8]
    assert spread_rows(3, 5, torch.device("cpu")).tolist() == [0, 1, 2]
    assert spread_rows(10, 0, torch.device("cpu")).tolist() == []
    assert minimum_tokens(256) == 512
