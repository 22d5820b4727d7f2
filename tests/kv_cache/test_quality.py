# SPDX-License-Identifier: Apache-2.0
"""Quality on the shipped model: what a 2-bit past costs in perplexity with and without window and sinks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from bench.quality.kv_dropped import LEAST_LOSS, measure_dropped
from bench.quality.kv_models import NAIVE
from tests.kv_cache.quality_probe import measure_preset
from vllm_ext.compress.calibration import cut_windows, load_tokenizer
from vllm_ext.compress.profile import load_model
from vllm_ext.kv_cache.presets import PRESETS

#: The model was trained on slices of 256 tokens, and makes no use of what lies further back: with the presets' window
#: of 128, a cache that stores nothing would pass.
CONTEXT, WINDOW = 256, 32


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("text", "limit"), [("kjv_val.txt", 1.01), ("py_val.txt", 1.02)])
def test_window_and_sinks_keep_perplexity_where_naive_two_bits_do_not(tiny_moe: str, text: str, limit: float) -> None:
    model, tokenizer = load_model(Path(tiny_moe), torch.float32), load_tokenizer(Path(tiny_moe))
    windows = cut_windows(Path(tiny_moe) / text, tokenizer, CONTEXT)[:8]
    presets = [dataclasses.replace(PRESETS[name], window=WINDOW) for name in ("skvq_k2v2", "kivi_k2v2", "kivi_k4v4")]
    plain = measure_preset(model, windows, None)
    # The text holds the model to a difference only if a bad cache shows in it, and one that stores nothing.
    assert measure_preset(model, windows, NAIVE) > 1.05 * plain
    assert measure_dropped(model, windows, presets[0]) > LEAST_LOSS * plain
    for preset in presets:
        assert measure_preset(model, windows, preset) < limit * plain
