# SPDX-License-Identifier: Apache-2.0
"""Loaded layers under odd batches and odd weights: one token, every token to one expert, experts with none."""

from __future__ import annotations

import pytest
import torch

from tests.quantization.test_packed import (
    EXPERTS,
    HIDDEN,
    Weights,
    finish,
    load,
    make_layer,
    make_plan,
    pack,
    random_weights,
    run,
    run_plain,
    vllm_config,  # noqa: F401 - the fixture that every layer needs
)
from vllm_ext.kernels import tolerances

PLANS = {
    "weights": [
        ("w2a16_g32", "w4a16_g128"), ("w3a16_g64", "w6a16_g64_sym"), ("w16a16", "w5a16_g-1"), ("w8a16_g32",) * 2,
    ],
    "ternary": [
        ("w1.6a16_g32_sym", "w1.6a16_g64_sym"), ("w2a16_g64", "w1.6a16_g-1_sym"), ("w4a16_g32",) * 2, ("w16a16",) * 2,
    ],
}  # fmt: skip

#: {name: (tokens, experts of each token)}.
ROUTINGS = {
    "one token": torch.tensor([[2, 0]]),
    "all to one": torch.tensor([[1, -1]] * 9),
    "all to two": torch.tensor([[3, 0]] * 17),
    "one without any": torch.tensor([[0, 1], [1, 3], [3, 0], [0, 3]]),
    "a token to no expert": torch.tensor([[-1, -1], [2, 1], [-1, 2]]),
    "no token": torch.zeros(0, 2, dtype=torch.int64),
}


def run_expected(
    plan: object, weights: Weights, x: torch.Tensor, ids: torch.Tensor, routing: torch.Tensor
) -> torch.Tensor:
    """`run_plain`, in which -1 is expert 0 with weight 0."""
    return run_plain(plan, weights, x, ids.clamp_min(0), torch.where(ids < 0, 0.0, routing))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_routing(kind: str, dtype: torch.dtype) -> None:
    plan, weights = make_plan(PLANS[kind]), random_weights()
    rounded = {name: weight.to(dtype) for name, weight in weights.items()}
    layer = make_layer(plan, dtype=dtype)
    load(layer, pack(plan, rounded))
    finish(layer)
    for name, ids in ROUTINGS.items():
        x = torch.randn(len(ids), HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)
        routing = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) + 0.1
        found = run(layer, x, ids.int(), routing)
        assert found.shape == x.shape
        assert torch.isfinite(found).all(), name
        expected = run_expected(plan, {key: value.float() for key, value in rounded.items()}, x.float(), ids, routing)
        limit = 1e-5 if dtype == torch.float32 else 2e-2
        if len(ids):
            assert tolerances.relative_error(found.float(), expected) < limit, name
        # A token without an expert adds nothing.
        assert not found[(ids < 0).all(-1)].any(), name


@pytest.mark.parametrize("kind", ["zeros", "equal", "outlier", "subnormal"])
@pytest.mark.parametrize("is_packed", [True, False])
def test_odd_weights_are_computed(kind: str, is_packed: bool) -> None:
    plan, weights = make_plan(PLANS["weights"]), random_weights()
    for name, weight in weights.items():
        if kind == "zeros" and ".1." in name:
            weight.zero_()
        elif kind == "equal":
            weight.fill_(0.01)
        elif kind == "outlier":
            weight[3, 7] = 1000.0
        elif kind == "subnormal" and ".2." in name:
            weight.mul_(1e-38)
    layer = make_layer(plan, is_packed=is_packed)
    if is_packed:
        load(layer, pack(plan, weights))
        finish(layer)
    else:
        prefix = "model.layers.0.mlp.experts."
        load(layer, {f"{name.removeprefix(prefix)}.weight": weight for name, weight in weights.items()})
    ids = torch.tensor([[e, (e + 1) % EXPERTS] for e in range(EXPERTS)])
    x = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(5))
    routing = torch.full((EXPERTS, 2), 0.5)
    found = run(layer, x, ids.int(), routing)
    expected = run_plain(plan, weights, x, ids, routing)
    assert torch.isfinite(found).all()
    assert tolerances.relative_error(found, expected) < 1e-5
