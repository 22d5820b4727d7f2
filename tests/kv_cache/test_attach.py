# SPDX-License-Identifier: Apache-2.0
"""What is refused by name: settings, configurations and layers that the quantizers do not know."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

from vllm_ext import activation, config, observability
from vllm_ext.config import KVCacheSettings
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kv_cache import attach, calibrated, engine_setup
from vllm_ext.kv_cache.calibrated import _cut
from vllm_ext.kv_cache.presets import PRESETS
from vllm_ext.kv_cache.settings import choose_preset
from vllm_ext.kv_cache.sidecar import write_sidecar
from vllm_ext.patches import registry
from vllm_ext.patches.kv_cache import wrap_attention


@pytest.fixture(autouse=True)
def _restore_state() -> Iterator[None]:
    """The hook writes the environment of this process; children of other tests must not inherit it."""
    yield
    for name in (activation.ACTIVE_ENV, observability.DIRECTORY_ENV):
        os.environ.pop(name, None)


def make_config(model: str, dtype: str = "skvq_k2v2", block: dict[str, Any] | None = None, **arguments: Any) -> Any:
    block = {"vllm_ext": {"kv_cache": block}} if block is not None else {}
    given = {"max_model_len": 256, "enforce_eager": True, **arguments}
    return EngineArgs(model=model, kv_cache_dtype=dtype, additional_config=block, **given).create_engine_config()


def test_names_are_presets_and_switch_the_feature_on(tiny_moe: str) -> None:
    assert set(config.KV_CACHE_DTYPES) <= set(PRESETS)
    for name in config.KV_CACHE_DTYPES:
        built = make_config(tiny_moe, name)
        assert built.cache_config.cache_dtype == name
        assert activation.active_features() == ("kv_cache",)


def test_settings_change_the_preset() -> None:
    preset = choose_preset("skvq_k2v2", KVCacheSettings(window=64, sinks=0, clip=0.9, group_size=32), 128)
    assert (preset.window, preset.sinks, preset.clips) == (64, 0, (0.9,))
    assert preset.key.group_size == preset.value.group_size == 32
    assert choose_preset("kv4", None, 80) == PRESETS["kv4"].fit(80)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"window": -1}, r"vllm_ext\.kv_cache\.window must be a number of tokens, 0 for none, got -1"),
        ({"sinks": -5}, r"kv_cache\.sinks must be a number of tokens"),
        ({"clip": 0.0}, r"kv_cache\.clip must be a share of a group's range, above 0 to 1, got 0\.0"),
        ({"clip": 1.5}, r"kv_cache\.clip must be a share"),
        ({"group_size": 48}, r"--kv-cache-dtype skvq_k2v2: .*group_size=48 does not divide head_dim=64"),
        ({"layer_bits": {"default": "k4v4"}}, r"kv_cache\.layer_bits needs a preset for every layer"),
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


def test_gpus_are_refused(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_is_cpu", lambda: False)
    with pytest.raises(config.ConfigError, match="kv_cache does not run with GPUs: in this release"):
        make_config(tiny_moe)


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


def test_a_layer_is_ours_by_its_dtype_or_the_engines(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Falcon's attention gets no KV-cache configuration: it must not run unquantized without a word."""
    from vllm.model_executor.layers.attention.attention import Attention

    stock, ours = make_config(tiny_moe, "auto"), make_config(tiny_moe)
    calls: list[str] = []
    monkeypatch.setattr(Attention, "__init__", lambda self, *args, **kwargs: calls.append("vLLM's"))
    wrap_attention()
    with set_current_vllm_config(stock):
        Attention(2, 64, 0.125)
        Attention(2, 64, 0.125, cache_config=SimpleNamespace(cache_dtype="fp8"))
    assert calls == ["vLLM's"] * 2
    monkeypatch.setattr(attach, "make_layer", lambda *args, **kwargs: calls.append("ours"))
    with set_current_vllm_config(ours):
        Attention(2, 64, 0.125)
        Attention(2, 64, 0.125, None, None, None, ours.cache_config)
        Attention(2, 64, 0.125, cache_config=SimpleNamespace(cache_dtype="auto"))
    assert calls == ["vLLM's"] * 2 + ["ours"] * 2 + ["vLLM's"]


def test_vllm_plans_the_pages_of_a_layer_with_its_drafts(tiny_moe: str) -> None:
    """vLLM writes over `extra_retained_tokens` of windows: the room for rejected drafts must outlive that."""
    from vllm.model_executor.layers.attention.attention import Attention

    speculative = {"method": "ngram", "num_speculative_tokens": 5}
    built, name = make_config(tiny_moe, speculative_config=speculative), "model.layers.0.self_attn.attn"
    built.cache_config.kv_cache_layout = "LBHNC"
    with set_current_vllm_config(built):
        layer = Attention(2, 64, 0.125, num_kv_heads=2, cache_config=built.cache_config, prefix=name)
        beside = built.compilation_config.static_forward_context[f"{name}.recent"]
        specs = {
            name: layer.attn_backend.customize_spec(layer.get_kv_cache_spec(built)),
            f"{name}.recent": beside.get_kv_cache_spec(built),
        }
        groups = get_kv_cache_configs(built, [specs], [1 << 28])[0].kv_cache_groups
    quantized, window = (group.kv_cache_spec for group in groups)
    assert quantized.state_content_bytes == 36
    assert (window.sliding_window, window.kept_window, window.sinks) == (128, 133, 5)


def test_head_sizes_without_whole_bytes_are_refused(tiny_moe: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_moe, model, ignore=shutil.ignore_patterns("*.safetensors", "*.txt"))
    changed = json.loads((model / "config.json").read_text()) | {"head_dim": 36}
    (model / "config.json").write_text(json.dumps(changed))
    with pytest.raises(config.ConfigError, match="kivi_k2v2 does not fit this model's heads: head_dim=36"):
        make_config(str(model), "kivi_k2v2", tokenizer=tiny_moe)


def test_calibration_of_another_preset_is_refused(tiny_moe: str, tmp_path: Path) -> None:
    path = tmp_path / "sidecar.safetensors"
    tensors = CodecTensors(smooth=torch.ones(2, 64))
    write_sidecar(path, {"model.layers.0.self_attn.attn": (tensors, CodecTensors())}, PRESETS["skvq_k2v15"], 2, 64)
    make_config(tiny_moe, "skvq_k2v15", {"calibration": str(path)})
    with pytest.raises(ValueError, match="has preset 'skvq_k2v15', but this engine needs 'skvq_k2v2'"):
        make_config(tiny_moe, "skvq_k2v2", {"calibration": str(path)})


def test_a_layer_takes_its_tensors_from_the_file(
    tiny_moe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, name = tmp_path / "sidecar.safetensors", "model.layers.1.self_attn.attn"
    order = torch.stack([torch.randperm(64), torch.arange(64)])
    write_sidecar(path, {name: (CodecTensors(order=order), CodecTensors())}, PRESETS["skvq_k2v2"], 2, 64)
    built = make_config(tiny_moe, block={"calibration": str(path)})
    layers: dict[str, Any] = {name: object(), "model.layers.0.self_attn.attn": object()}
    monkeypatch.setattr(built.compilation_config, "static_forward_context", layers)
    monkeypatch.setattr(built.parallel_config, "tensor_parallel_size", 2)
    monkeypatch.setattr(calibrated, "get_tensor_model_parallel_rank", lambda: 1)
    preset = choose_preset("skvq_k2v2", None, 64)
    with set_current_vllm_config(built):
        found = [
            calibrated.find_tensors(SimpleNamespace(preset=preset, head_size=64, num_kv_heads=1, layer_name=layer))
            for layer in layers
        ]
        assert found[0][0].order is not None
        assert found[0][0].order.tolist() == [list(range(64))]
        assert found[1] == (CodecTensors(), CodecTensors())
        # A file that is calibrated again between two engines of a process is read again.
        write_sidecar(path, {name: (CodecTensors(order=order.flip(-1)), CodecTensors())}, PRESETS["skvq_k2v2"], 2, 64)
        os.utime(path, ns=(0, 0))
        impl = SimpleNamespace(preset=preset, head_size=64, num_kv_heads=1, layer_name=name)
        assert calibrated.find_tensors(impl)[0].order.tolist() == [list(range(63, -1, -1))]
        del layers[name]
        impl = SimpleNamespace(preset=preset, head_size=64, num_kv_heads=1, layer_name="model.layers.0.self_attn.attn")
        with pytest.raises(ValueError, match=r"holds model\.layers\.1\.self_attn\.attn, which is no attention layer"):
            calibrated.find_tensors(impl)


def test_a_rank_takes_its_heads() -> None:
    tensors = CodecTensors(smooth=torch.arange(8.0).view(4, 2), levels=torch.arange(4.0))
    cut = _cut(tensors, 2, 2)
    assert cut.smooth is not None
    assert cut.smooth.tolist() == [[4, 5], [6, 7]]
    assert cut.levels is tensors.levels
    assert cut.order is None
