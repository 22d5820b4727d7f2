# SPDX-License-Identifier: Apache-2.0
"""`vllm_ext::mixed_moe` beside vLLM's own MoE operators of this CPU, at the sizes of real models, weights cold.

    python -m bench.op --bind-threads 'cpu_moe_*'

Without the binding that vLLM's workers have, two OpenMP runtimes are loaded, the idle threads of one spin on the cores
of the other, and no arm's time means anything.

Arms, call by call in turn:

    bf16         `cpu_fused_moe` with the instruction set that vLLM itself chooses here
    int4         `fused_experts_cpu` with INT4_W4A8; without AMX vLLM does not select it, but the operator runs
    w2a8 ...     one width in all experts, groups of 128
    mixed_a16    experts of 2, 3 and 4 bits with 16-bit activations: 2.7 code bits on average

Every arm has copies of the layer worth 1.5 GB and goes through all of them before it comes back to the first. Routing
is skewed (zipf 0.7); at one token it goes through all experts of a copy in turn, then to the next copy. Weights are
random: this is speed only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.op import OpCase
from vllm_ext.kernels.arena import BlockFormat, Layout
from vllm_ext.kernels.blocks import write_codes
from vllm_ext.kernels.mixed_moe import mixed_moe
from vllm_ext.kernels.mixed_moe.layout import Block, block_shape, plan_arena
from vllm_ext.kernels.native.load import load_ops

#: Copies of the layer, in bytes, that the calls of one arm can go through.
COLD_BYTES = 1_500_000_000
TOKENS = (1, 4, 16, 64, 256)
#: Routings that are looked at to say how many experts a call touches.
SAMPLED_ROUTINGS = 16
#: Exponent of the experts' popularity.
SKEW = 0.7
GROUP_SIZE = 128


class Shape(NamedTuple):
    """Sizes of one MoE layer."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.intermediate


SHAPES = (
    Shape("e60", 2048, 1408, 60, 4),
    Shape("e128", 2048, 768, 128, 8),
)

#: Weight bits of consecutive experts, and activation bits, of our arms.
WIDTHS: dict[str, tuple[tuple[int, ...], int]] = {
    "w2a8": ((2,), 8),
    "w3a8": ((3,), 8),
    "w4a8": ((4,), 8),
    "mixed_a16": ((2, 3, 2, 3, 2, 4, 2, 3, 2, 3, 4, 2, 3, 2, 3, 2, 3, 2, 4, 3), 16),
}


class Inputs(NamedTuple):
    """Number of the copy, x bf16 [tokens, hidden], topk_ids int32 and topk_weights float32 [tokens, top k]."""

    copy: int
    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


Arm = Callable[[Inputs], torch.Tensor]


def route(shape: Shape, tokens: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(topk_ids, topk_weights) of input set `index`."""
    generator = np.random.default_rng(1000 * tokens + index)
    if tokens == 1:
        first = index * shape.top_k
        ids = np.arange(first, first + shape.top_k)[None] % shape.experts
    else:
        popularity = np.arange(1, shape.experts + 1) ** -SKEW
        popularity /= popularity.sum()
        order = generator.permutation(shape.experts)
        drawn = [generator.choice(shape.experts, shape.top_k, replace=False, p=popularity) for _ in range(tokens)]
        ids = order[np.stack(drawn)]
    weights = generator.random((tokens, shape.top_k), dtype=np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    return torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(weights)


def make_inputs(shape: Shape, tokens: int) -> Callable[[int], Inputs]:
    """Input set i: other tokens, other experts, another copy of the layer."""

    def make(index: int) -> Inputs:
        generator = torch.Generator().manual_seed(index)
        x = (torch.randn(tokens, shape.hidden, generator=generator) / 2).bfloat16()
        # All experts of one copy come before the next copy: taken by turns, both could repeat long before all met.
        turns = math.ceil(shape.experts / shape.top_k) if tokens == 1 else 1
        return Inputs(index // turns, x, *route(shape, tokens, index))

    return make


def make_bf16_arm(shape: Shape) -> Arm:
    """vLLM's bf16 operator, with its weights repacked as vLLM does."""
    from vllm import _custom_ops as ops

    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    layers = []
    for copy in range(math.ceil(COLD_BYTES / (2 * shape.experts * shape.expert_weights))):
        generator = torch.Generator().manual_seed(copy)
        weights = []
        for N, K in (block_shape(block, shape.hidden, shape.intermediate) for block in Block):
            codes = torch.randint(-100, 100, (shape.experts, N, K), generator=generator, dtype=torch.int8)
            weights.append(ops.cpu_prepack_moe_weight(codes.bfloat16().mul_(5e-4), isa))
        layers.append(tuple(weights))

    def run(inputs: Inputs) -> torch.Tensor:
        out = torch.empty_like(inputs.x)
        weights = layers[inputs.copy % len(layers)]
        ops.cpu_fused_moe(out, inputs.x, *weights, None, None, inputs.topk_weights, inputs.topk_ids, "silu", isa, False)
        return out

    return run


def make_int4_arm(shape: Shape) -> Arm:
    """vLLM's 4-bit operator, asymmetric groups of 128 in the form of a GPTQ checkpoint."""
    from vllm import _custom_ops as ops

    packed = []
    generator = torch.Generator().manual_seed(0)
    for block in Block:
        N, K = block_shape(block, shape.hidden, shape.intermediate)
        experts, groups = shape.experts, K // GROUP_SIZE
        codes = torch.randint(-(2**31), 2**31 - 1, (experts, K // 8, N), generator=generator).int()
        scales = (torch.rand(experts, groups, N, generator=generator) * 1e-2).bfloat16()
        zeros = torch.full((experts, groups, N // 8), 0x77777777, dtype=torch.int32)
        weight, zeros, scales = ops.convert_weight_packed_scale_zp(codes, zeros, scales, ops.CPUQuantAlgo.GPTQ)
        packed.append((weight, scales, zeros))
    num_bytes = sum(tensor.nbytes for tensors in packed for tensor in tensors)
    layers = [
        [[tensor.clone() for tensor in tensors] for tensors in packed] for _ in range(math.ceil(COLD_BYTES / num_bytes))
    ]

    def run(inputs: Inputs) -> torch.Tensor:
        out = torch.empty_like(inputs.x)
        (w1, s1, z1), (w2, s2, z2) = layers[inputs.copy % len(layers)]
        method = ops.CPUQuantMethod.INT4_W4A8
        routing = inputs.topk_weights, inputs.topk_ids
        ops.fused_experts_cpu(out, inputs.x, w1, w2, *routing, method, s1, s2, z1, z2, None)
        return out

    return run


def plan_arm(shape: Shape, arm: str) -> tuple[torch.Tensor, int]:
    """(table, bytes of the arena) of one of our arms."""
    widths, act_bits = WIDTHS[arm]
    formats = [
        (BlockFormat(widths[expert % len(widths)], act_bits, GROUP_SIZE, layout=Layout.CPU_RECORD),) * 2
        for expert in range(shape.experts)
    ]
    plan = plan_arena(formats, shape.hidden, shape.intermediate)
    return plan.table, plan.num_bytes


def make_mixed_arm(shape: Shape, arm: str) -> Arm:
    """Our operator on arenas as a served model has them. Raises RuntimeError where the kernels cannot be had."""
    ops = load_ops()
    if ops is None:
        raise RuntimeError("the CPU kernels are not compiled; see the warning above")
    table, num_bytes = plan_arm(shape, arm)
    generator = torch.Generator().manual_seed(0)
    first = ops.empty_huge(num_bytes)
    for rows in table.tolist():
        for block in Block:
            N, K = block_shape(block, shape.hidden, shape.intermediate)
            bits = rows[block][0]
            codes = torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
            scales = torch.full((N, K // GROUP_SIZE), 0.06 / (2**bits - 1)).half()
            zeros = torch.full((N, K // GROUP_SIZE), 2 ** (bits - 1), dtype=torch.uint8)
            write_codes(first, rows[block], codes, scales, zeros, gate_up=block == Block.GATE_UP)
    arenas = [first]
    while len(arenas) * num_bytes < COLD_BYTES:
        arenas.append(ops.empty_huge(num_bytes))
        arenas[-1].copy_(first)

    def run(inputs: Inputs) -> torch.Tensor:
        arena = arenas[inputs.copy % len(arenas)]
        return mixed_moe(inputs.x, inputs.topk_ids, inputs.topk_weights, arena, table, None, shape.intermediate)

    return run


@lru_cache(maxsize=1)
def make_arms(shape: Shape) -> dict[str, Arm]:
    """All arms of one shape; those of another are dropped first, for all together hold eight gigabytes."""
    # The cache itself would drop them only once the new ones are made.
    make_arms.cache_clear()
    arms = {"bf16": make_bf16_arm(shape), "int4": make_int4_arm(shape)}
    return arms | {arm: make_mixed_arm(shape, arm) for arm in WIDTHS}


def delay(shape: Shape, arm: str) -> Arm:
    """The arm, whose weights are made by its first call: listing the cases must not take gigabytes."""
    return lambda inputs: make_arms(shape)[arm](inputs)


def count_expert_bytes(shape: Shape, arm: str) -> float:
    """Bytes of one expert, on average."""
    if arm == "bf16":
        return 2.0 * shape.expert_weights
    if arm == "int4":
        return shape.expert_weights * (0.5 + 2.5 / GROUP_SIZE)
    return plan_arm(shape, arm)[1] / shape.experts


def describe_kernels() -> dict[str, str]:
    """The instruction set that our operators use here. Raises RuntimeError where they cannot be had."""
    ops = load_ops()
    if ops is None:
        raise RuntimeError("the CPU kernels are not compiled; see the warning above")
    return {"cpu_kernels": ops.isa()}


def make_case(shape: Shape, tokens: int) -> OpCase:
    """One layer at one batch size."""
    touched = [route(shape, tokens, index)[0].unique().numel() for index in range(SAMPLED_ROUTINGS)]
    unique = sum(touched) / len(touched)
    settings: dict[str, Any] = {**shape._asdict(), "tokens": tokens, "unique_experts": unique, "skew": SKEW}
    settings |= {"series": f"cpu_moe_{shape.name}", "series_by": "tokens"}
    arms = ("bf16", "int4", *WIDTHS)
    return OpCase(
        case=f"cpu_moe_{shape.name}_{tokens}",
        arms={arm: delay(shape, arm) for arm in arms},
        make_inputs=make_inputs(shape, tokens),
        working_set_bytes={arm: round(unique * count_expert_bytes(shape, arm)) for arm in arms},
        stock="bf16",
        cold_bytes=COLD_BYTES,
        settings=settings,
        features=describe_kernels,
    )


def op_cases() -> list[OpCase]:
    """Both shapes at all batch sizes."""
    return [make_case(shape, tokens) for shape in SHAPES for tokens in TOKENS]
