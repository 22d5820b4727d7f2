# SPDX-License-Identifier: Apache-2.0
"""What is refused by name: settings, configurations and layers that the quantizers do not know."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config

from tests.kv_cache.configs import LAYERS, make_config, restore_state  # noqa: F401  (a fixture)
from vllm_ext import activation, config
from vllm_ext.kv_cache import attach, engine_setup
from vllm_ext.kv_cache.presets import PLAN_NAME, PRESETS
from vllm_ext.patches import registry


def test_names_are_presets_and_switch_the_feature_on(tiny_moe: str) -> None:
    assert set(config.KV_CACHE_DTYPES) <= {*PRESETS, PLAN_NAME}
    for name in config.KV_CACHE_DTYPES:
        built = make_config(tiny_moe, name)
        assert built.cache_config.cache_dtype == name
        assert activation.active_features() == ("kv_cache",)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"window": -1}, r"vllm_ext\.kv_cache\.window must be a number of tokens, 0 for none, got -1"),
        ({"clip": 0.0}, r"kv_cache\.clip must be a share of a group's range, above 0 to 1, got 0\.0"),
        ({"group_size": 48}, r"--kv-cache-dtype skvq_k2v2: .*group_size=48 does not divide head_dim=64"),
        ({"layer_bits": {"7": "k4v4"}}, r"layer_bits key '7' is not a layer, a range or 'default': layers are 0 to 4"),
        ({"calibration": "/nowhere.safetensors"}, r"/nowhere\.safetensors does not exist: write one with"),
        ({"enabled": False}, r"needs vllm_ext\.kv_cache, which is switched off"),
        ({"windw": 3}, r"unknown setting vllm_ext\.kv_cache\.windw; did you mean vllm_ext\.kv_cache\.window"),
    ],
)
def test_bad_settings_stop_the_start(tiny_moe: str, block: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tiny_moe, block=block)
    assert activation.ACTIVE_ENV not in os.environ


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "auto", "block": {}}, "kv_cache does not run with a --kv-cache-dtype of vLLM's own: .*skvq_k2v2"),
        ({"disable_hybrid_kv_cache_manager": True}, "kv_cache does not run with --disable-hybrid-kv-cache-manager"),
        ({"kv_offloading_size": 1.0}, "kv_cache does not run with --kv-transfer-config and --kv-offloading-size"),
        ({"kv_cache_dtype_skip_layers": ["0"]}, "kv_cache does not run with --kv-cache-dtype-skip-layers"),
        ({"kv_sharing_fast_prefill": True}, "kv_cache does not run with --kv-sharing-fast-prefill"),
        ({"decode_context_parallel_size": 2}, "kv_cache does not run with --decode-context-parallel-size"),
        ({"pipeline_parallel_size": 2}, "kv_cache does not run with --pipeline-parallel-size above 1"),
        (
            {"speculative_config": {"method": "eagle", "model": "x", "num_speculative_tokens": 2}},
            "kv_cache does not run with drafters that have a KV cache of their own",
        ),
        ({"dtype": "kivi_k2v2", "block_size": 48}, "block_size=48 does not hold whole groups of 32 tokens"),
    ],
)
def test_refused_combinations(tiny_moe: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        make_config(tiny_moe, **arguments)


def test_other_devices_are_refused(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_is_cpu", lambda: False)
    with pytest.raises(config.ConfigError, match="kv_cache does not run with devices other than CPUs and CUDA: its"):
        make_config(tiny_moe)
    monkeypatch.setattr(config, "_is_cuda", lambda: True)
    assert make_config(tiny_moe).cache_config.cache_dtype == "skvq_k2v2"


def test_a_changed_attention_layer_is_refused(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to vLLM, its layers would read our pages as if they held numbers."""
    record = registry.find_record("kv_cache_attention")
    broken = dataclasses.replace(record, symbols=(dataclasses.replace(record.symbols[0], digest="0" * 12),))
    monkeypatch.setattr(registry, "RECORDS", tuple(broken if one is record else one for one in registry.RECORDS))
    with pytest.raises(config.ConfigError, match=r"skvq_k2v2 cannot run: vllm\.model_executor.*Attention.__init__ is"):
        make_config(tiny_moe)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("use_mla", True, r"tiny_moe, a model with latent attention \(MLA\): use a --kv-cache-dtype of vLLM's own"),
        ("is_hybrid", True, "a model with state-space or linear-attention layers"),
        ("is_attention_free", True, "a model with no attention"),
        ("is_encoder_decoder", True, "a model with an encoder and cross-attention"),
        ("runner_type", "pooling", "a model with no causal decoder"),
        ("is_diffusion", True, "a model with diffusion"),
    ],
)
def test_other_kinds_of_models_are_refused(
    tiny_moe: str, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, message: str
) -> None:
    built = make_config(tiny_moe)
    # Some are properties, others are kept in the object.
    model = built.model_config
    monkeypatch.setattr(model if name in vars(model) else type(model), name, value)
    with pytest.raises(config.ConfigError, match=message):
        engine_setup.check_engine(built)


def test_the_other_model_runner_is_refused(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = make_config(tiny_moe)
    monkeypatch.setattr(type(built), "use_v2_model_runner", True)
    with pytest.raises(config.ConfigError, match="needs the V1 model runner, and this engine uses V2: set VLLM_USE_V2"):
        engine_setup.check_engine(built)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, None),
        ({"logits_soft_cap": 0.0, "extra_impl_args": {"sinks": None}}, None),
        ({"alibi_slopes": [0.5]}, "ALiBi slopes"),
        ({"logits_soft_cap": 50.0}, "a logits soft cap of 50.0"),
        ({"per_layer_sliding_window": 512}, "a sliding window of 512 tokens"),
        ({"attn_type": "encoder_only"}, "attention of the type encoder_only"),
        ({"attn_backend": object}, "an attention backend of its own"),
        ({"kv_sharing_target_layer_name": "model.layers.3"}, "the KV cache of model.layers.3"),
        ({"head_size_v": 32}, "values of 32 elements"),
        ({"cache_config": None}, "no KV-cache configuration from its model's code"),
        ({"extra_impl_args": {"sinks": torch.zeros(4)}}, "attention arguments sinks"),
    ],
)
def test_layers_are_refused_by_what_they_have(given: dict[str, Any], words: str | None) -> None:
    cache = SimpleNamespace(sliding_window=None)
    engine = SimpleNamespace(model_config=SimpleNamespace(is_mm_prefix_lm=False))
    assert attach.find_refusal({"head_size": 64, "cache_config": cache, **given}, engine) == words


def test_head_sizes_without_whole_bytes_are_refused(tiny_moe: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_moe, model, ignore=shutil.ignore_patterns("*.safetensors", "*.txt"))
    changed = json.loads((model / "config.json").read_text()) | {"head_dim": 66}
    (model / "config.json").write_text(json.dumps(changed))
    with pytest.raises(config.ConfigError, match="kivi_k2v2 does not fit this model's heads: K=66 codes"):
        make_config(str(model), "kivi_k2v2", tokenizer=tiny_moe)


@pytest.mark.parametrize(("heads", "size"), [(1, 64), (2, 128)])
def test_layers_with_other_heads_are_refused(tiny_moe: str, heads: int, size: int) -> None:
    """vLLM ends in a bare assertion, far from the layer, where pages of one pool differ."""
    from vllm.model_executor.layers.attention.attention import Attention

    built = make_config(tiny_moe)
    with set_current_vllm_config(built):
        for name in LAYERS[:2]:
            Attention(2, 64, 0.125, num_kv_heads=2, cache_config=built.cache_config, prefix=name)
        message = (
            rf"model\.layers\.2\.self_attn\.attn, which has {heads} kv heads of {size} where .*layers\.0\..* 2 of 64"
        )
        with pytest.raises(config.ConfigError, match=message):
            Attention(2, size, 0.125, num_kv_heads=heads, cache_config=built.cache_config, prefix=LAYERS[2])
