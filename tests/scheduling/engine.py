# SPDX-License-Identifier: Apache-2.0
"""What the engine tests of smartspec share: the reference model, a draft model, requests, counters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams, TokensPrompt

from vllm_ext.speculation.step_time import COEFFICIENTS, StepTimeModel

#: The shipped model.
TINY_MOE = Path(__file__).resolve().parents[2] / "bench" / "models" / "tiny_moe"


def load_reference(path: Path = TINY_MOE) -> Any:
    """A model in transformers, float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def save_draft_model(folder: Path, layers: int = 2, path: Path = TINY_MOE) -> str:
    """A drafter for a model: its first layers, with its embedding, last norm and tokenizer."""
    model = load_reference(path)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.save_pretrained(folder)
    for file in path.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return str(folder)


def make_step_time(price: float) -> StepTimeModel:
    """Steps of one millisecond and so much for each token, whatever the machine takes."""
    model = StepTimeModel({name: {"step": 1.0, "tokens": price}.get(name, 0.0) for name in COEFFICIENTS})
    model.observe = lambda features, milliseconds: None  # type: ignore[method-assign]
    return model


def check_same(model: Any, prompt: list[int], tokens: list[int], expected: list[int]) -> bool:
    """Whether two outputs are equal; they may only part where the model finds both tokens equally good."""
    if tokens == expected:
        return True
    parted = next(place for place in range(len(expected)) if tokens[place] != expected[place])
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens[:parted]])).logits[0, -1]
    assert abs(float(logits[tokens[parted]] - logits[expected[parted]])) < 2e-3
    return False


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
