# SPDX-License-Identifier: Apache-2.0
"""Round-to-nearest quantization of one weight matrix, and its inverse."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_ext.compress.grids import fit_ternary, round_to_grid
from vllm_ext.quantization.scheme import Scheme


class QuantizedWeight(NamedTuple):
    """codes uint8 [N, K], scales fp16 [N, K/g], zeros uint8 [N, K/g] or None when symmetric.

    weight = scale * (code - zero); a symmetric scheme's zero is `Scheme.fixed_zero`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


def round_to_nearest(weight: torch.Tensor, scheme: Scheme, name: str = "weight") -> QuantizedWeight:
    """Quantize `weight` [N, K] (any float type) on its own device, each group to the nearest of its levels.

    The step of a group is the smallest fp16 number, rounded up, whose levels span the group's values and zero:
    no value is clipped, and every error is at most half a step. It is fixed in fp16 before any code is chosen, so
    the codes are the best for the scale that is stored. Ties round to even. Of ternary weights the scale is that of
    least squared error (`grids.fit_ternary`): with three levels, to clip nothing is to round nearly all to zero.

    name: what an error calls the matrix. Raises ValueError for NaN or infinite weights, for a group whose step
    exceeds fp16, for a group size that does not divide K, and for w16a16, which has no codes.

    Source: asymmetric min/max and symmetric rounding as in GPTQ (arXiv:2210.17323, section 4, RTN baseline); the
    upward rounding of the scale is ours, and a symmetric group uses its extra negative level.
    """
    if not scheme.is_quantized:
        raise ValueError(f"{name}: {scheme} leaves a weight as it is; there is nothing to round")
    if weight.dim() != 2:
        raise ValueError(f"{name} must be [N, K], got {list(weight.shape)}")
    check_finite(weight, name)
    N, K = weight.shape
    groups = weight.float().reshape(N, scheme.num_groups(K), -1)
    highest = groups.amax(-1).clamp(min=0.0)
    lowest = groups.amin(-1).clamp(max=0.0)
    top = scheme.highest_code
    if scheme.is_ternary:
        scales = fit_ternary(groups)
    elif scheme.symmetric:
        scales = _round_up_to_fp16(torch.maximum(highest / (top - scheme.fixed_zero), -lowest / scheme.fixed_zero))
    else:
        # Divided before the subtraction: the difference of two finite numbers can overflow.
        scales = _round_up_to_fp16(highest / top - lowest / top)
    if not torch.isfinite(scales).all():
        row, group = (~torch.isfinite(scales)).nonzero()[0].tolist()
        raise ValueError(
            f"{name}: row {row}, group {group} spans {float(lowest[row, group]):g} to {float(highest[row, group]):g}, "
            f"which needs a scale beyond fp16's 65504; keep this weight as w16a16"
        )
    # A group of zeros has no range. Any scale is exact there; one is the least surprising.
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    scale = scales.float()
    zeros = torch.full_like(scale, scheme.fixed_zero) if scheme.symmetric else (-lowest / scale).round()
    codes = round_to_grid(groups, scale.unsqueeze(-1), zeros.unsqueeze(-1), scheme)
    return QuantizedWeight(
        codes.view(N, K).to(torch.uint8), scales, None if scheme.symmetric else zeros.to(torch.uint8)
    )


def dequantize(quantized: QuantizedWeight, scheme: Scheme) -> torch.Tensor:
    """The weight [N, K] in float32 that the codes stand for."""
    codes, scales, zeros = quantized
    N, K = codes.shape
    zero = float(scheme.fixed_zero) if zeros is None else zeros.float().unsqueeze(-1)
    centred = codes.view(N, scheme.num_groups(K), -1).float() - zero
    return (centred * scales.float().unsqueeze(-1)).view(N, K)


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Raises ValueError for a weight [N, K] with NaN or infinite values, naming the first."""
    finite = torch.isfinite(weight)
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{name} has {int((~finite).sum())} NaN or infinite values, the first {float(weight[row, column])} "
            f"at [{row}, {column}]: the checkpoint is damaged"
        )


def _round_up_to_fp16(step: torch.Tensor) -> torch.Tensor:
    """Smallest fp16 number >= step, for step >= 0; infinity above fp16's range, a subnormal near zero."""
    rounded = step.half()
    # The bit pattern of a positive float, plus one, is the next float.
    above = (rounded.view(torch.int16) + 1).view(torch.float16)
    return torch.where(rounded.float() < step, above, rounded)
