# SPDX-License-Identifier: Apache-2.0
"""`mixed_moe` in C++ on every instruction set, against the float32 reference on the same records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.mixed_moe_cases import Inputs, Layer, make_inputs, make_layer, naive_moe
from vllm_ext.kernels import tolerances
from vllm_ext.kernels.arena import BlockFormat, Layout
from vllm_ext.kernels.mixed_moe import cpu, reference
from vllm_ext.kernels.mixed_moe.layout import copy_arena, plan_arena
from vllm_ext.kernels.packing import CODE_BITS

#: (hidden, intermediate): whole records, short last records, sizes that 16 does not divide, less than one record.
SHAPES = ((256, 128), (136, 40), (384, 200), (72, 24))
TOKENS = (1, 3, 16, 40, 257)
NUM_EXPERTS = 3


def record(bits: int, act_bits: int, group_size: int, symmetric: bool = False) -> BlockFormat:
    return BlockFormat(bits, act_bits, group_size, symmetric, Layout.CPU_RECORD)


def pick_group(K: int, wanted: int) -> int:
    return wanted if wanted > 0 and K % wanted == 0 else -1


def call(implementation: Any, layer: Layer, inputs: Inputs, **options: Any) -> torch.Tensor:
    return implementation.mixed_moe(
        inputs.x,
        inputs.topk_ids,
        inputs.topk_weights,
        layer.arena,
        layer.table,
        options.get("expert_map"),
        layer.intermediate_size,
        "silu",
        options.get("weight_on_input", False),
    )


def measure(layer: Layer, inputs: Inputs, **options: Any) -> float:
    """Relative error of the C++ op against the reference, whose own output is not rounded."""
    in_float32 = Inputs(inputs.x.float(), inputs.topk_ids, inputs.topk_weights)
    actual = call(cpu, layer, inputs, **options)
    assert actual.dtype == inputs.x.dtype
    assert actual.shape == inputs.x.shape
    return tolerances.relative_error(actual, call(reference, layer, in_float32, **options))


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("bits", CODE_BITS)
def test_every_width_at_odd_shapes(isa: str, bits: int, act_bits: int) -> None:
    tolerance = tolerances.NATIVE_MOE[act_bits]
    for shape, wanted in zip(SHAPES, (128, -1, 64, 8), strict=True):
        gate_up = record(bits, act_bits, pick_group(shape[0], wanted if wanted != 8 else -1), bits % 2 == 0)
        down = record(bits, act_bits, pick_group(shape[1], 128 if shape[1] % 128 == 0 else -1))
        layer = make_layer([(gate_up, down)] * NUM_EXPERTS, *shape, seed=bits)
        for num_tokens in TOKENS:
            dtype = torch.float16 if num_tokens == 3 else torch.bfloat16
            error = measure(layer, make_inputs(num_tokens, shape[0], 2, NUM_EXPERTS, dtype, seed=bits))
            limit = tolerances.find_limit(tolerance, num_tokens * shape[0])
            assert error <= limit, (shape, num_tokens, tolerance.reason)


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("bits", CODE_BITS)
def test_errors_at_the_depths_of_a_model(ops: Any, bits: int, act_bits: int) -> None:
    """Sums as long as those of real layers, and no allowance for few outputs: the limits of tolerances.py as they
    are, for the instruction set that this machine uses."""
    hidden, intermediate = 2048, 640
    block = record(bits, act_bits, 128)
    layer = make_layer([(block, block)] * NUM_EXPERTS, hidden, intermediate, seed=bits)
    tolerance = tolerances.NATIVE_MOE[act_bits]
    for num_tokens in TOKENS:
        error = measure(layer, make_inputs(num_tokens, hidden, 2, NUM_EXPERTS, torch.bfloat16, seed=num_tokens))
        assert error <= tolerance.relative, (num_tokens, tolerance.reason)


@pytest.mark.parametrize("act_bits", [8, 16])
def test_ternary_weights_as_they_are_loaded(isa: str, act_bits: int) -> None:
    """Written five to a byte and repacked, beside blocks of other widths; against the layer as it was written."""
    hidden, intermediate = 384, 192
    tolerance = tolerances.NATIVE_MOE[act_bits]
    for group_size in (32, 64, -1):
        ternary = BlockFormat.ternary(act_bits, group_size)
        formats = [(ternary, ternary), (BlockFormat(3, act_bits, 64), ternary), (ternary, BlockFormat(2, act_bits, -1))]
        stored = make_layer(formats, hidden, intermediate, seed=act_bits)
        in_records = [tuple(block._replace(layout=Layout.CPU_RECORD) for block in pair) for pair in formats]
        plan = plan_arena(in_records, hidden, intermediate)  # type: ignore[arg-type]
        arena = torch.full((plan.num_bytes,), 0xA5, dtype=torch.uint8)
        copy_arena(stored.arena, stored.table, arena, plan.table, hidden, intermediate)
        repacked = dataclasses.replace(stored, arena=arena, table=plan.table)
        for num_tokens in TOKENS:
            inputs = make_inputs(num_tokens, hidden, 2, NUM_EXPERTS, torch.bfloat16, seed=num_tokens)
            in_float32 = Inputs(inputs.x.float(), inputs.topk_ids, inputs.topk_weights)
            actual, expected = call(cpu, repacked, inputs), call(reference, stored, in_float32)
            assert torch.equal(call(reference, repacked, in_float32), expected)
            error = tolerances.relative_error(actual, expected)
            assert error <= tolerances.find_limit(tolerance, actual.numel()), (group_size, num_tokens)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("act_bits", [8, 16])
def test_every_group_size(isa: str, group_size: int, act_bits: int) -> None:
    for bits in (2, 3, 8):
        block = record(bits, act_bits, group_size)
        layer = make_layer([(block, block)] * NUM_EXPERTS, 512, 256, seed=bits)
        for num_tokens in (2, 19):
            error = measure(layer, make_inputs(num_tokens, 512, 2, NUM_EXPERTS, torch.bfloat16, seed=1))
            assert error <= tolerances.NATIVE_MOE[act_bits].relative, (bits, num_tokens)


def test_16_bit_blocks_beside_codes(isa: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        plain, codes = BlockFormat.full_precision(dtype), record(3, 16, -1)
        layer = make_layer([(plain, codes), (codes, plain), (plain, plain)], 136, 40)
        for num_tokens in (1, 5, 40):
            error = measure(layer, make_inputs(num_tokens, 136, 2, 3, dtype, seed=2))
            assert error <= tolerances.MIXED_MOE[torch.bfloat16, 16].relative


def test_weights_on_the_input_and_other_ranks_experts(isa: str) -> None:
    formats = [
        (record(bits, act_bits, 32), record(bits, 16, -1)) for bits, act_bits in ((2, 8), (3, 16), (4, 16), (8, 8))
    ]
    layer = make_layer(formats, 64, 40)
    placed = torch.tensor([2, -1, 0, 3, -1, 1], dtype=torch.int32)
    for kind in (torch.int32, torch.int64):
        for weight_on_input in (False, True):
            inputs = make_inputs(21, 64, 3, 6, torch.bfloat16, seed=3)
            inputs.topk_ids = inputs.topk_ids.to(kind)
            error = measure(layer, inputs, expert_map=placed.to(kind), weight_on_input=weight_on_input)
            assert error <= tolerances.NATIVE_MOE[8].relative


def test_it_is_the_formula_of_the_naive_loop(isa: str) -> None:
    """Beside the reference: a loop in float64 that never saw an arena."""
    formats = [(record(2, 16, 64), record(5, 16, -1)), (record(6, 16, -1), record(3, 16, -1))]
    layer = make_layer(formats, 192, 72)
    inputs = make_inputs(9, 192, 2, 2, torch.bfloat16)
    error = tolerances.relative_error(call(cpu, layer, inputs), naive_moe(layer, inputs))
    assert error <= tolerances.NATIVE_MOE[16].relative


def test_nobody_and_nothing_to_compute(isa: str) -> None:
    layer = make_layer([(record(4, 16, 128), record(4, 16, 128))] * 2, 128, 128)
    counted: list[int] = []
    for inputs, expert_map in [
        (make_inputs(0, 128, 2, 2, torch.bfloat16), None),
        (Inputs(torch.randn(4, 128).bfloat16(), torch.full((4, 2), -1, dtype=torch.int32), torch.rand(4, 2)), None),
        (make_inputs(4, 128, 2, 2, torch.bfloat16), torch.full((2,), -1, dtype=torch.int32)),
        (Inputs(torch.randn(4, 128).bfloat16(), torch.zeros(4, 0, dtype=torch.int32), torch.rand(4, 0)), None),
    ]:
        out = cpu.mixed_moe(
            inputs.x, inputs.topk_ids, inputs.topk_weights, layer.arena, layer.table, expert_map, 128, "silu",
            False, observer=counted.append,
        )  # fmt: skip
        assert torch.equal(out, torch.zeros_like(inputs.x))
    assert counted == [0, 0, 0, 0]


def test_pairs_are_counted_and_strides_do_not_matter(isa: str) -> None:
    layer = make_layer([(record(3, 8, 64), record(3, 16, -1))] * 3, 64, 24)
    inputs = make_inputs(7, 64, 2, 3, torch.bfloat16, seed=5)
    counted: list[int] = []
    arguments = (layer.arena, layer.table, None, 24, "silu", False)
    expected = cpu.mixed_moe(inputs.x, inputs.topk_ids, inputs.topk_weights, *arguments, observer=counted.append)
    assert counted == [int((inputs.topk_ids >= 0).sum())]
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in (inputs.x, inputs.topk_ids, inputs.topk_weights)]
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(cpu.mixed_moe(*strided, *arguments), expected)


def test_rows_do_not_see_their_neighbours(isa: str) -> None:
    """Deterministic, and a token's result does not depend on which others share its batch beyond the last bit."""
    layer = make_layer([(record(4, 16, 128), record(3, 8, 128))] * 4, 256, 128)
    inputs = make_inputs(40, 256, 3, 4, torch.bfloat16)
    out = call(cpu, layer, inputs)
    assert torch.equal(call(cpu, layer, inputs), out)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = Inputs(inputs.x[order], inputs.topk_ids[order], inputs.topk_weights[order])
    assert tolerances.relative_error(call(cpu, layer, shuffled), out[order]) < 1e-3
    alone = [
        call(cpu, layer, Inputs(inputs.x[i : i + 1], inputs.topk_ids[i : i + 1], inputs.topk_weights[i : i + 1]))
        for i in range(40)
    ]
    assert tolerances.relative_error(torch.cat(alone), out) < 5e-3


def test_float32_takes_the_exact_path(ops: Any) -> None:
    layer = make_layer([(record(3, 16, 64), record(5, 8, -1))] * 3, 192, 40)
    inputs = make_inputs(6, 192, 2, 3, torch.float32)
    assert tolerances.relative_error(call(cpu, layer, inputs), call(reference, layer, inputs)) < 1e-5


def test_opcheck(ops: Any) -> None:
    layer = make_layer([(record(3, 16, 64), record(4, 8, -1))] * 3, 64, 40)
    inputs = make_inputs(5, 64, 2, 3, torch.bfloat16)
    routing = inputs.topk_ids, inputs.topk_weights
    arguments = (inputs.x, *routing, layer.arena, layer.table, None, 40, "silu", False)
    torch.library.opcheck(torch.ops.vllm_ext.mixed_moe.default, arguments)


def test_extreme_inputs_stay_finite(isa: str) -> None:
    """Zeros, one huge and one tiny value: no scale may become NaN, no exponential overflow."""
    layer = make_layer([(record(4, 16, 128), record(4, 8, 128))] * 2, 128, 128)
    x = torch.zeros(6, 128, dtype=torch.bfloat16)
    x[1, 3], x[2, 7], x[3, :] = 1e4, 1e-38, -300.0
    x[4, 0], x[4, 1] = 1e15, 1e-15
    x[5, 0], x[5, 1] = 1e30, 1e-30
    ids, routing = torch.zeros(6, 1, dtype=torch.int32), torch.ones(6, 1)
    out = call(cpu, layer, Inputs(x, ids, routing))
    assert torch.isfinite(out[:5]).all()
    assert torch.equal(out[0], torch.zeros(128, dtype=torch.bfloat16))
    expected = call(reference, layer, Inputs(x.float(), ids, routing))
    for token in (1, 3, 4):
        assert tolerances.relative_error(out[token], expected[token]) < 0.02
    # Its gate times its up is past the largest float, in any arithmetic of 32 bits.
    assert not torch.isfinite(out[5]).any()
    assert not torch.isfinite(expected[5]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_ids": torch.full((4, 2), 3, dtype=torch.int32)}, "topk_ids holds 3, but there are 3 experts"),
        ({"expert_map": torch.tensor([0, 1, 7])}, "expert_map holds 7, but the table has 3 local experts"),
        ({"arena": torch.zeros(64, dtype=torch.uint8)}, "the arena is truncated"),
        ({"layout": 0}, "layout 0"),
        ({"bits": 7}, "7"),
        ({"group": 8}, "8"),
        ({"act_bits": 4}, "act_bits=4 is not one of 8, 16"),
        ({"offset": 3}, "64"),
    ],
)
def test_bad_arguments_are_errors_and_never_read_out_of_bounds(ops: Any, change: dict[str, Any], message: str) -> None:
    layer = make_layer([(record(4, 16, 64), record(4, 16, -1))] * 3, 64, 32)
    for name, column in (("bits", 0), ("act_bits", 1), ("group", 2), ("offset", 3), ("layout", 6)):
        if name in change:
            layer.table[1, 0, column] = change[name]
    arguments = {
        "x": torch.randn(4, 64).bfloat16(),
        "topk_ids": torch.tensor([[0, 1], [2, 0], [1, 2], [2, 2]], dtype=torch.int32),
        "topk_weights": torch.rand(4, 2),
        "arena": layer.arena,
        "table": layer.table,
        "expert_map": None,
        "intermediate_size": 32,
        "activation": "silu",
        "weight_on_input": False,
    }
    changed = {name: value for name, value in change.items() if name in arguments}
    with pytest.raises(ValueError, match=message):
        cpu.mixed_moe(**{**arguments, **changed})


# --- fuzz ---------------------------------------------------------------------------------------------------


def draw_format(random: np.random.Generator, K: int) -> BlockFormat:
    if random.random() < 0.1:
        return BlockFormat.full_precision(torch.bfloat16)
    groups = [size for size in (32, 64, 128, 256, -1) if size == -1 or K % size == 0]
    bits, act_bits, group_size = (int(random.choice(options)) for options in (CODE_BITS, (8, 16), groups))
    return record(bits, act_bits, group_size, bool(random.random() < 0.5))


def draw_case(seed: int) -> tuple[Layer, Inputs, dict[str, Any]]:
    random = np.random.default_rng(seed)
    hidden, intermediate = (int(8 * random.integers(1, 40)) for _ in range(2))
    num_local, tokens = int(random.integers(1, 5)), int(random.choice((0, 1, 2, 3, 4, 5, 7, 16, 17, 33, 70)))
    if random.random() < 0.04:
        # Now and then several panels of tokens, or many experts with few tokens each.
        tokens = int(random.integers(120, 300))
        num_local, hidden, intermediate = int(random.integers(1, 65)), min(hidden, 96), min(intermediate, 96)
    formats = [(draw_format(random, hidden), draw_format(random, intermediate)) for _ in range(num_local)]
    layer = make_layer(formats, hidden, intermediate, seed)
    options: dict[str, Any] = {"weight_on_input": bool(random.random() < 0.3)}
    num_global = num_local
    if random.random() < 0.4:
        num_global += 2
        placed = random.permutation([*range(num_local), -1, -1])
        options["expert_map"] = torch.tensor(placed, dtype=torch.int32)
    dtype = torch.bfloat16 if random.random() < 0.7 else torch.float16
    return layer, make_inputs(tokens, hidden, int(random.integers(1, 4)), num_global, dtype, seed), options


def fuzz(seeds: Sequence[int]) -> None:
    for seed in seeds:
        layer, inputs, options = draw_case(seed)
        formats = [block for pair in layer.formats for block in pair]
        act_bits = min(block.act_bits for block in formats)
        tolerance, limit = tolerances.NATIVE_FUZZ[act_bits], tolerances.NATIVE_FUZZ[act_bits].relative
        is_ordinary = min(layer.hidden_size, layer.intermediate_size) >= 64
        if is_ordinary and all(block.layout == Layout.CPU_RECORD for block in formats):
            tolerance = tolerances.NATIVE_MOE[act_bits]
            limit = tolerances.FUZZ_ROOM * tolerances.find_limit(tolerance, inputs.x.numel())
        error = measure(layer, inputs, **options)
        assert error <= limit, (seed, error, limit, tolerance.reason)


def test_fuzz_briefly(ops: Any) -> None:
    fuzz(range(300))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_fuzz_ten_thousand_cases(isa: str) -> None:
    fuzz(range(300, 10_300))
