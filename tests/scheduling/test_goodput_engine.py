# SPDX-License-Identifier: Apache-2.0
"""smartspec in the real engine, float32 on CPU: the target model's tokens, whatever is drafted or preempted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import LLM, SamplingParams, TokensPrompt

from tests.scheduling.engine import abort_one_of_three, load_reference, read_counters
from vllm_ext.speculation.step_time import COEFFICIENTS, StepTimeModel

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]

K = 6
MAX_MODEL_LEN = 512


def start_engine(model: str, cache: Path, **arguments: Any) -> LLM:
    return LLM(
        model=model, dtype="float32", enforce_eager=True, max_model_len=MAX_MODEL_LEN, max_num_seqs=8,
        speculative_config={"method": "ngram", "num_speculative_tokens": K, "prompt_lookup_min": 1},
        additional_config={"vllm_ext": {"smartspec": {}, "cache_dir": str(cache)}},
        disable_log_stats=False, **arguments,
    )  # fmt: skip


def check_greedy(model: Any, prompt: list[int], tokens: list[int]) -> None:
    """Every token is the argmax of transformers after those before it; nearly equal logits may fall either way."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert (logits.max(dim=1).values - chosen).max() < 2e-3


@pytest.fixture(scope="module")
def reference() -> Any:
    return load_reference()


def test_tokens_are_the_models_and_lengths_follow_acceptance(
    tiny_moe: str, reference: Any, tmp_path: Path, engine_in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 20 blocks of 32, the CPU backend's smallest: eight requests of up to 240 tokens do not fit at once.
    llm = start_engine(tiny_moe, tmp_path, num_gpu_blocks_override=20, block_size=32, enable_prefix_caching=False)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    stored = [json.loads(path.read_text()) for path in (tmp_path / "smartspec").iterdir()]
    assert [set(one) for one in stored] == [set(COEFFICIENTS)]
    assert stored[0]["step"] > 0
    assert scheduler._controller.step_time.is_prior_measured

    planned: list[list[int]] = []
    verified: list[int] = []
    scheduled: list[tuple[int, int]] = []
    preempted: list[str] = []
    update = scheduler._update_after_schedule

    def record(output: Any) -> None:
        update(output)
        preempted.extend(output.preempted_req_ids or ())
        planned.append(list(getattr(output, "draft_lengths", {}).values()))
        verified.append(sum(map(len, output.scheduled_spec_decode_tokens.values())))
        scheduled.extend(
            (len(drafts), output.num_scheduled_tokens[rid])
            for rid, drafts in output.scheduled_spec_decode_tokens.items()
        )

    scheduler._update_after_schedule = record
    generator = np.random.default_rng(0)
    vocabulary = llm.get_tokenizer().vocab_size
    repetitive = [generator.integers(10, vocabulary - 10, 12).tolist() * 6 for _ in range(8)]

    def generate(prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
        planned.clear()
        verified.clear()
        parameters = SamplingParams(**{"max_tokens": 160, "ignore_eos": True, **sampling})
        outputs = llm.generate([TokensPrompt(prompt_token_ids=one) for one in prompts], parameters, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in outputs]

    for prompt, tokens in zip(repetitive, generate(repetitive, temperature=0), strict=True):
        assert len(tokens) == 160
        check_greedy(reference, prompt, tokens)
    assert preempted
    eager = float(np.mean([length for lengths in planned[-40:] for length in lengths]))

    # Up to the end of the context: vLLM drafts nothing for any request while one has less than K tokens left.
    prompts = repetitive[:2]
    for prompt, tokens in zip(prompts, generate(prompts, temperature=0, max_tokens=MAX_MODEL_LEN), strict=True):
        assert len(tokens) == MAX_MODEL_LEN - len(prompt)
        check_greedy(reference, prompt, tokens)

    # Noise of few tokens: always a match, hardly ever the right one. Where a draft costs as much as a step, as it does
    # not on this machine, only probes are verified.
    costly = StepTimeModel({name: 1.0 if name in ("step", "tokens") else 0.0 for name in COEFFICIENTS})
    monkeypatch.setattr(costly, "observe", lambda features, milliseconds: None)
    scheduler._controller.step_time = costly
    noise = [generator.integers(10, vocabulary - 10, 64).tolist() for _ in range(2)]
    generate(noise, temperature=2.0, seed=1, allowed_token_ids=list(range(100, 120)))
    steady = verified[60:]
    assert np.mean([total == 0 for total in steady]) > 0.5
    assert eager > np.mean(steady) / len(noise)
    assert all(0 <= length <= K and count == 1 + length for length, count in scheduled)

    # Abort in the middle: nothing stays behind, and the others finish with the right tokens.
    for number, tokens in abort_one_of_three(llm, repetitive).items():
        check_greedy(reference, repetitive[number], tokens)
    scheduler._controller.forget(scheduler.requests)
    assert len(scheduler._controller.acceptance) == 0
    assert scheduler._notes == {}
    counters = read_counters(llm)
    assert 0 < counters["spec_decode_num_accepted_tokens"] <= counters["spec_decode_num_draft_tokens"]


def test_two_tensor_parallel_ranks(
    tiny_moe: str, reference: Any, tmp_path: Path, engine_in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two workers on one NUMA node have to be told their cores.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    llm = start_engine(tiny_moe, tmp_path, tensor_parallel_size=2, distributed_executor_backend="mp")
    try:
        generator = np.random.default_rng(1)
        prompts = [generator.integers(10, 900, 12).tolist() * 4 for _ in range(4)]
        parameters = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)
        outputs = llm.generate([TokensPrompt(prompt_token_ids=one) for one in prompts], parameters, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            assert len(tokens) == 80
            check_greedy(reference, prompt, tokens)
        # Both ranks ran the sweep and drafted.
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert scheduler._controller.step_time.is_prior_measured
        counters = read_counters(llm)
        assert 0 < counters["spec_decode_num_accepted_tokens"] <= counters["spec_decode_num_draft_tokens"]
    finally:
        llm.llm_engine.engine_core.shutdown()
