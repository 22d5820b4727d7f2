# SPDX-License-Identifier: Apache-2.0
"""Layers of our dtypes: which are ours, the pages that vLLM plans for them, what is said at start-up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs, update_kv_cache_capacity

from tests.kv_cache.configs import LAYERS, make_config, restore_state, write_calibration  # noqa: F401  (a fixture)
from vllm_ext import config
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kv_cache import attach, engine_setup
from vllm_ext.kv_cache.capacity import Geometry, compute_capacity
from vllm_ext.kv_cache.presets import PRESETS
from vllm_ext.patches.kv_cache import wrap_attention


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


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param({"0": "k4v4"}, id="a layer of five with larger pages"),
        pytest.param({"0-1": "k4v4", "2-3": "kivi_k2v2", "4": "k8v8"}, id="three sizes"),
        pytest.param({"0": "k4v4", "1": "k8v4", "2": "k8v8", "3": "k4v2"}, id="no two layers of one size"),
        pytest.param({"0-1": "k2v4", "2-3": "k4v2", "4": "k4v2"}, id="pages of one size"),
    ],
)
def test_vllm_plans_one_group_for_all_layers_of_a_plan(tiny_moe: str, plan: dict[str, str]) -> None:
    """And one for their windows: dealt to several groups, a request's window would cost several times as much."""
    from vllm.model_executor.layers.attention.attention import Attention

    built = make_config(tiny_moe, block={"layer_bits": plan})
    names = [f"model.layers.{number}.self_attn.attn" for number in range(5)]
    with set_current_vllm_config(built):
        layers = [
            Attention(2, 64, 0.125, num_kv_heads=2, cache_config=built.cache_config, prefix=name) for name in names
        ]
        known = built.compilation_config.static_forward_context
        supported = [
            [layout.name for layout in known[name].get_attn_backend().supported_kv_cache_layouts()]
            for name in (*names, *(f"{name}.recent" for name in names))
        ]
        specs: dict[str, Any] = {
            name: layer.attn_backend.customize_spec(layer.get_kv_cache_spec(built))
            for name, layer in zip(names, layers, strict=True)
        }
        specs |= {f"{name}.recent": known[f"{name}.recent"].get_kv_cache_spec(built) for name in names}
        common = set.intersection(*map(set, supported))
        resolve_kv_cache_layout(built, [sorted(common)], specs.values())
        made = get_kv_cache_configs(built, [specs], [1 << 28])[0]
        update_kv_cache_capacity(built, made)
    assert built.cache_config.kv_cache_layout == "BLHNC"
    assert [len(group.layer_names) for group in made.kv_cache_groups] == [5, 5]
    assert not made.needs_kv_cache_zeroing
    expected = compute_capacity([layer.impl.preset for layer in layers], Geometry(5, 2, 64), 1 << 28, 256)
    assert made.num_blocks == (1 << 28) // expected.page_bytes
    assert built.cache_config.kv_cache_size_tokens == expected.tokens


def test_what_runs_in_torch_is_said_at_start_up(tiny_moe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(engine_setup.logger, "warning", lambda text, *values: messages.append(text % values))
    make_config(tiny_moe, block={"layer_bits": {"0": "k3v15", "1": "kivi_k2v2"}})
    assert messages == []
    make_config(tiny_moe, block={"layer_bits": {"default": "kvquant_k3v3"}})
    said = "KV-cache preset kvquant_k3v3 runs in torch and not in a compiled kernel: its keys are stored before RoPE"
    assert messages == [said]
    path = tmp_path / "sidecar.safetensors"
    tensors = CodecTensors(levels=torch.tensor([0.0, 1.1, 1.9, 3.0]))
    write_calibration(path, tiny_moe, {LAYERS[0]: tensors})
    make_config(tiny_moe, "skvq_k2v2", {"calibration": str(path)})
    assert messages[1:] == [f"{path} has codebooks, whose layers run in torch and not in a compiled kernel"]
    plain = PRESETS["kv4"].fit(64)
    assert engine_setup.find_slow(plain, plain.plan_cells(64, 128), torch.bfloat16) is None
    assert engine_setup.find_slow(plain, plain.plan_cells(64, 128), torch.float32) == (
        "the model is float32; serve it in bfloat16"
    )
    on_gpu = engine_setup.find_slow(plain, plain.plan_cells(64, 128), torch.bfloat16, is_cpu=False)
    assert on_gpu == "in this release they run on CPUs only, and torch is far too slow to serve with"


@pytest.mark.parametrize(
    ("dtype", "block", "named"),
    [
        ("skvq_k2v2", {}, "skvq_k2v2"),
        ("kv4", {}, "kv4"),
        ("kivi_k2v2", {}, None),
        ("kvplan", {"layer_bits": {"0": "kivi_k2v2", "1-2": "k3v2", "default": "k4v15"}}, "k3v2, k4v15"),
        ("kvplan", {"layer_bits": {"0": "kivi_k2v2", "default": "k8v2"}}, None),
    ],
)
def test_presets_that_mix_channels_are_warned_of_where_keys_have_biases(
    tiny_moe: str, monkeypatch: pytest.MonkeyPatch, dtype: str, block: dict[str, Any], named: str | None
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(engine_setup.logger, "warning", lambda text, *values: messages.append(text % values))
    built = make_config(tiny_moe, dtype, block)
    assert messages == []
    monkeypatch.setattr(built.model_config.hf_text_config, "attention_bias", True)
    engine_setup.check_engine(built)
    if named is None:
        assert messages == []
    else:
        (said,) = messages
        assert said.startswith(f"keys of {tiny_moe} have biases, and KV-cache preset {named} codes channels")


def test_a_calibrated_preset_is_not_warned_of(tiny_moe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(engine_setup.logger, "warning", lambda text, *values: messages.append(text % values))
    path = tmp_path / "sidecar.safetensors"
    write_calibration(path, tiny_moe, {LAYERS[0]: CodecTensors(shift=torch.ones(2, 64))})
    built = make_config(tiny_moe, "skvq_k2v2", {"calibration": str(path)})
    monkeypatch.setattr(built.model_config.hf_text_config, "attention_bias", True)
    engine_setup.check_engine(built)
    assert messages == []


def test_models_with_key_biases_are_known() -> None:
    biased = [
        {"model_type": "qwen2"},
        {"model_type": "qwen2_5_vl_text"},
        {"model_type": "glm4", "attention_bias": True},
    ]
    plain = [{"model_type": "qwen3", "attention_bias": False}, {"model_type": "llama", "qkv_bias": None}, {}]
    assert all(engine_setup.has_key_bias(SimpleNamespace(**one)) for one in biased)
    assert not any(engine_setup.has_key_bias(SimpleNamespace(**one)) for one in plain)


def test_layers_of_a_plan_are_known_by_their_number() -> None:
    assert attach.find_number("model.layers.3.self_attn.attn", 5) == 3
    for prefix in ("model.layers.5.self_attn.attn", "model.layers.1.block.2.attn", "attn"):
        with pytest.raises(config.ConfigError, match=f"layer_bits numbers 5 layers, and '{prefix}' names none"):
            attach.find_number(prefix, 5)


def test_keys_before_rope_need_its_angles(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = make_config(tiny_moe)
    text_config = built.model_config.hf_text_config
    with set_current_vllm_config(built):
        cos_sin = attach.find_cos_sin(built, 64)
        assert cos_sin.shape == (2048, 64)
        # One full turn of the fastest pair takes 2 pi tokens.
        assert torch.allclose(cos_sin[:, 0], torch.arange(2048.0).cos(), atol=1e-4)
        monkeypatch.setattr(text_config, "rope_parameters", {"full": {"rope_type": "default"}})
        with pytest.raises(config.ConfigError, match=r"keeps keys before their rotary .*tiny_moe has none"):
            attach.find_cos_sin(built, 64)
