# SPDX-License-Identifier: Apache-2.0
"""Prepared activations: the codes and scales of act_quant's reference, bit by bit, and sums."""

from __future__ import annotations

import pytest
import torch

from vllm_ext.kernels.act_quant import reference
from vllm_ext.kernels.arena import BlockFormat, Layout
from vllm_ext.kernels.gpu.activations import prepare_activations, prepare_by_expert
from vllm_ext.kernels.gpu.formats import INT8_GROUPS, SUM_DEPTHS, describe_kind
from vllm_ext.kernels.gpu.sorting import sort_pairs
from vllm_ext.kernels.mixed_moe.layout import plan_arena

EVERY_KIND = (1 << (len(INT8_GROUPS) + len(SUM_DEPTHS))) - 1
STRIDE = 12


def sum_pieces(values: torch.Tensor, depth: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % 128))
    return padded.unflatten(-1, (-1, depth)).sum(-1)


def make_values(dtype: torch.dtype, K: int = 256) -> torch.Tensor:
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[1, :64] = 0
    x[2, 3] = 300
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kind_at_once(dtype: torch.dtype) -> None:
    x = make_values(dtype)
    codes, scales, sums = prepare_activations(x, EVERY_KIND, STRIDE)
    assert codes.shape == (len(INT8_GROUPS), *x.shape)
    for kind in range(len(INT8_GROUPS) + len(SUM_DEPTHS)):
        int8, group_size, depth = describe_kind(kind)
        pieces = 256 // depth
        if not int8:
            assert torch.allclose(sums[kind, :, :pieces], sum_pieces(x.float(), depth), atol=1e-3)
            continue
        expected_codes, expected_scales = reference.act_quant(x, group_size)
        assert torch.equal(codes[kind], expected_codes)
        repeated = expected_scales.expand(-1, pieces) if group_size == -1 else expected_scales
        assert torch.equal(scales[kind, :, :pieces], repeated)
        assert torch.equal(sums[kind, :, :pieces], sum_pieces(expected_codes.float(), depth))


def test_rows_that_no_chunk_divides_end_in_empty_pieces() -> None:
    x = make_values(torch.bfloat16, K=160)
    codes, scales, sums = prepare_activations(x, 0b11, STRIDE)
    whole, by_group = reference.act_quant(x, -1), reference.act_quant(x, 32)
    assert torch.equal(codes[0], whole[0])
    assert torch.equal(scales[0, :, :2], whole[1].expand(-1, 2))
    assert torch.equal(sums[0, :, :2], sum_pieces(whole[0].float(), 128))
    assert torch.equal(codes[1], by_group[0])
    assert torch.equal(scales[1, :, :8], torch.nn.functional.pad(by_group[1], (0, 3)))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_group_that_is_not_finite_is_zeros_with_a_scale_that_is_not(value: float) -> None:
    x = make_values(torch.bfloat16)
    x[3, 70] = value
    for kind, group_size in ((0, -1), (2, 64)):
        codes, scales, sums = prepare_activations(x, 1 << kind, STRIDE)
        expected_codes, expected_scales = reference.act_quant(x, group_size)
        assert torch.equal(codes[0], expected_codes)
        pieces = 2 if group_size == -1 else 4
        assert torch.equal(scales[0, :, :pieces].isnan(), expected_scales.isnan().expand(-1, pieces))
        assert not sums[0, :, :pieces].isnan().any()


def test_sorted_rows_are_prepared_for_their_own_expert() -> None:
    blocks = [BlockFormat(4, *widths, layout=Layout.GPU_FRAGMENT) for widths in ((8, 32), (16, 128), (8, -1), (16, 64))]
    blocks.append(BlockFormat.full_precision(torch.bfloat16))
    table = plan_arena([(block, block) for block in blocks], 256, 256).table
    ids = torch.tensor([[0, 3], [-1, 1], [2, 0], [4, 2]], dtype=torch.int32)
    order = sort_pairs(ids, None, len(blocks), 16)
    hidden = torch.randn(ids.numel(), 256, generator=torch.Generator().manual_seed(4)).bfloat16()
    # Prepared: int8 by rows and by 32, and sums of 128. Sums of 64 are not asked for.
    codes, scales, sums = prepare_by_expert(hidden, table, order, 0b1000011, STRIDE)
    assert codes.shape == (1, *hidden.shape)
    for position, expert in enumerate(order.experts[:7].tolist()):
        row, block = hidden[position : position + 1], blocks[expert]
        if block.act_bits == 8:
            expected, expected_scales = reference.act_quant(row, block.group_size)
            assert torch.equal(codes[0, position], expected[0])
            assert torch.equal(scales[0, position, : expected_scales.shape[1]], expected_scales[0])
        elif block.group_size == 128:
            assert torch.allclose(sums[0, position, :2], sum_pieces(row.float(), 128)[0], atol=1e-3)
