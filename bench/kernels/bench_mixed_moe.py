# SPDX-License-Identifier: Apache-2.0
"""`vllm_ext::mixed_moe` beside a bf16 loop over the same experts, in one run.

    pytest --benchmark-only bench/kernels -o python_files='bench_*.py' -o python_functions='bench_*'
    python -m bench.op mixed_moe_1

Only the ratio inside one run means something on a shared machine. The loop does the GEMMs a bf16 layer cannot
avoid; it is a yardstick, not vLLM's own kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import linear, silu

from bench.kernels.conftest import Gated
from bench.op import OpCase
from vllm_ext.compress.rounding import round_to_nearest
from vllm_ext.kernels.arena import BlockFormat
from vllm_ext.kernels.blocks import write_codes
from vllm_ext.kernels.mixed_moe import mixed_moe
from vllm_ext.kernels.mixed_moe.layout import ArenaPlan, Block, plan_arena
from vllm_ext.quantization.scheme import Scheme

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 1024, 512, 16, 2
SCHEMES = (Scheme.parse("w4a16_g128"), Scheme.parse("w3a16_g128"))
TOKENS = (1, 16, 64)
#: Copies of the layer that calls go through, so that neither arm finds its weights in a cache.
LAYERS = 12


class Layer(NamedTuple):
    """One MoE layer twice: bf16 weights by `Block`, and the arena with its table."""

    weights: tuple[torch.Tensor, torch.Tensor]
    arena: torch.Tensor
    table: torch.Tensor


class Inputs(NamedTuple):
    """What one call computes: a layer, x bf16 [tokens, hidden], topk_ids int32 and topk_weights float32."""

    layer: Layer
    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


def choose_schemes() -> list[Scheme]:
    """The schemes by turns, one for each expert."""
    return [SCHEMES[expert % len(SCHEMES)] for expert in range(EXPERTS)]


def plan_layer() -> ArenaPlan:
    """Where the packed experts lie."""
    formats = [BlockFormat(scheme.code_bits, scheme.act_bits, scheme.group_size, False) for scheme in choose_schemes()]
    return plan_arena([(block_format, block_format) for block_format in formats], HIDDEN, INTERMEDIATE)


@cache
def make_layers() -> tuple[Layer, ...]:
    """LAYERS times the same layer, each in memory of its own."""
    generator = torch.Generator().manual_seed(0)
    shapes = {Block.GATE_UP: (2 * INTERMEDIATE, HIDDEN), Block.DOWN: (HIDDEN, INTERMEDIATE)}
    gate_up, down = (
        (torch.randn(EXPERTS, *shapes[block], generator=generator) / shapes[block][1] ** 0.5).bfloat16()
        for block in Block
    )
    schemes, plan = choose_schemes(), plan_layer()
    arena = torch.zeros(plan.num_bytes, dtype=torch.uint8)
    for expert, rows in enumerate(plan.table.tolist()):
        for block, weight in ((Block.GATE_UP, gate_up), (Block.DOWN, down)):
            write_codes(arena, rows[block], *round_to_nearest(weight[expert], schemes[expert]))
    return tuple(Layer((gate_up.clone(), down.clone()), arena.clone(), plan.table) for _ in range(LAYERS))


def make_inputs(tokens: int) -> Callable[[int], Inputs]:
    """Input set i: another copy of the layer, other tokens, other experts."""

    def make(index: int) -> Inputs:
        generator = torch.Generator().manual_seed(1000 * tokens + index)
        x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
        topk_weights, topk_ids = torch.randn(tokens, EXPERTS, generator=generator).softmax(-1).topk(TOP_K)
        layers = make_layers()
        return Inputs(layers[index % len(layers)], x, topk_ids.int(), topk_weights)

    return make


def run_bf16_loop(inputs: Inputs) -> torch.Tensor:
    """Gather, two GEMMs and a weighted scatter per expert, in bf16."""
    layer, x, topk_ids, topk_weights = inputs
    out = torch.zeros(x.shape)
    for expert in range(EXPERTS):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        if token.numel():
            gate, up = linear(x[token], layer.weights[Block.GATE_UP][expert]).chunk(2, -1)
            down = linear(silu(gate) * up, layer.weights[Block.DOWN][expert])
            out.index_add_(0, token, down.float() * topk_weights[token, slot].unsqueeze(-1))
    return out.to(x.dtype)


def run_mixed_moe(inputs: Inputs) -> torch.Tensor:
    """The pack's operator."""
    layer, x, topk_ids, topk_weights = inputs
    return mixed_moe(x, topk_ids, topk_weights, layer.arena, layer.table, None, INTERMEDIATE)


def op_cases() -> list[OpCase]:
    """The layer at a few batch sizes."""
    # The part of the experts that a batch of random tokens uses.
    active = [1 - (1 - TOP_K / EXPERTS) ** tokens for tokens in TOKENS]
    bf16_bytes = 2 * EXPERTS * 3 * INTERMEDIATE * HIDDEN
    packed_bytes = plan_layer().num_bytes
    return [
        OpCase(
            case=f"mixed_moe_{tokens}",
            arms={"bf16_loop": run_bf16_loop, "mixed_moe": run_mixed_moe},
            make_inputs=make_inputs(tokens),
            working_set_bytes={
                "bf16_loop": round(bf16_bytes * part),
                "mixed_moe": round(packed_bytes * part),
            },
            stock="bf16_loop",
            settings={
                "tokens": tokens,
                "hidden": HIDDEN,
                "intermediate": INTERMEDIATE,
                "experts": EXPERTS,
                "top_k": TOP_K,
                "schemes": [str(scheme) for scheme in SCHEMES],
            },
        )
        for tokens, part in zip(TOKENS, active, strict=True)
    ]


@pytest.mark.parametrize("tokens", TOKENS)
def bench_mixed_moe(gated: Gated, tokens: int) -> None:
    """Against the bf16 loop."""
    gated(run_mixed_moe, run_bf16_loop, make_inputs(tokens))
