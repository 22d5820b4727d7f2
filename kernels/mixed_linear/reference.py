# SPDX-License-Identifier: Apache-2.0
"""The specification of `vllm_ext::mixed_linear` in plain torch and float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..act_quant.reference import round_activations
from ..arena import Field
from ..blocks import dequantize_block
from .arguments import check_arguments, check_rows
from .layout import NUM_ROWS


def mixed_linear(
    x: torch.Tensor, arena: torch.Tensor, table: torch.Tensor, out_features: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """Same arguments, result and errors as `vllm_ext.kernels.mixed_linear.mixed_linear`, on any device.

    Reads the table on the host, so it is not capturable.
    """
    check_arguments(x, arena, table, out_features, bias)
    rows = table.tolist()
    check_rows(rows, out_features)
    inputs = x.reshape(-1, x.shape[-1]).float()
    out = torch.cat([apply_block(inputs, arena, row, row[NUM_ROWS], x.shape[-1]) for row in rows], dim=-1)
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def apply_block(
    inputs: torch.Tensor, arena: torch.Tensor, row: Sequence[int], N: int, K: int, gate_up: bool = False
) -> torch.Tensor:
    """One GEMM in float32: inputs [tokens, K] -> [tokens, N], with a table row's weight and activation width.

    gate_up: as in `arena.section_bytes`.
    """
    if row[Field.ACT_BITS] == 8:
        inputs = round_activations(inputs, row[Field.GROUP_SIZE])
    return inputs @ dequantize_block(arena, row, N, K, gate_up).T
