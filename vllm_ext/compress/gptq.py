# SPDX-License-Identifier: Apache-2.0
"""GPTQ and GPTAQ, for many experts of one shape at once."""

from __future__ import annotations

import torch

from vllm_ext.compress.grids import Grid, make_grid, round_to_grid, search_grid
from vllm_ext.compress.refine import SWEEPS, refine_codes
from vllm_ext.compress.rounding import QuantizedWeight, check_finite
from vllm_ext.quantization.scheme import Scheme

#: Added to the Hessian's diagonal, as a share of its mean; raised tenfold where the factorization fails.
DAMPING = 0.01
_MAX_DAMPING = 1e4

#: Columns whose error is spread over the columns after them in one product.
BLOCK_COLUMNS = 128


def round_with_hessian(
    weights: torch.Tensor,
    hessians: torch.Tensor,
    scheme: Scheme,
    *,
    drifts: torch.Tensor | None = None,
    act_order: bool = True,
    clip: bool = True,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
    name: str = "weight",
) -> list[QuantizedWeight]:
    """Quantize weights [experts, N, K] so that their outputs change least on the inputs of the Hessians.

    hessians: [experts, K, K], mean of x x^T, float32 or float64; singular, zero and indefinite ones are damped until
    they factorize, and a Hessian of zeros rounds every weight to the nearest level. drifts: [experts, K, K], mean of
    (x~ - x) x^T; with them outputs stay close to W x~, those of the unquantized path (GPTAQ).
    act_order: columns of large Hessian diagonal first; groups, scales and zero points are those of the columns' own
    places, fixed before (static groups). clip: search clipped ranges, see `grids.search_grid`.
    sweeps: passes of `refine.refine_codes` over GPTQ's codes and scales; 0 for plain GPTQ. name: for errors.

    Scales are fp16 and zero points whole whenever codes are chosen. Raises ValueError for NaN or infinite weights,
    and for a group whose step exceeds fp16.

    Source: GPTQ (arXiv:2210.17323, algorithm 1). GPTAQ (arXiv:2504.02692) minimizes |Q X - W X~|^2; this is
    |(Q - W*) X|^2 plus a constant with W* = W + W D H^-1 (least squares, D the drift), so we run GPTQ on W*. The
    paper corrects the columns after the one just rounded only, which is the same objective, less closely.
    """
    for expert, weight in enumerate(weights):
        check_finite(weight, name if len(weights) == 1 else f"{name}, expert {expert}")
    importance = torch.diagonal(hessians, dim1=-2, dim2=-1)
    experts, K = importance.shape
    order = torch.arange(K, device=weights.device).expand(experts, K)
    if act_order:
        order = importance.argsort(dim=-1, descending=True, stable=True)
    damped, lower = _factorize(_permute(hessians, order), damping)
    target = weights.float()
    if drifts is not None:
        target = target + _correct(target, drifts, order, lower)
    if clip:
        # Damped as the columns are, so that a dead column's weights are not clipped away.
        counted = torch.empty_like(importance).scatter_(1, order, torch.diagonal(damped, dim1=-2, dim2=-1))
        grid = search_grid(target, scheme, counted.float())
    else:
        groups = target.unflatten(-1, (scheme.num_groups(K), -1))
        grid = make_grid(groups.amin(-1).clamp_max(0.0), groups.amax(-1).clamp_min(0.0), scheme)
    if not bool(torch.isfinite(grid.scales).all()):
        raise ValueError(f"{name}: a group of weights needs a scale beyond fp16's 65504; keep this weight as w16a16")
    codes = _round_columns(target, _invert(damped, lower), order, grid, scheme)
    if sweeps:
        codes, grid = refine_codes(target, _permute(damped, order.argsort(dim=-1)), codes, grid, scheme, sweeps)
    zeros = grid.zeros.to(torch.uint8)
    return [QuantizedWeight(codes[e], grid.scales[e], None if scheme.symmetric else zeros[e]) for e in range(experts)]


def _permute(matrices: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows and columns [experts, K, K] in the order [experts, K]."""
    rows = matrices.gather(1, order.unsqueeze(-1).expand_as(matrices))
    return rows.gather(2, order.unsqueeze(1).expand_as(matrices))


def _factorize(hessians: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(positive definite version of each Hessian, its lower Cholesky factor), [experts, K, K].

    A column that no token used gets the mean of the diagonal, so that its weights are rounded to nearest.
    """
    damped = hessians.clone()
    diagonal = torch.diagonal(damped, dim1=-2, dim2=-1)
    mean = diagonal.clamp_min(0.0).mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    diagonal.copy_(torch.where(diagonal > 0, diagonal, mean) + damping * mean)
    lower, failed = torch.linalg.cholesky_ex(damped)
    added = damping
    while bool((failed > 0).any()):
        bad = failed > 0
        added *= 10
        if added > _MAX_DAMPING:
            # Not even close to a covariance: only its diagonal is used.
            damped[bad] = torch.diag_embed(diagonal[bad])
        else:
            diagonal[bad] += added * mean[bad]
        lower, failed = torch.linalg.cholesky_ex(damped)
    return damped, lower


def _invert(damped: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of each inverse, [experts, K, K]."""
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    bad = (failed > 0) | ~torch.isfinite(upper).all(-1).all(-1)
    if bool(bad.any()):
        # Rounding errors of the inverse outgrew the damping: double precision, with more of it.
        hessian = damped[bad].double()
        diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1)
        diagonal += diagonal.mean(-1, keepdim=True)
        again = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
        upper[bad] = again.to(upper.dtype)
    return upper


def _correct(weights: torch.Tensor, drifts: torch.Tensor, order: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """W D H^-1 [experts, N, K], columns in their own places."""
    moved = torch.bmm(weights.to(lower.dtype), drifts.to(lower.dtype))
    moved = moved.gather(2, order.unsqueeze(1).expand_as(moved))
    solved = torch.cholesky_solve(moved.transpose(1, 2), lower).transpose(1, 2)
    return torch.empty_like(weights).scatter_(2, order.unsqueeze(1).expand_as(weights), solved.to(weights.dtype))


def _round_columns(
    target: torch.Tensor, upper: torch.Tensor, order: torch.Tensor, grid: Grid, scheme: Scheme
) -> torch.Tensor:
    """Codes uint8 [experts, N, K]: column by column, each one's error moved to the columns after it."""
    experts, N, K = target.shape
    group = order // (K // scheme.num_groups(K))
    every = torch.arange(experts, device=target.device)
    # Columns as rows: one column of all outputs is then contiguous.
    scales, zeros = grid.scales.float().mT.contiguous(), grid.zeros.mT.contiguous()
    left = target.mT.gather(1, order.unsqueeze(-1).expand(-1, -1, N))
    codes = torch.empty(left.shape, dtype=torch.uint8, device=target.device)
    upper = upper.float()
    for start in range(0, K, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, K)
        block = left[:, start:end]
        errors = torch.empty_like(block)
        for column in range(start, end):
            place = column - start
            scale, zero = scales[every, group[:, column]], zeros[every, group[:, column]]
            code = round_to_grid(block[:, place], scale, zero, scheme)
            codes[:, column] = code
            error = (block[:, place] - (code - zero) * scale) / upper[:, column, column, None]
            errors[:, place] = error
            if column + 1 < end:
                block[:, place + 1 :].baddbmm_(
                    upper[:, column, column + 1 : end].unsqueeze(2), error.unsqueeze(1), alpha=-1
                )
        if end < K:
            left[:, end:].baddbmm_(upper[:, start:end, end:].mT, errors, alpha=-1)
    places = order.argsort(dim=-1)
    return codes.gather(1, places.unsqueeze(-1).expand_as(codes)).mT.contiguous()
