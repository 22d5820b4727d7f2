# SPDX-License-Identifier: Apache-2.0
"""The routed experts of one MoE layer, every expert and block with its own bit width."""

from __future__ import annotations

import torch

from . import op  # noqa: F401 - registers torch.ops.vllm_ext.mixed_moe


def mixed_moe(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    expert_map: torch.Tensor | None,
    intermediate_size: int,
    activation: str = "silu",
    weight_on_input: bool = False,
) -> torch.Tensor:
    """Weighted sum over a token's experts of down(silu(gate(x)) * up(x)), on packed weights of mixed widths.

    x                  bf16, fp16 or fp32 [tokens, hidden]
    topk_ids           int32 (or int64) [tokens, top k], global expert ids; -1: no expert
    topk_weights       float32 [tokens, top k]
    arena, table       uint8 [bytes], int64 [local experts, 2, fields]: see layout.py
    expert_map         int [global experts], global -> local id, -1: on another rank; None: ids are local
    intermediate_size  rows of gate, and of up, on this rank
    activation         "silu" (SwiGLU)
    weight_on_input    routing weights multiply the expert's input instead of its output (Llama 4)

    Returns [tokens, hidden] in x's dtype: the partial sum of this rank, not reduced over ranks. Blocks with
    8-bit activations round them to int8, one scale per (token, group of the block's group_size).
    Raises ValueError for an unsupported activation, shapes or dtypes that do not fit, an id past the last
    expert, and a table that points outside the arena.

    Source: MxMoE (arXiv:2505.05799) for the mix of widths; vLLM's modular MoE interface for arguments and result.
    """
    return torch.ops.vllm_ext.mixed_moe(
        x, topk_ids, topk_weights, arena, table, expert_map, intermediate_size, activation, weight_on_input
    )
