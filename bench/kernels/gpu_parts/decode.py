# SPDX-License-Identifier: Apache-2.0
"""Variants of the kernels for few tokens beside each other: stages, scaling, unrolling, tokens, warps, parts of K.

The layer is Qwen3-30B-A3B's. An arm's bandwidth is its bytes over its time; roofline.py has what the GPU could do.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from bench.kernels.gpu_parts.common import Context, Result, count_traffic, make_trial, time_arms, uniform
from bench.kernels.gpu_parts.reference import name_tile
from bench.records import Metric
from vllm_ext.kernels.gpu.configurations import CORRECT_SUMS, DECODE_TILE, SCALE_WEIGHTS, Tile

TOKENS = (1, 4, 16)
WIDTHS = ((4, 16), (2, 16), (3, 16), (8, 16), (4, 8), (8, 8))

#: The rule's tile first: the others are compared with it.
VARIANTS = (
    DECODE_TILE,
    replace(DECODE_TILE, num_stages=3),
    replace(DECODE_TILE, num_stages=6),
    replace(DECODE_TILE, scaling=CORRECT_SUMS),
    replace(DECODE_TILE, scaling=CORRECT_SUMS, unroll=2),
    replace(DECODE_TILE, scaling=SCALE_WEIGHTS),
    replace(DECODE_TILE, unroll=2),
    replace(DECODE_TILE, block_tokens=8),
    replace(DECODE_TILE, num_warps=2),
    replace(DECODE_TILE, block_tokens=8, num_warps=2),
    replace(DECODE_TILE, block_tokens=8, num_warps=2, unroll=2),
    replace(DECODE_TILE, block_tokens=8, num_warps=2, num_stages=6),
    replace(DECODE_TILE, block_tokens=8, num_warps=2, scaling=CORRECT_SUMS),
)
SPLITS = (1, 2, 4)


def run(context: Context) -> Result:
    """Latency of every variant; in a dry run of two, at one width."""
    result = Result("decode", "latency")
    for bits, act_bits in WIDTHS:
        for num_tokens in TOKENS:
            case = f"w{bits}a{act_bits}_{num_tokens}"
            if context.is_dry_run and case != "w4a16_1":
                result.needs_cuda.append(case)
            elif not context.has_time():
                result.left_out.append(case)
            else:
                _compare(context, result, case, bits, act_bits, num_tokens)
    return result


def _compare(context: Context, result: Result, case: str, bits: int, act_bits: int, num_tokens: int) -> None:
    trial = make_trial(context, uniform(bits, act_bits), num_tokens)
    num_bytes, _ = count_traffic(trial)
    variants: dict[str, tuple[Tile, int | None]] = {}
    for tile in VARIANTS:
        # With 8-bit activations products are scaled in one way only.
        if act_bits == 16 or tile.scaling == DECODE_TILE.scaling:
            variants[name_tile(tile)] = (tile, None)
    for split in SPLITS:
        variants[f"{name_tile(DECODE_TILE)}_split{split}"] = (DECODE_TILE, split)
    if context.is_dry_run:
        variants = dict(list(variants.items())[:2])

    def call(index: int, tile: Tile, split: int | None) -> object:
        return trial.run(index, (tile, tile), split)

    arms = {name: (partial(call, tile=tile, split=split), trial.copies) for name, (tile, split) in variants.items()}

    def describe(seconds: float) -> dict[str, Metric]:
        return {"bandwidth": Metric(num_bytes / seconds / 1e9, "GB/s", "higher")}

    settings = {"tokens": num_tokens, "bytes": round(num_bytes), "shape": list(context.shape)}
    time_arms(context, result, case, arms, dict.fromkeys(arms, describe), settings)
