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
    so the error is never above that of an unclipped range with the nearest fp16 scale. A ternary group has one scale to
    find, and gets the best there is (`fit_ternary`).

    Source: the MSE clip search of GPTQ's and OmniQuant's successors; ours moves the two ends of an asymmetric range
    independently after a common search, and weighs columns by the Hessian's diagonal.
    """
    groups = weights.unflatten(-1, (scheme.num_groups(weights.shape[-1]), -1))
    weight = None
    if importance is not None:
        # Dead columns still count a little, so that no group is without a preference.
        floor = importance.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) * 1e-4
        weight = (importance + floor).unflatten(-1, (groups.shape[-2], -1)).unsqueeze(-3)
    if scheme.is_ternary:
        scales = fit_ternary(groups, weight)
        return Grid(scales, torch.full_like(scales, scheme.fixed_zero, dtype=torch.float32))
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
    top, zero = scheme.highest_code, scheme.fixed_zero
    if scheme.symmetric:
        step = torch.maximum(high / (top - zero), -low / (zero - scheme.lowest_code))
    else:
        step = high / top - low / top
    scales = _to_scale(step)
    if scheme.symmetric:
        return Grid(scales, torch.full_like(high, zero))
    return Grid(scales, (-low / scales.float()).round().clamp(0, top))


def fit_ternary(groups: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The scale of least squared error for groups that are rounded to -1, 0 and +1 times it.

    groups: float32 [..., size], finite. weight: how much each element's error counts, positive, broadcast against
    groups; None: all the same. Returns fp16 [...]; infinite where fp16 has no such number, one for a group of zeros.

    Whatever the scale, the elements that become +-1 are the largest ones. Of the t largest, of magnitudes a and weights
    h, the best scale is sum(h a) / sum(h), and takes sum(h a)**2 / sum(h) off the error: all t are tried.
    Source: Ternary Weight Networks (arXiv:1605.04711) set the problem and take a threshold of 0.7 mean(a); this is the
    exact optimum, before the scale is rounded to fp16.
    """
    magnitudes, order = groups.abs().sort(dim=-1, descending=True)
    # Of the size of one, so that no square underflows.
    largest = magnitudes[..., :1]
    magnitudes = magnitudes / torch.where(largest > 0, largest, 1.0)
    if weight is None:
        counts = torch.arange(1, groups.shape[-1] + 1, device=groups.device, dtype=groups.dtype)
        sums = magnitudes.cumsum_(-1)
    else:
        sorted_weight = (weight / weight.amax(-1, keepdim=True)).expand_as(groups).gather(-1, order)
        sums = magnitudes.mul_(sorted_weight).cumsum_(-1)
        counts = sorted_weight.cumsum_(-1)
    scales = sums / counts
    best = (scales * sums).argmax(-1, keepdim=True)
    return _to_scale((scales.gather(-1, best) * largest).squeeze(-1))


def round_to_grid(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Codes of a scheme, as whole float32 numbers; the tensors broadcast against each other."""
    return (values / scales).round_().add_(zeros).clamp_(scheme.lowest_code, scheme.highest_code)


def _to_scale(step: torch.Tensor) -> torch.Tensor:
    """The nearest fp16 number that is of use as a scale; one for a group without a range."""
    return torch.where(step > 0, step.clamp_min(_SMALLEST_SCALE), 1.0).half()


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
    codes = round_to_grid(groups, scales, zeros, scheme)
    error = codes.sub_(zeros).mul_(scales).sub_(groups).square_()
    return (error if weight is None else error.mul_(weight)).sum(-1)
