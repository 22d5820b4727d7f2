# SPDX-License-Identifier: Apache-2.0
"""What smartspec reads of a finished VllmConfig, for engines that this machine cannot start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform

K = 6


def describe_engine(
    method: str = "ngram",
    uses_v2: bool = False,
    *,
    k: int = K,
    table: Any = None,
    mode: CUDAGraphMode = CUDAGraphMode.NONE,
    is_adaptive: bool = False,
    is_parallel: bool = False,
    mtp: str = "one",
    num_seqs: int = 64,
    **smartspec: Any,
) -> Any:
    """mtp: which kind of multi-token prediction it is, "one", "multi_module" or "step3p5". smartspec: settings."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            method=method,
            num_speculative_tokens=k,
            num_speculative_tokens_per_batch_size=table,
            enable_adaptive_verification=is_adaptive,
            parallel_drafting=is_parallel,
            prompt_lookup_max=4,
            use_multi_module_mtp=lambda: mtp == "multi_module",
            use_step3p5_mtp=lambda: mtp == "step3p5",
        ),
        model_config=SimpleNamespace(model="some/model", is_hybrid=False, is_diffusion=False),
        compilation_config=SimpleNamespace(cudagraph_mode=mode, cudagraph_capture_sizes=[1, 2, 4, 8, 16]),
        scheduler_config=SimpleNamespace(max_num_seqs=num_seqs),
        use_v2_model_runner=uses_v2,
        additional_config={"vllm_ext": {"smartspec": smartspec}},
    )


def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make vLLM's platform say that it is CUDA."""
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
