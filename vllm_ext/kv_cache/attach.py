# SPDX-License-Identifier: Apache-2.0
"""An attention layer with a KV-cache dtype of ours: refused by name where our kernels do not know it, or completed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from vllm_ext import config, observability
from vllm_ext.kernels.native.load import load_ops
from vllm_ext.kv_cache.backend import KVCacheImpl, make_backend
from vllm_ext.kv_cache.presets import is_mixed
from vllm_ext.kv_cache.recent_layer import RecentLayer
from vllm_ext.kv_cache.settings import choose_presets


def make_layer(original: Callable[..., None], layer: Any, *args: Any, **kwargs: Any) -> None:
    """Run vLLM's constructor with our backend, then add what it does not pass on.

    original: `Attention.__init__`. Raises ConfigError naming the layer and what it has.
    """
    vllm_config = get_current_vllm_config()
    given = inspect.signature(original).bind(layer, *args, **kwargs).arguments
    cache_dtype = vllm_config.cache_config.cache_dtype
    if reason := find_refusal(given, vllm_config):
        raise config.ConfigError(
            f"--kv-cache-dtype {cache_dtype} does not run with {given.get('prefix', 'an attention layer')}, which has "
            f"{reason}: use a --kv-cache-dtype of vLLM's own for {vllm_config.model_config.model}"
        )
    every_setting = config.read_settings(vllm_config)
    settings = every_setting.kv_cache
    if current_platform.is_cpu():
        # Compiled now, where no request waits for it.
        load_ops(every_setting.cache_dir)
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    presets = choose_presets(cache_dtype, settings, given["head_size"], num_layers)
    number = find_number(given.get("prefix", ""), num_layers) if is_mixed(presets) else 0
    preset = presets[number]
    original(layer, *args, **kwargs, attn_backend=make_backend(preset, is_mixed(presets)))
    check_same_heads(layer, vllm_config)
    index = vllm_config.parallel_config.data_parallel_rank
    keeps_recent = any(one.keeps_recent for one in presets)
    layer.impl.attach(
        layer.layer_name,
        preset,
        vllm_config.model_config.dtype,
        is_checked=settings is not None and settings.check,
        engine_index=index,
        keeps_recent=keeps_recent,
        cos_sin=find_cos_sin(vllm_config, given["head_size"]) if preset.pre_rope else None,
    )
    if keeps_recent:
        RecentLayer(layer, presets, number == num_layers - 1, vllm_config)
    is_first_rank = vllm_config.parallel_config.rank % vllm_config.parallel_config.tensor_parallel_size == 0
    cells = preset.plan_cells(layer.head_size, vllm_config.cache_config.block_size)
    observability.add("vllm_ext:kv_cache_layer_count", float(is_first_rank), index)
    observability.add("vllm_ext:kv_cache_token_bytes", layer.num_kv_heads * cells.cell_bytes, index)
    observability.add("vllm_ext:kv_cache_token_elements", 2 * layer.num_kv_heads * layer.head_size, index)


def find_refusal(given: Mapping[str, Any], vllm_config: Any) -> str | None:
    """What of a layer's arguments our kernels do not know, in words; None for a plain causal layer."""
    cache_config = given.get("cache_config")
    if cache_config is None:
        return "no KV-cache configuration from its model's code"
    window = given.get("per_layer_sliding_window") or cache_config.sliding_window
    extra = {
        name: value
        for name, value in given.get("extra_impl_args", {}).items()
        if value is not None and (name, value) != ("chunk_lookback", -1)
    }
    found = {
        "an attention backend of its own": given.get("attn_backend") is not None,
        f"attention of the type {given.get('attn_type')}": given.get("attn_type", "decoder") != "decoder",
        "ALiBi slopes": bool(given.get("alibi_slopes")) or bool(given.get("use_alibi_sqrt")),
        f"a logits soft cap of {given.get('logits_soft_cap')}": bool(given.get("logits_soft_cap")),
        f"a sliding window of {window} tokens": window is not None,
        f"the KV cache of {given.get('kv_sharing_target_layer_name')}": bool(given.get("kv_sharing_target_layer_name")),
        f"values of {given.get('head_size_v')} elements": given.get("head_size_v") not in (None, given["head_size"]),
        f"attention arguments {', '.join(sorted(extra))}": bool(extra),
        "attention in both directions over images": bool(vllm_config.model_config.is_mm_prefix_lm),
    }
    return next((words for words, is_found in found.items() if is_found), None)


def check_same_heads(layer: Any, vllm_config: Any) -> None:
    """Raises ConfigError for a layer whose heads differ from those of the first: one pool has one size of page."""
    known = vllm_config.compilation_config.static_forward_context
    first = next((one for one in known.values() if isinstance(getattr(one, "impl", None), KVCacheImpl)), layer)
    found, expected = ((one.num_kv_heads, one.head_size) for one in (layer, first))
    if found != expected:
        raise config.ConfigError(
            f"--kv-cache-dtype {vllm_config.cache_config.cache_dtype} does not run with {layer.layer_name}, which has "
            f"{found[0]} kv heads of {found[1]} where {first.layer_name} has {expected[0]} of {expected[1]}: use a "
            f"--kv-cache-dtype of vLLM's own for {vllm_config.model_config.model}"
        )


def find_number(prefix: str, num_layers: int) -> int:
    """The number of a layer in its name. Raises ConfigError for a name without one number below `num_layers`."""
    try:
        number = int(extract_layer_index(prefix))
    except AssertionError:
        number = num_layers
    if number >= num_layers:
        raise config.ConfigError(
            f"vllm_ext.kv_cache.layer_bits numbers {num_layers} layers, and {prefix!r} names none of them: drop it, "
            "and choose one preset for all layers with --kv-cache-dtype"
        )
    return number


def find_cos_sin(vllm_config: Any, head_dim: int) -> torch.Tensor:
    """Angles by which a preset with keys before RoPE turns them back: float32 [positions, rotary], cosines, then sines.

    An attention layer does not know its model's rotary embedding, so this is the one of the model's configuration, for
    pairs of channels that lie half a head apart. Keys are turned back and forth by the same angles: where a model
    pairs its channels otherwise, its keys are read right and are only no easier to code. Raises ConfigError for a
    model without one rotary embedding for all layers.
    """
    model = vllm_config.model_config
    parameters = getattr(model.hf_text_config, "rope_parameters", None)
    positions = max(getattr(model.hf_text_config, "max_position_embeddings", 0), model.max_model_len)
    if parameters and "rope_type" in parameters:
        rope = get_rope(head_dim, positions, rope_parameters=parameters, dtype=torch.float32)
        cos_sin = getattr(rope, "cos_sin_cache", None)
        if cos_sin is not None and cos_sin.dim() == 2 and len(cos_sin) >= model.max_model_len:
            return cos_sin.float()
    raise config.ConfigError(
        f"--kv-cache-dtype {vllm_config.cache_config.cache_dtype} keeps keys before their rotary embedding, and "
        f"{model.model} has none that is known, or several: use a preset that keeps them after it, such as skvq_k2v2"
    )
