# SPDX-License-Identifier: Apache-2.0
"""Time of the trie drafter for 256 requests a step, beside vLLM's n-gram drafter on the same texts.

pytest --benchmark-only bench/kernels/bench_trie.py -o python_files='bench_*.py' -o python_functions='bench_*'
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_ext.speculation.trie_drafter import TrieDrafter

REQUESTS, PROMPT, STEPS, TOKENS_PER_STEP, K = 256, 1024, 200, 3, 6


def make_texts(seed: int) -> np.ndarray:
    """int32 [REQUESTS, tokens]: words by Zipf's law, and three times in ten a piece of what came before."""
    generator = np.random.default_rng(seed)
    length = PROMPT + STEPS * TOKENS_PER_STEP
    texts = np.empty((REQUESTS, length), np.int32)
    for row in range(REQUESTS):
        text: list[int] = (generator.zipf(1.3, 64) % 5000).tolist()
        while len(text) < length:
            if generator.random() < 0.3:
                begin, count = int(generator.integers(0, len(text) - 20)), int(generator.integers(3, 30))
                text += text[begin : begin + count]
            else:
                text += (generator.zipf(1.3, 8) % 5000).tolist()
        texts[row] = text[:length]
    return texts


@pytest.fixture(scope="module")
def texts() -> np.ndarray:
    return make_texts(0)


def bench_trie_256_requests(benchmark: Any, texts: np.ndarray) -> None:
    """Three new tokens and six drafts for each request; all prompts are inserted, and outputs of others are shared."""
    drafter = TrieDrafter(K)
    drafter.compile()
    for text in make_texts(1)[:64]:
        drafter.shared.insert(text[:500])
    ids, wanted = [str(row) for row in range(REQUESTS)], np.full(REQUESTS, K)
    lengths = np.full(REQUESTS, PROMPT)
    for _ in range(REQUESTS * PROMPT // 16384 + 1):
        drafter.propose(ids, texts, lengths, wanted)
    drafts: list[list[int]] = []

    def set_up() -> None:
        lengths[:] += TOKENS_PER_STEP

    def propose() -> None:
        drafts[:] = drafter.propose(ids, texts, lengths, wanted)

    benchmark.pedantic(propose, setup=set_up, rounds=STEPS - 1, warmup_rounds=1)
    assert sum(map(len, drafts)) > REQUESTS
    # A fifth of a short step on a GPU.
    assert benchmark.stats.stats.median < 2e-3


def bench_ngram_256_requests(benchmark: Any, texts: np.ndarray) -> None:
    """What the trie stands in for: vLLM's search through the whole texts."""
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    proposer = NgramProposer(
        SimpleNamespace(
            speculative_config=SimpleNamespace(prompt_lookup_min=2, prompt_lookup_max=8, num_speculative_tokens=K),
            model_config=SimpleNamespace(max_model_len=texts.shape[1]),
            scheduler_config=SimpleNamespace(max_num_seqs=REQUESTS),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        )
    )
    lengths = np.full(REQUESTS, PROMPT, np.int32)
    sampled = [[1]] * REQUESTS

    def set_up() -> None:
        lengths[:] += TOKENS_PER_STEP

    benchmark.pedantic(
        lambda: proposer.propose(K, sampled, lengths, texts), setup=set_up, rounds=STEPS - 1, warmup_rounds=1
    )
