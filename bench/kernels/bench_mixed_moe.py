# SPDX-License-Identifier: Apache-2.0
"""`vllm_ext::mixed_moe` beside a bf16 loop over the same experts, in one run.

    pytest --benchmark-only bench/kernels -o python_files='bench_*.py'

Only the ratio inside one run means something on a shared machine. The loop does the GEMMs a bf16 layer cannot
avoid; it is a yardstick, not vLLM's own kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import linear, silu

from vllm_ext.compress.rounding import round_to_nearest
from vllm_ext.kernels.arena import BlockFormat, write_codes
from vllm_ext.kernels.mixed_moe import mixed_moe
from vllm_ext.kernels.mixed_moe.layout import Block, plan_arena
from vllm_ext.quantization.scheme import Scheme

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 1024, 512, 16, 2
SCHEMES = (Scheme.parse("w4a16_g128"), Scheme.parse("w3a16_g128"))


class Layer(NamedTuple):
    """One MoE layer twice: bf16 weights by `Block`, and the arena with its table."""

    weights: tuple[torch.Tensor, torch.Tensor]
    arena: torch.Tensor
    table: torch.Tensor


@pytest.fixture(scope="module")
def layer() -> Layer:
    generator = torch.Generator().manual_seed(0)
    shapes = {Block.GATE_UP: (2 * INTERMEDIATE, HIDDEN), Block.DOWN: (HIDDEN, INTERMEDIATE)}
    weights = tuple(
        (torch.randn(EXPERTS, *shapes[block], generator=generator) / shapes[block][1] ** 0.5).bfloat16()
        for block in Block
    )
    schemes = [SCHEMES[expert % 2] for expert in range(EXPERTS)]
    formats = [BlockFormat(scheme.weight_bits, scheme.act_bits, scheme.group_size, False) for scheme in schemes]
    plan = plan_arena([(block_format, block_format) for block_format in formats], HIDDEN, INTERMEDIATE)
    arena = torch.zeros(plan.num_bytes, dtype=torch.uint8)
    for expert, rows in enumerate(plan.table.tolist()):
        for block in Block:
            write_codes(arena, rows[block], *round_to_nearest(weights[block][expert], schemes[expert]))
    return Layer((weights[0], weights[1]), arena, plan.table)


def route(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x bf16 [tokens, hidden], topk_ids int32 and topk_weights float32 [tokens, top k]."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    topk_weights, topk_ids = torch.randn(tokens, EXPERTS, generator=generator).softmax(-1).topk(TOP_K)
    return x, topk_ids.int(), topk_weights


def run_bf16_loop(layer: Layer, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape)
    for expert in range(EXPERTS):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        if token.numel():
            gate, up = linear(x[token], layer.weights[Block.GATE_UP][expert]).chunk(2, -1)
            down = linear(silu(gate) * up, layer.weights[Block.DOWN][expert])
            out.index_add_(0, token, down.float() * topk_weights[token, slot].unsqueeze(-1))
    return out.to(x.dtype)


def run_mixed_moe(layer: Layer, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    return mixed_moe(x, topk_ids, topk_weights, layer.arena, layer.table, None, INTERMEDIATE)


@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("arm", [run_bf16_loop, run_mixed_moe], ids=["bf16_loop", "mixed_moe"])
def bench_moe_layer(benchmark: Any, layer: Layer, arm: Callable[..., torch.Tensor], tokens: int) -> None:
    benchmark.group = f"moe H{HIDDEN} I{INTERMEDIATE} E{EXPERTS} top{TOP_K}, {tokens} tokens"
    inputs = route(tokens)
    benchmark(arm, layer, *inputs)
