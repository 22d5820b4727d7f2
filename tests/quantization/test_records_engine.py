# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU kernels in the real engine: bf16, packed and online, compared and reloaded."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from vllm import LLM

from tests.quantization.packed_models import pack_model
from tests.quantization.test_plan_engine import (
    PLAN,
    digest_arenas,
    fake_quantize_model,
    perturb_model,
    score_with_transformers,
    score_with_vllm,
)
from vllm_ext.kernels.arena import Field, Layout
from vllm_ext.quantization.moe import list_storage

# Slow: four engines take two minutes.
pytestmark = [pytest.mark.engine, pytest.mark.slow]


def start(model: str | Path, **options: Any) -> LLM:
    return LLM(model=str(model), dtype="bfloat16", max_model_len=512, max_num_seqs=4, enforce_eager=True, **options)


def list_layouts(model: torch.nn.Module) -> set[int]:
    """Every layout in the tables of a loaded model."""
    tables = (tensor for name, tensor in model.named_buffers() if name.endswith("_table"))
    return {int(layout) for table in tables for layout in table.select(-1, Field.LAYOUT).flatten()}


def test_online_packed_reloaded_and_on_torch(tiny_moe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Functions travel to the worker as pickled references.
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe)
    texts = [Path(tiny_moe, name).read_text()[:2000] for name in ("kjv_val.txt", "py_val.txt")]
    windows = [tokenizer(text)["input_ids"][:128] for text in texts]
    directory = pack_model(tiny_moe, tmp_path / "packed", PLAN)
    perturbed = pack_model(str(perturb_model(tiny_moe, tmp_path / "source")), tmp_path / "perturbed", PLAN)

    llm = start(tiny_moe, hf_overrides={"quantization_config": PLAN.to_config()})
    try:
        online = score_with_vllm(llm, windows)
        online_arenas = llm.apply_model(digest_arenas)
        assert llm.apply_model(list_layouts) == [{Layout.CPU_RECORD, Layout.PLAIN_BF16}]
    finally:
        llm.llm_engine.engine_core.shutdown()

    llm = start(directory)
    try:
        packed = score_with_vllm(llm, windows)
        assert llm.apply_model(digest_arenas) == online_arenas
        (storage,) = llm.apply_model(list_storage)
        assert all(layer.resident_bytes > layer.quantized_bytes for layer in storage.values())
        # The repacked arena is what a fresh start makes of the new weights.
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(perturbed)})
        reloaded = llm.apply_model(digest_arenas)
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert torch.equal(online, packed)

    shutil.rmtree(directory)
    llm = start(perturbed)
    try:
        assert llm.apply_model(digest_arenas) == reloaded
    finally:
        llm.llm_engine.engine_core.shutdown()

    # The same model on torch's operators, and the truth: bf16 noise apart, all three agree.
    directory = pack_model(tiny_moe, tmp_path / "packed", PLAN)
    monkeypatch.setenv("VLLM_EXT_CPU_ISA", "torch")
    llm = start(directory)
    try:
        on_torch = score_with_vllm(llm, windows)
        assert llm.apply_model(list_layouts) == [{Layout.PLAIN_CODES, Layout.PLAIN_TERNARY, Layout.PLAIN_BF16}]
    finally:
        llm.llm_engine.engine_core.shutdown()
    expected = score_with_transformers(fake_quantize_model(tiny_moe, tmp_path / "rounded", PLAN), windows)
    original = score_with_transformers(tiny_moe, windows)
    assert (packed - expected).abs().mean() < (packed - original).abs().mean() / 2
    assert (packed - expected).abs().mean() < 1.5 * (on_torch - expected).abs().mean()
