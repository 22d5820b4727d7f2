# SPDX-License-Identifier: Apache-2.0
"""Windows for rare experts: never fewer tokens missing than in the draw, the same draw where none are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compress.runnable_model import EXPERTS, VOCABULARY, add_tokenizer, make_tokens, write_runnable
from vllm_ext.compress.balance import choose_balanced, count_routing, make_balanced_windows
from vllm_ext.compress.calibration import cut_windows, load_tokenizer, make_windows
from vllm_ext.compress.hessian import minimum_tokens
from vllm_ext.compress.profile import load_model, measure_profile
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.compress.source import open_source
from vllm_ext.quantization.checkpoint import validate_checkpoint


@given(seed=st.integers(0, 999), pool=st.integers(2, 12), experts=st.integers(1, 6), least=st.integers(0, 40))
@settings(deadline=None)
def test_an_exchange_never_loses(seed: int, pool: int, experts: int, least: int) -> None:
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 12, (pool, experts)) * (generator.random((pool, experts)) < 0.5)
    wanted = int(generator.integers(1, pool + 1))
    found = choose_balanced(counts, wanted, least)
    assert len(found.chosen) == len(set(found.chosen.tolist())) == wanted
    missing = [int(np.maximum(least - counts[rows].sum(0), 0).sum()) for rows in (np.arange(wanted), found.chosen)]
    assert missing[1] <= missing[0]
    assert (found.fewest_before, found.fewest) == (counts[:wanted].sum(0).min(), counts[found.chosen].sum(0).min())
    if missing[0] == 0:
        assert found.chosen.tolist() == list(range(wanted))


def test_the_windows_of_a_rare_expert_are_found() -> None:
    """One expert appears in two windows of a hundred only, none of them in the draw."""
    counts = np.full((100, 4), 10)
    counts[:, 3] = 0
    counts[[61, 87], 3] = 9
    found = choose_balanced(counts, 20, 15)
    assert {61, 87} <= set(found.chosen.tolist())
    assert (found.fewest_before, found.fewest) == (0, 18)


def test_routing_is_that_of_the_profile(tmp_path: Path) -> None:
    directory = write_runnable(tmp_path / "model")
    source, windows = open_source(directory), make_tokens()
    counts = count_routing(source, windows)
    assert counts.shape == (len(windows), 2 * EXPERTS)
    assert (counts.sum(1) == 2 * 2 * windows.shape[1]).all()
    profile = measure_profile(load_model(directory, torch.float32, "cpu"), source.family, windows)
    expected = np.concatenate([profile.counts[f"model.layers.{layer}.mlp.experts"] for layer in (0, 2)])
    assert counts.sum(0).tolist() == expected.tolist()


def test_a_pool_that_is_too_small() -> None:
    with pytest.raises(ValueError, match="cannot choose 3 of 2 windows"):
        choose_balanced(np.ones((2, 2), np.int64), 3, 1)


def test_windows_of_a_text_with_rare_words(tmp_path: Path) -> None:
    """A quantize run with --balanced: as many windows as without, from the same text, no expert worse off."""
    directory = write_runnable(tmp_path / "model", max_position_embeddings=512)
    add_tokenizer(directory)
    words = np.random.default_rng(0).random(40 * 512) ** 4 * VOCABULARY
    (tmp_path / "text.txt").write_text(" ".join(f"w{int(word)}" for word in words))
    source, tokenizer = open_source(directory), load_tokenizer(directory)
    text = [tmp_path / "text.txt"]
    draw = make_windows(text, tokenizer, seed=3, num_windows=4)
    balanced = make_balanced_windows(source, text, tokenizer, seed=3, num_windows=4)
    every = {window.tobytes() for window in cut_windows(text[0], tokenizer, 512)}
    assert balanced.shape == draw.shape
    assert {window.tobytes() for window in balanced} <= every
    least = minimum_tokens(64)
    missing = [int(np.maximum(least - count_routing(source, w).sum(0), 0).sum()) for w in (draw, balanced)]
    assert missing[1] <= missing[0]
    arguments: dict[str, Any] = {"bits": 3.5, "rounding": "gptq", "calibration": text, "balanced": True}
    quantize_model(directory, tmp_path / "out", **arguments)
    assert validate_checkpoint(tmp_path / "out").plan.producer["balanced"] is True
