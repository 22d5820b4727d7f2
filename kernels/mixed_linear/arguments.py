# SPDX-License-Identifier: Apache-2.0
"""Checks shared by every implementation of `vllm_ext::mixed_linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..act_quant.reference import ACTIVATION_DTYPES
from .layout import NUM_COLUMNS, NUM_ROWS


def check_arguments(
    x: torch.Tensor, arena: torch.Tensor, table: torch.Tensor, out_features: int, bias: torch.Tensor | None
) -> None:
    """Raise ValueError, naming the argument and its value. Metadata only: no device is read."""
    if x.dim() == 0 or x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"x must be [..., K] in bf16, fp16 or fp32, got {_describe(x)}")
    if x.shape[-1] == 0:
        raise ValueError(f"K must be positive, got x {_describe(x)}")
    if arena.dim() != 1 or arena.dtype != torch.uint8:
        raise ValueError(f"arena must be uint8 [bytes], got {_describe(arena)}")
    if table.dim() != 2 or table.shape[1] != NUM_COLUMNS or table.dtype != torch.int64:
        raise ValueError(f"table must be int64 [row blocks, {NUM_COLUMNS}], got {_describe(table)}")
    if out_features <= 0:
        raise ValueError(f"out_features must be positive, got {out_features}")
    if bias is not None and (bias.shape != (out_features,) or not bias.dtype.is_floating_point):
        raise ValueError(f"bias must be float [{out_features}], got {_describe(bias)}")


def check_rows(rows: Sequence[Sequence[int]], out_features: int) -> None:
    """Raise ValueError where the table, read on the host, does not describe `out_features` outputs."""
    for row in rows:
        if row[NUM_ROWS] <= 0:
            raise ValueError(f"the number of outputs of a row block must be positive, got {row[NUM_ROWS]}")
    total = sum(row[NUM_ROWS] for row in rows)
    if total != out_features:
        raise ValueError(f"out_features is {out_features}, but the table describes {total} outputs")


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
