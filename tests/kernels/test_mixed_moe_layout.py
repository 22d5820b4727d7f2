# SPDX-License-Identifier: Apache-2.0
"""The arena: sections aligned and disjoint, what is written is read back, and wrong tables are refused."""

import pytest
import torch

from vllm_ext.kernels.arena import ALIGNMENT, BlockFormat, Field, Layout, section_bytes
from vllm_ext.kernels.blocks import read_codes, read_full_precision, write_codes, write_full_precision
from vllm_ext.kernels.mixed_moe.layout import Block, block_shape, plan_arena

FORMATS = [
    (BlockFormat(3, 16, 32), BlockFormat(4, 8, -1, symmetric=True)),
    (BlockFormat(2, 8, -1), BlockFormat.full_precision(torch.bfloat16)),
    (BlockFormat.full_precision(torch.float32), BlockFormat(5, 16, 8)),
    (BlockFormat(8, 8, 64), BlockFormat(6, 16, 24, symmetric=True)),
    (BlockFormat.full_precision(torch.float16), BlockFormat(3, 8, 8)),
]
HIDDEN, INTERMEDIATE = 64, 24


def test_sections_are_aligned_disjoint_and_fill_the_arena() -> None:
    plan = plan_arena(FORMATS, HIDDEN, INTERMEDIATE)
    sections = []
    for pair, rows in zip(FORMATS, plan.table.tolist(), strict=True):
        for block, block_format in zip(Block, pair, strict=True):
            sizes = section_bytes(block_format, *block_shape(block, HIDDEN, INTERMEDIATE))
            offsets = rows[block][Field.CODES_OFFSET : Field.ZEROS_OFFSET + 1]
            assert [offset >= 0 for offset in offsets] == [size > 0 for size in sizes]
            sections += [(o, s) for o, s in zip(offsets, sizes, strict=True) if s]
    assert all(offset % ALIGNMENT == 0 for offset, _ in sections)
    ends = [offset + size for offset, size in sections]
    starts = [offset for offset, _ in sections[1:]] + [plan.num_bytes]
    assert all(0 <= start - end < ALIGNMENT for start, end in zip(starts, ends, strict=True))
    assert sum(map(sum, plan.block_bytes)) == plan.num_bytes


def test_table_holds_the_formats() -> None:
    table = plan_arena(FORMATS, HIDDEN, INTERMEDIATE).table
    assert table.dtype == torch.int64
    assert table.device.type == "cpu"
    assert table.shape == (5, 2, 7)
    assert table[0, Block.GATE_UP, :3].tolist() == [3, 16, 32]
    assert table[0, Block.DOWN, :3].tolist() == [4, 8, -1]
    assert table[1, Block.DOWN].tolist()[Field.LAYOUT] == Layout.PLAIN_BF16
    assert table[2, Block.GATE_UP].tolist()[Field.WEIGHT_BITS] == 32


def test_blocks_are_read_back_as_written() -> None:
    torch.manual_seed(0)
    plan = plan_arena(FORMATS, HIDDEN, INTERMEDIATE)
    arena = torch.full((plan.num_bytes,), 0xFF, dtype=torch.uint8)
    written = {}
    for expert, rows in enumerate(plan.table.tolist()):
        for block in Block:
            N, K = block_shape(block, HIDDEN, INTERMEDIATE)
            row = rows[block]
            if row[Field.LAYOUT] == Layout.PLAIN_CODES:
                groups = 1 if row[Field.GROUP_SIZE] == -1 else K // row[Field.GROUP_SIZE]
                codes = torch.randint(0, 2 ** row[Field.WEIGHT_BITS], (N, K), dtype=torch.uint8)
                zeros = torch.randint(0, 255, (N, groups), dtype=torch.uint8)
                zeros = None if row[Field.ZEROS_OFFSET] < 0 else zeros
                written[expert, block] = (codes, torch.randn(N, groups).half(), zeros)
                write_codes(arena, row, *written[expert, block])
            else:
                dtype = {16: torch.bfloat16, 32: torch.float32}[row[Field.WEIGHT_BITS]]
                if row[Field.LAYOUT] == Layout.PLAIN_FP16:
                    dtype = torch.float16
                written[expert, block] = torch.randn(N, K).to(dtype)
                write_full_precision(arena, row, written[expert, block])
    for (expert, block), expected in written.items():
        row = plan.table[expert, block].tolist()
        shape = block_shape(block, HIDDEN, INTERMEDIATE)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(read_full_precision(arena, row, *shape), expected)
            continue
        for got, want in zip(read_codes(arena, row, *shape), expected, strict=True):
            assert (got is None and want is None) or torch.equal(got, want)


def test_impossible_formats_are_refused_with_expert_and_block() -> None:
    good = BlockFormat(4, 16, 8)
    with pytest.raises(ValueError, match="expert 1, down: group_size=16 does not divide K=24"):
        plan_arena([(good, good), (good, BlockFormat(4, 16, 16))], HIDDEN, INTERMEDIATE)
    with pytest.raises(ValueError, match="expert 0, down: K=20 codes of bits=3"):
        plan_arena([(good, BlockFormat(3))], HIDDEN, 20)
    with pytest.raises(ValueError, match=r"weights of torch\.float64"):
        BlockFormat.full_precision(torch.float64)


def test_wrong_tensors_are_refused() -> None:
    plan = plan_arena([(BlockFormat(4, 16, 32), BlockFormat(4, 16, 8, symmetric=True))], HIDDEN, INTERMEDIATE)
    arena = torch.zeros(plan.num_bytes, dtype=torch.uint8)
    row = plan.table[0, Block.GATE_UP].tolist()
    N, K = block_shape(Block.GATE_UP, HIDDEN, INTERMEDIATE)
    codes, scales = torch.zeros(N, K, dtype=torch.uint8), torch.ones(N, 2).half()
    zeros = torch.zeros(N, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"scales must be torch.float16 \[48, 2\], got torch.float32"):
        write_codes(arena, row, codes, scales.float(), zeros)
    with pytest.raises(ValueError, match=r"zeros must be torch.uint8 \[48, 2\]"):
        write_codes(arena, row, codes, scales, zeros[:, :1])
    with pytest.raises(ValueError, match="exactly for asymmetric blocks"):
        write_codes(arena, row, codes, scales, None)
    with pytest.raises(ValueError, match="layout 0 is not a full-precision layout"):
        read_full_precision(arena, row, N, K)
    with pytest.raises(ValueError, match="the arena is truncated"):
        read_codes(arena[: N * K // 2 - 1], row, N, K)
