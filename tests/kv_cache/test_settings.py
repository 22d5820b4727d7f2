# SPDX-License-Identifier: Apache-2.0
"""From a name and the `kv_cache` block to the preset of every layer; messages that name setting, value and fix."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_ext.config import ConfigError, KVCacheSettings
from vllm_ext.kv_cache.presets import PLAN_NAME, PRESETS, default_plan, is_mixed
from vllm_ext.kv_cache.settings import choose_preset, choose_presets


def list_names(name: str, num_layers: int = 6, **block: Any) -> list[str]:
    return [preset.name for preset in choose_presets(name, KVCacheSettings(**block), 128, num_layers)]


def test_one_preset_serves_all_layers() -> None:
    presets = choose_presets("skvq_k2v2", KVCacheSettings(window=64, sinks=0, clip=0.9, group_size=32), 128, 3)
    assert len(presets) == 3
    assert not is_mixed(presets)
    assert (presets[0].window, presets[0].sinks, presets[0].clips) == (64, 0, (0.9,))
    assert presets[0].key.group_size == presets[0].value.group_size == 32
    assert choose_presets("kv4", None, 80, 1) == [PRESETS["kv4"].fit(80)] == [choose_preset("kv4", None, 80)]


def test_layers_that_are_not_named_have_the_preset_of_the_engine() -> None:
    assert list_names("skvq_k2v2", layer_bits={"0": "k4v4", "4-5": "kivi_k4v4"}) == [
        "k4v4", "skvq_k2v2", "skvq_k2v2", "skvq_k2v2", "kivi_k4v4", "kivi_k4v4",
    ]  # fmt: skip
    assert list_names("kv4", layer_bits={"0": "k4v4", "default": "k2v2"}) == ["k4v4"] + ["k2v2"] * 5


def test_settings_hold_for_every_layer_of_a_plan() -> None:
    plan = {"0": "k8v8", "1": "kivi_k2v2"}
    presets = choose_presets("kv4", KVCacheSettings(layer_bits=plan, window=40, sinks=3, clip=0.8), 64, 3)
    assert {(one.window, one.sinks, one.clips) for one in presets} == {(40, 3, (0.8,))}
    assert [one.retained_window for one in presets] == [40, 71, 40]
    assert {one.window for one in choose_presets("kv4", KVCacheSettings(layer_bits=plan), 64, 3)} == {128}
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype k8v8: .*group_size=48 does not divide head_dim=64"):
        choose_presets("kv4", KVCacheSettings(layer_bits=plan, group_size=48), 64, 3)


def test_kvplan_gives_boundary_layers_more_bits() -> None:
    assert list_names(PLAN_NAME) == ["k4v4"] * 2 + ["skvq_k2v2"] * 2 + ["k4v4"] * 2
    assert default_plan(3) == {"0": "k4v4", "1": "k4v4", "2": "k4v4", "default": "skvq_k2v2"}
    assert list_names(PLAN_NAME, layer_bits={"0-4": "k2v2", "5": "k2v15"}) == ["k2v2"] * 5 + ["k2v15"]


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        ("skvq_k2v2", {"window": -1}, r"vllm_ext\.kv_cache\.window must be a number of tokens, 0 for none, got -1"),
        (PLAN_NAME, {"sinks": -5}, r"vllm_ext\.kv_cache\.sinks must be a number of tokens, 0 for none, got -5"),
        (PLAN_NAME, {"clip": 1.5}, r"vllm_ext\.kv_cache\.clip must be a share of a group's range, .* got 1\.5"),
        (PLAN_NAME, {"layer_bits": {"0": "k4v4"}}, "layer_bits has nothing for layer 1: name it, or add 'default'"),
        ("kv4", {"layer_bits": {"6": "k4v4"}}, "layer_bits key '6' is not a layer, .*: layers are 0 to 5"),
        ("kv4", {"layer_bits": {"0": "k5v4"}}, "vllm_ext.kv_cache: 'k5v4' is not a KV-cache preset: use skvq_k2v2"),
        ("kv4", {"layer_bits": {"0": 4}}, "layer_bits has '0': 4, expected a layer and a preset, both as text"),
        ("kv4", {"layer_bits": {0: "k4v4"}}, "layer_bits has 0: 'k4v4', expected a layer and a preset"),
        ("kv4", {"layer_bits": {"0": "kvquant_k3v3"}}, "mixes presets with keys before and after RoPE"),
        (
            PLAN_NAME,
            {"calibration": "kv.safetensors"},
            r"vllm_ext\.kv_cache\.calibration kv\.safetensors is for one preset.*: drop calibration or layer_bits",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(name: str, block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_presets(name, KVCacheSettings(**block), 128, 6)
