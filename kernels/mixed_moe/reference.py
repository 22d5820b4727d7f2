# SPDX-License-Identifier: Apache-2.0
"""The specification of `vllm_ext::mixed_moe` in plain torch and float32. Every fast path is tested against it.

The mathematics is that of a stock MoE layer (vLLM's `RoutedExperts.forward_modular`, unreduced, with the routing
weights applied) on weights that the arena describes. MxMoE (arXiv:2505.05799) mixes widths per expert and per
linear block; here gate and up share one block, since their GEMM is one.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from ..mixed_linear.reference import apply_block
from .arguments import check_arguments
from .layout import Block, block_shape


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
        shape = block_shape(Block.GATE_UP, hidden_size, intermediate_size)
        gate_up = apply_block(inputs, arena, rows[Block.GATE_UP], *shape, gate_up=True)
        gate, up = gate_up.chunk(2, dim=-1)
        shape = block_shape(Block.DOWN, hidden_size, intermediate_size)
        down = apply_block(silu(gate) * up, arena, rows[Block.DOWN], *shape)
        out.index_add_(0, token, down if weight_on_input else down * routing)
    return out.to(x.dtype)


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
