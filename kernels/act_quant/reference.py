# SPDX-License-Identifier: Apache-2.0
"""The specification of int8 activations in plain torch and float32; also what `mixed_moe` and `mixed_linear` mean
by 8-bit activations."""

from __future__ import annotations

import torch

from ..arena import num_groups

#: Largest magnitude of an int8 activation; -128 is left out, so that the range is symmetric.
INT8_MAX = 127

#: Element types of x.
ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def act_quant(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments, result and errors as `vllm_ext.kernels.act_quant.act_quant`, on any device."""
    check_arguments(x, group_size)
    codes, scale = _round_groups(x.float(), group_size)
    return codes.flatten(-2).to(torch.int8), scale.squeeze(-1)


def round_activations(inputs: torch.Tensor, group_size: int) -> torch.Tensor:
    """Values that the codes and scales of `act_quant` stand for: float32 [tokens, K] -> float32 [tokens, K]."""
    codes, scale = _round_groups(inputs, group_size)
    return (codes * scale).flatten(-2)


def check_arguments(x: torch.Tensor, group_size: int) -> None:
    """Raise ValueError, naming the argument and its value. Metadata only: no device is read."""
    if x.dim() != 2 or x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"x must be [tokens, K] in bf16, fp16 or fp32, got {x.dtype} {list(x.shape)}")
    num_groups(x.shape[1], group_size)


def _round_groups(inputs: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integer-valued float32 codes [tokens, groups, group] and scales [tokens, groups, 1]."""
    grouped = inputs.unflatten(-1, (num_groups(inputs.shape[-1], group_size), -1))
    scale = grouped.abs().amax(-1, keepdim=True) / INT8_MAX
    # An infinite scale would make the other codes 0 * inf, and its own inf / inf, which no integer stands for.
    scale = torch.where(scale.isinf(), torch.nan, scale)
    return torch.where(scale > 0, grouped / scale, 0.0).round().clamp(-INT8_MAX, INT8_MAX), scale
