# SPDX-License-Identifier: Apache-2.0
"""A name of `--kv-cache-dtype` and the `kv_cache` block, to the preset of every layer. Imports no vLLM."""

from __future__ import annotations

import dataclasses

from vllm_ext.config import ConfigError, KVCacheSettings
from vllm_ext.kv_cache.presets import DEFAULT_LAYER, PLAN_NAME, Preset, default_plan, get_preset, parse_plan


def choose_presets(name: str, settings: KVCacheSettings | None, head_dim: int, num_layers: int) -> list[Preset]:
    """The preset of every layer: one for all, or those of `layer_bits`, whose unnamed layers have the one of `name`.

    The presets of a list have equal windows and sinks. Raises ConfigError, naming the setting, its value and the fix,
    for what no page can hold.
    """
    block = settings or KVCacheSettings()
    if block.layer_bits is None and name != PLAN_NAME:
        return [choose_preset(name, block, head_dim)] * num_layers
    if block.calibration is not None:
        raise ConfigError(
            f"vllm_ext.kv_cache.calibration {block.calibration} is for one preset, and layers with presets of their "
            "own are served without: drop calibration or layer_bits"
        )
    plan = default_plan(num_layers) if block.layer_bits is None else dict(block.layer_bits)
    for key, value in plan.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ConfigError(
                f"vllm_ext.kv_cache.layer_bits has {key!r}: {value!r}, expected a layer and a preset, both as text, "
                'for example "0": "k4v4"'
            )
    if name != PLAN_NAME:
        plan.setdefault(DEFAULT_LAYER, name)
    _check(block)
    try:
        presets = parse_plan(plan, num_layers, block.window, block.sinks)
    except ValueError as error:
        raise ConfigError(f"vllm_ext.kv_cache: {error}") from error
    return [_change(preset, block, head_dim) for preset in presets]


def choose_preset(name: str, settings: KVCacheSettings | None, head_dim: int) -> Preset:
    """The preset of `name` for all layers, changed by the block and fitted to the head size. Raises ConfigError."""
    block = settings or KVCacheSettings()
    _check(block)
    preset = get_preset(name)
    window = preset.window if block.window is None else block.window
    sinks = preset.sinks if block.sinks is None else block.sinks
    return _change(dataclasses.replace(preset, window=window, sinks=sinks), block, head_dim)


def _check(block: KVCacheSettings) -> None:
    for key, value in (("window", block.window), ("sinks", block.sinks)):
        if value is not None and value < 0:
            raise ConfigError(f"vllm_ext.kv_cache.{key} must be a number of tokens, 0 for none, got {value}")
    if block.clip is not None and not 0 < block.clip <= 1:
        raise ConfigError(f"vllm_ext.kv_cache.clip must be a share of a group's range, above 0 to 1, got {block.clip}")


def _change(preset: Preset, block: KVCacheSettings, head_dim: int) -> Preset:
    changed = preset if block.clip is None else dataclasses.replace(preset, clips=(block.clip,))
    try:
        return changed.fit(head_dim, block.group_size)
    except ValueError as error:
        raise ConfigError(f"--kv-cache-dtype {preset.name}: {error}") from error
