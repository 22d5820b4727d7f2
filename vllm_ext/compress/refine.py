# SPDX-License-Identifier: Apache-2.0
"""Lower the output error of chosen codes further: one code, then one scale at a time, everything else fixed."""

from __future__ import annotations

import torch

from vllm_ext.compress.grids import Grid, round_to_grid
from vllm_ext.quantization.scheme import Scheme

#: Passes over all columns; the later ones gain little.
SWEEPS = 3

#: Columns whose changes reach the rest of the row in one product.
_BLOCK_COLUMNS = 128

#: A scale moves at most by this factor in one step, so that a group of zeros or of one level stays sensible.
_MAX_STEP = 2.0


def refine_codes(
    target: torch.Tensor, hessians: torch.Tensor, codes: torch.Tensor, grid: Grid, scheme: Scheme, sweeps: int = SWEEPS
) -> tuple[torch.Tensor, Grid]:
    """Codes and scales of lower (Q - target) H (Q - target)^T, row by row.

    target: float32 [experts, N, K]. hessians: [experts, K, K], positive definite, columns in their own places.
    codes: uint8 [experts, N, K] on the grid. Returns both anew. Each code moves to the level nearest to the minimum
    along its own axis, and each scale to the fp16 number nearest to its own, if that is lower; so no step raises the
    error, up to float32 rounding. Zero points stay.

    Source: coordinate descent on codes as in CDQuant (arXiv:2406.17542), in the order of the columns, and with the
    scales among the coordinates.
    """
    _, _, K = target.shape
    size = K // scheme.num_groups(K)
    hessian = hessians.float()
    diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1)
    # Columns as rows: one column of all outputs is then contiguous.
    levels = codes.mT.float().contiguous()
    scales, zeros = grid.scales.float().mT.contiguous(), grid.zeros.mT.contiguous()
    values = (levels - zeros.repeat_interleave(size, 1)) * scales.repeat_interleave(size, 1)
    gradient = torch.bmm(hessian, values - target.mT)
    for _ in range(sweeps):
        for group in range(K // size):
            zero = zeros[:, group]
            for start in range(group * size, (group + 1) * size, _BLOCK_COLUMNS):
                end = min(start + _BLOCK_COLUMNS, (group + 1) * size)
                local = gradient[:, start:end].clone()
                moved = torch.empty_like(local)
                for column in range(start, end):
                    place = column - start
                    value = values[:, column].clone()
                    wanted = value - local[:, place] / diagonal[:, column, None]
                    level = round_to_grid(wanted, scales[:, group], zero, scheme)
                    levels[:, column] = level
                    values[:, column] = (level - zero) * scales[:, group]
                    moved[:, place] = values[:, column] - value
                    local.baddbmm_(hessian[:, start:end, column, None], moved[:, place, None])
                gradient.baddbmm_(hessian[:, :, start:end], moved)
            _move_scale(hessian, values, levels, gradient, scales, zero, group, size)
    fitted = Grid(scales.mT.contiguous().half(), grid.zeros)
    return levels.mT.contiguous().to(torch.uint8), fitted


def _move_scale(
    hessian: torch.Tensor,
    values: torch.Tensor,
    levels: torch.Tensor,
    gradient: torch.Tensor,
    scales: torch.Tensor,
    zero: torch.Tensor,
    group: int,
    size: int,
) -> None:
    """Put one group's scale, of every row, at its minimum; values, gradient and scales change in place."""
    columns = slice(group * size, (group + 1) * size)
    direction = levels[:, columns] - zero.unsqueeze(1)
    slope = (direction * gradient[:, columns]).sum(1)
    curvature = (direction * torch.bmm(hessian[:, columns, columns], direction)).sum(1)
    scale = scales[:, group]
    wanted = scale - slope / curvature.clamp_min(torch.finfo(torch.float32).tiny)
    wanted = torch.minimum(torch.maximum(wanted, scale / _MAX_STEP), scale * _MAX_STEP).half().float()
    step = wanted - scale
    # Rounded to fp16 the step may overshoot; a scale that is zero or infinite there is no scale.
    lower = (slope * step + 0.5 * curvature * step * step < 0) & (wanted > 0) & torch.isfinite(wanted)
    step = torch.where(lower, step, 0.0)
    scales[:, group] = torch.where(lower, wanted, scale)
    values[:, columns] = direction * scales[:, group].unsqueeze(1)
    gradient.baddbmm_(hessian[:, :, columns], direction * step.unsqueeze(1))
