# SPDX-License-Identifier: Apache-2.0
"""What the engine tests of smartspec share: requests of which one is aborted, counters, the reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams, TokensPrompt


def load_reference() -> Any:
    """The shipped model in transformers, float32."""
    path = Path(__file__).resolve().parents[2] / "bench" / "models" / "tiny_moe"
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def read_counters(llm: LLM) -> dict[str, float]:
    """vLLM's counters and gauges by name, without their prefix."""
    found = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {name.removeprefix("vllm:"): value for name, value in found.items()}


def abort_one_of_three(llm: LLM, prompts: list[list[int]]) -> dict[int, list[int]]:
    """60 greedy tokens of the first and third of three prompts; the second is aborted in the middle."""
    engine = llm.llm_engine
    for number, prompt in enumerate(prompts[:3]):
        parameters = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
        engine.add_request(str(number), TokensPrompt(prompt_token_ids=prompt), parameters)
    finished: dict[str, Any] = {}
    for step in range(200):
        if not engine.has_unfinished_requests():
            break
        if step == 6:
            engine.abort_request(["1"])
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    assert {"0", "2"} <= set(finished)
    return {number: list(finished[str(number)].outputs[0].token_ids) for number in (0, 2)}
