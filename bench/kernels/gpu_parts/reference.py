# SPDX-License-Identifier: Apache-2.0
"""Every scheme by the Triton kernels, with their inline PTX, against the reference in float32 on the same device.

One arm for each width, group size and element type of x; a case for each tile. The error is that of tolerances.py and
its limit, too, so an arm fails where a test of the interpreter would. Sizes are odd on purpose: K that is no multiple
of 128, one token, empty experts, more tokens than a tile.

Most of the time goes to compiling, some seconds for each arm. What does not fit in the time is listed as left out; a
second run on the same machine finds compiled kernels in Triton's cache and comes further.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from bench.kernels.gpu_parts.common import Context, Result, Shape
from bench.records import Metric
from vllm_ext.kernels import tolerances
from vllm_ext.kernels.arena import BlockFormat
from vllm_ext.kernels.gpu.configurations import (
    CORRECT_SUMS,
    DECODE_TILE,
    LARGE_TILE,
    MIDDLE_TILE,
    PREFILL_TILE,
    Tile,
)
from vllm_ext.kernels.gpu.samples import make_format
from vllm_ext.kernels.gpu.trials import LinearTrial, MoeTrial
from vllm_ext.kernels.mixed_linear import reference as linear_reference
from vllm_ext.kernels.mixed_moe import reference as moe_reference

WIDTHS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 128, -1)
TOKENS = (1, 37, 300)
#: A group of -1 goes with a K that no group divides.
SHAPES = {32: Shape(5, 2, 160, 96), 128: Shape(5, 2, 384, 256), -1: Shape(5, 2, 200, 72)}

#: (tile, element type of x, group sizes), in the order of what a step needs most.
PLAN: tuple[tuple[Tile, torch.dtype, tuple[int, ...]], ...] = (
    (DECODE_TILE, torch.bfloat16, GROUPS),
    (PREFILL_TILE, torch.bfloat16, (128,)),
    (LARGE_TILE, torch.bfloat16, (128,)),
    (MIDDLE_TILE, torch.bfloat16, (128,)),
    (DECODE_TILE, torch.float16, (128,)),
    (replace(DECODE_TILE, scaling=CORRECT_SUMS), torch.bfloat16, (128,)),
    (PREFILL_TILE, torch.float16, GROUPS),
)


def run(context: Context) -> Result:
    """Check all; in a dry run, one scheme with one tile."""
    result = Result("reference", "error_share", limit=1.0)
    for tile, dtype, groups in PLAN:
        for group_size, bits, act_bits in itertools.product(groups, (*WIDTHS, 16), (16, 8)):
            if bits == 16 and (act_bits == 8 or group_size != 128):
                continue
            arm = f"w{bits}a{act_bits}_g{group_size}_{str(dtype).removeprefix('torch.')}"
            case = name_tile(tile)
            is_tiny = tile == DECODE_TILE and dtype == torch.bfloat16 and (bits, group_size) == (4, 128)
            if context.is_dry_run and not is_tiny:
                result.needs_cuda.append(f"{case} {arm}")
            elif not context.has_time():
                result.left_out.append(f"{case} {arm}")
            else:
                _check(context, result, case, arm, tile, make_format(bits, act_bits, group_size), dtype)
    return result


def name_tile(tile: Tile) -> str:
    """ "64x16_w4_s4_c1_u1": rows, tokens, warps, stages, scaling, unrolling."""
    shape = f"{tile.block_n}x{tile.block_tokens}_w{tile.num_warps}"
    return f"{shape}_s{tile.num_stages}_c{tile.scaling}_u{tile.unroll}"


def _check(
    context: Context, result: Result, case: str, arm: str, tile: Tile, block: BlockFormat, dtype: torch.dtype
) -> None:
    shape = SHAPES.get(block.group_size, SHAPES[128])
    metrics: dict[str, Metric] = {}
    worst = 0.0
    try:
        for num_tokens in TOKENS[:2] if context.is_dry_run else TOKENS:
            for op, (error, limit) in _measure(context, shape, tile, block, dtype, num_tokens).items():
                metrics[f"{op}_{num_tokens}"] = Metric(error, "relative error", "lower")
                # A NaN would pass max().
                share = error / limit if error == error else float("inf")
                worst = max(worst, share)
    except Exception as error:  # noqa: BLE001 - a kernel can fail in many ways, and the other schemes go on
        result.add(case, arm, metrics, error=f"{type(error).__name__}: {error}")
        return
    finite = min(worst, 1e9)
    metrics["error_share"] = Metric(finite, "of the limit", "lower")
    result.add(case, arm, metrics, error=f"{finite:.2f} times the tolerance" if worst > 1 else None)


def _measure(
    context: Context, shape: Shape, tile: Tile, block: BlockFormat, dtype: torch.dtype, num_tokens: int
) -> dict[str, tuple[float, float]]:
    """{op: (error, limit)}."""
    experts, top_k, hidden, intermediate = shape
    moe = MoeTrial([(block, block)] * experts, hidden, intermediate, num_tokens, top_k, dtype, context.device, 0)
    x, ids, weights = moe.routings[0]
    # The last expert stays empty, and some slots are nobody's.
    ids = torch.where(ids == experts - 1, -1, ids)
    moe.routings[0] = moe.routings[0]._replace(topk_ids=ids)
    rest = (moe.layer.arena, moe.layer.table, None, intermediate, "silu", False)
    expected = moe_reference.mixed_moe(x.float(), ids, weights, *rest)
    tolerance = tolerances.choose_gpu_moe(dtype, block.act_bits, tile.scaling)
    found = {"moe": (tolerances.relative_error(moe.run(0, (tile, tile)), expected), tolerance, expected.numel())}
    only = LinearTrial(block, hidden, 2 * intermediate + 8, num_tokens, dtype, context.device, 0)
    expected = linear_reference.mixed_linear(
        only.x.float(), only.layer.arena, only.layer.table, only.layer.out_features, None
    )
    tolerance = tolerances.choose_gpu_linear(dtype, block.act_bits, tile.scaling)
    found["linear"] = (tolerances.relative_error(only.run(0, (tile,)), expected), tolerance, expected.numel())
    return {op: (error, tolerances.find_limit(limit, size)) for op, (error, limit, size) in found.items()}
