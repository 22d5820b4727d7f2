# SPDX-License-Identifier: Apache-2.0
"""One linear layer on packed weights of any width, or of several widths stacked along its outputs."""

from __future__ import annotations

import torch

from . import op  # noqa: F401 - registers torch.ops.vllm_ext.mixed_linear


def mixed_linear(
    x: torch.Tensor, arena: torch.Tensor, table: torch.Tensor, out_features: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ weight.T + bias, on the weight that an arena and its table describe.

    x             bf16, fp16 or fp32 [..., K]
    arena, table  uint8 [bytes], int64 [row blocks, fields]: see layout.py
    out_features  rows of the weight, over all row blocks
    bias          any float type [out_features], or None

    Returns [..., out_features] in x's dtype. Row blocks with 8-bit activations see x rounded to int8, one scale
    per (token, group of the block's group_size).
    Raises ValueError for shapes or dtypes that do not fit, row blocks that do not add up to out_features, and a
    table that points outside the arena.

    Source: torch.nn.functional.linear for arguments and result; the arena is that of `mixed_moe`.
    """
    return torch.ops.vllm_ext.mixed_linear(x, arena, table, out_features, bias)
