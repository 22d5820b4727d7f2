# SPDX-License-Identifier: Apache-2.0
"""`mixed_linear`, `act_quant`, repacking and dequantizing in C++, on every instruction set."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from tests.kernels.native.test_layout import weights
from vllm_ext.kernels import tolerances
from vllm_ext.kernels.act_quant import act_quant
from vllm_ext.kernels.act_quant import reference as act_quant_reference
from vllm_ext.kernels.arena import BlockFormat, Layout, num_groups
from vllm_ext.kernels.blocks import copy_block, dequantize_block, write_codes, write_full_precision
from vllm_ext.kernels.mixed_linear import cpu, reference
from vllm_ext.kernels.mixed_linear.layout import plan_linear
from vllm_ext.kernels.native import layout
from vllm_ext.kernels.packing import CODE_BITS

#: (N, K, group size)
SHAPES = ((48, 256, 128), (37, 136, -1), (16, 384, 64), (130, 192, 32), (1, 8, -1))
TOKENS = (1, 3, 16, 40, 257)


def make_linear(blocks: list[tuple[BlockFormat, int]], K: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(arena, table) of random codes over the full range."""
    generator = torch.Generator().manual_seed(seed)
    plan = plan_linear(blocks, K)
    arena = torch.full((plan.num_bytes,), 0xA5, dtype=torch.uint8)
    for (block, N), row in zip(blocks, plan.table.tolist(), strict=True):
        if block.layout != Layout.CPU_RECORD:
            write_full_precision(arena, row, (torch.randn(N, K, generator=generator) / K**0.5).bfloat16())
            continue
        bits, groups = block.weight_bits, num_groups(K, block.group_size)
        codes = torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
        scales = torch.rand(N, groups, generator=generator).add(0.5).div(2 ** (bits - 2) * K**0.5).half()
        zeros = torch.randint(0, 2**bits, (N, groups), generator=generator, dtype=torch.uint8)
        write_codes(arena, row, codes, scales, None if block.symmetric else zeros)
    return arena, plan.table


def record(bits: int, act_bits: int, group_size: int, symmetric: bool = False) -> BlockFormat:
    return BlockFormat(bits, act_bits, group_size, symmetric, Layout.CPU_RECORD)


def measure(arena: torch.Tensor, table: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    out_features = int(table[:, -1].sum())
    actual = cpu.mixed_linear(x, arena, table, out_features, bias)
    assert actual.dtype == x.dtype
    assert actual.shape == (*x.shape[:-1], out_features)
    return tolerances.relative_error(actual, reference.mixed_linear(x.float(), arena, table, out_features, bias))


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("bits", CODE_BITS)
def test_every_width_at_odd_shapes(isa: str, bits: int, act_bits: int) -> None:
    tolerance = tolerances.NATIVE_LINEAR[act_bits]
    for N, K, group_size in SHAPES:
        arena, table = make_linear([(record(bits, act_bits, group_size, bits % 2 == 1), N)], K, seed=bits)
        for tokens in TOKENS:
            generator = torch.Generator().manual_seed(tokens)
            x = torch.randn(tokens, K, generator=generator).to(torch.float16 if tokens == 3 else torch.bfloat16)
            bias = torch.randn(N, generator=generator).to(x.dtype) if tokens % 2 else None
            limit = tolerances.find_limit(tolerance, tokens * N)
            assert measure(arena, table, x, bias) <= limit, (N, K, tokens, tolerance.reason)


@pytest.mark.parametrize("act_bits", [8, 16])
def test_ternary_weights_as_they_are_loaded(isa: str, act_bits: int) -> None:
    tolerance = tolerances.NATIVE_LINEAR[act_bits]
    for N, K, group_size in ((48, 256, 128), (37, 192, -1), (130, 192, 32), (16, 64, 64)):
        stored = BlockFormat.ternary(act_bits, group_size)
        generator = torch.Generator().manual_seed(K)
        (source, source_table), (target, table) = (
            (torch.full((plan.num_bytes,), 0xA5, dtype=torch.uint8), plan.table)
            for plan in (plan_linear([(block, N)], K) for block in (stored, stored._replace(layout=Layout.CPU_RECORD)))
        )
        codes = torch.randint(1, 4, (N, K), generator=generator, dtype=torch.uint8)
        scales = torch.rand(N, num_groups(K, group_size), generator=generator).add(0.5).div(K**0.5).half()
        rows = [one[0].tolist() for one in (source_table, table)]
        write_codes(source, rows[0], codes, scales, None)
        copy_block(source, rows[0], target, rows[1], N, K)
        assert torch.equal(dequantize_block(target, rows[1], N, K), dequantize_block(source, rows[0], N, K))
        for tokens in TOKENS:
            x = torch.randn(tokens, K, generator=generator).bfloat16()
            assert measure(target, table, x) <= tolerances.find_limit(tolerance, tokens * N), (N, K, tokens)


def test_stacked_blocks_any_leading_shape_and_any_bias(isa: str) -> None:
    blocks = [(record(3, 8, 64), 24), (BlockFormat.full_precision(torch.bfloat16), 9), (record(5, 16, -1), 33)]
    arena, table = make_linear(blocks, 192)
    generator = torch.Generator().manual_seed(0)
    for shape in ((192,), (2, 3, 192), (0, 192), (1, 192)):
        x = torch.randn(shape, generator=generator).bfloat16()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            bias = torch.randn(66, generator=generator).to(dtype)
            assert measure(arena, table, x, bias) <= tolerances.MIXED_LINEAR[torch.bfloat16, 16].relative
    strided = torch.randn(192, 5, generator=generator).bfloat16().T
    assert measure(arena, table, strided) <= tolerances.MIXED_LINEAR[torch.bfloat16, 16].relative


def test_bad_arguments_are_errors_and_never_read_out_of_bounds(ops: Any) -> None:
    arena, table = make_linear([(record(4, 16, 32), 24)], 64)
    x = torch.randn(4, 64).bfloat16()
    cpu.mixed_linear(x, arena, table, 24, None)
    with pytest.raises(ValueError, match="group_size=32 does not divide K=72"):
        cpu.mixed_linear(torch.zeros(4, 72).bfloat16(), arena, table, 24, None)
    with pytest.raises(ValueError, match="the arena is truncated"):
        cpu.mixed_linear(x, arena[:-64], table, 24, None)
    with pytest.raises(ValueError, match="out_features is 25, but the table describes 24 outputs"):
        cpu.mixed_linear(x, arena, table, 25, None)
    wider = table.clone()
    wider[0, -1] = 40
    with pytest.raises(ValueError, match="the arena is truncated"):
        cpu.mixed_linear(x, arena, wider, 40, None)


@settings(max_examples=60)
@given(weights())
def test_repacking_is_the_drawing_byte_for_byte(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, bool],
) -> None:
    from vllm_ext.kernels.native.load import load_ops

    codes, scales, zeros, bits, group_size, gate_up = case
    ops = load_ops()
    assert ops is not None
    for given_zeros in (zeros, None):
        expected = layout.pack_records(codes, scales, given_zeros, bits, group_size, gate_up).flatten()
        out = torch.full(expected.shape, 0xA5, dtype=torch.uint8)
        ops.repack_block(codes, scales, given_zeros, bits, group_size, gate_up, out)
        assert torch.equal(out, expected)
    N, K = codes.shape
    repeat = K if group_size == -1 else group_size
    step, zero = (t.float().repeat_interleave(repeat, dim=1) for t in (scales, zeros))
    packed = layout.pack_records(codes, scales, zeros, bits, group_size, gate_up).flatten()
    arena = torch.cat([torch.full((64,), 0xA5, dtype=torch.uint8), packed])
    found = ops.dequantize_block(arena, 64, bits, group_size, N, K, gate_up)
    assert torch.equal(found, step * (codes.float() - zero))


def test_repacking_takes_strided_codes_and_refuses_wrong_ones(ops: Any) -> None:
    codes, scales = torch.randint(0, 8, (128, 16), dtype=torch.uint8).T, torch.rand(1, 16).half().T
    expected = layout.pack_records(codes, scales, None, 3, 128).flatten()
    out = torch.zeros_like(expected)
    ops.repack_block(codes, scales, None, 3, 128, False, out)
    assert torch.equal(out, expected)
    for wrong in (out[:-64], torch.zeros(expected.numel() + 64, dtype=torch.uint8)):
        with pytest.raises((RuntimeError, ValueError)):
            ops.repack_block(codes, scales, None, 3, 128, False, wrong)
    with pytest.raises((RuntimeError, ValueError)):
        ops.repack_block(codes, scales[:8], None, 3, 128, False, out)
    with pytest.raises((RuntimeError, ValueError)):
        ops.dequantize_block(out, 64, 3, 128, 16, 128, False)


def find_resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_huge_arenas_are_zero_aligned_and_given_back(ops: Any) -> None:
    for num_bytes in (0, 1, 4096, (8 << 20) + 13):
        arena = ops.empty_huge(num_bytes)
        assert arena.dtype == torch.uint8
        assert arena.shape == (num_bytes,)
        assert arena.data_ptr() % 64 == 0
        assert int(arena.sum()) == 0
        arena.fill_(7)
        parameter = torch.nn.Parameter(arena, requires_grad=False)
        assert parameter.data_ptr() == arena.data_ptr()
    del arena, parameter
    before, num_bytes = find_resident_bytes(), 256 << 20
    arena = ops.empty_huge(num_bytes).fill_(7)
    assert find_resident_bytes() - before > 0.9 * num_bytes
    del arena
    assert find_resident_bytes() - before < 0.1 * num_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_activations_are_the_reference(isa: str, dtype: torch.dtype) -> None:
    for tokens, K, group_size in ((1, 128, 128), (7, 136, -1), (33, 192, 64), (5, 40, 8), (0, 64, 32), (3, 96, 32)):
        x = (torch.randn(tokens, K) * torch.rand(tokens, 1) * 10).to(dtype)
        codes, scales = act_quant(x, group_size)
        expected_codes, expected_scales = act_quant_reference.act_quant(x, group_size)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(scales, expected_scales)
