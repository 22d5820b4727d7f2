# SPDX-License-Identifier: Apache-2.0
"""Dynamic symmetric int8 activations, one scale per (token, group along K)."""

from __future__ import annotations

import torch

from . import op  # noqa: F401 - registers torch.ops.vllm_ext.act_quant


def act_quant(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round activations to int8: x[t, k] is about codes[t, k] * scales[t, k // group_size].

    x           bf16, fp16 or fp32 [tokens, K]
    group_size  divides K; -1: one group per token

    Returns (codes int8 [tokens, K] in -127..127, scales float32 [tokens, K / group_size]). A scale is its group's
    largest magnitude / 127; ties round to even; a group of zeros has codes and scale 0; a group
    with a value that is not finite has codes 0 and scale NaN.
    Raises ValueError for another dtype or rank of x, and for a group size that does not divide K.

    Source: per-token dynamic int8 as in vLLM's `dynamic_scaled_int8_quant`; ours has one scale per group of K, the
    weight's groups, so that a GEMM can apply both scales once per group.
    """
    return torch.ops.vllm_ext.act_quant(x, group_size)
