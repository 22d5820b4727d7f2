# SPDX-License-Identifier: Apache-2.0
"""Checks of a finished configuration for the KV-cache quantizers, before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.platforms import current_platform

from vllm_ext import config
from vllm_ext.kernels.kv_store.cpu import WIDTHS, knows
from vllm_ext.kernels.kv_store.layout import CellLayout
from vllm_ext.kv_cache.presets import Preset
from vllm_ext.kv_cache.settings import choose_presets
from vllm_ext.kv_cache.sidecar import describe_model, read_sidecar
from vllm_ext.patches import registry

logger = logging.getLogger("vllm.vllm_ext")

#: What configurations call a bias of k_proj, and types of models that have one in any case.
BIAS_SETTINGS = ("attention_bias", "qkv_bias", "add_qkv_bias", "use_qkv_bias")
BIASED_MODELS = ("qwen2",)
#: Levels of so many bits are fine enough for a channel beside one that is some twenty times as large.
FINE_BITS = 8


def check_engine(vllm_config: Any) -> None:
    """Refuse what only the finished configuration shows; what only layers show is refused when they are made.

    Raises config.ConfigError naming the value and the fix, and sidecar.SidecarError (both ValueErrors).
    """
    name, model = vllm_config.cache_config.cache_dtype, vllm_config.model_config
    mismatch = registry.find_mismatch(registry.find_record("kv_cache_attention"))
    if mismatch is not None:
        raise config.ConfigError(
            f"--kv-cache-dtype {name} cannot run: {mismatch}. Install a vllm-ext release for this vLLM: "
            "pip install --upgrade vllm-ext"
        )
    kinds = {
        "latent attention (MLA)": model.use_mla,
        "state-space or linear-attention layers": model.is_hybrid,
        "no attention": model.is_attention_free,
        "an encoder and cross-attention": model.is_encoder_decoder,
        "no causal decoder": model.runner_type == "pooling",
        "diffusion": model.is_diffusion,
    }
    for kind, is_found in kinds.items():
        if is_found:
            raise config.ConfigError(
                f"--kv-cache-dtype {name} does not run with {model.model}, a model with {kind}: "
                "use a --kv-cache-dtype of vLLM's own"
            )
    if vllm_config.use_v2_model_runner:
        raise config.ConfigError(
            f"--kv-cache-dtype {name} needs the V1 model runner, and this engine uses V2: "
            "set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    settings = config.read_settings(vllm_config).kv_cache
    head_dim = model.get_head_size()
    presets = choose_presets(name, settings, head_dim, model.get_total_num_hidden_layers())
    for preset in dict.fromkeys(presets):
        try:
            layout = preset.plan_cells(head_dim, vllm_config.cache_config.block_size)
        except ValueError as error:
            raise config.ConfigError(f"--kv-cache-dtype {name}: {error} (--block-size)") from error
        if reason := find_slow(preset, layout, model.dtype, is_cpu=current_platform.is_cpu()):
            logger.warning("KV-cache preset %s runs in torch and not in a compiled kernel: %s", preset.name, reason)
    calibration = None if settings is None else settings.calibration
    if calibration is None and has_key_bias(model.hf_text_config) and (named := list_mixing(presets)):
        logger.warning(
            "keys of %s have biases, and KV-cache preset %s codes channels of a token in one range: where some stand "
            "far off zero, the others are read as noise. Use kivi_k2v2 or kivi_k4v4, or calibrate it (vllm-ext "
            "calibrate-kv)", model.model, ", ".join(named),
        )  # fmt: skip
    if calibration is not None:
        # Also read by every worker; here a bad file stops the start at once.
        path = Path(calibration).expanduser()
        described = describe_model(model.hf_text_config)
        layers = read_sidecar(path, presets[0], model.get_total_num_kv_heads(), head_dim, described)
        count = sum(any(field is not None for side in sides for field in side) for sides in layers.values())
        logger.info("KV-cache calibration %s: %d of %d layers calibrated", path, count, len(layers))
        if any(side.levels is not None for sides in layers.values() for side in sides) and not presets[0].pre_rope:
            logger.warning("%s has codebooks, whose layers run in torch and not in a compiled kernel", path)


def has_key_bias(hf_text_config: Any) -> bool:
    """Whether a model's k_proj adds a bias: its configuration says so, or its code does without asking."""
    named = any(getattr(hf_text_config, name, False) is True for name in BIAS_SETTINGS)
    return named or str(getattr(hf_text_config, "model_type", "")).startswith(BIASED_MODELS)


def list_mixing(presets: Sequence[Preset]) -> list[str]:
    """Names of the presets that code keys of several channels in one range, with so few bits that one spoils others."""
    mixing = [one.name for one in presets if not one.key.per_channel and one.key.bits < FINE_BITS]
    return list(dict.fromkeys(mixing))


def find_slow(preset: Preset, layout: CellLayout, dtype: torch.dtype, *, is_cpu: bool = True) -> str | None:
    """Why the compiled kernels do not run a fitted preset; None where they do, if the machine has a compiler."""
    if not is_cpu:
        return "in this release they run on CPUs only, and torch is far too slow to serve with"
    if dtype == torch.float32:
        return "the model is float32; serve it in bfloat16"
    if preset.pre_rope:
        return "its keys are stored before RoPE"
    if not knows(layout):
        widths = ", ".join(f"{width:g}" for width in WIDTHS)
        return f"the kernels know codes of {widths} bits without outliers, and heads of a multiple of 16"
    return None
