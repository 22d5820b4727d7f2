# SPDX-License-Identifier: Apache-2.0
"""Temperature 1 in the real engine: the first two tokens are distributed as the model says, with drafts as without."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from vllm import LLM, SamplingParams, TokensPrompt

from tests.scheduling.engine import load_reference, make_step_time, read_counters

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

#: Samples per engine, each of its own seed.
SAMPLES = 3000
#: The vocabulary: what may be put out, and what the prompt is made of.
CHOICES = 4
ENGINE: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 64, "disable_log_stats": False,
}  # fmt: skip
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2}


def count_pairs(llm: LLM, prompt: list[int], choices: list[int]) -> np.ndarray:
    """How often each pair of first tokens came, int64 [CHOICES, CHOICES]."""
    parameters = [
        SamplingParams(max_tokens=3, temperature=1.0, seed=seed, ignore_eos=True, allowed_token_ids=choices)
        for seed in range(SAMPLES)
    ]
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt)] * SAMPLES, parameters, use_tqdm=False)
    counts = np.zeros((CHOICES, CHOICES), np.int64)
    for output in outputs:
        first, second, _ = output.outputs[0].token_ids
        counts[choices.index(first), choices.index(second)] += 1
    return counts


def choose_task(model: Any) -> tuple[list[int], list[int], np.ndarray]:
    """(prompt, allowed tokens, probabilities of pairs [CHOICES, CHOICES]) where no token is nearly certain."""
    generator = np.random.default_rng(39)
    start = generator.integers(100, 4000, 12).tolist()
    with torch.no_grad():
        likely = model(torch.tensor([start])).logits[0, -1].topk(CHOICES).indices.tolist()
        # Every allowed token is in the prompt, so that each one has a draft behind it.
        prompt = start + generator.permutation(np.repeat(likely, 5)).tolist()
        first = model(torch.tensor([prompt])).logits[0, -1, likely].softmax(-1)
        seconds = model(torch.tensor([[*prompt, token] for token in likely])).logits[:, -1, likely].softmax(-1)
    return prompt, likely, (first[:, None] * seconds).double().numpy()


def test_the_first_two_tokens(
    tiny_moe: str, tmp_path: Path, engine_in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, choices, chances = choose_task(load_reference())
    assert chances.min() * SAMPLES > 5, "too rare for the test: take another prompt"
    counts: dict[str, np.ndarray] = {}
    for arm in ("off", "carrier", "trie"):
        block = {"vllm_ext": {"smartspec": {"drafter": arm}, "cache_dir": str(tmp_path)}}
        extra: dict[str, Any] = {} if arm == "off" else {"speculative_config": NGRAM, "additional_config": block}
        # What the engine before left behind would stop this one's worker (see `engine_in_process`).
        monkeypatch.delitem(sys.modules, "llvmlite.binding.ffi", raising=False)
        llm = LLM(model=tiny_moe, **ENGINE, **extra)
        if arm != "off":
            # Drafts cost nothing, so that as many as possible are verified.
            llm.llm_engine.engine_core.engine_core.scheduler._controller.step_time = make_step_time(0.0)
        counts[arm] = count_pairs(llm, prompt, choices)
        if arm != "off":
            counters = read_counters(llm)
            accepted, drafted = (counters[f"spec_decode_num_{name}_tokens"] for name in ("accepted", "draft"))
            # Drafts were accepted, and drafts were rejected.
            assert 0.1 * SAMPLES < accepted < 0.9 * drafted
        del llm
        expected = SAMPLES * chances / chances.sum()
        assert chisquare(counts[arm].ravel(), expected.ravel()).pvalue > 0.01, arm
    for arm in ("carrier", "trie"):
        assert chi2_contingency(np.stack([counts["off"].ravel(), counts[arm].ravel()])).pvalue > 0.01, arm
