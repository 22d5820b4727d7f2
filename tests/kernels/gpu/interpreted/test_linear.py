# SPDX-License-Identifier: Apache-2.0
"""The linear kernel against the reference: every width, group, tile and way of scaling; stacked blocks; split K."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.gpu.fragment_cases import check_linear, repack_linear
from tests.kernels.test_mixed_linear import Linear, make_linear
from vllm_ext.kernels.arena import BlockFormat, Field
from vllm_ext.kernels.blocks import write_codes
from vllm_ext.kernels.gpu.configurations import (
    CORRECT_SUMS,
    SCALE_PRODUCTS,
    SCALE_WEIGHTS,
    SHIPPED_TILES,
    Tile,
)
from vllm_ext.kernels.gpu.layout import GROUP_SIZES
from vllm_ext.kernels.mixed_linear import triton
from vllm_ext.kernels.packing import CODE_BITS

DTYPES = (torch.bfloat16, torch.float16)
SCALINGS = (SCALE_WEIGHTS, SCALE_PRODUCTS, CORRECT_SUMS)


def make_tile(scaling: int = SCALE_PRODUCTS, block_n: int = 64, block_tokens: int = 16) -> Tile:
    return Tile(block_n, block_tokens, num_warps=4, num_stages=3, scaling=scaling)


def make_x(rows: int, K: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_columns(bits: int, act_bits: int, columns: slice, dtypes: Sequence[torch.dtype]) -> None:
    """Rows of x that are 1 in one column read the weight back, and whole numbers survive every rounding."""
    layer = make_linear([(BlockFormat(bits, act_bits, 64), 70)], 128, seed=bits)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (70, 128), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (70, 2), generator=generator, dtype=torch.uint8)
    write_codes(layer.arena, layer.table[0].tolist(), codes, torch.ones(70, 2).half(), zeros)
    on_gpu = repack_linear(layer, 128)
    expected = (codes.float() - zeros.float().repeat_interleave(64, 1)).T[columns]
    for dtype in dtypes:
        for scaling in SCALINGS if act_bits == 16 else (SCALE_PRODUCTS,):
            x = torch.eye(128, dtype=dtype)[columns]
            out = triton.mixed_linear(x, on_gpu.arena, on_gpu.table, 70, None, tile=make_tile(scaling))
            assert out is not None
            assert torch.equal(out.float(), expected)


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("act_bits", [8, 16])
def test_codes_are_multiplied_by_their_own_column(bits: int, act_bits: int) -> None:
    # One column in eleven: other slots, lanes, elements and pieces each time.
    check_columns(bits, act_bits, slice(bits, None, 11), DTYPES[bits % 2 :][:1])


@pytest.mark.slow
@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("act_bits", [8, 16])
def test_every_code_is_multiplied_by_its_own_column(bits: int, act_bits: int) -> None:
    check_columns(bits, act_bits, slice(None), DTYPES)


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("act_bits", [8, 16])
def test_every_width(bits: int, act_bits: int) -> None:
    place = CODE_BITS.index(bits) + act_bits // 16
    group_size = GROUP_SIZES[place % len(GROUP_SIZES)]
    block = BlockFormat(bits, act_bits, group_size, symmetric=place % 3 == 0)
    # No tile divides these sizes; whole rows need not be whole chunks either.
    K = 136 if group_size == -1 else 192 if group_size < 128 else 256
    layer = make_linear([(block, 70)], K, seed=bits)
    check_linear(layer, make_x(9, K, DTYPES[bits % 2]), tile=make_tile(SCALINGS[place % 3]))


@pytest.mark.slow
@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_at_every_group_and_scaling(bits: int, act_bits: int, dtype: torch.dtype) -> None:
    for group_size in GROUP_SIZES:
        for symmetric in (False, True):
            layer = make_linear([(BlockFormat(bits, act_bits, group_size, symmetric), 130)], 384, seed=bits)
            for scaling in SCALINGS if act_bits == 16 else (SCALE_PRODUCTS,):
                check_linear(layer, make_x(17, 384, dtype), tile=make_tile(scaling))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ternary_and_full_precision_blocks(dtype: torch.dtype) -> None:
    blocks = [(BlockFormat.ternary(16, 64), 40)]
    blocks += [(BlockFormat.full_precision(kept), 33) for kept in (torch.bfloat16, torch.float16, torch.float32)]
    layer = make_linear(blocks, 192)
    check_linear(layer, make_x(5, 192, dtype), tile=make_tile(SCALE_WEIGHTS))


@pytest.mark.slow
@pytest.mark.parametrize("tile", SHIPPED_TILES, ids=lambda tile: f"{tile.block_n}x{tile.block_tokens}")
def test_shipped_tiles(tile: Tile) -> None:
    # Three tiles of 64 rows, of which tiles of 128 take one and a half; tokens that fill no tile.
    layer = make_linear([(BlockFormat(4, 16, 128), 130), (BlockFormat(3, 8, 64), 20)], 256)
    rows = tile.block_tokens + 3
    check_linear(layer, make_x(rows, 256, torch.bfloat16), tile=tile)


@st.composite
def stacked_cases(draw: st.DrawFn) -> tuple[Linear, torch.Tensor, torch.Tensor | None, Tile, int | None]:
    K = draw(st.sampled_from((64, 192, 256, 520)))
    groups = [size for size in GROUP_SIZES if size == -1 or K % size == 0]
    blocks = []
    for _ in range(draw(st.integers(1, 4))):
        block = BlockFormat(
            draw(st.sampled_from(CODE_BITS)),
            draw(st.sampled_from((8, 16))),
            draw(st.sampled_from(groups)),
            draw(st.booleans()),
        )
        if draw(st.integers(0, 5)) == 0:
            block = BlockFormat.full_precision(draw(st.sampled_from((*DTYPES, torch.float32))))
        # Few outputs may cancel to almost nothing, all of them.
        blocks.append((block, draw(st.integers(9, 140))))
    seed = draw(st.integers(0, 999))
    layer = make_linear(blocks, K, seed)
    shape = (*draw(st.lists(st.integers(0, 5), max_size=2)), K)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
    bias = torch.randn(layer.out_features, generator=generator) if draw(st.booleans()) else None
    tile = make_tile(draw(st.sampled_from(SCALINGS)), draw(st.sampled_from((64, 128))))
    return layer, x, bias, tile, draw(st.sampled_from((None, 2, 3, 8)))


def check_stacked(case: tuple[Linear, torch.Tensor, torch.Tensor | None, Tile, int | None]) -> None:
    layer, x, bias, tile, split = case
    check_linear(layer, x, bias, tile, split)


@settings(max_examples=3, derandomize=True)
@given(stacked_cases())
def test_stacked_blocks(case: tuple[Linear, torch.Tensor, torch.Tensor | None, Tile, int | None]) -> None:
    check_stacked(case)


# Derandomized: outputs that cancel to almost nothing have a large relative error in any implementation.
@pytest.mark.slow
@settings(max_examples=250, derandomize=True)
@given(stacked_cases())
def test_many_stacked_blocks(case: tuple[Linear, torch.Tensor, torch.Tensor | None, Tile, int | None]) -> None:
    check_stacked(case)


def test_a_single_output() -> None:
    layer = make_linear([(BlockFormat(4, 16, 32), 1), (BlockFormat(3, 8, 32), 1)], 32)
    check_linear(layer, make_x(7, 32, torch.float16), tile=make_tile())


def test_values_that_are_not_finite_stay_in_their_rows() -> None:
    layer = repack_linear(make_linear([(BlockFormat(4, 8, 64), 40), (BlockFormat(4, 16, 64), 40)], 128), 128)
    x = make_x(4, 128, torch.bfloat16)
    clean = triton.mixed_linear(x, layer.arena, layer.table, 80, None, tile=make_tile())
    x[2, 5] = float("nan")
    out = triton.mixed_linear(x, layer.arena, layer.table, 80, None, tile=make_tile())
    assert out is not None
    assert clean is not None
    assert out[2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(out[others], clean[others])


def test_a_layout_of_others_is_left_to_others() -> None:
    layer = make_linear([(BlockFormat(4, 16, 64), 40)], 128)
    assert triton.mixed_linear(make_x(2, 128, torch.bfloat16), layer.arena, layer.table, 40, None) is None


def test_wrong_tables_are_refused() -> None:
    layer = repack_linear(make_linear([(BlockFormat(4, 16, 64), 40)], 128), 128)
    x = make_x(2, 128, torch.bfloat16)
    with pytest.raises(ValueError, match="out_features is 41, but the table describes 40 outputs"):
        triton.mixed_linear(x, layer.arena, layer.table, 41, None)
    with pytest.raises(ValueError, match="the arena is truncated"):
        triton.mixed_linear(x, layer.arena[:64], layer.table, 40, None)
    broken = layer.table.clone()
    broken[0, Field.SCALES_OFFSET] += 64
    with pytest.raises(ValueError, match="table and shapes differ"):
        triton.mixed_linear(x, layer.arena, broken, 40, None)


@pytest.mark.slow
def test_warm_up_runs_every_batch_that_gets_another_tile() -> None:
    layer = repack_linear(make_linear([(BlockFormat(4, 16, 64), 20)], 128), 128)
    assert triton.warm_up(layer.arena, layer.table, 128, 20, 140, torch.bfloat16) == [1, 17, 65, 129]
