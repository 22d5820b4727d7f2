# SPDX-License-Identifier: Apache-2.0
"""The torch reference in an engine on a GPU: the tokens of stock where the window covers all, and a quantized past."""

from __future__ import annotations

import pytest
import torch

from tests.kv_cache.engines import generate, make_prompts, start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

COUNT = 16


@pytest.mark.parametrize("name", ["skvq_k2v2", "kivi_k2v2", "kvquant_k3v3"])
def test_an_engine_on_a_gpu(name: str, engine_in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    prompts = make_prompts()
    with start(None) as llm:
        expected = [output.outputs[0].token_ids for output in generate(llm, prompts, COUNT)]
    with start(name, {"window": 512}) as llm:
        assert [output.outputs[0].token_ids for output in generate(llm, prompts, COUNT)] == expected
    # The caches are compared in every step.
    with start(name, {"window": 32, "sinks": 4, "check": True}) as llm:
        assert all(len(output.outputs[0].token_ids) == COUNT for output in generate(llm, prompts, COUNT))
