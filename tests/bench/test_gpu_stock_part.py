# SPDX-License-Identifier: Apache-2.0
"""The GPU program's arms of stock kernels: what they hand to vLLM, as far as a CPU goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.kernels.gpu_parts import stock
from bench.kernels.gpu_parts.common import TINY_SHAPE, Context

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = TINY_SHAPE


# Slow: it imports vLLM's MoE layers, which takes longer than most tests.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_uniform_w8a8_is_handed_over_as_vllm_loads_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe import fused_moe

    calls: list[tuple[tuple[torch.Tensor, ...], Any]] = []

    def fused_experts(*tensors: torch.Tensor, quant_config: Any) -> torch.Tensor:
        calls.append((tensors, quant_config))
        return tensors[0]

    monkeypatch.setattr(fused_moe, "fused_experts", fused_experts)
    monkeypatch.setattr(stock, "COLD_BYTES", 2 * 3 * EXPERTS * HIDDEN * INTERMEDIATE)
    context = Context(torch.device("cpu"), True, 0.0)
    run, copies = stock.make_w8a8(context, 5, dtype)
    assert copies == 2
    run(0)
    run(1)
    (x, first, second, routing, ids), config = calls[0]
    assert x.shape == (5, HIDDEN)
    assert x.dtype == torch.bfloat16
    assert routing.shape == ids.shape == (5, TOP_K)
    assert (first.shape, second.shape) == ((EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE))
    assert {first.dtype, second.dtype} == {dtype}
    assert (config.use_int8_w8a8, config.use_fp8_w8a8) == (dtype == torch.int8, dtype != torch.int8)
    assert (config.per_act_token_quant, config.block_shape) == (True, None)
    assert config.w1_scale.shape == (EXPERTS, 2 * INTERMEDIATE, 1)
    assert config.w2_scale.shape == (EXPERTS, HIDDEN, 1)
    # Weights of another copy, so that they come from memory and not from the cache.
    assert calls[1][0][1].data_ptr() != first.data_ptr()
    # Outputs about as large as bf16's: codes times scales have a mean square of about 1 / K.
    weight = first.float() * config.w1_scale
    assert 0.05 < (weight.square().mean() * HIDDEN).sqrt() < 2
