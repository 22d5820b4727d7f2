# SPDX-License-Identifier: Apache-2.0
"""Random layers in the layout of the kernels, on any device: what tuning and timing programs run them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..arena import FULL_PRECISION_DTYPES, BlockFormat, Field, Layout, num_groups
from ..blocks import write_codes, write_full_precision
from ..mixed_linear.layout import NUM_ROWS, plan_linear
from ..mixed_moe.layout import Block, block_shape, plan_arena


class Moe(NamedTuple):
    """A MoE layer as the op takes it: arena uint8 and table int64 on the device."""

    arena: torch.Tensor
    table: torch.Tensor
    hidden_size: int
    intermediate_size: int


class Linear(NamedTuple):
    """A linear layer as the op takes it."""

    arena: torch.Tensor
    table: torch.Tensor
    K: int
    out_features: int


class Routing(NamedTuple):
    """x [tokens, hidden], topk_ids int32 and topk_weights float32 [tokens, top k]."""

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


def make_format(bits: int, act_bits: int = 16, group_size: int = 128) -> BlockFormat:
    """The kernels' format of a block of codes; 16 bits: a block kept in bf16."""
    if bits == 16:
        return BlockFormat.full_precision(torch.bfloat16)
    return BlockFormat(bits, act_bits, group_size, layout=Layout.GPU_FRAGMENT)


def make_moe(
    formats: Sequence[tuple[BlockFormat, BlockFormat]],
    hidden_size: int,
    intermediate_size: int,
    device: torch.device | str,
    seed: int = 0,
) -> Moe:
    """A layer of one expert for each (gate_up, down) pair of formats. Outputs are of the size of x's elements."""
    plan = plan_arena(formats, hidden_size, intermediate_size)
    arena = torch.zeros(plan.num_bytes, dtype=torch.uint8, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for pair, rows in zip(formats, plan.table.tolist(), strict=True):
        for block in Block:
            shape = block_shape(block, hidden_size, intermediate_size)
            write_random(arena, rows[block], pair[block], *shape, generator, block == Block.GATE_UP)
    return Moe(arena, plan.table.to(device), hidden_size, intermediate_size)


def make_linear(blocks: Sequence[tuple[BlockFormat, int]], K: int, device: torch.device | str, seed: int = 0) -> Linear:
    """A layer of row blocks, (format, number of outputs) each."""
    plan = plan_linear(blocks, K)
    arena = torch.zeros(plan.num_bytes, dtype=torch.uint8, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for (block, num_rows), row in zip(blocks, plan.table.tolist(), strict=True):
        write_random(arena, row[:NUM_ROWS], block, num_rows, K, generator)
    return Linear(arena, plan.table.to(device), K, sum(rows for _, rows in blocks))


def write_random(
    arena: torch.Tensor,
    row: Sequence[int],
    block: BlockFormat,
    N: int,
    K: int,
    generator: torch.Generator,
    gate_up: bool = False,
) -> None:
    """Random codes, scales and zero points at a block's place: weights of zero mean and variance 1 / K."""
    device = arena.device
    if block.layout in FULL_PRECISION_DTYPES:
        weight = torch.randn(N, K, generator=generator, device=device) / K**0.5
        write_full_precision(arena, row, weight.to(FULL_PRECISION_DTYPES[block.layout]))
        return
    bits = row[Field.WEIGHT_BITS]
    groups = num_groups(K, block.group_size)
    codes = torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8, device=device)
    # The variance of a uniform code is (4**bits - 1) / 12.
    step = (12 / ((4**bits - 1) * K)) ** 0.5
    scales = (torch.rand(N, groups, generator=generator, device=device) + 0.5).mul_(step).half()
    zeros = torch.randint(2 ** (bits - 1), 2 ** (bits - 1) + 2, (N, groups), generator=generator, device=device)
    zeros = None if block.symmetric else zeros.clamp_(max=2**bits - 1).to(torch.uint8)
    write_codes(arena, row, codes, scales, zeros, gate_up)


def make_routing(
    num_tokens: int,
    hidden_size: int,
    top_k: int,
    num_experts: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> Routing:
    """Random tokens, each with `top_k` different experts, all experts equally likely."""
    generator = torch.Generator(device=device).manual_seed(seed)
    x = torch.randn(num_tokens, hidden_size, generator=generator, device=device).to(dtype)
    scores = torch.rand(num_tokens, num_experts, generator=generator, device=device)
    weights, ids = scores.softmax(-1).topk(top_k)
    return Routing(x, ids.int(), weights.float())
