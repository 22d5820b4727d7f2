# SPDX-License-Identifier: Apache-2.0
"""`quantization="mxmoe"` in the real engine, against transformers on weights rounded outside of it.

The other side of the comparison shares only the default plan and the rounding formula with the served model: its
weights go through safetensors, its mathematics is that of transformers.
"""

import functools
import itertools
import re
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

from vllm_ext.compress.rounding import dequantize, round_to_nearest
from vllm_ext.quantization.default_plan import choose_schemes
from vllm_ext.quantization.moe import list_storage

pytestmark = pytest.mark.engine

EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.gate_proj\.weight")
NUM_LAYERS, NUM_EXPERTS, HIDDEN, INTERMEDIATE = 5, 16, 256, 128


def round_experts(tensors: dict[str, torch.Tensor], expert_ranks: int = 1) -> dict[str, torch.Tensor]:
    """Every expert weight replaced by what the default plan, made by each rank of its own experts, makes of it."""
    rounded = {name: tensor.float() for name, tensor in tensors.items()}
    layers = {match[1] for match in map(EXPERT.fullmatch, tensors) if match}
    assert len(layers) == NUM_LAYERS
    for layer, first in itertools.product(layers, range(0, NUM_EXPERTS, NUM_EXPERTS // expert_ranks)):
        names = [
            [f"{layer}.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
            for expert in range(first, first + NUM_EXPERTS // expert_ranks)
        ]
        gate_up = torch.stack([torch.cat([tensors[gate], tensors[up]]) for gate, up, _ in names])
        down = torch.stack([tensors[name] for _, _, name in names])
        for (gate, up, _), weight, scheme in zip(names, gate_up, choose_schemes(gate_up), strict=True):
            new = dequantize(round_to_nearest(weight, scheme), scheme)
            rounded[gate], rounded[up] = (part.clone() for part in new.chunk(2))
        for (_, _, name), weight, scheme in zip(names, down, choose_schemes(down), strict=True):
            rounded[name] = dequantize(round_to_nearest(weight, scheme), scheme)
    return rounded


def copy_model(source: str, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """The model directory again, with other weights."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.txt", "*.safetensors"))
    tensors = {name: t.contiguous() for name, t in change(load_file(f"{source}/model.safetensors")).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def score_with_transformers(directory: str | Path, windows: list[list[int]]) -> torch.Tensor:
    """Log-probability of every token after the first of every window, in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor(windows)
    with torch.inference_mode():
        log_probs = model(ids[:, :-1]).logits.log_softmax(-1)
    return log_probs.gather(-1, ids[:, 1:, None]).flatten()


def score_with_vllm(llm: LLM, windows: list[list[int]]) -> torch.Tensor:
    """The same from the engine's prompt_logprobs."""
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in windows], sampling, use_tqdm=False)
    return torch.tensor(
        [
            position[token].logprob
            for output, ids in zip(outputs, windows, strict=True)
            for position, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        ]
    )


#: Compiled where it can be: vLLM's compiled mode on a CPU needs Python.h, which Debian ships apart from Python.
COMPILED = {"enforce_eager": not (Path(sysconfig.get_path("include")) / "Python.h").is_file()}


def start(model: str, **options: Any) -> LLM:
    return LLM(model=model, quantization="mxmoe", max_model_len=512, max_num_seqs=4, **options)


@pytest.fixture(scope="module")
def windows(tiny_moe: str) -> list[list[int]]:
    """Held-out text of both domains."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe)
    texts = [Path(tiny_moe, name).read_text()[:2000] for name in ("kjv_val.txt", "py_val.txt")]
    return [tokenizer(text)["input_ids"][:128] for text in texts]


@pytest.fixture(scope="module")
def rounded_model(tiny_moe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_model(tiny_moe, tmp_path_factory.mktemp("models") / "rounded", round_experts)


def test_compiled_float32_engine_computes_the_rounded_model(
    tiny_moe: str,
    rounded_model: Path,
    windows: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # list_storage travels to the worker as a pickled reference.
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    llm = start(tiny_moe, dtype="float32", **COMPILED)
    try:
        served = score_with_vllm(llm, windows)
        expected = score_with_transformers(rounded_model, windows)
        original = score_with_transformers(tiny_moe, windows)
        assert (served - expected).abs().max() < 1e-4
        # The same comparison with the unrounded weights fails by orders of magnitude: rounding happened.
        assert (served - original).abs().max() > 0.05

        (storage,) = llm.apply_model(list_storage)
        assert len(storage) == NUM_LAYERS
        for layer in storage.values():
            assert layer.quantized_weights == NUM_EXPERTS * 3 * HIDDEN * INTERMEDIATE
            assert layer.unquantized_bytes == 0
            assert layer.bits_per_weight == 3.6875

        # A reload puts new weights into the arena that the compiled graph holds.
        def scale_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: t * 1.5 if ".down_proj." in name else t for name, t in tensors.items()}

        scaled = copy_model(tiny_moe, tmp_path / "scaled", scale_experts)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(scaled)})
        expected = score_with_transformers(copy_model(str(scaled), tmp_path / "scaled_rounded", round_experts), windows)
        assert (score_with_vllm(llm, windows) - expected).abs().max() < 1e-4
        assert (served - expected).abs().max() > 0.05
    finally:
        llm.llm_engine.engine_core.shutdown()


def test_eager_bf16_engine_is_close_to_the_original(
    tiny_moe: str, rounded_model: Path, windows: list[list[int]], engine_in_process: None
) -> None:
    llm = start(tiny_moe, dtype="bfloat16", enforce_eager=True, distributed_executor_backend="uni")
    try:
        served = score_with_vllm(llm, windows)
        outputs = llm.generate(
            ["And God said unto Moses,", "def __init__(self"],
            SamplingParams(max_tokens=24, temperature=0, ignore_eos=True),
            use_tqdm=False,
        )
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert all(len(output.outputs[0].token_ids) == 24 for output in outputs)
    assert all(len(set(output.outputs[0].token_ids)) > 8 for output in outputs)
    rounded, original = (score_with_transformers(model, windows) for model in (rounded_model, tiny_moe))
    # bf16 noise is zero on average: the served model stays with the rounded one, token by token and in the mean.
    assert (served - rounded).abs().mean() < (served - original).abs().mean() / 2
    assert abs(float(served.mean() - original.mean())) < 0.1
    assert not torch.equal(served, original)


@pytest.mark.slow
def test_expert_parallel_ranks_compute_their_own_plans(
    tiny_moe: str, windows: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two workers on one NUMA node have to be told their cores.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    llm = start(tiny_moe, dtype="float32", enforce_eager=True, **options)
    try:
        served = score_with_vllm(llm, windows)
    finally:
        llm.llm_engine.engine_core.shutdown()
    rounded = copy_model(tiny_moe, tmp_path / "rounded", functools.partial(round_experts, expert_ranks=2))
    assert (served - score_with_transformers(rounded, windows)).abs().max() < 1e-4
