# SPDX-License-Identifier: Apache-2.0
"""Engines whose layers differ, or that are calibrated, compiled, quantized or drafting beside their quantized cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.config import CompilationMode

from bench.quality.kv_engine import STOCK, Arm, score_vocabulary, start_engine
from bench.quality.kv_models import draw_tokens, make_planted_model
from tests.kv_cache.engines import SMALL, find_scheduler, generate, list_tokens, list_tokens_twice, read_text, start
from tests.scheduling.engine import read_counters
from vllm_ext.cli import main
from vllm_ext.config import KVCacheSettings
from vllm_ext.kv_cache.capacity import Geometry, compute_capacity
from vllm_ext.kv_cache.settings import choose_presets

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

COUNT = 16
LAYERS = 5
CACHE_BYTES = 1 << 30
#: Of five layers; the last has the preset of the engine. Larger and smaller pages, per token and per channel.
PLAN = {"0": "k4v4", "1": "kivi_k2v2", "2": "k2v15", "3": "k8v8"}


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(PLAN, id="every layer another"),
        pytest.param({"0-1": "k4v4"}, id="two sizes"),
        pytest.param({"default": "kvquant_k3v3"}, id="keys before RoPE, outliers"),
    ],
)
def test_chunks_and_prefix_hits_of_a_plan_give_the_same_tokens(plan: dict[str, str], engine_in_process: None) -> None:
    """With the consistency check in every step; the second round of every engine comes from the first's pages."""
    block = {**SMALL, "layer_bits": plan}
    expected = None
    for size in (50, 2048):
        with start("skvq_k2v2", block, max_num_batched_tokens=size) as llm:
            cache = llm.llm_engine.vllm_config.cache_config
            presets = choose_presets("skvq_k2v2", KVCacheSettings(**block), 64, LAYERS)
            capacity = compute_capacity(presets, Geometry(LAYERS, 2, 64, 32, 4), CACHE_BYTES, 512)
            assert cache.kv_cache_size_tokens == capacity.tokens
            assert find_scheduler(llm).kv_cache_config.num_blocks == CACHE_BYTES // capacity.page_bytes
            first = list_tokens_twice(llm, COUNT)
        expected = expected or first
        assert first == expected


def test_a_compiled_model_gives_the_tokens_of_an_eager_one(engine_in_process: None) -> None:
    found = {}
    for is_eager in (True, False):
        with start("skvq_k2v2", SMALL, enforce_eager=is_eager, max_num_batched_tokens=128) as llm:
            assert (llm.llm_engine.vllm_config.compilation_config.mode == CompilationMode.NONE) == is_eager
            found[is_eager] = list_tokens_twice(llm, COUNT)
    assert found[True] == found[False]


def test_calibration_mends_planted_outliers(
    tmp_path: Path, engine_in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `calibrate-kv` writes, served: nearer to bf16 than without; two bits without a window are further away."""
    model = make_planted_model(tmp_path / "planted")
    files = {name: tmp_path / f"{name}.safetensors" for name in ("kv4", "skvq_k2v2")}
    for name, path in files.items():
        command = ["calibrate-kv", str(model), "--preset", name, "--calibration", "random", "--windows", "8"]
        assert main([*command, "-o", str(path)]) == 0, capsys.readouterr().err
    prompts = draw_tokens(2, 300, 4096, 1)
    arms = [Arm(STOCK), Arm("naive", "skvq_k2v2", {"window": 0, "sinks": 0, "clip": 1.0})]
    for name, path in files.items():
        arms += [Arm(name, name), Arm(f"{name} calibrated", name, {"calibration": str(path)})]
    divergence: dict[str, float] = {}
    plain = None
    for arm in arms:
        with start_engine(model, arm) as llm:
            if "calibration" in arm.block:
                layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
                tensors = [layer.impl.tensors for name, layer in layers.items() if not name.endswith(".recent")]
                assert any(key.shift is not None for key, _ in tensors)
            rows = score_vocabulary(llm, prompts, 200).astype(np.float64)
        plain = rows if plain is None else plain
        divergence[arm.name] = float((np.exp(plain) * (plain - rows)).sum(-1).mean())
    assert divergence["skvq_k2v2"] < divergence["naive"]
    for name in files:
        assert divergence[f"{name} calibrated"] < 0.7 * divergence[name], divergence


def test_quantized_weights_and_chosen_drafts_beside_a_quantized_cache(engine_in_process: None, tmp_path: Path) -> None:
    """mxmoe, smartspec and a preset in one engine: the tokens of the engine that does not draft."""
    prompts = [prompt[:24] * 5 for prompt in read_text("py", 3, 60)]
    arguments: dict[str, Any] = {"quantization": "mxmoe"}
    with start("skvq_k2v2", SMALL, **arguments) as llm:
        expected = list_tokens(generate(llm, prompts, 48))
    with start("skvq_k2v2", SMALL) as llm:
        # The weights are quantized, too: other tokens somewhere.
        assert list_tokens(generate(llm, prompts, 48)) != expected
    others = {"smartspec": {}, "cache_dir": str(tmp_path)}
    speculative = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1}
    with start("skvq_k2v2", SMALL, others, speculative_config=speculative, **arguments) as llm:
        assert list_tokens(generate(llm, prompts, 48)) == expected
        assert hasattr(find_scheduler(llm), "_controller")
        assert read_counters(llm)["spec_decode_num_accepted_tokens"] > 0
