# SPDX-License-Identifier: Apache-2.0
"""Weights and inputs as no textbook has them, under every rounding: finite, bounded, or refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vllm_ext.compress.gptq import round_with_hessian
from vllm_ext.compress.hessian import measure_moments
from vllm_ext.compress.rounding import QuantizedWeight, dequantize, round_to_nearest
from vllm_ext.quantization.scheme import Scheme

N, K = 6, 64
SCHEMES = [
    Scheme.parse(name)
    for name in (
        "w2a16_g32", "w2a16_g-1_sym", "w3a16_g64", "w4a16_g32_sym", "w5a16_g-1", "w6a16_g32", "w8a16_g64_sym",
        "w8a16_g-1", "w1.6a16_g32_sym",
    )
]  # fmt: skip


def draw(seed: int = 0, rows: int = N) -> torch.Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))


def with_outlier(size: float) -> torch.Tensor:
    weight = 0.01 * draw()
    weight[1, 5], weight[2, 40] = size, -size
    return weight


def with_zero_rows() -> torch.Tensor:
    weight = draw()
    weight[0] = 0
    weight[3, :32] = 0
    weight[4] = -0.0
    return weight


#: The largest is what fp16 scales of two bits still hold.
WEIGHTS: dict[str, torch.Tensor] = {
    "equal": torch.full((N, K), 0.37),
    "equal and negative": torch.full((N, K), -1.5),
    "zeros": torch.zeros(N, K),
    "zero rows": with_zero_rows(),
    "outliers": with_outlier(30.0),
    "huge outliers": with_outlier(6e4),
    "large": 1e4 * draw().clamp(-3, 3),
    "subnormal": draw() * 1e-40,
    "smallest": torch.full((N, K), 1.4e-45) * draw().sign(),
    "below fp16": draw() * 1e-9,
    "one value": torch.zeros(N, K).index_put((torch.tensor([2]), torch.tensor([7])), torch.tensor(3.0)),
    "two values": draw().sign() * 0.25,
    "bf16 subnormal": (draw() * 1e-39).bfloat16(),
    "wide": draw() * torch.logspace(-20, 3, K),
}

INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "usual": lambda: draw(1, 300),
    "one token": lambda: draw(2, 1),
    "zeros": lambda: torch.zeros(10, K),
    "equal": lambda: torch.ones(50, K),
    "outlier": lambda: draw(3, 100) * (1 + 1e4 * (torch.arange(K) == 9)),
    "subnormal": lambda: draw(4, 50) * 1e-30,
    "huge": lambda: draw(5, 50) * 1e15,
    "dead columns": lambda: draw(6, 100) * (torch.arange(K) % 3 > 0),
    "no token": lambda: torch.zeros(0, K),
}


def check_codes(found: QuantizedWeight, scheme: Scheme, name: str) -> torch.Tensor:
    """The dequantized weight, after checks of what must hold for any."""
    assert torch.isfinite(found.scales).all(), name
    assert (found.scales > 0).all(), name
    assert int(found.codes.max()) <= scheme.highest_code, name
    assert int(found.codes.min()) >= scheme.lowest_code, name
    value = dequantize(found, scheme)
    assert torch.isfinite(value).all(), name
    return value


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_nearest(scheme: Scheme) -> None:
    for name, weight in WEIGHTS.items():
        value = check_codes(round_to_nearest(weight, scheme), scheme, name)
        groups = weight.float().view(N, scheme.num_groups(K), -1)
        spread = groups.amax(-1).clamp_min(0) - groups.amin(-1).clamp_max(0)
        error = (value - weight.float()).view_as(groups).abs().amax(-1)
        # A rounding error is at most a step, fp16's smallest included; three levels without an own zero have two steps.
        levels = scheme.highest_code - scheme.lowest_code
        assert (error <= 2 * spread / levels * 1.01 + 6e-8).all(), name
        # A group of zeros is exact.
        assert (error[spread == 0] == 0).all(), name


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_by_inputs(scheme: Scheme) -> None:
    """GPTQ, GPTAQ, clipping and refinement: what matters for the outputs is no worse than rounding to nearest."""
    weights = torch.stack([weight.float() for weight in WEIGHTS.values()])
    nearest = [dequantize(round_to_nearest(weight, scheme), scheme).double() for weight in weights]
    for input_name, make in INPUTS.items():
        inputs = make()
        for reference in (None, inputs * 1.01):
            moments = measure_moments(inputs, reference=reference)
            hessians, drifts = (
                None if one is None else one.expand(len(weights), K, K) for one in (moments.hessian, moments.drift)
            )
            assert hessians is not None
            found = round_with_hessian(weights, hessians, scheme, drifts=drifts, sweeps=1)
            for name, weight, one, usual in zip(WEIGHTS, weights.double(), found, nearest, strict=True):
                value = check_codes(one, scheme, f"{name}, {input_name}").double()
                if reference is None and len(inputs) and float(inputs.abs().max()) < 1e10:
                    rows = inputs.double()
                    error, other = (float((rows @ (w - weight).T).square().sum()) for w in (value, usual))
                    # The damping keeps some of the weights of what inputs do not see.
                    scale = float((rows @ weight.T).square().sum())
                    assert error <= 1.05 * other + 0.02 * scale + 1e-12, (name, input_name, error, other, scale)


@pytest.mark.parametrize("value", [7e4, 1e30, float("inf")])
def test_what_no_scale_holds_is_refused_by_name(value: float) -> None:
    weight = draw()
    weight[4, 40] = value * 4
    if not torch.isfinite(weight).all():
        message = r"^layer has 1 NaN or infinite values, the first inf at \[4, 40\]"
    else:
        message = r"^layer: row 4, group 1 spans .* which needs a scale beyond fp16's 65504; keep this weight as w16a16"
    scheme = Scheme.parse("w2a16_g32")
    with pytest.raises(ValueError, match=message):
        round_to_nearest(weight, scheme, "layer")
    with pytest.raises(ValueError, match=r"^layer"):
        round_with_hessian(weight[None], torch.eye(K)[None], scheme, name="layer")
