# SPDX-License-Identifier: Apache-2.0
"""Random layers of mixed formats, and the MoE formula once more as a naive loop in float64.

The loop shares no code with the kernels: it goes token by token, and takes the weights from what was written,
never from the arena.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_ext.kernels.arena import FULL_PRECISION_DTYPES, BlockFormat, Layout, num_groups
from vllm_ext.kernels.blocks import write_codes, write_full_precision
from vllm_ext.kernels.mixed_moe.layout import Block, block_shape, plan_arena

#: (hidden, intermediate) that no kernel tile divides.
ODD_SHAPES = ((64, 32), (136, 40), (8, 24), (192, 128))


@dataclass
class Layer:
    """A written arena, and beside it the float64 weights of every expert: weights[expert][block] is [N, K]."""

    arena: torch.Tensor
    table: torch.Tensor
    formats: list[tuple[BlockFormat, BlockFormat]]
    weights: list[list[np.ndarray]]
    hidden_size: int
    intermediate_size: int


@dataclass
class Inputs:
    """What a router hands to the experts."""

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


def make_layer(
    formats: list[tuple[BlockFormat, BlockFormat]], hidden_size: int, intermediate_size: int, seed: int = 0
) -> Layer:
    """Write random codes, scales and zero points of the full range into an arena that was full of other bytes."""
    generator = torch.Generator().manual_seed(seed)
    plan = plan_arena(formats, hidden_size, intermediate_size)
    arena = torch.full((plan.num_bytes,), 0xA5, dtype=torch.uint8)
    weights: list[list[np.ndarray]] = []
    for pair, rows in zip(formats, plan.table.tolist(), strict=True):
        weights.append([])
        for block, block_format in zip(Block, pair, strict=True):
            N, K = block_shape(block, hidden_size, intermediate_size)
            bits = block_format.weight_bits
            if block_format.layout in FULL_PRECISION_DTYPES:
                dtype = FULL_PRECISION_DTYPES[block_format.layout]
                weight = (torch.randn(N, K, generator=generator) / K**0.5).to(dtype)
                write_full_precision(arena, rows[block], weight)
                weights[-1].append(weight.double().numpy())
                continue
            groups = num_groups(K, block_format.group_size)
            lowest = 1 if block_format.layout == Layout.PLAIN_TERNARY else 0
            codes = torch.randint(lowest, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
            scales = torch.rand(N, groups, generator=generator).add(0.5).div(2 ** (bits - 2) * K**0.5).half()
            zeros = torch.randint(0, 2**bits, (N, groups), generator=generator, dtype=torch.uint8)
            if block_format.symmetric:
                zeros.fill_(2 ** (bits - 1))
            written = None if block_format.symmetric else zeros
            write_codes(arena, rows[block], codes, scales, written, gate_up=block == Block.GATE_UP)
            step, zero = (t.double().numpy().repeat(K // groups, axis=1) for t in (scales, zeros))
            weights[-1].append(step * (codes.double().numpy() - zero))
    return Layer(arena, plan.table, formats, weights, hidden_size, intermediate_size)


def make_inputs(
    num_tokens: int, hidden_size: int, top_k: int, num_experts: int, dtype: torch.dtype, seed: int = 0
) -> Inputs:
    """Random tokens; about one id in eight is -1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
    ids = torch.randint(0, num_experts, (num_tokens, top_k), generator=generator, dtype=torch.int32)
    absent = torch.rand(num_tokens, top_k, generator=generator) < 1 / 8
    weights = torch.rand(num_tokens, top_k, generator=generator) + 0.1
    return Inputs(x, ids.masked_fill(absent, -1), weights)


def naive_moe(
    layer: Layer, inputs: Inputs, expert_map: Sequence[int] | None = None, weight_on_input: bool = False
) -> torch.Tensor:
    """float64 [tokens, hidden], one token and one expert at a time."""
    x = inputs.x.double().numpy()
    out = np.zeros_like(x)
    for token, (ids, routing) in enumerate(zip(inputs.topk_ids.tolist(), inputs.topk_weights.tolist(), strict=True)):
        for global_id, weight in zip(ids, routing, strict=True):
            expert = global_id if expert_map is None or global_id < 0 else expert_map[global_id]
            if expert < 0:
                continue
            gate_up_format, down_format = layer.formats[expert]
            gate_up_weight, down_weight = layer.weights[expert]
            vector = x[token] * weight if weight_on_input else x[token]
            gate_up = gate_up_weight @ naive_round(vector, gate_up_format)
            gate, up = gate_up[: layer.intermediate_size], gate_up[layer.intermediate_size :]
            down = down_weight @ naive_round(gate / (1 + np.exp(-gate)) * up, down_format)
            out[token] += down if weight_on_input else down * weight
    return torch.from_numpy(out)


def naive_round(vector: np.ndarray, block_format: BlockFormat) -> np.ndarray:
    """int8 activations of one token: every group by its own largest magnitude."""
    if block_format.act_bits == 16:
        return vector
    size = len(vector) if block_format.group_size == -1 else block_format.group_size
    rounded = vector.copy()
    for start in range(0, len(vector), size):
        group = vector[start : start + size]
        scale = np.abs(group).max() / 127
        if scale > 0:
            rounded[start : start + size] = np.rint(group / scale) * scale
    return rounded
