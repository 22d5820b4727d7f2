# SPDX-License-Identifier: Apache-2.0
"""The whole MoE path of the Triton kernels against the reference, with the mixes and routings that layers have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.gpu.fragment_cases import check_moe, repack_layer
from tests.kernels.mixed_moe_cases import Inputs, Layer, make_inputs, make_layer
from vllm_ext.kernels import tolerances
from vllm_ext.kernels.arena import BlockFormat
from vllm_ext.kernels.gpu.configurations import (
    CORRECT_SUMS,
    SCALE_PRODUCTS,
    SCALE_WEIGHTS,
    SHIPPED_TILES,
    LayerTiles,
    Tile,
)
from vllm_ext.kernels.gpu.layout import GROUP_SIZES
from vllm_ext.kernels.mixed_moe import triton
from vllm_ext.kernels.mixed_moe.layout import Block, block_shape
from vllm_ext.kernels.packing import CODE_BITS

DTYPES = (torch.bfloat16, torch.float16)
SCALINGS = (SCALE_WEIGHTS, SCALE_PRODUCTS, CORRECT_SUMS)


def make_tile(scaling: int = SCALE_PRODUCTS, block_n: int = 64, block_tokens: int = 16) -> Tile:
    return Tile(block_n, block_tokens, num_warps=4, num_stages=3, scaling=scaling)


def uniform_layer(bits: int, act_bits: int, group_size: int, hidden: int, intermediate: int) -> Layer:
    block = BlockFormat(bits, act_bits, group_size, symmetric=bits % 2 == 0)
    return make_layer([(block, block), (block, block._replace(group_size=-1))], hidden, intermediate, seed=bits)


@pytest.mark.slow
@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("act_bits", [8, 16])
def test_every_width(bits: int, act_bits: int) -> None:
    dtype, scaling = DTYPES[bits % 2], SCALINGS[bits % 3]
    group_size = GROUP_SIZES[bits % 4]
    inputs = make_inputs(5, 128, 2, 2, dtype, seed=bits)
    check_moe(uniform_layer(bits, act_bits, group_size, 128, 128), inputs, make_tile(scaling))


@pytest.mark.slow
@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_at_every_group_and_scaling(bits: int, act_bits: int, dtype: torch.dtype) -> None:
    for group_size in GROUP_SIZES:
        layer = uniform_layer(bits, act_bits, group_size, 256, 128)
        for scaling in SCALINGS if act_bits == 16 else (SCALE_PRODUCTS,):
            check_moe(layer, make_inputs(20, 256, 2, 2, dtype, seed=bits), make_tile(scaling))


#: Widths of weights and activations that differ between experts and blocks; the last expert stays empty in MIXED_IDS.
MIXED = [
    (BlockFormat(2, 16, 64), BlockFormat(8, 8, 32)),
    (BlockFormat(4, 8, 128), BlockFormat.full_precision(torch.bfloat16)),
    (BlockFormat.ternary(16, 32), BlockFormat(3, 16, -1)),
    (BlockFormat.full_precision(torch.float16), BlockFormat(5, 8, 64, symmetric=True)),
    (BlockFormat(6, 16, -1), BlockFormat(6, 8, -1)),
]
#: Expert 0 has more tokens than a tile, expert 2 has one, 3 tokens have none or one.
MIXED_IDS = [[0, 1]] * 9 + [[0, 3]] * 9 + [[2, -1], [-1, -1], [3, -1]]


@pytest.mark.parametrize("scaling", [SCALE_PRODUCTS, *(pytest.param(s, marks=pytest.mark.slow) for s in SCALINGS)])
def test_mixed_experts_with_empty_and_lonely_ones(scaling: int) -> None:
    layer = make_layer(MIXED, 128, 128)
    inputs = make_inputs(len(MIXED_IDS), 128, 2, len(MIXED), DTYPES[scaling % 2])
    inputs.topk_ids = torch.tensor(MIXED_IDS, dtype=torch.int32)
    out = check_moe(layer, inputs, make_tile(scaling), split=2 if scaling else None, weight_on_input=scaling == 1)
    assert torch.equal(out[-2], torch.zeros_like(out[-2]))


@pytest.mark.parametrize("shape", [(136, 40), *(pytest.param(s, marks=pytest.mark.slow) for s in [(8, 24), (192, 72)])])
def test_sizes_that_nothing_divides(shape: tuple[int, int]) -> None:
    blocks = [(BlockFormat(4, 16, -1), BlockFormat(3, 16, -1)), (BlockFormat(8, 16, -1), BlockFormat(2, 16, -1))]
    blocks.append((BlockFormat.full_precision(torch.bfloat16),) * 2)
    check_moe(make_layer(blocks, *shape), make_inputs(6, shape[0], 2, 3, torch.bfloat16), make_tile(CORRECT_SUMS))


@pytest.mark.parametrize("tile", SHIPPED_TILES[1:], ids=lambda tile: f"{tile.block_n}x{tile.block_tokens}")
def test_larger_tiles(tile: Tile) -> None:
    block = BlockFormat(4, 16, 64)
    check_moe(make_layer([(block, block)] * 2, 128, 64), make_inputs(5, 128, 1, 2, torch.bfloat16), tile)


@pytest.mark.slow
@pytest.mark.parametrize("tile", SHIPPED_TILES, ids=lambda tile: f"{tile.block_n}x{tile.block_tokens}")
def test_shipped_tiles(tile: Tile) -> None:
    blocks = [(BlockFormat(4, 16, 64), BlockFormat(4, 8, 32)), (BlockFormat(2, 16, 64), BlockFormat(8, 16, 32))]
    layer = make_layer(blocks, 192, 96)
    check_moe(layer, make_inputs(tile.block_tokens + 2, 192, 2, 2, torch.bfloat16), tile)


@pytest.mark.slow
def test_gate_up_and_down_may_have_tiles_of_their_own() -> None:
    layer = repack_layer(uniform_layer(4, 16, 64, 192, 128))
    inputs = make_inputs(5, 192, 2, 2, torch.bfloat16)
    arguments = (inputs.x, inputs.topk_ids, inputs.topk_weights, layer.arena, layer.table, None, 128, "silu", False)
    small, large = make_tile(), make_tile(block_n=128)
    one = triton.mixed_moe(*arguments, tiles=LayerTiles(small, small))
    other = triton.mixed_moe(*arguments, tiles=LayerTiles(large, small))
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)


@pytest.mark.parametrize("bits", [(4, 4, 4, 4), pytest.param((2, 3, 4, 8), marks=pytest.mark.slow)])
def test_partial_sums_of_expert_parallel_ranks_add_up(bits: tuple[int, ...]) -> None:
    layer = make_layer([(BlockFormat(width, 16, 64), BlockFormat(width, 16, 64)) for width in bits], 128, 64)
    inputs = make_inputs(7, 128, 2, 4, torch.float16)
    whole = check_moe(layer, inputs, make_tile())
    parts = []
    for places in ([0, -1, 1, -1], [-1, 0, -1, 1]):
        local = [expert for expert, place in enumerate(places) if place >= 0]
        formats = [layer.formats[expert] for expert in local]
        rank = Layer(layer.arena, layer.table[local], formats, [], 128, 64)
        parts.append(check_moe(rank, inputs, make_tile(), expert_map=torch.tensor(places, dtype=torch.int32)))
    error = tolerances.relative_error(parts[0].float() + parts[1].float(), whole)
    assert error <= 2 * tolerances.GPU_MOE[torch.float16, 16].relative


@pytest.mark.slow
def test_many_pairs_are_sorted_in_three_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = uniform_layer(4, 16, 64, 64, 64)
    inputs = make_inputs(70, 64, 2, 2, torch.bfloat16)
    expected = check_moe(layer, inputs, make_tile())
    sort_pairs = triton.sort_pairs
    monkeypatch.setattr(triton, "sort_pairs", lambda *arguments: sort_pairs(*arguments, few_pairs=0))
    assert torch.equal(check_moe(layer, inputs, make_tile()), expected)


def test_ids_past_the_last_expert_count_as_none() -> None:
    layer = repack_layer(uniform_layer(4, 16, 64, 64, 64))
    inputs = make_inputs(5, 64, 2, 2, torch.bfloat16)
    rest = (inputs.topk_weights, layer.arena, layer.table, None, 64, "silu", False)
    inputs.topk_ids[:, 1] = -1
    expected = triton.mixed_moe(inputs.x, inputs.topk_ids, *rest)
    inputs.topk_ids[:, 1] = 7
    actual = triton.mixed_moe(inputs.x, inputs.topk_ids, *rest)
    assert expected is not None
    assert actual is not None
    assert torch.equal(actual, expected)


def test_empty_batches_and_batches_without_experts() -> None:
    layer = repack_layer(uniform_layer(3, 16, 64, 64, 64))
    for num_tokens in (0, 4):
        inputs = make_inputs(num_tokens, 64, 2, 2, torch.bfloat16)
        inputs.topk_ids.fill_(-1)
        out = triton.mixed_moe(
            inputs.x, inputs.topk_ids, inputs.topk_weights, layer.arena, layer.table, None, 64, "silu", False
        )
        assert out is not None
        assert torch.equal(out, torch.zeros(num_tokens, 64, dtype=torch.bfloat16))


def test_a_layout_of_others_is_left_to_others() -> None:
    layer, inputs = uniform_layer(3, 16, 64, 64, 64), make_inputs(2, 64, 2, 2, torch.bfloat16)
    assert triton.mixed_moe(
        inputs.x, inputs.topk_ids, inputs.topk_weights, layer.arena, layer.table, None, 64, "silu", False
    ) is None  # fmt: skip


@pytest.mark.slow
def test_warm_up_runs_every_batch_that_gets_another_tile() -> None:
    layer = repack_layer(uniform_layer(4, 16, 64, 64, 64))
    sizes = triton.warm_up(layer.arena, layer.table, 64, 64, 2, 140, torch.bfloat16)
    assert sizes == [1, 17, 65, 129, 140]


@st.composite
def mixed_cases(draw: st.DrawFn) -> tuple[Layer, Inputs, torch.Tensor | None, bool, Tile]:
    hidden, intermediate = draw(st.sampled_from(((64, 32), (136, 40), (256, 128), (192, 200))))
    num_local, seed = draw(st.integers(1, 4)), draw(st.integers(0, 999))

    def draw_format(block: Block) -> BlockFormat:
        if draw(st.integers(0, 6)) == 0:
            return BlockFormat.full_precision(draw(st.sampled_from((*DTYPES, torch.float32))))
        K = block_shape(block, hidden, intermediate)[1]
        groups = [size for size in GROUP_SIZES if size == -1 or K % size == 0]
        return BlockFormat(
            draw(st.sampled_from(CODE_BITS)),
            draw(st.sampled_from((8, 16))),
            draw(st.sampled_from(groups)),
            draw(st.booleans()),
        )

    formats = [(draw_format(Block.GATE_UP), draw_format(Block.DOWN)) for _ in range(num_local)]
    expert_map, num_global = None, num_local
    if draw(st.booleans()):
        places = draw(st.permutations([*range(num_local), -1, -1]))
        expert_map, num_global = torch.tensor(places, dtype=torch.int32), num_local + 2
    inputs = make_inputs(
        draw(st.integers(0, 20)), hidden, draw(st.integers(1, 3)), num_global, draw(st.sampled_from(DTYPES)), seed
    )
    tile = make_tile(draw(st.sampled_from(SCALINGS)), draw(st.sampled_from((64, 128))))
    return make_layer(formats, hidden, intermediate, seed), inputs, expert_map, draw(st.booleans()), tile


# Derandomized: outputs that cancel to almost nothing have a large relative error in any implementation.
@pytest.mark.slow
@settings(max_examples=120, derandomize=True)
@given(mixed_cases())
def test_many_mixed_layers(case: tuple[Layer, Inputs, torch.Tensor | None, bool, Tile]) -> None:
    layer, inputs, expert_map, weight_on_input, tile = case
    check_moe(layer, inputs, tile, expert_map, weight_on_input)
