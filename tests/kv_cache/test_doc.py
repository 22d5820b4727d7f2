# SPDX-License-Identifier: Apache-2.0
"""docs/kv-cache.md: its memory table is what `capacity.py` computes, and every name of the pack is in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bench.quality.kv_cache import PLANS
from vllm_ext import config
from vllm_ext.kv_cache.capacity import Geometry, compute_capacity, compute_plain_capacity
from vllm_ext.kv_cache.presets import PLAN_NAME, PRESETS
from vllm_ext.kv_cache.settings import choose_presets

#: A Llama-3-8B-like model, and more cache than a request needs.
GEOMETRY, CACHE_BYTES = Geometry(32, 8, 128), 64 << 30
LENGTHS = (2048, 8192, 32768)
MARK = "<!-- constant: capacity.py -->"


def render_row(head: str, bits: float, ratios: Sequence[float]) -> str:
    numbers = [f"{bits:g}", *(f"{ratio:.2f}" for ratio in ratios)]
    return f"| {head} | " + " | ".join(f"{number} {MARK}" for number in numbers) + " |"


def render_preset(head: str, name: str, settings: config.KVCacheSettings | None = None) -> str:
    presets = choose_presets(name, settings, GEOMETRY.head_dim, GEOMETRY.num_layers)
    found = [compute_capacity(presets, GEOMETRY, CACHE_BYTES, length) for length in LENGTHS]
    return render_row(head, found[0].bits, [each.ratio for each in found])


def test_the_memory_table_is_computed(repository: Path) -> None:
    text = (repository / "docs" / "kv-cache.md").read_text()
    assert set(config.KV_CACHE_DTYPES) <= {*PRESETS, PLAN_NAME}
    for name in (*PRESETS, PLAN_NAME):
        assert render_preset(f"`{name}`", name) in text
    for name in PLANS:
        settings = config.KVCacheSettings(layer_bits={"default": name})
        assert render_preset(f"`{PLAN_NAME}`, all layers `{name}`", PLAN_NAME, settings) in text
    halves = [
        compute_plain_capacity(dataclasses.replace(GEOMETRY, dtype_bytes=1), CACHE_BYTES, length)
        / compute_plain_capacity(GEOMETRY, CACHE_BYTES, length)
        for length in LENGTHS
    ]
    assert render_row("stock `fp8`", 8, halves) in text
