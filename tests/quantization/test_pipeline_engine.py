# SPDX-License-Identifier: Apache-2.0
"""Two stages of a pipeline in two processes, against transformers on the rounded weights.

Not eager: on CPUs vLLM 0.32 makes the buffers between stages in the warm-up of compiled engines alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.quantization.family_models import make_family, make_full_plan
from tests.quantization.packed_models import fake_quantize_model
from tests.quantization.test_families_engine import make_windows
from tests.quantization.test_plan_engine import score_with_transformers, score_with_vllm, start
from vllm_ext.compress.quantize import quantize_model

# Slow: an engine of two processes takes half a minute.
pytestmark = [pytest.mark.engine, pytest.mark.slow]


#: Traced and not compiled further, which needs no compiler and takes half the time. vLLM 0.32's own CPU kernel of
#: interleaved rotary embeddings, DeepSeek's, is wrong for separate heads.
TRACED = {"mode": 2, "backend": "eager", "custom_ops": ["-rotary_embedding"]}


@pytest.mark.parametrize(
    ("preset", "is_packed"), [("tiny-mixtral", True), ("tiny-mixtral", False), ("tiny-deepseek-v2", True)]
)
def test_two_stages_are_the_rounded_model(
    preset: str, is_packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two workers on one NUMA node have to be told their cores.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = make_family(preset, tmp_path / "model", layers=3)
    plan = make_full_plan(model)
    rounded = fake_quantize_model(str(model), tmp_path / "rounded", plan)
    options: dict[str, Any] = {"hf_overrides": {"quantization_config": plan.to_config()}}
    served = model
    if is_packed:
        served, options = tmp_path / "packed", {}
        quantize_model(model, served, plan=plan)
    windows = make_windows()
    llm = start(served, pipeline_parallel_size=2, compilation_config=TRACED, **options)
    try:
        found = score_with_vllm(llm, windows)
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert (found - score_with_transformers(rounded, windows)).abs().max() < 1e-4
    assert (found - score_with_transformers(model, windows)).abs().max() > 0.05
