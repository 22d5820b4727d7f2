# SPDX-License-Identifier: Apache-2.0
"""Plans in the real engine: online, packed, and changed at the same path."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

from tests.quantization.packed_models import fake_quantize_model, pack_model
from vllm_ext.quantization.moe import list_storage
from vllm_ext.quantization.plan import Plan

# Slow: three compiled engines take two to three minutes.
pytestmark = [pytest.mark.engine, pytest.mark.slow]

NUM_LAYERS, NUM_EXPERTS = 5, 16
# K is 256 for gate_up, q, k, v and o, and 128 for down.
MIXED = (
    "w2a16_g32", "w3a8_g64", "w4a16_g128", "w5a8_g-1", "w6a16_g64_sym", "w8a8_g128_sym", "w16a16", "w3a16_g32_sym",
    "w1.6a16_g128_sym",
)  # fmt: skip
WEIGHT_ONLY = ("w4a16_g64", "w8a16_g-1_sym", "w3a16_g128", "w1.6a16_g64_sym", "w6a16_g32", "w5a16_g128_sym")


def make_plan(schemes: tuple[str, ...], linears: dict[str, str], left_out: str = "") -> Plan:
    """Schemes dealt to experts and blocks in turn, every layer another way; `linears` in every layer.

    left_out: a layer whose experts the plan does not name.
    """
    modules: dict[str, Any] = {}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        modules |= {f"{prefix}.self_attn.{name}": scheme for name, scheme in linears.items()}
        for expert in range(NUM_EXPERTS if prefix != left_out else 0):
            modules[f"{prefix}.mlp.experts.{expert}"] = {
                "gate_up": schemes[(expert + layer) % len(schemes)],
                "down": schemes[(3 * expert + 2 * layer + 1) % len(schemes)],
            }
    return Plan.parse(modules)


PLAN = make_plan(MIXED, {"q_proj": "w4a8_g64", "k_proj": "w4a8_g64", "v_proj": "w4a8_g64", "o_proj": "w6a16_g128"})
WEIGHT_ONLY_PLAN = make_plan(WEIGHT_ONLY, {"o_proj": "w3a16_g32"}, left_out="model.layers.3")


def score_with_vllm(llm: LLM, windows: list[list[int]]) -> torch.Tensor:
    """Log-probability of every token after the first of every window.

    One window at a time: which requests share a batch depends on when they arrive, and a GEMM's last bits on its batch.
    """
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    outputs = [llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)[0] for ids in windows]
    return torch.tensor(
        [
            position[token].logprob
            for output, ids in zip(outputs, windows, strict=True)
            for position, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        ]
    )


def score_with_transformers(directory: str | Path, windows: list[list[int]]) -> torch.Tensor:
    """The same in float32 from transformers."""
    return score_with_model(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), windows)


def score_with_model(model: torch.nn.Module, windows: list[list[int]]) -> torch.Tensor:
    """The same from a transformers model."""
    ids = torch.tensor(windows)
    with torch.inference_mode():
        log_probs = model(ids[:, :-1]).logits.log_softmax(-1)
    return log_probs.gather(-1, ids[:, 1:, None]).flatten()


def digest_arenas(model: torch.nn.Module) -> dict[str, str]:
    """A hash of every arena of a loaded model."""
    arenas = ((name, tensor) for name, tensor in model.named_parameters() if name.endswith("_arena"))
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in arenas}


def perturb_model(source: str, target: Path) -> Path:
    """The same model with every weight changed by about a tenth."""
    shutil.copytree(source, target)
    torch.manual_seed(0)
    tensors = load_file(target / "model.safetensors")
    changed = {
        name: (tensor * (1 + 0.1 * torch.randn(tensor.shape))).to(tensor.dtype) for name, tensor in tensors.items()
    }
    save_file(changed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def start(model: str | Path, **options: Any) -> LLM:
    return LLM(model=str(model), dtype="float32", max_model_len=512, max_num_seqs=4, **options)


def test_online_packed_and_changed(tiny_moe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # list_storage travels to the worker as a pickled reference.
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe)
    texts = [Path(tiny_moe, name).read_text()[:2000] for name in ("kjv_val.txt", "py_val.txt")]
    windows = [tokenizer(text)["input_ids"][:128] for text in texts]
    original = score_with_transformers(tiny_moe, windows)

    llm = start(tiny_moe, hf_overrides={"quantization_config": PLAN.to_config()})
    try:
        online = score_with_vllm(llm, windows)
        (online_storage,) = llm.apply_model(list_storage)
    finally:
        llm.llm_engine.engine_core.shutdown()

    directory = pack_model(tiny_moe, tmp_path / "packed", PLAN)
    llm = start(directory)
    try:
        packed = score_with_vllm(llm, windows)
        (packed_storage,) = llm.apply_model(list_storage)
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert torch.equal(online, packed)
    assert (online - original).abs().max() > 0.05
    assert online_storage == packed_storage
    assert sorted(packed_storage) == sorted(
        f"model.layers.{layer}.{module}"
        for layer in range(NUM_LAYERS)
        for module in ("mlp.experts", "self_attn.o_proj", "self_attn.qkv_proj")
    )
    # One scale of two bytes and one zero point for 128 weights; q, k and v have 128 outputs more than o.
    assert packed_storage["model.layers.0.self_attn.o_proj"].bits_per_weight == 6 + 24 / 128

    # Another plan at the same path: the answers must be its own, whatever vLLM has compiled and kept before.
    assert pack_model(tiny_moe, tmp_path / "packed", WEIGHT_ONLY_PLAN) == directory
    llm = start(directory)
    try:
        served = score_with_vllm(llm, windows)
        rounded = fake_quantize_model(tiny_moe, tmp_path / "rounded", WEIGHT_ONLY_PLAN)
        expected = score_with_transformers(rounded, windows)
        assert (served - expected).abs().max() < 1e-4
        assert (served - packed).abs().max() > 0.05
        kept = list(Path(tmp_path, "cache", "torch_compile_cache", "torch_aot_compile").iterdir())
        assert len(kept) == 3

        # The arenas of another model at the same plan. Not its answers: vLLM itself keeps the old weights of linear
        # layers that are not quantized, prepacked for the CPU.
        pack_model(str(perturb_model(tiny_moe, tmp_path / "perturbed")), directory, WEIGHT_ONLY_PLAN)
        (before,) = llm.apply_model(digest_arenas)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(directory)})
        (reloaded,) = llm.apply_model(digest_arenas)
    finally:
        llm.llm_engine.engine_core.shutdown()
    llm = start(directory, enforce_eager=True)
    try:
        assert llm.apply_model(digest_arenas) == [reloaded]
        assert not set(before.values()) & set(reloaded.values())
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_packed_on_two_ranks(
    tiny_moe: str, tmp_path: Path, expert_parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under expert parallelism, layer 3, which the plan leaves out, too: vLLM's own kernel would die there."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe)
    windows = [tokenizer(Path(tiny_moe, "py_val.txt").read_text()[:2000])["input_ids"][:128]]
    linears = {"q_proj": "w4a16_g-1", "k_proj": "w4a16_g-1", "v_proj": "w4a16_g-1", "o_proj": "w3a16_g32"}
    plan = make_plan(("w4a16_g64", "w3a16_g32", "w8a16_g64_sym"), linears, left_out="model.layers.3")
    directory = pack_model(tiny_moe, tmp_path / "packed", plan)
    scores = []
    for ranks in (1, 2):
        options = {"tensor_parallel_size": ranks, "enable_expert_parallel": expert_parallel and ranks > 1}
        if ranks > 1:
            # Two workers on one NUMA node have to be told their cores.
            monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        llm = start(directory, enforce_eager=True, **options)
        try:
            scores.append(score_with_vllm(llm, windows))
        finally:
            llm.llm_engine.engine_core.shutdown()
    assert (scores[0] - scores[1]).abs().max() < 1e-4
