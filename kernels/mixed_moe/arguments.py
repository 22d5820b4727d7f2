# SPDX-License-Identifier: Apache-2.0
"""Checks shared by every implementation of `vllm_ext::mixed_moe`. Metadata only: no device is read."""

from __future__ import annotations

import torch

from ..act_quant.reference import ACTIVATION_DTYPES
from ..arena import NUM_FIELDS
from .layout import Block

#: Gated activations between the two blocks; "silu" is SwiGLU, silu(gate) * up.
ACTIVATIONS = ("silu",)


def check_arguments(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    expert_map: torch.Tensor | None,
    intermediate_size: int,
    activation: str,
) -> None:
    """Raise ValueError, naming the argument and its value, for what no implementation can compute."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation {activation!r} is not supported by mixed_moe; supported: {', '.join(ACTIVATIONS)}"
        )
    if x.dim() != 2 or x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"x must be [tokens, hidden] in bf16, fp16 or fp32, got {_describe(x)}")
    if x.shape[1] == 0:
        raise ValueError(f"hidden size must be positive, got x {_describe(x)}")
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0] or not _is_integer(topk_ids):
        raise ValueError(f"topk_ids must be int [{x.shape[0]}, top k], got {_describe(topk_ids)}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights must have the shape of topk_ids {list(topk_ids.shape)}, got {_describe(topk_weights)}"
        )
    if arena.dim() != 1 or arena.dtype != torch.uint8:
        raise ValueError(f"arena must be uint8 [bytes], got {_describe(arena)}")
    if table.dim() != 3 or table.shape[1:] != (len(Block), NUM_FIELDS) or table.dtype != torch.int64:
        raise ValueError(f"table must be int64 [local experts, {len(Block)}, {NUM_FIELDS}], got {_describe(table)}")
    if expert_map is not None and (expert_map.dim() != 1 or not _is_integer(expert_map)):
        raise ValueError(f"expert_map must be int [global experts], got {_describe(expert_map)}")
    if intermediate_size <= 0:
        raise ValueError(f"intermediate_size must be positive, got {intermediate_size}")


def _is_integer(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.int32, torch.int64)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
