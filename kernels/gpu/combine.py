# SPDX-License-Identifier: Apache-2.0
# Triton reads the annotations of its functions as its own.
# mypy: disallow-untyped-defs=False
"""Sums of what several thread blocks computed, over a token's experts and over parts of K, always in the same order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .accumulate import store_rounded
from .sorting import load_local_ids

#: Columns that one thread block sums. Where parts are float32, there are few tokens: two columns a thread spread them
#: over more thread blocks, and leave registers for the rows of eight slots to be on their way together.
FEW_COLUMNS, MANY_COLUMNS = 256, 1024


@triton.jit(do_not_specialize=["num_pairs", "split"], do_not_specialize_on_alignment=["topk_ids"])
def sum_experts_kernel(
    parts,
    topk_ids,
    expert_map,
    out,
    num_pairs,
    split,
    num_global,
    hidden_size,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """out[token] = sum over parts, and in each over the slots that have an expert here.

    Grid: (tokens, blocks of columns).
    """
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = columns < hidden_size
    total = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    stride = num_pairs.to(tl.int64) * hidden_size
    source = parts + token.to(tl.int64) * TOP_K * hidden_size + columns
    for _ in range(0, split):
        # Unrolled, so that the loads of all slots are on their way together.
        for slot in tl.static_range(TOP_K):
            pair = token * TOP_K + slot
            expert = load_local_ids(topk_ids, expert_map, pair, num_pairs, num_global, NUM_EXPERTS, HAS_MAP)
            # Rows of pairs that have no expert here were never written.
            is_here = columns < tl.where(expert < NUM_EXPERTS, hidden_size, 0)
            total += tl.load(source + slot * hidden_size, mask=is_here, other=0).to(tl.float32)
        source += stride
    store_rounded(out + token.to(tl.int64) * hidden_size + columns, total, mask, USE_ASM)


@triton.jit(do_not_specialize=["num_rows", "split"])
def sum_parts_kernel(
    parts,
    bias,
    out,
    num_rows,
    split,
    out_features,
    HAS_BIAS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """out[row] = sum over parts, plus bias where HAS_BIAS. Grid: (rows, blocks of columns)."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = columns < out_features
    total = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    source = parts + row.to(tl.int64) * out_features + columns
    for _ in range(0, split):
        total += tl.load(source, mask=mask, other=0)
        source += num_rows.to(tl.int64) * out_features
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=mask, other=0).to(tl.float32)
    store_rounded(out + row.to(tl.int64) * out_features + columns, total, mask, USE_ASM)


def choose_columns(parts: torch.dtype) -> int:
    """Columns that a thread block sums of parts of this type."""
    return FEW_COLUMNS if parts == torch.float32 else MANY_COLUMNS


def sum_experts(
    parts: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_experts: int,
    out: torch.Tensor,
    use_asm: bool,
) -> None:
    """out [tokens, hidden] = sums of parts [split, pairs, hidden] over parts and the experts of topk_ids."""
    split, num_pairs, hidden_size = parts.shape
    tokens, top_k = topk_ids.shape
    num_global = 0 if expert_map is None else expert_map.numel()
    columns = choose_columns(parts.dtype)
    sum_experts_kernel[(tokens, -(-hidden_size // columns))](
        parts,
        topk_ids,
        expert_map,
        out,
        num_pairs,
        split,
        num_global,
        hidden_size,
        TOP_K=top_k,
        NUM_EXPERTS=num_experts,
        HAS_MAP=expert_map is not None,
        BLOCK_COLUMNS=columns,
        USE_ASM=use_asm,
    )


def sum_parts(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, use_asm: bool) -> None:
    """out [rows, outputs] = sums of parts float32 [split, rows, outputs], plus bias [outputs] or None."""
    split, num_rows, out_features = parts.shape
    columns = choose_columns(parts.dtype)
    sum_parts_kernel[(num_rows, -(-out_features // columns))](
        parts,
        bias,
        out,
        num_rows,
        split,
        out_features,
        HAS_BIAS=bias is not None,
        BLOCK_COLUMNS=columns,
        USE_ASM=use_asm,
    )
