# SPDX-License-Identifier: Apache-2.0
"""smartspec in the real engine on a larger random model, float32 on CPU: the tokens of no speculation."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from vllm import LLM, SamplingParams, TokensPrompt

from bench.models import make_model
from tests.scheduling.engine import check_same, load_reference, read_counters, save_draft_model

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

CASE = Path(__file__).resolve().parents[2] / "bench" / "cases" / "smartspec_larger_repetitive.yaml"
MAX_TOKENS = 96
ENGINE: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, "disable_log_stats": False,
}  # fmt: skip


class Larger(NamedTuple):
    """The model of the benchmark's cases, its prompts, and what it says without speculation."""

    path: Path
    prompts: list[list[int]]
    expected: list[list[int]]


def generate(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    parameters = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=one) for one in prompts], parameters, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in outputs]


@pytest.fixture
def larger(tmp_path: Path) -> Larger:
    # Engines in processes of their own: vLLM's CPU worker looks through all modules at its start, and fails on some
    # that an engine before it has loaded.
    path = tmp_path / "larger"
    options = shlex.split(yaml.safe_load(CASE.read_text(encoding="utf-8"))["make_model"])
    assert make_model.main([*options, "-o", str(path)]) == 0
    llm = LLM(model=str(path), **ENGINE)
    generator = np.random.default_rng(0)
    # Half of them repeat themselves, as chats quote what was said.
    prompts = [generator.integers(10, 900, 12).tolist() * 6 for _ in range(6)]
    prompts += [generator.integers(10, 900, 70).tolist() for _ in range(6)]
    expected = generate(llm, prompts)
    del llm
    return Larger(path, prompts, expected)


def test_tokens_are_those_of_no_speculation(larger: Larger, tmp_path: Path) -> None:
    """Of lookups, tries and a draft model."""
    reference = load_reference(larger.path)
    drafter = save_draft_model(tmp_path / "drafter", 2, larger.path)
    lookup = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_min": 1, "prompt_lookup_max": 4}
    model = {"method": "draft_model", "model": drafter, "num_speculative_tokens": 4}
    for speculative, settings in ((lookup, {}), (lookup, {"drafter": "trie"}), (model, {})):
        llm = LLM(
            model=str(larger.path),
            speculative_config=speculative,
            additional_config={"vllm_ext": {"smartspec": settings, "cache_dir": str(tmp_path)}},
            **ENGINE,
        )
        # Twice: the second time tries know the texts of the first, and lengths what drafts are worth.
        for _ in range(2):
            tokens = generate(llm, larger.prompts)
            same = [
                check_same(reference, prompt, one, other)
                for prompt, one, other in zip(larger.prompts, tokens, larger.expected, strict=True)
            ]
            assert sum(same) >= len(same) - 2, json.dumps([speculative, settings])
        counters = read_counters(llm)
        assert counters["spec_decode_num_draft_tokens"] > 0
        if settings:
            assert counters["spec_decode_num_accepted_tokens"] > 0
        del llm
