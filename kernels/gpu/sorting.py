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
with all; many in four, by counting: each thread block its own pairs, then the blocks before it expert by expert, then
tiles, then places.
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

#: Experts whose counts a thread block of `scan_kernel` sums, a 64-byte line of each block's counts, and how many of
#: these lines it takes at a time.
SCANNED_EXPERTS, SCANNED_BLOCKS = 16, 256

#: Unused tiles that are written at a time.
UNUSED_TILES = 1024

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
    UNUSED: tl.constexpr,
):
    """Segments and tiles, from pairs per expert, int32 [PADDED_EXPERTS], 0 for those past the last."""
    expert = tl.arange(0, PADDED_EXPERTS)
    ends = tl.cumsum(counts, 0)
    tl.store(segment_ends + expert, ends, mask=expert < NUM_EXPERTS)
    tiles = (counts + block_tokens - 1) // block_tokens
    first = tl.cumsum(tiles, 0) - tiles
    total = tl.sum(tiles, 0)
    tl.store(num_tiles, total)
    # All experts write their next tile at once, so no thread waits for another.
    for k in range(0, tl.max(tiles, 0)):
        has_tile = k < tiles
        tl.store(tile_experts + first + k, expert, mask=has_tile)
        tl.store(tile_starts + first + k, ends - counts + k * block_tokens, mask=has_tile)
    # The GEMMs read a tile before they know whether there is one.
    for unused in range(total, max_tiles, UNUSED):
        tile = unused + tl.arange(0, UNUSED)
        tl.store(tile_experts + tile, 0, mask=tile < max_tiles)
        tl.store(tile_starts + tile, 0, mask=tile < max_tiles)


@triton.jit(do_not_specialize=["num_pairs", "max_tiles", "block_tokens"], do_not_specialize_on_alignment=["topk_ids"])
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
    UNUSED: tl.constexpr,
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
            UNUSED,
        )


@triton.jit(do_not_specialize=["num_pairs"], do_not_specialize_on_alignment=["topk_ids"])
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


@triton.jit(do_not_specialize=["num_blocks"])
def scan_kernel(
    counts,
    bases,
    totals,
    num_blocks,
    PADDED_EXPERTS: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """bases[block, expert] = pairs of that expert in earlier blocks, totals[expert] = in all. Each thread block takes
    SLICE experts, and ROWS blocks at a time."""
    expert = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    row = tl.arange(0, ROWS)
    running = tl.zeros((SLICE,), tl.int32)
    for first in range(0, num_blocks, ROWS):
        place = (first + row)[:, None] * PADDED_EXPERTS + expert[None, :]
        mask = (first + row < num_blocks)[:, None]
        here = tl.load(counts + place, mask=mask, other=0)
        tl.store(bases + place, running[None, :] + tl.cumsum(here, 0) - here, mask=mask)
        running += tl.sum(here, 0)
    tl.store(totals + expert, running)


@triton.jit(do_not_specialize=["max_tiles", "block_tokens"])
def tiles_kernel(
    totals,
    segment_ends,
    tile_experts,
    tile_starts,
    num_tiles,
    max_tiles,
    block_tokens,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    UNUSED: tl.constexpr,
):
    """Segments and tiles from the totals. One thread block."""
    expert = tl.arange(0, PADDED_EXPERTS)
    # Past the last expert are the pairs that nobody takes.
    counts = tl.load(totals + expert, mask=expert < NUM_EXPERTS, other=0)
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
        UNUSED,
    )


@triton.jit(do_not_specialize=["num_pairs"], do_not_specialize_on_alignment=["topk_ids"])
def place_kernel(
    topk_ids,
    expert_map,
    bases,
    totals,
    segment_ends,
    pairs,
    experts,
    num_pairs,
    num_global,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each pair to its expert's start, plus its block's base, plus its rank among the block's pairs of that expert."""
    lane = tl.arange(0, BLOCK)
    mine = tl.program_id(0) * BLOCK + lane
    expert = load_local_ids(topk_ids, expert_map, mine, num_pairs, num_global, NUM_EXPERTS, HAS_MAP)
    same = (expert[None, :] == expert[:, None]) & (lane[None, :] < lane[:, None])
    is_routed = expert < NUM_EXPERTS
    start = tl.load(segment_ends + expert, mask=is_routed, other=0) - tl.load(totals + expert)
    base = tl.load(bases + tl.program_id(0) * PADDED_EXPERTS + expert)
    position = start + base + tl.sum(same.to(tl.int32), 1)
    tl.store(pairs + position, mine, mask=is_routed)
    tl.store(experts + position, expert, mask=is_routed)


def choose_slice(padded_experts: int) -> int:
    """Experts that a thread block of `scan_kernel` takes."""
    return min(SCANNED_EXPERTS, padded_experts)


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
    sizes = [num_pairs, num_pairs, num_experts, max_tiles, max_tiles, 1, scratch, scratch, padded_experts]
    lines = [-(-size // LINE) * LINE for size in sizes]
    workspace = torch.empty(sum(lines), dtype=torch.int32, device=topk_ids.device)
    parts = [part[:size] for part, size in zip(workspace.split(lines), sizes, strict=True)]
    pairs, experts, segment_ends, tile_experts, tile_starts, num_tiles, counts, bases, totals = parts
    order = SortedPairs(pairs, experts, segment_ends, tile_experts, tile_starts, num_tiles, num_experts, max_tiles)
    num_global = 0 if expert_map is None else expert_map.numel()
    common = {"NUM_EXPERTS": num_experts, "PADDED_EXPERTS": padded_experts}
    mapped = {"HAS_MAP": expert_map is not None, "BLOCK": block}
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
            UNUSED=UNUSED_TILES,
            num_warps=8,
        )
        return order
    count_kernel[(num_blocks,)](topk_ids, expert_map, counts, num_pairs, num_global, **common, **mapped)
    part = choose_slice(padded_experts)
    scan_kernel[(padded_experts // part,)](
        counts,
        bases,
        totals,
        num_blocks,
        PADDED_EXPERTS=padded_experts,
        SLICE=part,
        ROWS=SCANNED_BLOCKS,
        num_warps=8,
    )
    tiles_kernel[(1,)](totals, *segments, max_tiles, block_tokens, **common, UNUSED=UNUSED_TILES, num_warps=8)
    place_kernel[(num_blocks,)](
        topk_ids,
        expert_map,
        bases,
        totals,
        segment_ends,
        pairs,
        experts,
        num_pairs,
        num_global,
        **common,
        **mapped,
        num_warps=8,
    )
    return order
