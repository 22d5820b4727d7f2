# SPDX-License-Identifier: Apache-2.0
"""Quality on the shipped model: what a 2-bit past costs in perplexity with and without window and sinks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kv_cache.quality_probe import NAIVE, measure_preset
from vllm_ext.compress.calibration import cut_windows, load_tokenizer
from vllm_ext.compress.profile import load_model
from vllm_ext.kv_cache.presets import PRESETS


@pytest.mark.slow
def test_window_and_sinks_keep_perplexity_where_naive_two_bits_do_not(tiny_moe: str) -> None:
    model, tokenizer = load_model(Path(tiny_moe), torch.float32), load_tokenizer(Path(tiny_moe))
    windows = cut_windows(Path(tiny_moe) / "kjv_val.txt", tokenizer, 512)[:3]
    plain = measure_preset(model, windows, None)
    # The text holds the model to a difference only if a bad cache shows in it.
    assert measure_preset(model, windows, NAIVE) > 1.05 * plain
    for name in ("skvq_k2v2", "kivi_k2v2", "kivi_k4v4"):
        assert measure_preset(model, windows, PRESETS[name]) < 1.01 * plain
