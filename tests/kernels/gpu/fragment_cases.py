# SPDX-License-Identifier: Apache-2.0
"""Random layers in the layout of the Triton kernels, beside their plain copies, for the reference."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.kernels.mixed_moe_cases import Inputs, Layer
from tests.kernels.test_mixed_linear import Linear
from vllm_ext.kernels import tolerances
from vllm_ext.kernels.arena import STORED_CODES, BlockFormat, Layout
from vllm_ext.kernels.blocks import copy_block
from vllm_ext.kernels.gpu.configurations import DECODE_TILE, LayerTiles, Tile
from vllm_ext.kernels.mixed_linear import reference as linear_reference
from vllm_ext.kernels.mixed_linear import triton as linear_triton
from vllm_ext.kernels.mixed_linear.layout import NUM_ROWS, plan_linear
from vllm_ext.kernels.mixed_moe import reference as moe_reference
from vllm_ext.kernels.mixed_moe import triton as moe_triton
from vllm_ext.kernels.mixed_moe.layout import copy_arena, plan_arena


def place_on_gpu(block: BlockFormat) -> BlockFormat:
    """The format of a block in the kernels' layout; one that is kept as it is stays so."""
    return block._replace(layout=Layout.GPU_FRAGMENT) if block.layout in STORED_CODES else block


def repack_layer(layer: Layer) -> Layer:
    """The same layer with its codes in GPU_FRAGMENT, in an arena that was full of other bytes."""
    plan = plan_arena(
        [(place_on_gpu(gate_up), place_on_gpu(down)) for gate_up, down in layer.formats],
        layer.hidden_size,
        layer.intermediate_size,
    )
    arena = torch.full((plan.num_bytes,), 0xA5, dtype=torch.uint8)
    copy_arena(layer.arena, layer.table, arena, plan.table, layer.hidden_size, layer.intermediate_size)
    return replace(layer, arena=arena, table=plan.table)


def repack_linear(layer: Linear, K: int) -> Linear:
    """As `repack_layer`, of a linear layer."""
    plan = plan_linear([(place_on_gpu(block), rows) for block, rows in layer.blocks], K)
    arena = torch.full((plan.num_bytes,), 0xA5, dtype=torch.uint8)
    for source, target in zip(layer.table.tolist(), plan.table.tolist(), strict=True):
        copy_block(layer.arena, source, arena, target, target[NUM_ROWS], K)
    return replace(layer, arena=arena, table=plan.table)


def check_moe(
    layer: Layer,
    inputs: Inputs,
    tile: Tile | None = None,
    expert_map: torch.Tensor | None = None,
    weight_on_input: bool = False,
    split: int | None = None,
    device: str = "cpu",
) -> torch.Tensor:
    """Compare the kernels, on a device, with the reference in float32; returns their result, on the CPU."""
    on_gpu = repack_layer(layer)
    routed = (inputs.topk_ids, inputs.topk_weights)
    rest = (expert_map, layer.intermediate_size, "silu", weight_on_input)
    expected = moe_reference.mixed_moe(inputs.x.float(), *routed, layer.arena, layer.table, *rest)
    arguments = (inputs.x, *routed, on_gpu.arena, on_gpu.table, *rest)
    moved = [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments]
    tiles = None if tile is None else LayerTiles(tile, tile)
    actual = moe_triton.mixed_moe(*moved, tiles=tiles, split=split)
    assert actual is not None
    actual = actual.cpu()
    assert actual.dtype == inputs.x.dtype
    assert actual.shape == inputs.x.shape
    scaling = DECODE_TILE.scaling if tile is None else tile.scaling
    for act_bits, rows in split_tokens(layer, inputs.topk_ids, expert_map).items():
        if rows.any():
            check_error(actual[rows], expected[rows], tolerances.choose_gpu_moe(inputs.x.dtype, act_bits, scaling))
    return actual


def split_tokens(layer: Layer, topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> dict[int, torch.Tensor]:
    """{activation bits: which tokens have an expert with so few}: what flips codes in one expert's tokens is no excuse
    for the others'."""
    int8 = torch.tensor([min(block.act_bits for block in pair) == 8 for pair in layer.formats] + [False])
    num_global = len(layer.formats) if expert_map is None else len(expert_map)
    places = torch.arange(num_global) if expert_map is None else expert_map
    # The last is for those that have no expert here.
    places = torch.cat([places.long(), torch.tensor([-1])])
    known = torch.where((topk_ids >= 0) & (topk_ids < num_global), topk_ids, num_global).long()
    has_int8 = int8[places[known]].any(-1)
    return {8: has_int8, 16: ~has_int8}


def check_linear(
    layer: Linear,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    tile: Tile | None = None,
    split: int | None = None,
    device: str = "cpu",
) -> torch.Tensor:
    """As `check_moe`, of a linear layer."""
    on_gpu = repack_linear(layer, x.shape[-1])
    expected = linear_reference.mixed_linear(x.float(), layer.arena, layer.table, layer.out_features, bias)
    arguments = (x, on_gpu.arena, on_gpu.table, layer.out_features, bias)
    moved = [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments]
    actual = linear_triton.mixed_linear(*moved, tile=tile, split=split)
    assert actual is not None
    actual = actual.cpu()
    assert actual.dtype == x.dtype
    assert actual.shape == expected.shape
    scaling = DECODE_TILE.scaling if tile is None else tile.scaling
    check_error(actual, expected, tolerances.choose_gpu_linear(x.dtype, 16, scaling))
    return actual


def check_error(actual: torch.Tensor, expected: torch.Tensor, tolerance: tolerances.Tolerance) -> None:
    error = tolerances.relative_error(actual, expected)
    limit = tolerances.find_limit(tolerance, expected.numel())
    assert error <= limit, f"{error:.2e} > {limit:.2e}: {tolerance.reason}"
