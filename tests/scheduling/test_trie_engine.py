# SPDX-License-Identifier: Apache-2.0
"""The trie drafter in the real engine, float32 on CPU: the tokens of no speculation, and no request stays behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import LLM, SamplingParams, TokensPrompt

from tests.scheduling.engine import abort_one_of_three, check_same, load_reference, read_counters
from vllm_ext import observability

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]

K = 6
MAX_TOKENS = 120
#: 20 blocks of 32, the CPU backend's smallest: eight requests of up to 200 tokens do not fit at once.
ENGINE: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, "block_size": 32,
    "num_gpu_blocks_override": 20, "enable_prefix_caching": False, "disable_log_stats": False,
}  # fmt: skip


def generate(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    parameters = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=one) for one in prompts], parameters, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in outputs]


@pytest.fixture(scope="module")
def reference() -> Any:
    return load_reference()


def test_tokens_are_those_of_no_speculation(
    tiny_moe: str, reference: Any, tmp_path: Path, engine_in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(model=tiny_moe, **ENGINE)
    generator = np.random.default_rng(0)
    vocabulary = llm.get_tokenizer().vocab_size
    prompts = [generator.integers(10, vocabulary - 10, 12).tolist() * 6 for _ in range(6)]
    prompts += [generator.integers(10, vocabulary - 10, 70).tolist() for _ in range(2)]
    expected = generate(llm, prompts)
    del llm

    llm = LLM(
        model=tiny_moe,
        speculative_config={
            "method": "ngram", "num_speculative_tokens": K, "prompt_lookup_min": 2, "prompt_lookup_max": 6,
        },
        additional_config={"vllm_ext": {"smartspec": {"drafter": "trie"}, "cache_dir": str(tmp_path)}},
        **ENGINE,
    )  # fmt: skip
    (proposer,) = llm.collective_rpc(lambda worker: worker.model_runner.lookup_proposer)
    drafter = proposer.drafter
    free = drafter._segments.count_free()

    tokens = generate(llm, prompts)
    equal = [check_same(reference, *one) for one in zip(prompts, tokens, expected, strict=True)]
    assert sum(equal) >= len(prompts) - 1
    first = read_counters(llm)
    assert first["num_preemptions"] > 0
    assert first["spec_decode_num_accepted_tokens"] > MAX_TOKENS

    # The same again: what was put out is known from the start now, also where the prompt tells nothing.
    tokens = generate(llm, prompts)
    assert sum(check_same(reference, *one) for one in zip(prompts, tokens, expected, strict=True)) >= len(prompts) - 1
    second = read_counters(llm)
    accepted = "spec_decode_num_accepted_tokens"
    assert second[accepted] - first[accepted] > 1.1 * first[accepted]
    assert len(prompts) * MAX_TOKENS * 0.9 < drafter.shared.num_tokens

    # What the tries did is at /metrics, through the record of this process.
    records = observability.read_records(os.environ[observability.DIRECTORY_ENV])
    counted = {name.removeprefix("vllm_ext:smartspec_"): value for (_, name), value in records.items()}
    assert 0 < counted["trie_matched_rows_total"] <= counted["trie_searched_rows_total"]
    assert counted["accepted_tokens_total"] < counted["trie_drafted_tokens_total"]
    assert counted["trie_inserted_tokens_total"] >= 2 * len(prompts) * MAX_TOKENS
    assert counted["trie_stored_tokens"] >= drafter.shared.num_tokens

    # Abort one in the middle; when another has run, nothing is left of any of them.
    for number, text in abort_one_of_three(llm, prompts).items():
        assert text == expected[number][:60] or not equal[number]
    generate(llm, prompts[:1])
    assert len(proposer._states) == 1
    assert len(drafter) <= 1
    drafter.remove(next(iter(proposer._states)))
    assert drafter._segments.count_free() == free
