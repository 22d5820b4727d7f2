# SPDX-License-Identifier: Apache-2.0
"""Codes and back: bounds of the error, exactness of what is stored, changes of coordinates, damaged numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.kernels.kv_store.codec import (
    CodecTensors,
    dequantize,
    from_stored,
    pack_side,
    quantize,
    to_stored,
    transform_query,
    unpack_side,
)
from vllm_ext.kernels.kv_store.layout import LEVELS, Codec

FP8, FP16 = torch.float8_e4m3fn, torch.float16
#: Relative rounding of a stored number, half a unit in the last place; and the smallest step of subnormal ones.
ROUNDING = {FP8: (2**-4, 2**-10), FP16: (2**-11, 2**-25)}


def draw_numbers(seed: int, shape: tuple[int, ...], size: float, offset: float) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size + offset


@given(
    st.sampled_from(list(LEVELS)),
    st.sampled_from([(FP8, 16), (FP8, 64), (FP16, 32)]),
    st.integers(0, 2**16),
    st.sampled_from([0.02, 1.0, 30.0]),
    st.sampled_from([0.0, 5.0, -90.0]),
)
def test_error_is_half_a_step_plus_the_rounding_of_the_stored_numbers(
    bits: float, stored: tuple[torch.dtype, int], seed: int, size: float, offset: float
) -> None:
    dtype, group_size = stored
    codec = Codec(bits, group_size, scale_dtype=dtype)
    x = draw_numbers(seed, (5, 2, 64), size, offset)
    coded = quantize(x, codec)
    error = (dequantize(coded, codec) - x).abs().unflatten(-1, (-1, group_size)).amax(-1)
    groups = x.unflatten(-1, (-1, group_size))
    top = LEVELS[bits] - 1
    relative, absolute = ROUNDING[dtype]
    low, spread = groups.amin(-1), groups.amax(-1) - groups.amin(-1)
    # The low may be rounded above the least value; the scale, whose range starts there, by as much of the range.
    of_low = low.abs() * relative + absolute
    of_scale = ((spread + of_low) / top * relative + absolute) * top
    half_step = coded.scales.float() / 2
    assert bool((error <= half_step + torch.maximum(of_low, of_scale) * 1.001 + 1e-6).all())


@given(st.sampled_from(list(LEVELS)), st.integers(0, 2**16))
def test_codes_are_the_best_for_the_stored_numbers(bits: float, seed: int) -> None:
    codec = Codec(bits, 32)
    x = draw_numbers(seed, (3, 1, 64), 1.0, 0.5)
    coded = quantize(x, codec)
    error = (dequantize(coded, codec) - x).abs()
    for change in (-1, 1):
        codes = (coded.codes.int() + change).clamp(0, LEVELS[bits] - 1).to(torch.uint8)
        other = (dequantize(coded._replace(codes=codes), codec) - x).abs()
        assert bool((error <= other + 1e-5).all())


@given(st.integers(0, 2**16), st.sampled_from([2, 4]))
def test_outliers_are_kept_and_leave_the_range_to_the_others(seed: int, outliers: int) -> None:
    codec = Codec(2, 32, outliers=outliers)
    x = draw_numbers(seed, (4, 2, 64), 1.0, 0.0)
    generator = torch.Generator().manual_seed(seed + 1)
    planted = torch.rand(x.shape, generator=generator).argsort(-1)[..., :outliers]
    sign = torch.tensor([1.0, -1.0] * (outliers // 2)).expand(planted.shape)
    x = x.scatter(-1, planted, 100 * sign)
    coded = quantize(x, codec)
    assert torch.equal(coded.outlier_channels.sort(-1).values.long(), planted.sort(-1).values)
    decoded = dequantize(coded, codec)
    assert torch.equal(decoded.gather(-1, planted), 100 * sign)
    rest = (decoded - x).abs().scatter(-1, planted, 0.0)
    assert float(rest.max()) < 2.0
    assert float((dequantize(quantize(x, Codec(2, 32)), Codec(2, 32)) - x).abs().max()) > 10.0


@given(st.integers(0, 2**16), st.sampled_from([1.5, 2, 3]))
def test_levels_of_a_codebook_are_what_is_read(seed: int, bits: float) -> None:
    codec = Codec(bits, 16)
    x = draw_numbers(seed, (3, 2, 32), 1.0, 0.0)
    uniform = torch.arange(codec.num_levels, dtype=torch.float32)
    plain, listed = quantize(x, codec), quantize(x, codec, levels=uniform)
    assert torch.equal(dequantize(plain, codec), dequantize(plain, codec, uniform))
    # Ties go another way; nothing else differs.
    assert float((dequantize(plain, codec) - dequantize(listed, codec, uniform)).abs().max()) <= float(
        plain.scales.float().max()
    )
    bent = uniform + 0.2 * torch.sin(uniform)
    decoded = dequantize(quantize(x, codec, levels=bent), codec, bent)
    steps = (
        (decoded.unflatten(-1, (-1, 16)) - plain.lows.float()[..., None]) / plain.scales.float()[..., None]
    ).flatten()
    assert float((steps[:, None] - bent).abs().amin(-1).max()) < 1e-3


def test_clip_narrows_the_range_around_its_middle() -> None:
    x = torch.linspace(6.0, 10.0, 64).view(1, 1, 64)
    codec = Codec(4, 64, scale_dtype=FP16)
    decoded = dequantize(quantize(x, codec, clips=(0.5,)), codec)
    assert float(decoded.min()) == pytest.approx(7.0, abs=0.01)
    assert float(decoded.max()) == pytest.approx(9.0, abs=0.01)
    per_group = torch.tensor([[1.0, 0.5]])
    decoded = dequantize(quantize(x, codec._replace(group_size=32), (per_group,)), codec._replace(group_size=32))
    assert float(decoded[..., :32].min()) == pytest.approx(6.0, abs=0.01)
    assert float(decoded[..., 32:].max()) < 9.6


def test_extreme_values_saturate_and_damaged_ones_stay_visible() -> None:
    codec = Codec(2, 8)
    x = torch.zeros(1, 1, 16)
    x[..., 0], x[..., 9] = 1e6, math.nan
    decoded = dequantize(quantize(x, codec), codec)
    assert bool(decoded[..., :8].isfinite().all())
    assert bool(decoded[..., 8:].isnan().all())
    constant = torch.full((1, 1, 8), 1.5)
    assert torch.equal(dequantize(quantize(constant, codec), codec), constant)


@given(st.sampled_from(list(LEVELS)), st.sampled_from([8, 24, 40, 64]), st.integers(0, 2**16))
def test_rows_of_codes_round_trip(bits: float, head_dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, LEVELS[bits], (3, 2, head_dim), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack_side(pack_side(codes, bits), bits, head_dim), codes)


def make_tensors(seed: int, heads: int, head_dim: int) -> CodecTensors:
    generator = torch.Generator().manual_seed(seed)
    return CodecTensors(
        order=torch.rand(heads, head_dim, generator=generator).argsort(-1),
        smooth=torch.rand(heads, head_dim, generator=generator) + 0.5,
        shift=torch.randn(heads, head_dim, generator=generator),
    )


@given(st.integers(0, 2**16), st.lists(st.sampled_from(["order", "smooth", "shift"]), unique=True))
def test_coordinates_go_both_ways_and_scores_are_the_same_in_both(seed: int, used: list[str]) -> None:
    tensors = CodecTensors(**{name: getattr(make_tensors(seed, 2, 16), name) for name in used})
    key = draw_numbers(seed, (5, 2, 16), 1.0, 0.0)
    query = draw_numbers(seed + 1, (3, 2, 4, 16), 1.0, 0.0)
    stored = to_stored(key, tensors)
    assert torch.allclose(from_stored(stored, tensors), key, atol=1e-5)
    expected = torch.einsum("qhgd,shd->qhgs", query, key)
    transformed, offset = transform_query(query, tensors)
    scores = torch.einsum("qhgd,shd->qhgs", transformed, stored) + offset.unsqueeze(-1)
    assert torch.allclose(scores, expected, atol=1e-4)


@pytest.mark.parametrize("offset", [100.0, 400.0])
@pytest.mark.parametrize(("bits", "limit"), [(2, 0.35), (4, 0.09)])
def test_channels_far_off_zero_keep_their_spread_per_channel(offset: float, bits: float, limit: float) -> None:
    """Keys with a bias: an fp8 low beside 400 is off by up to 16 times the spread of 1."""
    x = draw_numbers(0, (64, 2, 16, 32), 1.0, offset)
    codec = Codec(bits, 32, per_channel=True)
    error = (dequantize(quantize(x, codec, (1.0, 0.8, 0.6)), codec) - x).square().mean().sqrt()
    assert float(error) < limit
    assert codec._replace(per_channel=False).low_dtype == FP8
