# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters on quantized linears of a dense model, against transformers on weights with the adapter added."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from tests.quantization.family_models import make_family, make_full_plan
from tests.quantization.packed_models import fake_quantize_model
from tests.quantization.test_families_engine import make_windows, start
from tests.quantization.test_plan_engine import score_with_transformers
from vllm_ext.compress.quantize import quantize_model

# Slow: an engine takes fifteen seconds.
pytestmark = [pytest.mark.engine, pytest.mark.slow]

RANK, ALPHA = 8, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_adapter(directory: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter of every linear layer, as PEFT writes it; returns {weight's name: what it adds}."""
    generator = torch.Generator().manual_seed(0)
    tensors, added = {}, {}
    for name, weight in sorted(weights.items()):
        if name.split(".")[-2] in TARGETS:
            down = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            up = 0.1 * torch.randn(weight.shape[0], RANK, generator=generator)
            path = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
            added[name] = ALPHA / RANK * up @ down
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps({**config, "target_modules": TARGETS}))
    return added


def score(llm: LLM, windows: list[list[int]], adapter: LoRARequest | None) -> torch.Tensor:
    """Log-probability of every token after the first of every window."""
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    found = []
    for ids in windows:
        (output,) = llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False, lora_request=adapter)
        logprobs = output.prompt_logprobs or []
        found += [position[token].logprob for position, token in zip(logprobs[1:], ids[1:], strict=True)]
    return torch.tensor(found)


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "online"])
def test_adapters_of_a_dense_model(is_packed: bool, tmp_path: Path, engine_in_process: None) -> None:
    model = make_family("tiny-llama", tmp_path / "model")
    plan, windows = make_full_plan(model), make_windows()
    rounded = fake_quantize_model(str(model), tmp_path / "rounded", plan)
    weights = load_file(rounded / "model.safetensors")
    added = write_adapter(tmp_path / "adapter", weights)
    merged = Path(shutil.copytree(rounded, tmp_path / "merged"))
    tuned = {name: (weight + added.get(name, 0)).contiguous() for name, weight in weights.items()}
    save_file(tuned, merged / "model.safetensors", {"format": "pt"})
    options: dict[str, Any] = {"hf_overrides": {"quantization_config": plan.to_config()}}
    if is_packed:
        quantize_model(model, tmp_path / "packed", plan=plan)
        model, options = tmp_path / "packed", {}
    llm = start(model, enable_lora=True, max_lora_rank=RANK, distributed_executor_backend="uni", **options)
    try:
        plain = score(llm, windows, None)
        adapted = score(llm, windows, LoRARequest("adapter", 1, str(tmp_path / "adapter")))
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert (plain - score_with_transformers(rounded, windows)).abs().max() < 1e-4
    assert (adapted - score_with_transformers(merged, windows)).abs().max() < 1e-4
    assert (plain - adapted).abs().max() > 0.05
