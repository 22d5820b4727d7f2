# SPDX-License-Identifier: Apache-2.0
"""A name of `--kv-cache-dtype` and the `kv_cache` block, to the preset that every layer uses. Imports no vLLM."""

from __future__ import annotations

import dataclasses

from vllm_ext.config import ConfigError, KVCacheSettings
from vllm_ext.kv_cache.presets import Preset, get_preset


def choose_preset(name: str, settings: KVCacheSettings | None, head_dim: int) -> Preset:
    """The preset of `name`, changed by the block and fitted to the head size.

    Raises ConfigError, naming the setting, its value and the fix, for what no page can hold.
    """
    block = settings or KVCacheSettings()
    if block.layer_bits is not None:
        raise ConfigError(
            "vllm_ext.kv_cache.layer_bits needs a preset for every layer, which this release has no engine for: "
            "drop it, or choose a preset for all layers with --kv-cache-dtype"
        )
    for key, value in (("window", block.window), ("sinks", block.sinks)):
        if value is not None and value < 0:
            raise ConfigError(f"vllm_ext.kv_cache.{key} must be a number of tokens, 0 for none, got {value}")
    if block.clip is not None and not 0 < block.clip <= 1:
        raise ConfigError(f"vllm_ext.kv_cache.clip must be a share of a group's range, above 0 to 1, got {block.clip}")
    preset = get_preset(name)
    changed = dataclasses.replace(
        preset,
        window=preset.window if block.window is None else block.window,
        sinks=preset.sinks if block.sinks is None else block.sinks,
        clips=preset.clips if block.clip is None else (block.clip,),
    )
    try:
        return changed.fit(head_dim, block.group_size)
    except ValueError as error:
        raise ConfigError(f"--kv-cache-dtype {name}: {error}") from error
