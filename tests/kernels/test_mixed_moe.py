# SPDX-License-Identifier: Apache-2.0
"""The reference against a naive float64 loop, and the CPU path against the reference."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.mixed_moe_cases import ODD_SHAPES, Inputs, Layer, make_inputs, make_layer, naive_moe
from vllm_ext.kernels import tolerances
from vllm_ext.kernels.arena import BlockFormat, Field
from vllm_ext.kernels.mixed_moe import cpu, reference
from vllm_ext.kernels.mixed_moe.layout import Block, block_shape
from vllm_ext.kernels.packing import CODE_BITS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def call(
    implementation: object,
    layer: Layer,
    inputs: Inputs,
    expert_map: torch.Tensor | None = None,
    weight_on_input: bool = False,
    activation: str = "silu",
) -> torch.Tensor:
    return implementation.mixed_moe(
        inputs.x,
        inputs.topk_ids,
        inputs.topk_weights,
        layer.arena,
        layer.table,
        expert_map,
        layer.intermediate_size,
        activation,
        weight_on_input,
    )


def uniform_layer(bits: int, act_bits: int, shape: tuple[int, int], num_experts: int = 3, seed: int = 0) -> Layer:
    block = BlockFormat(bits, act_bits, 8, symmetric=bits % 2 == 0)
    return make_layer([(block, block._replace(group_size=-1))] * num_experts, *shape, seed)


def check_against_reference(layer: Layer, inputs: Inputs, act_bits: int, **options: object) -> None:
    expected, actual = call(reference, layer, inputs, **options), call(cpu, layer, inputs, **options)
    assert actual.dtype == expected.dtype == inputs.x.dtype
    assert actual.shape == inputs.x.shape
    tolerance = tolerances.MIXED_MOE[inputs.x.dtype, act_bits]
    assert tolerances.relative_error(actual, expected) <= tolerance.relative, tolerance.reason


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_reference_is_the_formula(bits: int, act_bits: int, shape: tuple[int, int]) -> None:
    layer = uniform_layer(bits, act_bits, shape, seed=bits)
    inputs = make_inputs(7, shape[0], 2, 3, torch.float32, seed=act_bits)
    for weight_on_input in (False, True):
        expected = naive_moe(layer, inputs, weight_on_input=weight_on_input)
        error = tolerances.relative_error(call(reference, layer, inputs, weight_on_input=weight_on_input), expected)
        assert error <= tolerances.MIXED_MOE_REFERENCE[act_bits].relative


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 33])
def test_cpu_agrees_at_every_width(bits: int, act_bits: int, dtype: torch.dtype, num_tokens: int) -> None:
    for shape in ODD_SHAPES:
        layer = uniform_layer(bits, act_bits, shape, seed=bits)
        check_against_reference(layer, make_inputs(num_tokens, shape[0], 2, 3, dtype, seed=bits), act_bits)


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ternary_blocks(act_bits: int, dtype: torch.dtype) -> None:
    for group_size in (32, 64, -1):
        ternary = BlockFormat.ternary(act_bits, group_size)
        layer = make_layer([(ternary, ternary), (BlockFormat(3, act_bits, 32), ternary)], 192, 128)
        inputs = make_inputs(9, 192, 2, 2, dtype)
        check_against_reference(layer, inputs, act_bits)
        in_float32 = Inputs(inputs.x.float(), inputs.topk_ids, inputs.topk_weights)
        error = tolerances.relative_error(call(reference, layer, in_float32), naive_moe(layer, in_float32))
        assert error <= tolerances.MIXED_MOE_REFERENCE[act_bits].relative


@st.composite
def mixed_cases(draw: st.DrawFn) -> tuple[Layer, Inputs, torch.Tensor | None, bool]:
    hidden, intermediate = draw(st.sampled_from(ODD_SHAPES))
    num_local = draw(st.integers(1, 5))
    seed = draw(st.integers(0, 999))

    def draw_format(block: Block) -> BlockFormat:
        if draw(st.integers(0, 7)) == 0:
            return BlockFormat.full_precision(draw(st.sampled_from(DTYPES)))
        K = block_shape(block, hidden, intermediate)[1]
        groups = [size for size in (8, 32, 64, 128, -1) if size == -1 or K % size == 0]
        return BlockFormat(
            draw(st.sampled_from(CODE_BITS)),
            draw(st.sampled_from((8, 16))),
            draw(st.sampled_from(groups)),
            draw(st.booleans()),
        )

    formats = [(draw_format(Block.GATE_UP), draw_format(Block.DOWN)) for _ in range(num_local)]
    expert_map = None
    num_global = num_local
    if draw(st.booleans()):
        # Local experts stand at random places among those of other ranks.
        placed = draw(st.permutations([*range(num_local), -1, -1]))
        expert_map, num_global = torch.tensor(placed, dtype=torch.int32), num_local + 2
    inputs = make_inputs(
        draw(st.integers(0, 9)), hidden, draw(st.integers(1, 3)), num_global, draw(st.sampled_from(DTYPES)), seed
    )
    return make_layer(formats, hidden, intermediate, seed), inputs, expert_map, draw(st.booleans())


# Derandomized: an output that cancels to almost nothing has a large relative error in any implementation, and
# a search would find one some day.
@settings(max_examples=60, derandomize=True)
@given(mixed_cases())
def test_mixed_layers_agree(case: tuple[Layer, Inputs, torch.Tensor | None, bool]) -> None:
    layer, inputs, expert_map, weight_on_input = case
    act_bits = min(block.act_bits for pair in layer.formats for block in pair)
    options = {"expert_map": expert_map, "weight_on_input": weight_on_input}
    check_against_reference(layer, inputs, act_bits, **options)
    in_float32 = Inputs(inputs.x.float(), inputs.topk_ids, inputs.topk_weights)
    naive = naive_moe(layer, inputs, None if expert_map is None else expert_map.tolist(), weight_on_input)
    error = tolerances.relative_error(call(reference, layer, in_float32, **options), naive)
    assert error <= tolerances.MIXED_MOE_REFERENCE[act_bits].relative


@pytest.mark.parametrize("implementation", [reference, cpu])
def test_empty_batch_and_batch_without_experts(implementation: object) -> None:
    layer = uniform_layer(3, 16, (64, 32))
    nothing = make_inputs(0, 64, 2, 3, torch.bfloat16)
    assert call(implementation, layer, nothing).shape == (0, 64)
    inputs = make_inputs(4, 64, 2, 3, torch.bfloat16)
    inputs.topk_ids.fill_(-1)
    assert torch.equal(call(implementation, layer, inputs), torch.zeros(4, 64, dtype=torch.bfloat16))
    elsewhere = make_inputs(4, 64, 2, 3, torch.bfloat16)
    nobody = torch.full((3,), -1, dtype=torch.int32)
    assert torch.equal(call(implementation, layer, elsewhere, nobody), torch.zeros(4, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("implementation", [reference, cpu])
def test_partial_sums_of_expert_parallel_ranks_add_up(implementation: object) -> None:
    formats = [(BlockFormat(bits, 16, 8), BlockFormat(bits, 16, 8)) for bits in (2, 3, 4, 8)]
    layer = make_layer(formats, 64, 32)
    inputs = make_inputs(9, 64, 2, 4, torch.float32)
    whole = call(implementation, layer, inputs)
    parts = []
    for local in ([0, -1, 1, -1], [-1, 0, -1, 1]):
        table = layer.table[[expert for expert, place in enumerate(local) if place >= 0]]
        rank = Layer(layer.arena, table, layer.formats, layer.weights, 64, 32)
        parts.append(call(implementation, rank, inputs, torch.tensor(local, dtype=torch.int32)))
    assert all(part.abs().sum() > 0 for part in parts)
    assert tolerances.relative_error(parts[0] + parts[1], whole) < 1e-6


def test_cpu_is_deterministic_and_a_row_does_not_see_its_neighbours() -> None:
    layer = uniform_layer(4, 16, (192, 128), num_experts=4)
    inputs = make_inputs(40, 192, 3, 4, torch.float32)
    out = call(cpu, layer, inputs)
    assert torch.equal(call(cpu, layer, inputs), out)
    order = torch.randperm(40)
    shuffled = Inputs(inputs.x[order], inputs.topk_ids[order], inputs.topk_weights[order])
    assert tolerances.relative_error(call(cpu, layer, shuffled), out[order]) < 1e-6


@pytest.mark.parametrize("implementation", [reference, cpu])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "activation 'gelu' is not supported by mixed_moe; supported: silu"),
        ({"x": torch.zeros(4, 64, dtype=torch.float64)}, r"x must be .* got torch\.float64 \[4, 64\]"),
        ({"topk_ids": torch.zeros(3, 2, dtype=torch.int32)}, r"topk_ids must be int \[4, top k\]"),
        ({"topk_weights": torch.zeros(4, 3)}, r"topk_weights must have the shape of topk_ids \[4, 2\]"),
        ({"topk_ids": torch.full((4, 2), 3, dtype=torch.int32)}, "topk_ids holds 3, but there are 3 experts"),
        ({"expert_map": torch.tensor([0, 1, 7])}, "expert_map holds 7, but the table has 3 local experts"),
        ({"arena": torch.zeros(8, dtype=torch.uint8)}, "the arena is truncated"),
        ({"arena": torch.zeros(8)}, r"arena must be uint8 \[bytes\]"),
        ({"table": torch.zeros(3, 2, 6, dtype=torch.int64)}, r"table must be int64 \[local experts, 2, 7\]"),
        ({"intermediate_size": 0}, "intermediate_size must be positive, got 0"),
        ({"intermediate_size": 16}, r"does not describe a weight \[32, 64\]"),
        ({"x": torch.randn(4, 48)}, r"does not describe a weight \[64, 48\]"),
        ({Field.WEIGHT_BITS: 3}, r"does not describe a weight \[64, 64\]"),
        ({Field.ACT_BITS: 4}, "act_bits=4 is not one of 8, 16"),
        ({Field.LAYOUT: 77}, "layout 77 is not a full-precision layout; known layouts"),
    ],
)
def test_bad_arguments_are_named(implementation: object, change: dict[Any, Any], message: str) -> None:
    layer = uniform_layer(4, 16, (64, 32))
    for field in [key for key in change if isinstance(key, Field)]:
        layer.table[..., field] = change[field]
    arguments = {
        "x": torch.randn(4, 64),
        "topk_ids": torch.tensor([[0, 1], [2, 0], [1, 2], [2, 2]], dtype=torch.int32),
        "topk_weights": torch.rand(4, 2),
        "arena": layer.arena,
        "table": layer.table,
        "expert_map": None,
        "intermediate_size": 32,
        "activation": "silu",
        "weight_on_input": False,
    }
    with pytest.raises(ValueError, match=message):
        implementation.mixed_moe(**{**arguments, **{k: v for k, v in change.items() if not isinstance(k, Field)}})
