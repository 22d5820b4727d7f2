# SPDX-License-Identifier: Apache-2.0
"""Calibration on planted structure: outlier channels, biases, clustered channels; and that it is deterministic."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_ext.kernels.kv_store.codec import CodecTensors, to_stored
from vllm_ext.kernels.kv_store.layout import Codec
from vllm_ext.kv_cache.calibration import (
    calibrate_layer,
    calibrate_side,
    find_shift,
    fit_codebook,
    measure_error,
    order_channels,
    search_clip,
    smooth_scales,
)
from vllm_ext.kv_cache.presets import CLIPS, PRESETS

TOKENS, HEADS, HEAD_DIM = 256, 2, 64


def make_rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(TOKENS, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def plant_outliers(x: torch.Tensor, factor: float = 20.0) -> torch.Tensor:
    scale = torch.ones(HEADS, HEAD_DIM)
    scale[:, ::8] = factor
    return x * scale


def hidden_error(x: torch.Tensor, codec: Codec, tensors: CodecTensors) -> float:
    """Error relative to each channel's own size: the small channels count as much as the planted ones."""
    return measure_error(x, codec, tensors, CLIPS, 1 / x.square().mean(0))


def test_reorder_and_smooth_scales_recover_what_outlier_channels_cost() -> None:
    x = plant_outliers(make_rows())
    codec = Codec(2, 8)
    naive = hidden_error(x, codec, CodecTensors())
    ordered = hidden_error(x, codec, CodecTensors(order=order_channels(x, 8)))
    smooth = hidden_error(x, codec, CodecTensors(smooth=smooth_scales(x, 1.0)))
    best = hidden_error(make_rows(), codec, CodecTensors())
    assert naive > 3 * ordered
    assert naive > 3 * smooth
    assert smooth < 1.2 * best


def test_order_puts_the_planted_channels_together() -> None:
    order = order_channels(plant_outliers(make_rows()), 8)
    assert torch.equal(order.sort(-1).values, torch.arange(HEAD_DIM).expand(HEADS, -1))
    groups = order.view(HEADS, -1, 8) % 8 == 0
    assert bool((groups.all(-1).sum(-1) == 1).all())
    assert bool((groups.any(-1).sum(-1) == 1).all())


def test_a_bias_is_taken_off() -> None:
    bias = torch.zeros(HEADS, HEAD_DIM)
    bias[:, 3] = 50.0
    x = make_rows() + bias
    assert torch.allclose(find_shift(x), bias, atol=0.7)
    tensors = calibrate_side(x, Codec(2, 64), CLIPS)
    assert tensors.shift is not None
    weights = torch.ones(HEADS, HEAD_DIM)
    before, after = (measure_error(x, Codec(2, 64), each, CLIPS, weights) for each in (CodecTensors(), tensors))
    assert after < before / 3


def test_clips_follow_the_distribution() -> None:
    normal = search_clip(make_rows(), Codec(2, 64), CodecTensors())
    assert bool((normal < 0.7).all())
    # Four levels serve evenly spread values best from 1/8 to 7/8, and values at the ends alone from end to end.
    even = torch.rand(TOKENS, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    assert bool(((search_clip(even, Codec(2, 64), CodecTensors()) - 0.75).abs() < 0.06).all())
    assert bool((search_clip(even.round(), Codec(2, 64), CodecTensors()) == 1).all())
    channels = search_clip(make_rows(), Codec(2, 32, per_channel=True), CodecTensors())
    assert channels.shape == (HEADS, HEAD_DIM)


def test_a_codebook_finds_planted_levels() -> None:
    places = torch.tensor([0.0, 0.7, 1.7, 3.0])
    pick = torch.randint(0, 4, (TOKENS, HEADS, HEAD_DIM), generator=torch.Generator().manual_seed(2))
    codec = Codec(2, 64, scale_dtype=torch.float16)
    levels = fit_codebook(places[pick], codec, CodecTensors())
    assert torch.allclose(levels, places, atol=0.01)
    assert measure_error(places[pick], codec, CodecTensors(levels=levels)) < 1e-4
    assert measure_error(places[pick], codec, CodecTensors()) > 5e-3


@pytest.mark.parametrize("name", PRESETS)
def test_calibration_does_not_hurt_and_is_deterministic(name: str) -> None:
    preset = PRESETS[name].fit(HEAD_DIM)
    key, value = plant_outliers(make_rows(), 4.0), make_rows(1)
    query = torch.randn(TOKENS, 2 * HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    first, second = (calibrate_layer(key, value, PRESETS[name], query, seed=5) for _ in range(2))
    for one, other in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    weights = query.unflatten(1, (HEADS, -1)).square().mean((0, 2))
    for x, codec, tensors, weight in ((key, preset.key, first[0], weights), (value, preset.value, first[1], None)):
        plain = measure_error(x, codec, CodecTensors(), preset.clips, weight)
        assert measure_error(x, codec, tensors, preset.clips, weight) <= plain
        assert bool(to_stored(x, tensors).isfinite().all())


def test_bad_input_is_refused_by_name() -> None:
    rows = make_rows()
    with pytest.raises(ValueError, match=r"key must be float \[tokens, kv heads, head_dim\]"):
        calibrate_layer(rows[0], rows, PRESETS["kv4"])
    broken = rows.clone()
    broken[3, 0, 0] = math.inf
    with pytest.raises(ValueError, match="value holds NaN or infinity"):
        calibrate_layer(rows, broken, PRESETS["kv4"])
    with pytest.raises(ValueError, match="does not fit keys"):
        calibrate_layer(rows, rows, PRESETS["kv4"], rows[:5])
    with pytest.raises(ValueError, match="20 tokens do not fill a group of 32"):
        calibrate_layer(rows[:20], rows[:20], PRESETS["kivi_k2v2"])
    with pytest.raises(ValueError, match="3 tokens do not determine 4 levels"):
        fit_codebook(rows[:3], Codec(2, 64), CodecTensors())
