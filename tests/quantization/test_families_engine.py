# SPDX-License-Identifier: Apache-2.0
"""Every family: a random model, quantized by the command line, served by vLLM, against transformers on rounded weights.

Plans name everything that a family lets them name: routed and shared experts, attention, dense layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import LLM

from tests.quantization.family_models import FAMILY_PRESETS, LAYERS, make_family, make_full_plan, write_plan
from tests.quantization.packed_models import fake_quantize_model
from tests.quantization.test_plan_engine import score_with_model, score_with_transformers, score_with_vllm
from vllm_ext import cli
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.quantization.checkpoint import validate_checkpoint
from vllm_ext.quantization.moe import list_storage

pytestmark = pytest.mark.engine

#: An engine of the default run takes about fifteen seconds: the family that differs most, the rest with the slow tests.
DEFAULT = ("tiny-deepseek-v2",)
PRESETS = [preset if preset in DEFAULT else pytest.param(preset, marks=pytest.mark.slow) for preset in FAMILY_PRESETS]


def start(model: Path, **options: Any) -> LLM:
    return LLM(
        model=str(model),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        enforce_eager=True,
        # vLLM 0.32's own CPU kernel of interleaved rotary embeddings, DeepSeek's, is wrong for separate heads; compiled
        # engines do not use it, eager ones do.
        compilation_config={"custom_ops": ["-rotary_embedding"]},
        **options,
    )


def make_windows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 4000, (40,), generator=generator).tolist() for _ in range(2)]


def score_served(windows: list[list[int]], model: Path, **options: Any) -> torch.Tensor:
    """Prompt logprobs of an engine of its own."""
    llm = start(model, **options)
    try:
        return score_with_vllm(llm, windows)
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("preset", PRESETS)
def test_packed_directory_is_the_rounded_model(preset: str, tmp_path: Path, engine_in_process: None) -> None:
    model = make_family(preset, tmp_path / "model")
    plan = make_full_plan(model)
    arguments = ["--plan", str(write_plan(plan, tmp_path / "plan.json"))]
    assert cli.main(["quantize", str(model), "-o", str(tmp_path / "packed"), *arguments]) == 0
    assert validate_checkpoint(tmp_path / "packed").plan.modules == plan.modules
    windows = make_windows()
    served = score_served(windows, tmp_path / "packed", distributed_executor_backend="uni")
    rounded = fake_quantize_model(str(model), tmp_path / "rounded", plan)
    assert (served - score_with_transformers(rounded, windows)).abs().max() < 1e-4
    # The comparison can fail: unrounded weights are far away.
    assert (served - score_with_transformers(model, windows)).abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny-deepseek-v2-grouped", "tiny-qwen2-moe", "tiny-mixtral", "tiny-olmoe"])
def test_online_plan_is_the_rounded_model(preset: str, tmp_path: Path, engine_in_process: None) -> None:
    model = make_family(preset, tmp_path / "model")
    plan = make_full_plan(model)
    windows = make_windows()
    overrides = {"quantization_config": plan.to_config()}
    served = score_served(windows, model, hf_overrides=overrides, distributed_executor_backend="uni")
    rounded = fake_quantize_model(str(model), tmp_path / "rounded", plan)
    assert (served - score_with_transformers(rounded, windows)).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("tiny-deepseek-v2-grouped", {"tensor_parallel_size": 2, "enable_expert_parallel": True}),
        ("tiny-qwen2-moe", {"tensor_parallel_size": 2}),
    ],
    ids=["deepseek tp2 ep", "qwen2 tp2"],
)
def test_two_ranks_are_the_rounded_model(
    preset: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two workers on one NUMA node have to be told their cores.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = make_family(preset, tmp_path / "model")
    plan = make_full_plan(model, split=options.get("tensor_parallel_size", 1))
    quantize_model(model, tmp_path / "packed", plan=plan)
    windows = make_windows()
    served = score_served(windows, tmp_path / "packed", **options)
    rounded = fake_quantize_model(str(model), tmp_path / "rounded", plan)
    assert (served - score_with_transformers(rounded, windows)).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny-deepseek-v2", "tiny-deepseek-v2-grouped"])
def test_normalised_routing_weights(preset: str, tmp_path: Path, engine_in_process: None) -> None:
    """`norm_topk_prob`, which vLLM applies and transformers' DeepSeek-V2 does not read, with a dense first layer."""
    model = make_family(preset, tmp_path / "model")
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norm_topk_prob": True}))
    plan, windows = make_full_plan(model), make_windows()
    quantize_model(model, tmp_path / "packed", plan=plan)
    served = score_served(windows, tmp_path / "packed", distributed_executor_backend="uni")
    rounded = fake_quantize_model(str(model), tmp_path / "rounded", plan)
    assert (served - score_with_normalised_routing(rounded, windows)).abs().max() < 1e-4
    # Weights that do not sum up to one are far away, and so is the unrounded model.
    assert (served - score_with_transformers(rounded, windows)).abs().max() > 0.05
    assert (served - score_with_normalised_routing(model, windows)).abs().max() > 0.05


def score_with_normalised_routing(directory: Path, windows: list[list[int]]) -> torch.Tensor:
    """As `score_with_transformers`, each token's routing weights divided by their sum before they are scaled."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    assert len(routers) == LAYERS - 1

    def normalise(router: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        logits, weights, ids = output
        return logits, weights / weights.sum(-1, keepdim=True) * router.routed_scaling_factor, ids

    for router in routers:
        router.register_forward_hook(normalise)
    return score_with_model(model, windows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "is_packed"),
    [*((preset, True) for preset in FAMILY_PRESETS), ("tiny-qwen2-moe", False), ("tiny-llama", False)],
)
def test_dummy_weights_run(preset: str, is_packed: bool, tmp_path: Path, engine_in_process: None) -> None:
    """`--load-format dummy`: no file of weights is read, and the shapes are those of the plan."""
    model = make_family(preset, tmp_path / "model")
    plan = make_full_plan(model)
    options: dict[str, Any] = {"hf_overrides": {"quantization_config": plan.to_config()}}
    if is_packed:
        quantize_model(model, tmp_path / "packed", plan=plan)
        model, options = tmp_path / "packed", {}
    (model / "model.safetensors").unlink()
    llm = start(model, load_format="dummy", distributed_executor_backend="uni", **options)
    try:
        scores = score_with_vllm(llm, make_windows())
        (storage,) = llm.apply_model(list_storage)
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert len(scores) == 78
    assert torch.isfinite(scores).all()
    assert {name.split(".")[2] for name in storage} == {str(layer) for layer in range(LAYERS)}


@pytest.mark.parametrize(
    ("model_type", "architecture", "name"),
    [("gpt_oss", "GptOssForCausalLM", "GPT-OSS"), ("llama4_text", "Llama4ForCausalLM", "Llama 4")],
)
def test_refused_families_are_named_before_anything_is_loaded(
    tmp_path: Path, model_type: str, architecture: str, name: str, engine_in_process: None
) -> None:
    from transformers import CONFIG_MAPPING

    model = make_family("tiny-llama", tmp_path / "model")
    config = CONFIG_MAPPING[model_type](num_hidden_layers=2, hidden_size=256, vocab_size=4096)
    values = {**config.to_dict(), "architectures": [architecture]}
    values.pop("quantization_config", None)
    (model / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"does not support {name}"):
        start(model, quantization="mxmoe", distributed_executor_backend="uni")
