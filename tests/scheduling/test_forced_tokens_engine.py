# SPDX-License-Identifier: Apache-2.0
"""Forced tokens in the real engine, float32 on CPU: the tokens and the distribution of the engine without them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.sampling_params import StructuredOutputsParams

from tests.scheduling.engine import check_same, load_reference, read_counters
from vllm_ext.structured import carrier

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]

MAX_MODEL_LEN = 256
ENGINE: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 16,
    "disable_log_stats": False, "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}  # fmt: skip


def make_record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMAS = (
    make_record(
        name={"const": "set_thermostat"},
        arguments=make_record(
            room={"enum": ["kitchen", "office"]}, target_temperature={"type": "integer", "maximum": 99}
        ),
    ),
    make_record(customer_identifier={"type": "string", "maxLength": 8}, is_priority={"type": "boolean"}),
    {"type": "array", "minItems": 2, "maxItems": 3, "items": make_record(measured_value={"enum": [1, 10, 100]})},
    make_record(größe={"enum": ["groß", "größer"]}),
)
PROMPTS = ("And the LORD said ", "def f(x):\n    return ", "value = json.loads(", "In the beginning ")
TWO_CHOICES = make_record(first_choice={"enum": ["alpha", "beta"]}, second_choice={"enum": ["red", "green", "blue"]})


def start_engine(model: str, cache: Path, forced: str, **arguments: Any) -> LLM:
    block = {"structured": {"forced_tokens": forced, "whitespace": "compact"}, "cache_dir": str(cache)}
    return LLM(model=model, additional_config={"vllm_ext": block}, **{**ENGINE, **arguments})


def ask(llm: LLM, prompts: list[list[int]], parameters: list[SamplingParams]) -> list[Any]:
    outputs = llm.generate([TokensPrompt(prompt_token_ids=one) for one in prompts], parameters, use_tqdm=False)
    return [one.outputs[0] for one in outputs]


def make_parameters(schema: Any, **arguments: Any) -> SamplingParams:
    return SamplingParams(**{
        "temperature": 0, "max_tokens": 120,
        "structured_outputs": None if schema is None else StructuredOutputsParams(json=schema), **arguments,
    })  # fmt: skip


def list_greedy() -> list[SamplingParams]:
    """Every schema, and what speculation would refuse or treat in its own way."""
    first = SCHEMAS[0]
    return [
        *map(make_parameters, SCHEMAS),
        make_parameters(first, min_p=0.2),
        make_parameters(first, logit_bias={token: 4.0 for token in range(300, 900, 3)}),
        make_parameters(None, max_tokens=20, logit_bias={400: 30.0}),
        make_parameters(first, logprobs=2),
        make_parameters(first, max_tokens=9),
        make_parameters(SCHEMAS[1], repetition_penalty=1.3, min_tokens=12),
        make_parameters(None, max_tokens=20),
    ]


def test_tokens_and_distribution_are_those_without_drafts(
    tiny_moe: str, tmp_path: Path, engine_in_process: None
) -> None:
    greedy = list_greedy()
    results: dict[str, dict[str, Any]] = {}
    for forced in ("off", "auto"):
        llm = start_engine(tiny_moe, tmp_path, forced)
        speculative = llm.llm_engine.vllm_config.speculative_config
        assert (None if speculative is None else speculative.model) == (carrier.CARRIER if forced == "auto" else None)
        tokenizer = llm.get_tokenizer()
        prompts = [tokenizer(text).input_ids for text in PROMPTS]
        asked = [prompts[number % len(prompts)] for number in range(len(greedy))]
        # Up to the very end of the context.
        filler = tokenizer((Path(tiny_moe) / "kjv_val.txt").read_text()[:4000]).input_ids
        long = filler[: MAX_MODEL_LEN - 12]
        results[forced] = {
            "greedy": ask(llm, asked, greedy),
            "again": ask(llm, asked, greedy),
            "end": ask(llm, [long, long[:-7]], [make_parameters(SCHEMAS[0]), make_parameters(None, ignore_eos=True)]),
            "drawn": ask(llm, [prompts[0]] * 600, [make_parameters(TWO_CHOICES, temperature=1.0, top_p=0.95)] * 600),
            "counters": read_counters(llm),
        }
        del llm
    reference, (off, auto) = load_reference(), (results["off"], results["auto"])
    same = [
        check_same(reference, asked[place], list(one.token_ids), list(other.token_ids))
        for run in ("greedy", "again")
        for place, (one, other) in enumerate(zip(auto[run], off[run], strict=True))
        # Of these the reference's logits are not those that choose.
        if place not in (4, 5, 6, 9) or list(one.token_ids) == list(other.token_ids)
    ]
    assert len(same) == 2 * len(greedy)
    assert sum(same) >= 2 * len(greedy) - 1
    for one, other in zip(auto["end"], off["end"], strict=True):
        assert list(one.token_ids) == list(other.token_ids)
    for mine, stock in zip(auto["again"][7].logprobs, off["again"][7].logprobs, strict=True):
        assert set(mine) >= set(stock)
        assert all(
            abs(mine[token].logprob - stock[token].logprob) < 1e-3 for token in stock if stock[token].logprob > -20
        )

    counters = auto["counters"]
    assert 0 < counters["spec_decode_num_accepted_tokens"] <= counters["spec_decode_num_draft_tokens"]
    # Two samples of one distribution.
    drawn = [Counter(one.text for one in results[forced]["drawn"]) for forced in ("off", "auto")]
    texts = sorted(set(drawn[0]) | set(drawn[1]))
    common = [text for text in texts if drawn[0][text] + drawn[1][text] >= 20]
    assert len(common) >= 3
    table = [[counts[text] for text in common] for counts in drawn]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_beside_a_drafter(tiny_moe: str, tmp_path: Path, engine_in_process: None) -> None:
    """ngram drafts what the grammar leaves open, forced tokens what it does not; goodput trims neither wrongly."""
    expected: list[list[int]] = []
    speculative = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_min": 1}
    for blocks in (
        {"structured": {"forced_tokens": "off"}},
        {"structured": {"forced_tokens": "on"}, "smartspec": {}},
    ):
        llm = LLM(
            model=tiny_moe,
            additional_config={"vllm_ext": {**blocks, "cache_dir": str(tmp_path)}},
            **{**ENGINE, **({"speculative_config": speculative} if "smartspec" in blocks else {})},
        )
        tokenizer = llm.get_tokenizer()
        prompts = [tokenizer(text + '"measured_value" "customer_identifier"').input_ids for text in PROMPTS]
        tokens = [list(one.token_ids) for one in ask(llm, prompts, [make_parameters(schema) for schema in SCHEMAS])]
        if not expected:
            expected = tokens
        else:
            reference = load_reference()
            same = [check_same(reference, *one) for one in zip(prompts, tokens, expected, strict=True)]
            assert sum(same) >= len(prompts) - 1
            assert read_counters(llm)["spec_decode_num_accepted_tokens"] > 0
        del llm
