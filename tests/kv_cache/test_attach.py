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
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs, update_kv_cache_capacity

from vllm_ext import activation, config, observability
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kv_cache import attach, calibrated, engine_setup
from vllm_ext.kv_cache.calibrated import _cut
from vllm_ext.kv_cache.capacity import Geometry, compute_capacity
from vllm_ext.kv_cache.presets import PLAN_NAME, PRESETS
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
    write_sidecar(path, {"model.layers.0.self_attn.attn": (tensors, CodecTensors())}, PRESETS["skvq_k2v2"], 2, 64)
    make_config(tiny_moe, "skvq_k2v2", {"calibration": str(path)})
    assert messages[1:] == [f"{path} has codebooks, whose layers run in torch and not in a compiled kernel"]
    plain = PRESETS["kv4"].fit(64)
    assert engine_setup.find_slow(plain, plain.plan_cells(64, 128), torch.bfloat16) is None
    assert engine_setup.find_slow(plain, plain.plan_cells(64, 128), torch.float32) == (
        "the model is float32; serve it in bfloat16"
    )


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
