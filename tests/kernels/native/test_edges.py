# SPDX-License-Identifier: Apache-2.0
"""Both operators at the edges: values that are not finite, sizes that overflow, no columns, passes of long prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.mixed_moe_cases import Inputs, Layer, make_inputs, make_layer
from tests.kernels.native.test_records_linear import make_linear
from vllm_ext.kernels import tolerances
from vllm_ext.kernels.act_quant import act_quant
from vllm_ext.kernels.act_quant import reference as act_quant_reference
from vllm_ext.kernels.arena import BlockFormat, Field, Layout
from vllm_ext.kernels.mixed_linear import cpu as linear_cpu
from vllm_ext.kernels.mixed_linear import reference as linear_reference
from vllm_ext.kernels.mixed_moe import cpu as moe_cpu
from vllm_ext.kernels.mixed_moe import reference as moe_reference

PLAIN = BlockFormat.full_precision(torch.bfloat16)

#: Tokens that one pass takes (kPassTokens in cpu.cpp): one less, as many, one more, more than two passes.
PASSES = (1023, 1024, 1025, 2049)


def record(bits: int, act_bits: int, group_size: int = -1) -> BlockFormat:
    return BlockFormat(bits, act_bits, group_size, layout=Layout.CPU_RECORD)


def call_moe(implementation: Any, layer: Layer, inputs: Inputs) -> torch.Tensor:
    routing = inputs.topk_ids, inputs.topk_weights
    arguments = (layer.arena, layer.table, None, layer.intermediate_size, "silu", False)
    return implementation.mixed_moe(inputs.x, *routing, *arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("act_bits", [8, 16])
def test_experts_keep_what_is_not_finite_to_its_token(isa: str, act_bits: int, bad: float) -> None:
    for group_size in (128, -1):
        codes = record(3, act_bits, group_size)
        layer = make_layer([(record(4, act_bits, group_size), codes), (PLAIN, codes), (codes, PLAIN)], 256, 128)
        inputs = make_inputs(5, 256, 2, 3, torch.bfloat16)
        inputs.topk_ids = torch.tensor([[0, 1], [2, 0], [0, 2], [1, 2], [2, 1]], dtype=torch.int32)
        expected = call_moe(moe_cpu, layer, inputs)
        inputs.x[2, 7] = bad
        out = call_moe(moe_cpu, layer, inputs)
        assert out[2].isnan().all()
        assert call_moe(moe_reference, layer, inputs)[2].isnan().all()
        others = [0, 1, 3, 4]
        assert torch.equal(out[others], expected[others])
        # Its expert alone: a block kept as it is beside codes.
        inputs.topk_ids = torch.full((5, 1), 1, dtype=torch.int32)
        inputs.topk_weights = inputs.topk_weights[:, :1]
        assert not call_moe(moe_cpu, layer, inputs)[2].isfinite().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("act_bits", [8, 16])
def test_linears_keep_what_is_not_finite_to_its_row(isa: str, act_bits: int, bad: float) -> None:
    blocks = [(record(4, act_bits, 64), 24), (record(3, act_bits), 17), (PLAIN, 9)]
    arena, table = make_linear(blocks, 192)
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = linear_cpu.mixed_linear(x, arena, table, 50, None)
    x[2, 7] = bad
    out = linear_cpu.mixed_linear(x, arena, table, 50, None)
    assert out[2, :41].isnan().all()
    assert not out[2, 41:].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], expected[others])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_int8_groups_that_are_not_finite_have_no_scale(isa: str, bad: float) -> None:
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    x[1, 40] = bad
    for group_size in (32, -1):
        codes, scales = act_quant(x, group_size)
        expected_codes, expected_scales = act_quant_reference.act_quant(x, group_size)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(scales, expected_scales) or torch.equal(scales.isnan(), expected_scales.isnan())
        assert torch.equal(scales.nan_to_num(), expected_scales.nan_to_num())
        group = 0 if group_size == -1 else 1
        assert scales[1, group].isnan()
        assert int(scales.isnan().sum()) == 1


@pytest.mark.parametrize("act_bits", [8, 16])
def test_prompts_longer_than_a_pass(ops: Any, act_bits: int) -> None:
    """Both sides of the border between passes, against the reference token by token."""
    formats = [(record(2, act_bits, 32), record(3, act_bits)), (record(5, act_bits, 64), record(6, act_bits, 32))]
    layer = make_layer(formats, 64, 32)
    arena, table = make_linear([(record(3, act_bits, 32), 20), (record(5, act_bits), 17)], 64)
    for num_tokens in PASSES:
        inputs = make_inputs(num_tokens, 64, 1, 2, torch.bfloat16, seed=num_tokens)
        in_float32 = Inputs(inputs.x.float(), inputs.topk_ids, inputs.topk_weights)
        out, expected = call_moe(moe_cpu, layer, inputs), call_moe(moe_reference, layer, in_float32)
        assert tolerances.relative_error(out, expected) <= tolerances.NATIVE_MOE[act_bits].relative
        # A token that is missed, or another's, is off by its whole size.
        errors = (out - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-3)
        assert float(errors.max()) < 0.2
        out = linear_cpu.mixed_linear(inputs.x, arena, table, 37, None)
        expected = linear_reference.mixed_linear(inputs.x.float(), arena, table, 37, None)
        errors = (out - expected).norm(dim=1) / expected.norm(dim=1)
        assert float(errors.max()) < 0.01


def test_inputs_without_columns_are_errors(ops: Any) -> None:
    """Also of the operators themselves, which have no Python in front of them."""
    layer = make_layer([(record(4, 16), record(4, 16))], 128, 128)
    routing = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    x = torch.zeros(1, 0).bfloat16()
    for operator, rest in ((moe_cpu.mixed_moe, ("silu", False)), (ops.mixed_moe, (False,))):
        with pytest.raises(ValueError, match="hidden size must be positive"):
            operator(x, *routing, layer.arena, layer.table, None, 128, *rest)
    arena, table = make_linear([(record(4, 16), 24)], 64)
    for operator in (linear_cpu.mixed_linear, ops.mixed_linear):
        with pytest.raises(ValueError, match="K must be positive"):
            operator(torch.zeros(4, 0).bfloat16(), arena, table, 24, None)


@pytest.mark.parametrize("outputs", [2**62, 2**31, 0, -16])
def test_sizes_that_overflow_are_errors(ops: Any, outputs: int) -> None:
    """Sums and products of such sizes wrap around, to something that seems to lie inside the arena."""
    arena, table = make_linear([(record(2, 16), 16)], 128)
    table = table.repeat(5, 1)
    table[:4, -1] = outputs
    x = torch.zeros(1, 128).bfloat16()
    total = 4 * outputs + 16
    for out_features in {16, total if 0 < total < 2**63 else 16}:
        with pytest.raises(ValueError, match=r"row block|out_features|outside the arena"):
            linear_cpu.mixed_linear(x, arena, table, out_features, None)
        with pytest.raises(ValueError, match="row block"):
            ops.mixed_linear(x, arena, table, out_features, None)


@pytest.mark.parametrize("layout", [Layout.CPU_RECORD, Layout.PLAIN_FP32])
@pytest.mark.parametrize("intermediate_size", [2**62, 2**61 + 128, 2**30, 2**30 - 1, 2**24])
def test_an_intermediate_size_that_overflows_is_an_error(ops: Any, intermediate_size: int, layout: Layout) -> None:
    layer = make_layer([(record(2, 16), record(2, 16))], 128, 128)
    layer.table[:, :, Field.LAYOUT] = layout
    layer.table[:, 1, Field.LAYOUT] = Layout.CPU_RECORD
    x, routing = torch.zeros(1, 128).bfloat16(), (torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    for operator, rest in ((moe_cpu.mixed_moe, ("silu", False)), (ops.mixed_moe, (False,))):
        with pytest.raises(ValueError, match=r"outside the arena|intermediate_size must be positive and below"):
            operator(x, *routing, layer.arena, layer.table, None, intermediate_size, *rest)


def test_weights_to_expand_that_overflow_are_errors(ops: Any) -> None:
    arena = torch.zeros(64 * 9, dtype=torch.uint8)
    for N, K in ((2**62, 2**60), (2**31 - 1, 2**31 - 128), (2**24, 2**24), (16, 2**62)):
        with pytest.raises(ValueError, match=r"a weight cannot be|outside the arena"):
            ops.dequantize_block(arena, 0, 2, -1, N, K, False)
