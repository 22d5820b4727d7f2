# SPDX-License-Identifier: Apache-2.0
"""n-gram drafts with a length for each request are the first of those that vLLM's own drafter finds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.spec_decode.ngram_proposer import NgramProposer as VllmProposer
from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens

from vllm_ext.patches import lookup_drafters
from vllm_ext.scheduling.ngram_proposer import NgramProposer
from vllm_ext.speculation.goodput import load_compiled

K, LONGEST = 5, 48


def describe_engine() -> Any:
    """What is read of a finished VllmConfig, by both drafters."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=K, prompt_lookup_min=2, prompt_lookup_max=4),
        model_config=SimpleNamespace(max_model_len=LONGEST),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )


@pytest.fixture(scope="module")
def proposer() -> NgramProposer:
    return NgramProposer(describe_engine())


@pytest.fixture(scope="module")
def stock() -> VllmProposer:
    return VllmProposer(describe_engine())


def make_batch(texts: list[list[int]]) -> Any:
    """Of vLLM's InputBatch what drafters look at; behind each text is what an earlier request left there."""
    tokens, lengths = np.full((len(texts), LONGEST), 1, np.int32), np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], lengths[row] = text, len(text)
    return SimpleNamespace(
        req_ids=[str(row) for row in range(len(texts))], token_ids_cpu=tokens, num_tokens_no_spec=lengths
    )


#: Few different tokens, so that n-grams come again, overlap their ends, and come in several lengths.
TEXTS = st.integers(1, 4).flatmap(lambda size: st.lists(st.integers(1, size), max_size=LONGEST))


@given(st.lists(TEXTS, min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 5), st.data())
def test_the_drafts_are_those_of_vllm(texts: list[list[int]], least: int, more: int, data: st.DataObject) -> None:
    batch = make_batch(texts)
    wanted = [data.draw(st.integers(0, K)) for _ in texts]
    drafts, counts = np.zeros((4, K), np.int32), np.full(4, -1, np.int32)
    load_compiled().find_ngrams(
        batch.token_ids_cpu, batch.num_tokens_no_spec, np.array(wanted), least, least + more, LONGEST, drafts, counts
    )
    for row, (text, most) in enumerate(zip(texts, wanted, strict=True)):
        expected = _find_longest_matched_ngram_and_propose_tokens(
            np.array(text, np.int32), least, least + more, LONGEST, most
        )
        assert drafts[row, : counts[row]].tolist() == expected.tolist()
    # Rows of nobody are left alone.
    assert (counts[len(texts) :] == -1).all()


@given(st.lists(TEXTS, min_size=1, max_size=4), st.data())
def test_a_step_drafts_what_each_request_is_to_have(
    proposer: NgramProposer, stock: VllmProposer, texts: list[list[int]], data: st.DataObject
) -> None:
    batch = make_batch(texts)
    # Prompts in pieces have no new token. Some requests have no length of their own; some plans ask for too much.
    sampled = [[7] * data.draw(st.integers(0, 2)) for _ in texts]
    lengths = {rid: data.draw(st.integers(0, K + 2)) for rid in batch.req_ids if data.draw(st.booleans())}
    most = data.draw(st.integers(0, K))
    made = proposer.propose(batch, {}, sampled, lengths, most)
    full = stock.propose(K, sampled, batch.num_tokens_no_spec, batch.token_ids_cpu)
    assert made == [draft[: min(most, lengths.get(rid, most))] for rid, draft in zip(batch.req_ids, full, strict=True)]


def test_without_lengths_the_runner_asks_vllm(proposer: NgramProposer) -> None:
    """As where a benchmark has vLLM's own scheduler run in the pack's engine."""
    ask = lookup_drafters._ask_proposer(lambda runner, output, sampled: "vLLM's")
    runner = SimpleNamespace(lookup_proposer=proposer, input_batch=make_batch([[1, 2, 3, 1, 2]]), requests={})
    assert ask(runner, SimpleNamespace(num_spec_tokens_to_schedule=K), [[2]]) == "vLLM's"
    planned = SimpleNamespace(num_spec_tokens_to_schedule=K, draft_lengths={"0": 2})
    assert ask(runner, planned, [[2]]) == [[3, 1]]
    runner.lookup_proposer = None
    assert ask(runner, planned, [[2]]) == "vLLM's"
