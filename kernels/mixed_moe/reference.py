# SPDX-License-Identifier: Apache-2.0
"""The specification of `vllm_ext::mixed_moe` in plain torch and float32. Every fast path is tested against it.

The mathematics is that of a stock MoE layer (vLLM's `RoutedExperts.forward_modular`, unreduced, with the routing
weights applied) on weights that the arena describes. MxMoE (arXiv:2505.05799) mixes widths per expert and per
linear block; here gate and up share one block, since their GEMM is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import silu

from .arguments import check_arguments
from .layout import FULL_PRECISION_DTYPES, Block, Field, block_shape, num_groups, read_codes, read_full_precision

#: Largest magnitude of an int8 activation; -128 is left out, so that the range is symmetric.
INT8_MAX = 127


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
) -> torch.Tensor:
    """Same arguments, result and errors as `vllm_ext.kernels.mixed_moe.mixed_moe`, on any device.

    Reads the table on the host and loops over the experts, so it is neither fast nor capturable.
    """
    check_arguments(x, topk_ids, topk_weights, arena, table, expert_map, intermediate_size, activation)
    hidden_size = x.shape[1]
    local_ids = map_to_local(topk_ids, expert_map, table.shape[0])
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, rows in enumerate(table.tolist()):
        token, slot = (local_ids == expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        routing = topk_weights[token, slot].float().unsqueeze(-1)
        inputs = x[token].float()
        if weight_on_input:
            inputs = inputs * routing
        gate_up = apply_block(inputs, arena, rows[Block.GATE_UP], Block.GATE_UP, hidden_size, intermediate_size)
        gate, up = gate_up.chunk(2, dim=-1)
        down = apply_block(silu(gate) * up, arena, rows[Block.DOWN], Block.DOWN, hidden_size, intermediate_size)
        out.index_add_(0, token, down if weight_on_input else down * routing)
    return out.to(x.dtype)


def apply_block(
    inputs: torch.Tensor, arena: torch.Tensor, row: Sequence[int], block: int, hidden_size: int, intermediate_size: int
) -> torch.Tensor:
    """One GEMM in float32: inputs [rows, K] -> [rows, N], with the block's weights and activation width."""
    N, K = block_shape(block, hidden_size, intermediate_size)
    if row[Field.ACT_BITS] == 8:
        inputs = round_activations(inputs, row[Field.GROUP_SIZE])
    return inputs @ dequantize_block(arena, row, N, K).T


def dequantize_block(arena: torch.Tensor, row: Sequence[int], N: int, K: int) -> torch.Tensor:
    """The weight [N, K] in float32 that a row of the table stands for."""
    if row[Field.LAYOUT] in FULL_PRECISION_DTYPES:
        return read_full_precision(arena, row, N, K).float()
    codes, scales, zeros = read_codes(arena, row, N, K)
    groups = scales.shape[1]
    centred = codes.view(N, groups, K // groups).float()
    centred -= 2 ** (row[Field.WEIGHT_BITS] - 1) if zeros is None else zeros.float().unsqueeze(-1)
    return (centred * scales.float().unsqueeze(-1)).view(N, K)


def round_activations(inputs: torch.Tensor, group_size: int) -> torch.Tensor:
    """Values that dynamic symmetric int8 activations stand for: one scale amax/127 per (row, group along K).

    inputs: float32 [rows, K]. A group of zeros stays zero. Ties round to even.
    """
    grouped = inputs.unflatten(-1, (num_groups(inputs.shape[-1], group_size), -1))
    scale = grouped.abs().amax(-1, keepdim=True) / INT8_MAX
    codes = torch.where(scale > 0, grouped / scale, 0.0).round().clamp(-INT8_MAX, INT8_MAX)
    return (codes * scale).flatten(-2)


def map_to_local(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_local_experts: int) -> torch.Tensor:
    """int64 row of the table for every (token, slot), -1 where there is none or it lives on another rank.

    Raises ValueError for an id, or an entry of the map, past its table: indexing there would read another
    expert's weights.
    """
    ids = topk_ids.long()
    limit = num_local_experts if expert_map is None else expert_map.numel()
    if ids.numel() and int(ids.max()) >= limit:
        raise ValueError(f"topk_ids holds {int(ids.max())}, but there are {limit} experts")
    if expert_map is not None and limit:
        ids = torch.where(ids < 0, -1, expert_map.long()[ids.clamp(min=0)])
        if ids.numel() and int(ids.max()) >= num_local_experts:
            raise ValueError(f"expert_map holds {int(ids.max())}, but the table has {num_local_experts} local experts")
    return ids
