# SPDX-License-Identifier: Apache-2.0
# Triton reads the annotations of its functions as its own.
# mypy: disallow-untyped-defs=False
"""The (token, slot) pairs of a router grouped by expert, and cut into tiles of tokens, all on the device.

    topk_ids  [[2, 0], [0, -1], [2, 1]]      pair = token * top_k + slot: 0 .. 5
    pairs     1 2 | 5 | 0 4                  by expert, in their own order within one; -1 is nobody's
    experts   0 0 | 1 | 2 2                  of each position
    segment_ends  2   3   5                  of each expert
    tiles     (expert, first position) for every block_tokens positions of an expert; num_tiles of them

The host knows only how many pairs there are at most, so the arrays are as long as the worst case needs. The order is
the same every time, no matter in which order thread blocks run. Few pairs are sorted in one launch, by comparing each
with all; many in three, by counting.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .configurations import bound_tiles

#: Pairs that one thread block places: where it compares all with all, fewer, for they meet in registers.
BLOCK, FEW_BLOCK = 128, 64

#: Pairs up to which they are sorted in one launch.
FEW_PAIRS = 1024

#: Counts that are summed at a time, and comparisons of a tile with an expert that are made at a time: more of them
#: would not fit in the registers of the one thread block that does it.
SCANNED_COUNTS, COMPARED_TILES = 4096, 8192

#: int32 elements of a 64-byte line. Every array starts on one: Triton compiles another kernel for other alignments.
LINE = 16


class SortedPairs(NamedTuple):
    """The arrays of the drawing, all int32 on the device, and the number of tiles that the grid must allow for."""

    pairs: torch.Tensor
    experts: torch.Tensor
    segment_ends: torch.Tensor
    tile_experts: torch.Tensor
    tile_starts: torch.Tensor
    num_tiles: torch.Tensor
    num_experts: int
    max_tiles: int


@triton.jit
def load_local_ids(
    topk_ids, expert_map, index, num_pairs, num_global, NUM_EXPERTS: tl.constexpr, HAS_MAP: tl.constexpr
):
    """Rows of the table of some pairs; NUM_EXPERTS where there is none: -1, on another rank, or past the last."""
    ids = tl.load(topk_ids + index, mask=index < num_pairs, other=-1).to(tl.int32)
    if HAS_MAP:
        known = (ids >= 0) & (ids < num_global)
        ids = tl.load(expert_map + tl.where(known, ids, 0), mask=known, other=-1).to(tl.int32)
    return tl.where((ids >= 0) & (ids < NUM_EXPERTS), ids, NUM_EXPERTS)


@triton.jit
def _write_tiles(
    counts,
    segment_ends,
    tile_experts,
    tile_starts,
    num_tiles,
    max_tiles,
    block_tokens,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    TILE_BATCH: tl.constexpr,
):
    """Segments and tiles, from pairs per expert, int32 [PADDED_EXPERTS]."""
    expert = tl.arange(0, PADDED_EXPERTS)
    ends = tl.cumsum(counts, 0)
    tl.store(segment_ends + expert, ends, mask=expert < NUM_EXPERTS)
    tiles = (counts + block_tokens - 1) // block_tokens
    tile_ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    tl.store(num_tiles, total)
    for first in range(0, max_tiles, TILE_BATCH):
        tile = first + tl.arange(0, TILE_BATCH)
        passed = (tile_ends[None, :] <= tile[:, None]) & (expert < NUM_EXPERTS)[None, :]
        owner = tl.sum(passed.to(tl.int32), 1)
        first_tile = tl.max(tl.where(passed, tile_ends[None, :], 0), 1)
        segment_start = tl.max(tl.where(passed, ends[None, :], 0), 1)
        start = segment_start + (tile - first_tile) * block_tokens
        # Tiles past the last are read before it is known that they are none: they must name an expert that exists.
        owner = tl.minimum(owner, NUM_EXPERTS - 1)
        tl.store(tile_experts + tile, owner, mask=tile < max_tiles)
        tl.store(tile_starts + tile, start, mask=tile < max_tiles)


@triton.jit(do_not_specialize=["num_pairs", "max_tiles", "block_tokens"])
def sort_few_kernel(
    topk_ids,
    expert_map,
    pairs,
    experts,
    segment_ends,
    tile_experts,
    tile_starts,
    num_tiles,
    num_pairs,
    max_tiles,
    block_tokens,
    num_global,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_BATCH: tl.constexpr,
):
    """All in one launch: each thread block but the last places BLOCK pairs, the last one makes the tiles."""
    lane = tl.arange(0, BLOCK)
    mine = tl.program_id(0) * BLOCK + lane
    if tl.program_id(0) < tl.num_programs(0) - 1:
        my_expert = load_local_ids(topk_ids, expert_map, mine, num_pairs, num_global, NUM_EXPERTS, HAS_MAP)
        position = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, num_pairs, BLOCK):
            other = first + lane
            expert = load_local_ids(topk_ids, expert_map, other, num_pairs, num_global, NUM_EXPERTS, HAS_MAP)
            earlier = other[None, :] < mine[:, None]
            before = (expert[None, :] < my_expert[:, None]) | ((expert[None, :] == my_expert[:, None]) & earlier)
            position += tl.sum(before.to(tl.int32), 1)
        is_routed = my_expert < NUM_EXPERTS
        tl.store(pairs + position, mine, mask=is_routed)
        tl.store(experts + position, my_expert, mask=is_routed)
    else:
        counts = tl.zeros((PADDED_EXPERTS,), tl.int32)
        for first in range(0, num_pairs, BLOCK):
            expert = load_local_ids(topk_ids, expert_map, first + lane, num_pairs, num_global, NUM_EXPERTS, HAS_MAP)
            counts += tl.histogram(expert, PADDED_EXPERTS)
        counts = tl.where(tl.arange(0, PADDED_EXPERTS) < NUM_EXPERTS, counts, 0)
        _write_tiles(
            counts,
            segment_ends,
            tile_experts,
            tile_starts,
            num_tiles,
            max_tiles,
            block_tokens,
            NUM_EXPERTS,
            PADDED_EXPERTS,
            TILE_BATCH,
        )


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(
    topk_ids,
    expert_map,
    counts,
    num_pairs,
    num_global,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[block] = pairs per expert among BLOCK pairs."""
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = load_local_ids(topk_ids, expert_map, mine, num_pairs, num_global, NUM_EXPERTS, HAS_MAP)
    target = counts + tl.program_id(0) * PADDED_EXPERTS + tl.arange(0, PADDED_EXPERTS)
    tl.store(target, tl.histogram(expert, PADDED_EXPERTS))


@triton.jit(do_not_specialize=["num_blocks", "max_tiles", "block_tokens"])
def scan_kernel(
    counts,
    bases,
    segment_ends,
    tile_experts,
    tile_starts,
    num_tiles,
    num_blocks,
    max_tiles,
    block_tokens,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    SCAN_ROWS: tl.constexpr,
    TILE_BATCH: tl.constexpr,
):
    """bases[block, expert] = position of a block's first pair of that expert; segments and tiles. One thread block."""
    expert = tl.arange(0, PADDED_EXPERTS)
    scan_row = tl.arange(0, SCAN_ROWS)
    total = tl.zeros((PADDED_EXPERTS,), tl.int32)
    for first in range(0, num_blocks, SCAN_ROWS):
        place = (first + scan_row)[:, None] * PADDED_EXPERTS + expert[None, :]
        total += tl.sum(tl.load(counts + place, mask=(first + scan_row < num_blocks)[:, None], other=0), 0)
    total = tl.where(expert < NUM_EXPERTS, total, 0)
    running = tl.cumsum(total, 0) - total
    for first in range(0, num_blocks, SCAN_ROWS):
        place = (first + scan_row)[:, None] * PADDED_EXPERTS + expert[None, :]
        mask = (first + scan_row < num_blocks)[:, None]
        here = tl.load(counts + place, mask=mask, other=0)
        tl.store(bases + place, running[None, :] + tl.cumsum(here, 0) - here, mask=mask)
        running += tl.sum(here, 0)
    _write_tiles(
        total,
        segment_ends,
        tile_experts,
        tile_starts,
        num_tiles,
        max_tiles,
        block_tokens,
        NUM_EXPERTS,
        PADDED_EXPERTS,
        TILE_BATCH,
    )


@triton.jit(do_not_specialize=["num_pairs"])
def place_kernel(
    topk_ids,
    expert_map,
    bases,
    pairs,
    experts,
    num_pairs,
    num_global,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each pair to its block's base plus its rank among the block's pairs of that expert."""
    lane = tl.arange(0, BLOCK)
    mine = tl.program_id(0) * BLOCK + lane
    expert = load_local_ids(topk_ids, expert_map, mine, num_pairs, num_global, NUM_EXPERTS, HAS_MAP)
    same = (expert[None, :] == expert[:, None]) & (lane[None, :] < lane[:, None])
    position = tl.load(bases + tl.program_id(0) * PADDED_EXPERTS + expert) + tl.sum(same.to(tl.int32), 1)
    is_routed = expert < NUM_EXPERTS
    tl.store(pairs + position, mine, mask=is_routed)
    tl.store(experts + position, expert, mask=is_routed)


def choose_batches(padded_experts: int) -> dict[str, int]:
    """How many blocks of counts, and how many tiles, `scan_kernel` takes at a time for so many experts."""
    return {
        "SCAN_ROWS": max(1, SCANNED_COUNTS // padded_experts),
        "TILE_BATCH": max(1, COMPARED_TILES // padded_experts),
    }


def sort_pairs(
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_experts: int,
    block_tokens: int,
    few_pairs: int = FEW_PAIRS,
) -> SortedPairs:
    """Sort pairs by expert without asking the device anything.

    topk_ids int [tokens, top k], contiguous, -1 for none; expert_map int [global experts] or None; num_experts: on this
    rank, at least one; block_tokens: tokens of a tile. At least one pair. Ids past the last expert count as none.
    """
    num_pairs = topk_ids.numel()
    max_tiles = bound_tiles(num_pairs, num_experts, block_tokens)
    padded_experts = triton.next_power_of_2(num_experts + 1)
    is_few = num_pairs <= few_pairs
    block = FEW_BLOCK if is_few else BLOCK
    num_blocks = -(-num_pairs // block)
    scratch = 0 if is_few else num_blocks * padded_experts
    sizes = [num_pairs, num_pairs, num_experts, max_tiles, max_tiles, 1, scratch, scratch]
    lines = [-(-size // LINE) * LINE for size in sizes]
    workspace = torch.empty(sum(lines), dtype=torch.int32, device=topk_ids.device)
    parts = [part[:size] for part, size in zip(workspace.split(lines), sizes, strict=True)]
    pairs, experts, segment_ends, tile_experts, tile_starts, num_tiles, counts, bases = parts
    order = SortedPairs(pairs, experts, segment_ends, tile_experts, tile_starts, num_tiles, num_experts, max_tiles)
    num_global = 0 if expert_map is None else expert_map.numel()
    common = {"NUM_EXPERTS": num_experts, "PADDED_EXPERTS": padded_experts}
    mapped = {"HAS_MAP": expert_map is not None, "BLOCK": block}
    batches = choose_batches(padded_experts)
    segments = (segment_ends, tile_experts, tile_starts, num_tiles)
    if is_few:
        sort_few_kernel[(num_blocks + 1,)](
            topk_ids,
            expert_map,
            pairs,
            experts,
            *segments,
            num_pairs,
            max_tiles,
            block_tokens,
            num_global,
            **common,
            **mapped,
            TILE_BATCH=batches["TILE_BATCH"],
            num_warps=8,
        )
        return order
    count_kernel[(num_blocks,)](topk_ids, expert_map, counts, num_pairs, num_global, **common, **mapped)
    scan_kernel[(1,)](
        counts,
        bases,
        *segments,
        num_blocks,
        max_tiles,
        block_tokens,
        **common,
        **batches,
        num_warps=8,
    )
    place_kernel[(num_blocks,)](
        topk_ids, expert_map, bases, pairs, experts, num_pairs, num_global, **common, **mapped, num_warps=8
    )
    return order
