# SPDX-License-Identifier: Apache-2.0
"""Presets: true bits, head sizes, per-layer plans, and messages that name value and fix."""

from __future__ import annotations

import pytest

from vllm_ext.kv_cache.presets import PRESETS, get_preset, parse_plan


@pytest.mark.parametrize(
    ("name", "cell_bytes", "bits"),
    [
        ("skvq_k2v2", 68, 2.125),
        ("skvq_k2v15", 62, 1.9375),
        ("kivi_k2v2", 84, 2.625),
        ("kivi_k4v4", 148, 4.625),
        ("kv4", 136, 4.25),
        ("kvquant_k3v3", 112, 3.5),
    ],
)
def test_bytes_and_bits_of_a_head_of_128(name: str, cell_bytes: int, bits: float) -> None:
    assert PRESETS[name].plan_cells(128, 128).cell_bytes == cell_bytes
    assert PRESETS[name].bits(128) == pytest.approx(bits)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_usual_head_sizes_fit(name: str, head_dim: int) -> None:
    layout = PRESETS[name].plan_cells(head_dim, 128)
    for codec in (layout.key, layout.value):
        assert codec.per_channel or head_dim % codec.group_size == 0
        assert codec.group_size >= 16


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="skvq_k2v2 does not fit this model's heads: K=66 codes of bits=2"):
        PRESETS["skvq_k2v2"].fit(66)
    with pytest.raises(ValueError, match="group_size=48 does not divide head_dim=128: set group_size to one of 8, 16"):
        PRESETS["skvq_k2v2"].fit(128, 48)
    with pytest.raises(ValueError, match="block_size=16 does not hold whole groups of 32 tokens"):
        PRESETS["kivi_k2v2"].plan_cells(128, 16)


def test_names_of_a_plan() -> None:
    preset = get_preset("k4v15")
    assert (preset.key.bits, preset.value.bits) == (4, 1.5)
    assert get_preset("kv4") is PRESETS["kv4"]
    for name in ("k2", "k5v2", "k2v2 ", "k1.5v2", "skvq"):
        with pytest.raises(ValueError, match="is not a KV-cache preset: use skvq_k2v2"):
            get_preset(name)


def test_plans_name_every_layer_once() -> None:
    plan = parse_plan({"0": "k8v8", "5": "kivi_k4v4", "default": "skvq_k2v2", "1-2": "k4v2"}, 6)
    assert [preset.name for preset in plan] == ["k8v8", "k4v2", "k4v2", "skvq_k2v2", "skvq_k2v2", "kivi_k4v4"]
    assert {(preset.window, preset.sinks) for preset in plan} == {(128, 5)}
    assert {(preset.window, preset.sinks) for preset in parse_plan({"0-1": "kv4"}, 2, 32, 1)} == {(32, 1)}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"0": "k2v2"}, "nothing for layer 1: name it, or add 'default'"),
        ({"0-1": "k2v2", "1": "k4v4", "default": "k2v2"}, "names layer 1 twice: '1' repeats it"),
        ({"2": "k2v2", "default": "k2v2"}, "key '2' is not a layer, a range or 'default': layers are 0 to 1"),
        ({"1-0": "k2v2", "default": "k2v2"}, "key '1-0' is not a layer"),
        ({"-1": "k2v2", "default": "k2v2"}, "key '-1' is not a layer"),
        ({"layers": "k2v2"}, "key 'layers' is not a layer"),
        ({"0": "k2v9", "1": "k2v2"}, "'k2v9' is not a KV-cache preset"),
        ({"0": "kvquant_k3v3", "1": "k2v2"}, "mixes presets with keys before and after RoPE"),
    ],
)
def test_bad_plans_are_refused_by_name(plan: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_plan(plan, 2)
