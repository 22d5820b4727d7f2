# SPDX-License-Identifier: Apache-2.0
"""`vllm_ext::mixed_moe` on the CPU: cpu.cpp where the weights are CPU_RECORD and x is bf16 or fp16. Else, sort the
(token, expert) pairs once, then one dequantize and two GEMMs per expert that received tokens; there is no Python
loop over tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import silu

from ..mixed_linear.cpu import apply_block, find_kernels
from .arguments import ACTIVATIONS, check_arguments
from .layout import Block, block_shape
from .reference import map_to_local


def mixed_moe(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    expert_map: torch.Tensor | None,
    intermediate_size: int,
    activation: str,
    weight_on_input: bool,
    *,
    observer: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Same arguments, result and errors as `vllm_ext.kernels.mixed_moe.mixed_moe`.

    Differs from the reference where x is bf16 and a block's activations are 16-bit: that GEMM runs in bf16 (the
    CPU's matrix unit) with float32 accumulation; in the compiled kernels, on two int8 planes of x, whose error is that
    of rounding to bf16. Sums over experts are float32, in the order of the table, whatever the order of the tokens.

    observer: told the number of (token, expert) pairs computed here, once per call.
    """
    # The kernels check their other arguments, and whether the table is theirs.
    if activation in ACTIVATIONS and (ops := find_kernels(table)) is not None:
        routed, num_pairs = ops.mixed_moe(
            x, topk_ids, topk_weights, arena, table, expert_map, intermediate_size, weight_on_input
        )
        if routed is not None:
            if observer is not None:
                observer(num_pairs)
            return routed
    check_arguments(x, topk_ids, topk_weights, arena, table, expert_map, intermediate_size, activation)
    pairs, counts = sort_pairs(map_to_local(topk_ids, expert_map, table.shape[0]), table.shape[0])
    tokens = pairs // max(topk_ids.shape[1], 1)
    routing = topk_weights.float().flatten()[pairs].unsqueeze(-1)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    start = 0
    for rows, count in zip(table.tolist(), counts.tolist(), strict=True):
        if not count:
            continue
        token, weight = tokens[start : start + count], routing[start : start + count]
        start += count
        inputs = x.index_select(0, token)
        if weight_on_input:
            inputs = inputs.float() * weight
        shape = block_shape(Block.GATE_UP, x.shape[1], intermediate_size)
        gate_up = apply_block(inputs, arena, rows[Block.GATE_UP], *shape, x.dtype, gate_up=True)
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = silu(gate) * up
        shape = block_shape(Block.DOWN, x.shape[1], intermediate_size)
        down = apply_block(hidden, arena, rows[Block.DOWN], *shape, x.dtype)
        out.index_add_(0, token, down if weight_on_input else down * weight)
    if observer is not None:
        observer(pairs.numel())
    return out.to(x.dtype)


def sort_pairs(local_ids: torch.Tensor, num_local_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Group the routed (token, slot) pairs by expert, keeping their order inside an expert.

    local_ids: int64 [tokens, top k], -1 for pairs of other ranks and for none.
    Returns (pairs int64 [routed], positions in the flattened local_ids; counts int64 [num_local_experts]).
    """
    flat = local_ids.flatten()
    routed = (flat >= 0).nonzero().squeeze(-1)
    experts = flat[routed]
    return routed[torch.argsort(experts, stable=True)], torch.bincount(experts, minlength=num_local_experts)
