# SPDX-License-Identifier: Apache-2.0
"""smartspec over a draft model in the real engine, float32 on CPU: the tokens of no speculation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import LLM, SamplingParams, TokensPrompt

from tests.scheduling.engine import (
    abort_one_of_three,
    check_same,
    load_reference,
    make_step_time,
    read_counters,
    save_draft_model,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]

K = 4
MAX_TOKENS = 80
ENGINE: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, "disable_log_stats": False,
}  # fmt: skip


def generate(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    parameters = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=one) for one in prompts], parameters, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in outputs]


def test_tokens_are_those_of_no_speculation(tiny_moe: str, tmp_path: Path, engine_in_process: None) -> None:
    llm = LLM(model=tiny_moe, **ENGINE)
    tokenizer = llm.get_tokenizer()
    text = (Path(tiny_moe) / "kjv_val.txt").read_text(encoding="utf-8")
    ids = tokenizer(text[:20000]).input_ids
    prompts = [ids[400 * number : 400 * number + 60] for number in range(8)]
    expected = generate(llm, prompts)
    del llm

    # asynchronous scheduling is asked for as users may; vLLM's CPU platform runs these engines synchronously.
    llm = LLM(
        model=tiny_moe, async_scheduling=True,
        speculative_config={
            "method": "draft_model", "model": save_draft_model(tmp_path / "drafter"), "num_speculative_tokens": K,
        },
        additional_config={"vllm_ext": {"smartspec": {}, "cache_dir": str(tmp_path)}},
        **ENGINE,
    )  # fmt: skip
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert not llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    assert scheduler._plan.passes == (1, 1, 2, 3, 4)
    assert scheduler._plan.plans_drafts
    # The sweep timed the drafter apart: two of the target's layers cost less than all of them.
    times = scheduler._controller.step_time.coefficients
    assert 0 < times["passes"] + times["drafted"] < times["step"] + times["tokens"]
    planned: list[int] = []
    verified: list[int] = []
    update = scheduler._update_after_schedule

    def record(output: Any) -> None:
        update(output)
        planned.append(output.num_spec_tokens_to_schedule)
        verified.extend(map(len, output.scheduled_spec_decode_tokens.values()))

    scheduler._update_after_schedule = record

    # Drafts that cost nothing, so that the whole length is in use, ...
    for price, longest in ((0.0, K), (0.5, 1)):
        scheduler._controller.step_time = make_step_time(price)
        planned.clear()
        verified.clear()
        tokens = generate(llm, prompts)
        equal = [check_same(load_reference(), *one) for one in zip(prompts, tokens, expected, strict=True)]
        assert sum(equal) >= len(prompts) - 1
        # ... and such that most of them are not worth it: the drafter then mostly keeps its own cache only.
        assert np.median(planned) == longest if price == 0 else np.median(planned) <= longest
        assert max(verified) <= K
    counters = read_counters(llm)
    assert 0 < counters["spec_decode_num_accepted_tokens"] <= counters["spec_decode_num_draft_tokens"]
    for number, text_ids in abort_one_of_three(llm, prompts).items():
        check_same(load_reference(), prompts[number], text_ids, expected[number][:60])
    assert scheduler._notes == {}
