# SPDX-License-Identifier: Apache-2.0
"""GPTQ and GPTAQ: their objectives, equality with a textbook version, and inputs that break factorizations."""

from __future__ import annotations

import pytest
import torch

from vllm_ext.compress.gptq import round_with_hessian
from vllm_ext.compress.grids import search_grid
from vllm_ext.compress.hessian import measure_moments
from vllm_ext.compress.rounding import QuantizedWeight, dequantize, round_to_nearest
from vllm_ext.quantization.checkpoint import pack_weight
from vllm_ext.quantization.scheme import Scheme

EXPERTS, N, K, TOKENS = 3, 16, 128, 600
SCHEMES = [
    Scheme(bits, 16, g, sym)
    for bits, g, sym in [(2, 32, False), (3, 64, True), (4, 128, False), (8, -1, True), (1.6, 64, True)]
]


def draw(seed: int = 0, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights, inputs [experts, tokens, K], the same with noise): correlated columns of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(EXPERTS, K, K, generator=generator) * torch.logspace(0, -2, K)[:, None]
    inputs = torch.randn(EXPERTS, tokens, K, generator=generator) @ mixing
    clean = inputs + 0.2 * torch.randn(EXPERTS, tokens, K, generator=generator) @ mixing
    return torch.randn(EXPERTS, N, K, generator=generator), inputs, clean


def list_moments(inputs: torch.Tensor, clean: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    found = [measure_moments(x, None, y, dtype) for x, y in zip(inputs, clean, strict=True)]
    return torch.stack([one.hessian for one in found]), torch.stack(
        [one.drift for one in found if one.drift is not None]
    )


def output_error(
    rounded: list[QuantizedWeight], scheme: Scheme, weights: torch.Tensor, inputs: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """|Q X - W X~|^2 per expert."""
    values = torch.stack([dequantize(one, scheme) for one in rounded])
    return (inputs @ values.mT - target @ weights.mT).square().sum((1, 2))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smaller_output_error_than_rounding_to_nearest(scheme: Scheme, dtype: torch.dtype) -> None:
    weights, inputs, clean = draw()
    hessians, drifts = list_moments(inputs, clean, dtype)
    nearest = [round_to_nearest(weight, scheme) for weight in weights]
    plain = round_with_hessian(weights, hessians, scheme)
    aware = round_with_hessian(weights, hessians, scheme, drifts=drifts)
    errors = [output_error(one, scheme, weights, inputs, inputs) for one in (nearest, plain)]
    assert bool((errors[1] < 0.7 * errors[0]).all())
    # Against the unquantized path, knowing it helps most where rounding itself costs little.
    drifted = [output_error(one, scheme, weights, inputs, clean) for one in (nearest, plain, aware)]
    assert float(drifted[2].sum()) < float(drifted[1].sum())
    if scheme.weight_bits < 8:
        assert bool((drifted[1] < drifted[0]).all())
    for one in (*plain, *aware):
        assert one.codes.shape == (N, K)
        assert scheme.lowest_code <= int(one.codes.min()) <= int(one.codes.max()) <= scheme.highest_code
        shapes = {name: spec.shape(N, K) for name, spec in scheme.tensors.items()}
        assert {name: tuple(part.shape) for name, part in pack_weight(*one, scheme).items()} == shapes


def round_by_the_book(weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, act_order: bool) -> torch.Tensor:
    """Optimal brain quantization written from its definition, in float64: fix a column, solve for the rest, repeat."""
    hessian = hessian.double() + 0.01 * torch.diagonal(hessian).double().mean() * torch.eye(K, dtype=torch.float64)
    grid = search_grid(weight[None], scheme, torch.diagonal(hessian)[None].float())
    repeat = K // scheme.num_groups(K)
    scales, zeros = (part[0].double().repeat_interleave(repeat, -1) for part in grid)
    order = torch.diagonal(hessian).argsort(descending=True, stable=True) if act_order else torch.arange(K)
    left, codes = weight.double().clone(), torch.zeros(N, K)
    for place, column in enumerate(order.tolist()):
        code = (left[:, column] / scales[:, column]).round().add(zeros[:, column])
        code = code.clamp(scheme.lowest_code, scheme.highest_code)
        codes[:, column] = code
        change = (code - zeros[:, column]) * scales[:, column] - left[:, column]
        rest = order[place + 1 :]
        # The change of the other columns that undoes most of this one's: least squares under the Hessian.
        if len(rest):
            left[:, rest] -= torch.outer(change, torch.linalg.solve(hessian[rest][:, rest], hessian[rest, column]))
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=str)
def test_equals_the_textbook(scheme: Scheme, act_order: bool) -> None:
    weights, inputs, clean = draw(1)
    hessians, _ = list_moments(inputs, clean, torch.float64)
    found = round_with_hessian(weights, hessians, scheme, act_order=act_order, sweeps=0)
    for weight, hessian, one in zip(weights, hessians, found, strict=True):
        expected = round_by_the_book(weight, hessian, scheme, act_order)
        # A tie in float32 may fall the other way and move what follows in its row.
        same = (one.codes == expected).float().mean()
        assert float(same) > 0.97


def test_drift_moves_the_target() -> None:
    """Where the unquantized inputs are A x, the weights to round are W A: the same codes as for those without drift."""
    weights, inputs, _ = draw(2, tokens=2000)
    shift = torch.eye(K) + 0.1 * torch.randn(K, K, generator=torch.Generator().manual_seed(0)) / K**0.5
    inputs, shift = inputs.double(), shift.double()
    hessians, drifts = list_moments(inputs, inputs @ shift.T, torch.float64)
    for scheme in SCHEMES:
        found = round_with_hessian(weights, hessians, scheme, drifts=drifts, damping=1e-12)
        expected = round_with_hessian(weights.double() @ shift, hessians, scheme, damping=1e-12)
        unmoved = round_with_hessian(weights, hessians, scheme, damping=1e-12)
        for one, other, third in zip(found, expected, unmoved, strict=True):
            assert float((one.codes == other.codes).float().mean()) > 0.97
            assert float((one.codes == third.codes).float().mean()) < 0.95


def test_one_at_a_time_is_the_same() -> None:
    weights, inputs, clean = draw(3)
    hessians, drifts = list_moments(inputs, clean, torch.float64)
    scheme = SCHEMES[0]
    together = round_with_hessian(weights, hessians, scheme, drifts=drifts)
    for expert in range(EXPERTS):
        part = slice(expert, expert + 1)
        (alone,) = round_with_hessian(weights[part], hessians[part], scheme, drifts=drifts[part])
        assert float((alone.codes == together[expert].codes).float().mean()) > 0.99


@pytest.mark.parametrize(
    "hessian",
    [
        torch.zeros(K, K),
        torch.ones(K, K),
        torch.diag_embed(torch.tensor([1.0] + [0.0] * (K - 1))),
        torch.full((K, K), 1e30),
        torch.full((K, K), 1e-38),
        -torch.eye(K),
        torch.eye(K) + 10 * torch.tril(torch.ones(K, K), -1) + 10 * torch.triu(torch.ones(K, K), 1),
        torch.logspace(-30, 8, K).diag_embed(),
    ],
    ids=["zero", "rank 1", "one column", "huge", "tiny", "negative", "indefinite", "graded"],
)
@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[3]], ids=str)
def test_hessians_that_do_not_factorize(hessian: torch.Tensor, drift: bool, scheme: Scheme) -> None:
    """No NaN, and no weight is thrown far: the mean error stays that of rounding within a few steps."""
    weights, inputs, clean = draw(4)
    good, drifts = list_moments(inputs, clean, torch.float32)
    hessians = torch.stack([good[0], hessian, good[2]])
    found = round_with_hessian(weights, hessians, scheme, drifts=drifts * 0 if drift else None)
    alone = round_with_hessian(weights[[0, 2]], good[[0, 2]], scheme)
    assert float((found[0].codes == alone[0].codes).float().mean()) > 0.99
    values = dequantize(found[1], scheme)
    assert bool(torch.isfinite(values).all())
    nearest = dequantize(round_to_nearest(weights[1], scheme), scheme)
    assert float((values - weights[1]).square().mean()) < 10 * float((nearest - weights[1]).square().mean()) + 1e-3


def test_zero_hessian_rounds_to_nearest() -> None:
    weights, _, _ = draw(5)
    scheme = SCHEMES[0]
    found = round_with_hessian(weights, torch.zeros(EXPERTS, K, K), scheme, clip=False, sweeps=0)
    for weight, one in zip(weights, found, strict=True):
        assert one.zeros is not None
        scales, zeros = (part.float().repeat_interleave(32, -1) for part in (one.scales, one.zeros))
        assert torch.equal(one.codes.float(), (weight / scales).round().add(zeros).clamp(0, 3))


def test_dead_columns_keep_their_weights() -> None:
    """Inputs that calibration never used are rounded to nearest, not set to zero: serving may use them."""
    weights, inputs, clean = draw(6)
    inputs[:, :, 7] = clean[:, :, 7] = 0.0
    hessians, _ = list_moments(inputs, clean, torch.float32)
    scheme = Scheme(8, 16, 128)
    found = round_with_hessian(weights, hessians, scheme)
    for weight, one in zip(weights, found, strict=True):
        assert float((dequantize(one, scheme)[:, 7] - weight[:, 7]).abs().max()) < float(one.scales.max())


def test_bad_weights_are_named() -> None:
    weights, _, _ = draw()
    weights[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"layer 4, expert 1 has 1 NaN or infinite values"):
        round_with_hessian(weights, torch.zeros(EXPERTS, K, K), SCHEMES[0], name="layer 4")
    with pytest.raises(ValueError, match="needs a scale beyond fp16's 65504; keep this weight as w16a16"):
        round_with_hessian(torch.full((1, N, K), 1e9), torch.eye(K)[None], SCHEMES[0], clip=False)
