# SPDX-License-Identifier: Apache-2.0
"""Pairs grouped by expert, against a sort in plain Python; both ways of sorting give the same arrays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_ext.kernels.gpu.sorting import BLOCK, FEW_PAIRS, SCANNED_BLOCKS, SortedPairs, sort_pairs


def check_sorted(order: SortedPairs, local_ids: list[int], block_tokens: int) -> None:
    """local_ids: of every pair, -1 for none."""
    expected = [
        (pair, expert) for expert in range(order.num_experts) for pair, owner in enumerate(local_ids) if owner == expert
    ]
    count = len(expected)
    assert list(zip(order.pairs[:count].tolist(), order.experts[:count].tolist(), strict=True)) == expected
    sizes = [local_ids.count(expert) for expert in range(order.num_experts)]
    ends = [sum(sizes[: expert + 1]) for expert in range(order.num_experts)]
    assert order.segment_ends.tolist() == ends
    tiles = [
        (expert, start)
        for expert, (size, end) in enumerate(zip(sizes, ends, strict=True))
        for start in range(end - size, end, block_tokens)
    ]
    num_tiles = int(order.num_tiles)
    assert num_tiles <= order.max_tiles
    found = zip(order.tile_experts[:num_tiles].tolist(), order.tile_starts[:num_tiles].tolist(), strict=True)
    assert list(found) == tiles
    # Thread blocks past the last tile read these before they know: they must be places in the table.
    assert ((order.tile_experts >= 0) & (order.tile_experts < order.num_experts)).all()


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor | None, int, int]:
    """(topk_ids, expert_map, local experts, tokens of a tile)."""
    num_local = draw(st.sampled_from((1, 2, 5, 31, 64, 130)))
    expert_map, num_global = None, num_local
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    if draw(st.booleans()):
        num_global = num_local + 3
        places = torch.cat([torch.arange(num_local), torch.full((3,), -1)])
        expert_map = places[torch.randperm(num_global, generator=generator)].int()
    shape = (draw(st.integers(1, 90)), draw(st.integers(1, 4)))
    # Past the last expert, too: such ids count as none.
    ids = torch.randint(
        -1, num_global + 2, shape, generator=generator, dtype=draw(st.sampled_from((torch.int32, torch.int64)))
    )
    return ids, expert_map, num_local, draw(st.sampled_from((8, 16, 64)))


NOBODY = (torch.full((3, 2), -1, dtype=torch.int32), None, 4, 16)
ONE_EXPERT = (torch.zeros((70, 2), dtype=torch.int32), None, 3, 16)


#: 48 tiles are the most that these pairs can need, of which they need three.
UNUSED = (torch.zeros((24, 2), dtype=torch.int32), None, 260, 16)


@settings(max_examples=6)
@given(routings())
@example(NOBODY)
@example(ONE_EXPERT)
@example(UNUSED)
def test_pairs_are_grouped_by_expert_in_their_own_order(
    case: tuple[torch.Tensor, torch.Tensor | None, int, int],
) -> None:
    ids, expert_map, num_experts, block_tokens = case
    limit = num_experts if expert_map is None else expert_map.numel()
    local = [(value if 0 <= value < limit else -1) for value in ids.flatten().tolist()]
    if expert_map is not None:
        local = [value if value < 0 else int(expert_map[value]) for value in local]
    check_sorted(sort_pairs(ids, expert_map, num_experts, block_tokens), local, block_tokens)
    counted = sort_pairs(ids, expert_map, num_experts, block_tokens, few_pairs=0)
    check_sorted(counted, local, block_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("num_pairs", [FEW_PAIRS, FEW_PAIRS + 1, (SCANNED_BLOCKS + 2) * BLOCK + 5])
def test_many_pairs(num_pairs: int) -> None:
    ids = torch.randint(-1, 60, (num_pairs, 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    check_sorted(sort_pairs(ids, None, 60, 16), ids.flatten().tolist(), 16)
