# SPDX-License-Identifier: Apache-2.0
"""docs/kv-cache.md: its memory table is what `capacity.py` computes, and every name of the pack is in it."""

from __future__ import annotations

from pathlib import Path

from vllm_ext import config
from vllm_ext.kv_cache.capacity import Geometry, compute_capacity
from vllm_ext.kv_cache.presets import PLAN_NAME, PRESETS
from vllm_ext.kv_cache.settings import choose_presets

#: A Llama-3-8B-like model, and more cache than a request needs.
GEOMETRY, CACHE_BYTES = Geometry(32, 8, 128), 64 << 30
LENGTHS = (2048, 8192, 32768)
MARK = "<!-- constant: capacity.py -->"


def render_row(name: str) -> str:
    presets = choose_presets(name, None, GEOMETRY.head_dim, GEOMETRY.num_layers)
    found = [compute_capacity(presets, GEOMETRY, CACHE_BYTES, length) for length in LENGTHS]
    numbers = [f"{found[0].bits:g}", *(f"{each.ratio:.2f}" for each in found)]
    return f"| `{name}` | " + " | ".join(f"{number} {MARK}" for number in numbers) + " |"


def test_the_memory_table_is_computed(repository: Path) -> None:
    text = (repository / "docs" / "kv-cache.md").read_text()
    assert set(config.KV_CACHE_DTYPES) <= {*PRESETS, PLAN_NAME}
    for name in (*PRESETS, PLAN_NAME):
        assert render_row(name) in text
