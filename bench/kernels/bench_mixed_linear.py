# SPDX-License-Identifier: Apache-2.0
"""`vllm_ext::mixed_linear` at one and two rows beside a plain read of as many bytes: how near it is to memory speed.

    python -m bench.op --bind-threads 'cpu_gemv_*'

The arm `read` adds up the same arenas as 64-bit integers in torch. Weights are random, in 2 MiB pages and cold.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from bench.op import OpCase
from vllm_ext.kernels.arena import BlockFormat, Layout
from vllm_ext.kernels.blocks import write_codes
from vllm_ext.kernels.mixed_linear import mixed_linear
from vllm_ext.kernels.mixed_linear.layout import plan_linear
from vllm_ext.kernels.native.load import load_ops

#: Outputs and inputs of the layer: large, so that the cost of a call does not count.
OUT_FEATURES, IN_FEATURES = 131072, 2048
COLD_BYTES = 1_500_000_000
GROUP_SIZE = 128
WIDTHS = (2, 3, 4, 8)
ROWS = (1, 2)


class Inputs(NamedTuple):
    """An arena, and x bf16 [rows, IN_FEATURES]."""

    arena: torch.Tensor
    x: torch.Tensor


def plan_layer(bits: int, act_bits: int = 16) -> tuple[torch.Tensor, int]:
    """(table, bytes of the arena)."""
    block = BlockFormat(bits, act_bits, GROUP_SIZE, layout=Layout.CPU_RECORD)
    plan = plan_linear([(block, OUT_FEATURES)], IN_FEATURES)
    return plan.table, plan.num_bytes


@lru_cache(maxsize=1)
def make_arenas(bits: int) -> list[torch.Tensor]:
    """Copies of the layer worth COLD_BYTES; those of another width are dropped.

    Raises RuntimeError where the kernels cannot be had.
    """
    ops = load_ops()
    if ops is None:
        raise RuntimeError("the CPU kernels are not compiled; see the warning above")
    table, num_bytes = plan_layer(bits)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (OUT_FEATURES, IN_FEATURES), generator=generator, dtype=torch.uint8)
    scales = torch.full((OUT_FEATURES, IN_FEATURES // GROUP_SIZE), 0.06 / (2**bits - 1)).half()
    first = ops.empty_huge(num_bytes)
    write_codes(first, table[0].tolist(), codes, scales, None)
    arenas = [first]
    while len(arenas) * num_bytes < COLD_BYTES:
        arenas.append(ops.empty_huge(num_bytes))
        arenas[-1].copy_(first)
    return arenas


def make_inputs(bits: int, rows: int) -> Callable[[int], Inputs]:
    """Input set i: another copy of the layer, another x."""

    def make(index: int) -> Inputs:
        arenas = make_arenas(bits)
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(rows, IN_FEATURES, generator=generator).bfloat16()
        return Inputs(arenas[index % len(arenas)], x)

    return make


def run_linear(bits: int, act_bits: int) -> Callable[[Inputs], torch.Tensor]:
    """Our operator."""
    table, _ = plan_layer(bits, act_bits)
    return lambda inputs: mixed_linear(inputs.x, inputs.arena, table, OUT_FEATURES)


def read_arena(inputs: Inputs) -> torch.Tensor:
    """Every byte once, and as little else as possible."""
    return inputs.arena.view(torch.int64).sum()


def describe_kernels() -> dict[str, str]:
    """The instruction set that our operator uses here. Raises RuntimeError where it cannot be had."""
    ops = load_ops()
    if ops is None:
        raise RuntimeError("the CPU kernels are not compiled; see the warning above")
    return {"cpu_kernels": ops.isa()}


def op_cases() -> list[OpCase]:
    """Widths at one and two rows."""
    return [
        OpCase(
            case=f"cpu_gemv_w{bits}_{rows}",
            arms={"read": read_arena, "a8": run_linear(bits, 8), "a16": run_linear(bits, 16)},
            make_inputs=make_inputs(bits, rows),
            working_set_bytes=plan_layer(bits)[1],
            stock="read",
            ceiling="read",
            features=describe_kernels,
            cold_bytes=COLD_BYTES,
            settings={
                "bits": bits,
                "rows": rows,
                "out_features": OUT_FEATURES,
                "in_features": IN_FEATURES,
                "series": f"cpu_gemv_{rows}",
                "series_by": "bits",
            },
        )
        for bits in WIDTHS
        for rows in ROWS
    ]
