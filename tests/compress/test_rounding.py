# SPDX-License-Identifier: Apache-2.0
"""Round-to-nearest: the half-step bound at every width and magnitude, degenerate groups, damaged weights."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vllm_ext.compress.rounding import QuantizedWeight, dequantize, round_to_nearest
from vllm_ext.quantization.scheme import Scheme, list_schemes

QUANTIZED = [scheme for scheme in map(Scheme.parse, list_schemes()) if scheme.is_quantized]
SCHEMES = [scheme for scheme in QUANTIZED if scheme.act_bits == 16 and not scheme.is_ternary]
TERNARY = [scheme for scheme in QUANTIZED if scheme.act_bits == 16 and scheme.is_ternary]


def check_half_step(weight: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    quantized = round_to_nearest(weight, scheme)
    assert quantized.codes.dtype == torch.uint8
    assert quantized.scales.dtype == torch.float16
    assert int(quantized.codes.max()) < 2**scheme.code_bits
    assert (quantized.zeros is None) == scheme.symmetric
    if quantized.zeros is not None:
        assert quantized.zeros.dtype == torch.uint8
        assert int(quantized.zeros.max()) < 2**scheme.code_bits
    groups = scheme.num_groups(weight.shape[1])
    step = quantized.scales.double().repeat_interleave(weight.shape[1] // groups, dim=1)
    error = (dequantize(quantized, scheme).double() - weight.double()).abs()
    # float32 arithmetic may move the border between two codes by a few units in the last place.
    slack = 1e-6 * weight.double().abs().max()
    assert bool((error <= step / 2 * (1 + 1e-5) + slack).all())
    return quantized


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-8, 1e-5, 1.0, 1e4])
def test_error_is_at_most_half_a_step(scheme: Scheme, magnitude: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 256) * magnitude
    weight[0, :32] = magnitude
    weight[1, :64] = 0
    weight[2] = weight[2].abs()
    weight[3] = -weight[3].abs() - magnitude
    check_half_step(weight, scheme)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.sampled_from((32, 96))),
        elements=st.floats(-60000, 60000, width=32) | st.sampled_from((0.0, 1e-30, -1e-9, 6e-8)),
    ),
    st.sampled_from([scheme for scheme in SCHEMES if scheme.group_size in (32, -1)]),
)
def test_half_step_holds_for_any_weights(weight: np.ndarray, scheme: Scheme) -> None:
    check_half_step(torch.from_numpy(weight), scheme)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", [*SCHEMES[:4], *TERNARY], ids=str)
def test_checkpoint_dtypes_give_the_codes_of_their_float32_values(dtype: torch.dtype, scheme: Scheme) -> None:
    weight = torch.randn(16, 128).to(dtype)
    for got, want in zip(round_to_nearest(weight, scheme), round_to_nearest(weight.float(), scheme), strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


@pytest.mark.parametrize("scheme", TERNARY, ids=str)
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e2])
def test_ternary_weights_take_the_scale_of_least_error(scheme: Scheme, magnitude: float) -> None:
    """No scale of a fine grid does better, whichever weights it rounds to zero."""
    torch.manual_seed(0)
    weight = torch.randn(4, 128) ** 3 * magnitude
    quantized = round_to_nearest(weight, scheme)
    assert quantized.zeros is None
    assert set(quantized.codes.unique().tolist()) == {1, 2, 3}
    groups = weight.unflatten(1, (scheme.num_groups(128), -1))
    found = (dequantize(quantized, scheme).view_as(groups) - groups).square().sum(-1)
    scales = groups.abs().amax(-1, keepdim=True) * torch.linspace(0.01, 1, 500)
    best = torch.full_like(found, torch.inf)
    for scale in scales.unbind(-1):
        step = scale.unsqueeze(-1)
        rounded = (groups / step).round().clamp(-1, 1) * step
        best = torch.minimum(best, (rounded - groups).square().sum(-1))
    assert bool((found <= best * (1 + 1e-4)).all())


def test_ternary_gaussian_weights() -> None:
    """The least error of three levels on a normal distribution is known: 0.1902 of its variance."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    scheme = Scheme.parse("w1.6a16_g-1_sym")
    error = float((dequantize(round_to_nearest(weight, scheme), scheme) - weight).square().mean())
    assert error == pytest.approx(0.1902, rel=0.01)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.sampled_from((64, 192))),
        elements=st.floats(-60000, 60000, width=32) | st.sampled_from((0.0, 1e-30, -1e-9, 6e-8)),
    ),
    st.sampled_from([scheme for scheme in TERNARY if scheme.group_size != 128]),
)
def test_ternary_error_is_never_above_that_of_zeros(weight: np.ndarray, scheme: Scheme) -> None:
    quantized = round_to_nearest(torch.from_numpy(weight), scheme)
    assert torch.isfinite(quantized.scales).all()
    assert bool((quantized.scales > 0).all())
    assert bool(((quantized.codes >= 1) & (quantized.codes <= 3)).all())
    error = (dequantize(quantized, scheme).double().numpy() - weight) ** 2
    assert error.sum() <= (weight.astype(np.float64) ** 2).sum() * (1 + 1e-6)


def test_zero_groups_come_back_as_exact_zeros() -> None:
    weight = torch.zeros(4, 64)
    for scheme in (*SCHEMES, *TERNARY):
        if scheme.group_size in (32, 64, -1):
            quantized = round_to_nearest(weight, scheme)
            assert torch.isfinite(quantized.scales).all()
            assert torch.equal(dequantize(quantized, scheme), weight)


def test_weights_on_the_levels_come_back_exactly() -> None:
    scheme = Scheme.parse("w3a16_g32")
    weight = (torch.arange(32.0) % 8 - 3).mul(0.25).expand(4, 32)
    quantized = round_to_nearest(weight, scheme)
    assert torch.equal(dequantize(quantized, scheme), weight)
    assert quantized.zeros is not None
    assert set(quantized.zeros.flatten().tolist()) == {3}


def test_more_bits_never_hurt_much() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 256)
    errors = []
    for bits in (2, 3, 4, 5, 6, 8):
        scheme = Scheme(bits, 16, 64)
        errors.append(float((dequantize(round_to_nearest(weight, scheme), scheme) - weight).square().mean()))
    # Each bit halves the step: a quarter of the squared error.
    assert all(later < earlier / 3 for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused_with_their_place(value: float) -> None:
    weight = torch.zeros(4, 32)
    weight[2, 5] = value
    with pytest.raises(ValueError, match=rf"layer 7 has 1 NaN or infinite values, the first {value} at \[2, 5\]"):
        round_to_nearest(weight, Scheme.parse("w4a16_g32"), name="layer 7")


def test_unusable_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"row 1, group 0 spans -1e\+07 to 0, which needs a scale beyond fp16"):
        round_to_nearest(torch.tensor([[0.0] * 32, [-1e7] * 32]), Scheme.parse("w4a16_g32"))
    with pytest.raises(ValueError, match="beyond fp16"):
        round_to_nearest(torch.tensor([[3e38, -3e38] * 16]), Scheme.parse("w2a16_g32"))
    with pytest.raises(ValueError, match=r"row 0, group 0 spans -1e.*beyond fp16"):
        round_to_nearest(torch.full((1, 32), -1e7), Scheme.parse("w1.6a16_g32_sym"))
    with pytest.raises(ValueError, match="group size 128 does not divide K=96"):
        round_to_nearest(torch.zeros(2, 96), Scheme.parse("w4a16_g128"))
    with pytest.raises(ValueError, match="w16a16 leaves a weight as it is"):
        round_to_nearest(torch.zeros(2, 32), Scheme.parse("w16a16"))
    with pytest.raises(ValueError, match=r"must be \[N, K\]"):
        round_to_nearest(torch.zeros(2, 2, 32), Scheme.parse("w4a16_g32"))
