# SPDX-License-Identifier: Apache-2.0
"""The reference against a float64 loop, the CPU path against the reference, and the op around them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.mixed_moe_cases import naive_round
from vllm_ext.kernels import tolerances
from vllm_ext.kernels.arena import FULL_PRECISION_DTYPES, BlockFormat, Layout, num_groups
from vllm_ext.kernels.blocks import write_codes, write_full_precision
from vllm_ext.kernels.fallback import warn_no_fast_path
from vllm_ext.kernels.mixed_linear import cpu, mixed_linear, op, reference
from vllm_ext.kernels.mixed_linear.layout import NUM_ROWS, plan_linear
from vllm_ext.kernels.packing import CODE_BITS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: (N, K) that no kernel tile divides.
ODD_SHAPES = ((1, 8), (37, 136), (96, 40), (130, 192))


@dataclass
class Linear:
    """A written arena, and beside it the float64 weights of every row block."""

    arena: torch.Tensor
    table: torch.Tensor
    blocks: list[tuple[BlockFormat, int]]
    weights: list[np.ndarray]

    @property
    def out_features(self) -> int:
        return sum(rows for _, rows in self.blocks)


def make_linear(blocks: list[tuple[BlockFormat, int]], K: int, seed: int = 0) -> Linear:
    """Random codes, scales and zero points of the full range, in an arena that was full of other bytes."""
    generator = torch.Generator().manual_seed(seed)
    plan = plan_linear(blocks, K)
    arena = torch.full((plan.num_bytes,), 0xA5, dtype=torch.uint8)
    weights = []
    for (block_format, N), row in zip(blocks, plan.table.tolist(), strict=True):
        if block_format.layout in FULL_PRECISION_DTYPES:
            weight = (torch.randn(N, K, generator=generator) / K**0.5).to(FULL_PRECISION_DTYPES[block_format.layout])
            write_full_precision(arena, row, weight)
            weights.append(weight.double().numpy())
            continue
        bits, groups = block_format.weight_bits, num_groups(K, block_format.group_size)
        lowest = 1 if block_format.layout == Layout.PLAIN_TERNARY else 0
        codes = torch.randint(lowest, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
        scales = torch.rand(N, groups, generator=generator).add(0.5).div(2 ** (bits - 2) * K**0.5).half()
        zeros = torch.randint(0, 2**bits, (N, groups), generator=generator, dtype=torch.uint8)
        if block_format.symmetric:
            zeros.fill_(2 ** (bits - 1))
        write_codes(arena, row, codes, scales, None if block_format.symmetric else zeros)
        step, zero = (t.double().numpy().repeat(K // groups, axis=1) for t in (scales, zeros))
        weights.append(step * (codes.double().numpy() - zero))
    return Linear(arena, plan.table, blocks, weights)


def naive_linear(layer: Linear, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """float64, one token and one output at a time."""
    tokens = x.double().reshape(-1, x.shape[-1]).numpy()
    out = np.zeros((len(tokens), layer.out_features))
    for token, vector in enumerate(tokens):
        column = 0
        for (block_format, rows), weight in zip(layer.blocks, layer.weights, strict=True):
            rounded = naive_round(vector, block_format)
            for row in range(rows):
                out[token, column] = float(weight[row] @ rounded) + (0.0 if bias is None else float(bias[column]))
                column += 1
    return torch.from_numpy(out).view(*x.shape[:-1], layer.out_features)


def call(implementation: Any, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return implementation.mixed_linear(x, layer.arena, layer.table, layer.out_features, bias)


def check(layer: Linear, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    act_bits = min(block.act_bits for block, _ in layer.blocks)
    expected, actual = call(reference, layer, x, bias), call(cpu, layer, x, bias)
    assert actual.dtype == expected.dtype == x.dtype
    assert actual.shape == (*x.shape[:-1], layer.out_features)
    tolerance = tolerances.MIXED_LINEAR[x.dtype, act_bits]
    assert tolerances.relative_error(actual, expected) <= tolerance.relative, tolerance.reason
    exact = naive_linear(layer, x, bias)
    error = tolerances.relative_error(call(reference, layer, x.float(), bias), exact)
    assert error <= tolerances.MIXED_LINEAR_REFERENCE[act_bits].relative


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ternary_blocks_are_the_formula(act_bits: int, dtype: torch.dtype) -> None:
    for N, K, group_size in ((1, 64, 64), (37, 192, 32), (24, 128, -1)):
        blocks = [(BlockFormat.ternary(act_bits, group_size), N), (BlockFormat(3, act_bits, group_size), 5)]
        check(make_linear(blocks, K, seed=N), torch.randn(5, K, generator=torch.Generator().manual_seed(N)).to(dtype))


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_every_width_is_the_formula(bits: int, act_bits: int, shape: tuple[int, int]) -> None:
    N, K = shape
    for dtype, group_size in zip(DTYPES, (8, -1, 8), strict=True):
        layer = make_linear([(BlockFormat(bits, act_bits, group_size, symmetric=bits % 2 == 0), N)], K, seed=bits)
        generator = torch.Generator().manual_seed(act_bits)
        x = torch.randn(5, K, generator=generator).to(dtype)
        check(layer, x)
        check(layer, x, torch.randn(N, generator=generator).to(dtype))


@st.composite
def stacked_cases(draw: st.DrawFn) -> tuple[Linear, torch.Tensor, torch.Tensor | None]:
    K = draw(st.sampled_from([8, 40, 136, 192]))
    blocks = []
    for _ in range(draw(st.integers(1, 4))):
        groups = [size for size in (8, 32, 64, -1) if size == -1 or K % size == 0]
        block = BlockFormat(
            draw(st.sampled_from(CODE_BITS)),
            draw(st.sampled_from((8, 16))),
            draw(st.sampled_from(groups)),
            draw(st.booleans()),
        )
        if draw(st.integers(0, 5)) == 0:
            block = BlockFormat.full_precision(draw(st.sampled_from(DTYPES)))
        blocks.append((block, draw(st.integers(9, 33))))
    seed = draw(st.integers(0, 999))
    layer = make_linear(blocks, K, seed)
    shape = (*draw(st.lists(st.integers(0, 3), max_size=2)), K)
    generator = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from(DTYPES))
    bias = torch.randn(layer.out_features, generator=generator) if draw(st.booleans()) else None
    return layer, torch.randn(shape, generator=generator).to(dtype), bias


# Derandomized: an output that cancels to almost nothing has a large relative error in any implementation.
@settings(max_examples=60, derandomize=True)
@given(stacked_cases())
def test_stacked_blocks_and_any_leading_shape(case: tuple[Linear, torch.Tensor, torch.Tensor | None]) -> None:
    check(*case)


def test_non_contiguous_input() -> None:
    layer = make_linear([(BlockFormat(3, 16, 8), 24)], 64)
    x = torch.randn(64, 6).T
    assert torch.equal(call(cpu, layer, x), call(cpu, layer, x.contiguous()))


def test_table_has_one_row_per_block() -> None:
    layer = make_linear([(BlockFormat(3, 8, 32), 24), (BlockFormat(4), 8)], 64)
    assert layer.table.shape == (2, 8)
    assert layer.table[:, NUM_ROWS].tolist() == [24, 8]
    assert layer.table[0, :3].tolist() == [3, 8, 32]


@pytest.mark.parametrize("implementation", [reference, cpu])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 64, dtype=torch.float64)}, r"x must be .* got torch\.float64 \[4, 64\]"),
        ({"x": torch.zeros(())}, r"x must be \[\.\.\., K\]"),
        ({"x": torch.zeros(4, 72)}, "group_size=32 does not divide K=72"),
        ({"x": torch.zeros(4, 0)}, r"K must be positive, got x torch\.float32 \[4, 0\]"),
        ({"arena": torch.zeros(8, dtype=torch.uint8)}, "the arena is truncated"),
        ({"arena": torch.zeros(8)}, r"arena must be uint8 \[bytes\]"),
        ({"table": torch.zeros(1, 7, dtype=torch.int64)}, r"table must be int64 \[row blocks, 8\]"),
        ({"out_features": 0}, "out_features must be positive, got 0"),
        ({"out_features": 25}, "out_features is 25, but the table describes 24 outputs"),
        ({"bias": torch.zeros(23)}, r"bias must be float \[24\], got torch\.float32 \[23\]"),
        ({"bias": torch.zeros(24, dtype=torch.int32)}, r"bias must be float \[24\]"),
    ],
)
def test_bad_arguments_are_named(implementation: Any, change: dict[str, Any], message: str) -> None:
    layer = make_linear([(BlockFormat(4, 16, 32), 24)], 64)
    arguments = {
        "x": torch.randn(4, 64), "arena": layer.arena, "table": layer.table, "out_features": 24, "bias": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        implementation.mixed_linear(**{**arguments, **change})


def make_arguments(dtype: torch.dtype, *shape: int) -> tuple[Any, ...]:
    layer = make_linear([(BlockFormat(3, 16, 32), 24), (BlockFormat(4, 8, -1), 16)], 64)
    return torch.randn(*shape, 64).to(dtype), layer.arena, layer.table, 40, torch.randn(40)


def test_schema_is_the_one_of_the_design() -> None:
    assert str(torch.ops.vllm_ext.mixed_linear.default._schema) == (
        "vllm_ext::mixed_linear(Tensor x, Tensor arena, Tensor table, int out_features, Tensor? bias) -> Tensor"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    arguments = make_arguments(dtype, 5)
    torch.library.opcheck(torch.ops.vllm_ext.mixed_linear.default, arguments)
    torch.library.opcheck(torch.ops.vllm_ext.mixed_linear.default, (*make_arguments(dtype, 2, 3)[:4], None))
    assert torch.equal(mixed_linear(*arguments), cpu.mixed_linear(*arguments))


def test_compiled_equals_eager_at_several_batch_sizes() -> None:
    def layer(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.ops.vllm_ext.mixed_linear(x * 2, *rest) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for num_tokens in (1, 5, 8):
        arguments = make_arguments(torch.float32, num_tokens)
        assert tolerances.relative_error(compiled(*arguments), layer(*arguments)) < 1e-6


def test_without_a_fast_path_the_reference_runs_and_says_so_once(messages: list[str]) -> None:
    warn_no_fast_path.cache_clear()
    arguments = make_arguments(torch.bfloat16, 3)
    for _ in range(3):
        out = op._mixed_linear_reference(*arguments)
    assert torch.equal(out, reference.mixed_linear(*arguments))
    assert [text for text in messages if "vllm_ext::mixed_linear has no fast path for device 'cpu'" in text] == messages
    assert len(messages) == 1
    for key in ("CUDA", "XPU"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("vllm_ext::mixed_linear", key)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_tensors_take_the_reference() -> None:
    arguments = make_arguments(torch.bfloat16, 5)
    on_gpu = [value.cuda() if isinstance(value, torch.Tensor) else value for value in arguments]
    expected = reference.mixed_linear(*arguments)
    assert tolerances.relative_error(mixed_linear(*on_gpu).cpu(), expected) < 1e-2
