# SPDX-License-Identifier: Apache-2.0
"""`vllm_ext::mixed_linear` on the CPU: cpu.cpp where the weights are CPU_RECORD and x is bf16 or fp16; else one
dequantize and one GEMM per row block, no Python loop over tokens.

The C++ operators that vLLM and torch bring for packed weights are not used: those that scale per group round
activations per token (`int4_scaled_mm_cpu`) or keep scales in bf16 (`_weight_int4pack_mm_for_cpu`), which is another
function, and all of them want the weight in a layout of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from ..act_quant.reference import round_activations
from ..arena import Field, Layout
from ..blocks import dequantize_block
from ..native.load import find_ops, load_ops
from .arguments import check_arguments, check_rows
from .layout import NUM_ROWS


def mixed_linear(
    x: torch.Tensor, arena: torch.Tensor, table: torch.Tensor, out_features: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """Same arguments, result and errors as `vllm_ext.kernels.mixed_linear.mixed_linear`.

    Differs from the reference as `apply_block` says; in the compiled kernels 16-bit activations are two int8 planes,
    whose error is that of rounding the output to bf16.
    """
    # The kernels check their arguments, and whether the table is theirs.
    if (ops := find_kernels(table)) is not None:
        out = ops.mixed_linear(x, arena, table, out_features, bias)
        if out is not None:
            return out
    check_arguments(x, arena, table, out_features, bias)
    rows = table.tolist()
    check_rows(rows, out_features)
    inputs = x.reshape(-1, x.shape[-1])
    parts = [apply_block(inputs, arena, row, row[NUM_ROWS], x.shape[-1], x.dtype) for row in rows]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def find_kernels(table: torch.Tensor) -> Any | None:
    """The compiled operators: where they are loaded, or where some row of a table [..., fields] is CPU_RECORD and they
    can be loaded now. Once they are loaded, they look at the table themselves, in less time."""
    ops = find_ops()
    # A malformed table is named by `check_arguments`, which comes after.
    has_layout = table.dim() > 1 and table.shape[-1] > Field.LAYOUT and table.numel() > 0
    if ops is None and has_layout and int(table[..., Field.LAYOUT].max()) == Layout.CPU_RECORD:
        ops = load_ops()
    return ops


def apply_block(
    inputs: torch.Tensor,
    arena: torch.Tensor,
    row: Sequence[int],
    N: int,
    K: int,
    dtype: torch.dtype,
    gate_up: bool = False,
) -> torch.Tensor:
    """inputs [tokens, K] -> float32 [tokens, N], with a table row's weight and activation width.

    dtype: that of x. Where it is bf16 and the activations are 16-bit, the GEMM runs in bf16 (the CPU's matrix
    unit) with float32 accumulation; otherwise in float32. gate_up: as in `arena.section_bytes`.
    """
    weight = _dequantize(arena, row, N, K, gate_up)
    if row[Field.ACT_BITS] == 8:
        return linear(round_activations(inputs.float(), row[Field.GROUP_SIZE]), weight)
    if dtype == torch.bfloat16:
        return linear(inputs.to(dtype), weight.to(dtype)).float()
    # float16 GEMMs are emulated on most CPUs; float32 is faster and closer to the reference.
    return linear(inputs.float(), weight)


def _dequantize(arena: torch.Tensor, row: Sequence[int], N: int, K: int, gate_up: bool) -> torch.Tensor:
    ops = find_ops() if row[Field.LAYOUT] == Layout.CPU_RECORD else None
    if ops is None:
        return dequantize_block(arena, row, N, K, gate_up)
    widths = row[Field.WEIGHT_BITS], row[Field.GROUP_SIZE]
    return ops.dequantize_block(arena, row[Field.CODES_OFFSET], *widths, N, K, gate_up)
