# SPDX-License-Identifier: Apache-2.0
"""Scales and zero points of groups, searched so that clipping the largest weights lowers the weighted error."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_ext.quantization.scheme import Scheme

#: Shares of a group's range that are tried first, the same for both ends, and the factors that then move each end.
_SHARES = (1.0, 0.94, 0.88, 0.81, 0.74, 0.67, 0.6, 0.53, 0.46, 0.39)
_MOVES = (0.7, 0.85, 1.15, 1.3)

#: A subnormal fp16 number that still has five binary digits. Not the smallest normal one: weights of 1e-5 need less.
_SMALLEST_SCALE = 2.0**-20


class Grid(NamedTuple):
    """scales fp16 and zeros float32 (whole numbers), both [..., N, groups]; weight = scale * (code - zero)."""

    scales: torch.Tensor
    zeros: torch.Tensor


def search_grid(weights: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None) -> Grid:
    """The best of a set of clipped ranges for every group, by the squared error that rounding to them leaves.

    weights: float32 [..., N, K], finite. importance: float32 [..., K], how much the error of a column counts, such
    as the diagonal of its Hessian; None: all the same. Every scale is the fp16 number that is stored, and a zero
    point the whole number that is stored, before its error is measured. The unclipped range is among the candidates,
    so the error is never above that of an unclipped range with the nearest fp16 scale.

    Source: the MSE clip search of GPTQ's and OmniQuant's successors; ours moves the two ends of an asymmetric range
    independently after a common search, and weighs columns by the Hessian's diagonal.
    """
    groups = weights.unflatten(-1, (scheme.num_groups(weights.shape[-1]), -1))
    weight = None
    if importance is not None:
        # Dead columns still count a little, so that no group is without a preference.
        floor = importance.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) * 1e-4
        weight = (importance + floor).unflatten(-1, (groups.shape[-2], -1)).unsqueeze(-3)
    high, low = groups.amax(-1).clamp_min(0.0), groups.amin(-1).clamp_max(0.0)
    best = make_grid(low, high, scheme)
    error = _measure(groups, best, scheme, weight)
    shares = torch.ones_like(high), torch.ones_like(low)
    for share in _SHARES[1:]:
        factor = torch.full_like(high, share)
        best, error, shares = _keep_better(groups, (low, high), (factor, factor), scheme, weight, best, error, shares)
    if not scheme.symmetric:
        for end in (0, 1):
            start = shares
            for move in _MOVES:
                moved = (start[0] * move, start[1]) if end == 0 else (start[0], start[1] * move)
                moved = (moved[0].clamp(max=1.0), moved[1].clamp(max=1.0))
                best, error, shares = _keep_better(groups, (low, high), moved, scheme, weight, best, error, shares)
    return best


def make_grid(low: torch.Tensor, high: torch.Tensor, scheme: Scheme) -> Grid:
    """The grid whose levels span [low, high], low <= 0 <= high; an empty range gets the scale 1."""
    levels = 2**scheme.weight_bits
    if scheme.symmetric:
        step = torch.maximum(high / (levels // 2 - 1), -low / (levels // 2))
    else:
        step = high / (levels - 1) - low / (levels - 1)
    scales = torch.where(step > 0, step.clamp_min(_SMALLEST_SCALE), 1.0).half()
    if scheme.symmetric:
        return Grid(scales, torch.full_like(high, levels // 2))
    return Grid(scales, (-low / scales.float()).round().clamp(0, levels - 1))


def round_to_grid(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, num_levels: int) -> torch.Tensor:
    """Codes, as whole float32 numbers; all arguments broadcast against each other."""
    return (values / scales).round_().add_(zeros).clamp_(0, num_levels - 1)


def _keep_better(
    groups: torch.Tensor,
    ends: tuple[torch.Tensor, torch.Tensor],
    factors: tuple[torch.Tensor, torch.Tensor],
    scheme: Scheme,
    weight: torch.Tensor | None,
    best: Grid,
    error: torch.Tensor,
    shares: tuple[torch.Tensor, torch.Tensor],
) -> tuple[Grid, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Per group, the candidate range (factors on the high and the low end) where it beats the best so far."""
    low, high = ends
    grid = make_grid(low * factors[1], high * factors[0], scheme)
    found = _measure(groups, grid, scheme, weight)
    better = found < error
    return (
        Grid(torch.where(better, grid.scales, best.scales), torch.where(better, grid.zeros, best.zeros)),
        torch.where(better, found, error),
        (torch.where(better, factors[0], shares[0]), torch.where(better, factors[1], shares[1])),
    )


def _measure(groups: torch.Tensor, grid: Grid, scheme: Scheme, weight: torch.Tensor | None) -> torch.Tensor:
    scales, zeros = grid.scales.float().unsqueeze(-1), grid.zeros.unsqueeze(-1)
    codes = round_to_grid(groups, scales, zeros, 2**scheme.weight_bits)
    error = codes.sub_(zeros).mul_(scales).sub_(groups).square_()
    return (error if weight is None else error.mul_(weight)).sum(-1)
