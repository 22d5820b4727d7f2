# SPDX-License-Identifier: Apache-2.0
"""Odd weights in the engine: experts that are zero, constant, tiny or have outliers, and one-sided routing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

from tests.quantization.family_models import LAYERS, make_family, make_full_plan, write_plan
from tests.quantization.packed_models import fake_quantize_model
from tests.quantization.test_families_engine import make_windows, start
from tests.quantization.test_plan_engine import score_with_model, score_with_vllm
from vllm_ext import cli

# Slow: an engine takes fifteen seconds.
pytestmark = [pytest.mark.engine, pytest.mark.slow]

GENERATED = 12


def make_odd(directory: Path) -> Path:
    """Eight experts, of which a token gets 0 and 2, or 1 and 3; the others never get any."""
    make_family("tiny-qwen3-moe", directory, dtype="fp32")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        gate = tensors[f"{prefix}.mlp.gate.weight"]
        gate[1:] = 0
        gate[1], gate[2], gate[3] = -gate[0], 0.9 * gate[0], -0.9 * gate[0]
        experts = [
            [f"{prefix}.mlp.experts.{e}.{part}_proj.weight" for part in ("gate", "up", "down")] for e in range(8)
        ]
        for name in experts[0]:
            tensors[name][5, 17], tensors[name][6, 3] = 30.0, -30.0
        for name in experts[1]:
            tensors[name].fill_(0.01)
        tensors[experts[2][1]].mul_(1e-38)
        tensors[experts[2][2]][:7] = 0
        tensors[experts[3][2]].zero_()
        for name in experts[4]:
            tensors[name].zero_()
        tensors[f"{prefix}.self_attn.o_proj.weight"][9:40] = 0
        tensors[f"{prefix}.self_attn.v_proj.weight"][3] = 0.02
        tensors[f"{prefix}.self_attn.q_proj.weight"][2, 2] = 20.0
    save_file(tensors, path, {"format": "pt"})
    return directory


def test_odd_weights_are_served(tmp_path: Path, engine_in_process: None) -> None:
    model = make_odd(tmp_path / "model")
    plan = make_full_plan(model)
    plan_file = write_plan(plan, tmp_path / "plan.json")
    assert cli.main(["quantize", str(model), "-o", str(tmp_path / "packed"), "--plan", str(plan_file)]) == 0
    rounded = fake_quantize_model(str(model), tmp_path / "rounded", plan)
    reference = AutoModelForCausalLM.from_pretrained(rounded, dtype=torch.float32).eval()
    # Long and as short as can be.
    windows = [*make_windows(), [17, 5], [4000, 4000]]
    llm = start(tmp_path / "packed", distributed_executor_backend="uni")
    try:
        for window in windows:
            found = score_with_vllm(llm, [window])
            assert torch.isfinite(found).all()
            assert (found - score_with_model(reference, [window])).abs().max() < 1e-4
        # Batches of one token each.
        prompt = windows[0][:1]
        tokens, found = generate(llm, prompt)
    finally:
        llm.llm_engine.engine_core.shutdown()
    expected = score_with_model(reference, [[*prompt, *tokens]])
    assert (found - expected).abs().max() < 1e-4
    assert used_experts(reference, windows) == [{0, 1, 2, 3}] * LAYERS


def generate(llm: LLM, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their log-probabilities."""
    sampling = SamplingParams(max_tokens=GENERATED, temperature=0, logprobs=0, ignore_eos=True)
    (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
    tokens = list(output.outputs[0].token_ids)
    logprobs = output.outputs[0].logprobs or []
    return tokens, torch.tensor([position[token].logprob for token, position in zip(tokens, logprobs, strict=True)])


def used_experts(model: torch.nn.Module, windows: list[list[int]]) -> list[set[int]]:
    """Experts of each layer that any token is routed to."""
    found: list[set[int]] = []
    for layer in model.model.layers:
        seen: set[int] = set()
        found.append(seen)
        layer.mlp.gate.register_forward_hook(
            lambda _router, _inputs, output, seen=seen: seen.update(output[2].flatten().tolist())
        )
    for window in windows:
        score_with_model(model, [window])
    return found
