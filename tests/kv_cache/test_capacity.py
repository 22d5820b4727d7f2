# SPDX-License-Identifier: Apache-2.0
"""Capacity: the tokens that vLLM itself logged for these specs, and the ratios at the geometry of the targets."""

from __future__ import annotations

import dataclasses

import pytest

from vllm_ext.kv_cache.capacity import Geometry, compute_capacity, compute_plain_capacity
from vllm_ext.kv_cache.presets import PRESETS, Preset, parse_plan

#: What was run in an engine: 4 layers, 2 heads of 64, 256 MiB.
SMALL, SMALL_BYTES = Geometry(4, 2, 64), 256 << 20
LARGE, LARGE_BYTES = Geometry(32, 8, 128), 64 << 30


def change(name: str, **fields: object) -> Preset:
    return dataclasses.replace(PRESETS[name], **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("preset", "max_model_len", "tokens"),
    [
        (change("skvq_k2v2", window=0, sinks=0), 2048, 931_968),
        (change("skvq_k2v2", sinks=4), 2048, 426_042),
        (change("skvq_k2v2", sinks=4), 32_768, 867_577),
    ],
)
def test_the_figures_of_vllms_log(preset: Preset, max_model_len: int, tokens: int) -> None:
    assert compute_plain_capacity(SMALL, SMALL_BYTES, 2048) == 131_072
    assert compute_capacity(preset, SMALL, SMALL_BYTES, max_model_len).tokens == tokens


@pytest.mark.parametrize(
    ("name", "ratio", "bits"),
    [
        ("skvq_k2v2", 7.01, 2.125),
        ("skvq_k2v15", 7.26, 1.9375),
        ("kivi_k2v2", 5.61, 2.625),
        ("kivi_k4v4", 3.30, 4.625),
        ("kv4", 3.76, 4.25),
        ("kvquant_k3v3", 4.55, 3.5),
    ],
)
def test_ratios_at_32k(name: str, ratio: float, bits: float) -> None:
    capacity = compute_capacity(PRESETS[name], LARGE, LARGE_BYTES, 32_768)
    assert capacity.ratio == pytest.approx(ratio, abs=0.01)
    assert capacity.bits == pytest.approx(bits)


def test_the_window_costs_short_requests_most() -> None:
    ratios = [
        compute_capacity(PRESETS["skvq_k2v2"], LARGE, LARGE_BYTES, length).ratio for length in (2048, 8192, 32768)
    ]
    assert ratios == pytest.approx([3.44, 5.81, 7.01], abs=0.01)


def test_a_plan_lies_between_its_presets() -> None:
    plan = parse_plan({"0": "kivi_k4v4", "31": "kivi_k4v4", "default": "skvq_k2v2"}, 32)
    mixed, low, high = (
        compute_capacity(each, LARGE, LARGE_BYTES, 32_768)
        for each in (plan, PRESETS["skvq_k2v2"], PRESETS["kivi_k4v4"])
    )
    assert high.ratio < mixed.ratio < low.ratio
    assert mixed.bits == pytest.approx((30 * 2.125 + 2 * 4.625) / 32)
    with pytest.raises(ValueError, match="32 presets do not fit 4 layers"):
        compute_capacity(plan, SMALL, SMALL_BYTES, 2048)


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="does not hold one block"):
        compute_capacity(PRESETS["kv4"], LARGE, 1000, 2048)
    with pytest.raises(ValueError, match="does not hold one token in full precision: raise block_size above 4"):
        compute_capacity(PRESETS["skvq_k2v2"], Geometry(1, 8, 128, block_size=4), LARGE_BYTES, 2048)
