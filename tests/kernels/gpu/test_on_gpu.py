# SPDX-License-Identifier: Apache-2.0
"""The kernels as they are compiled, inline PTX included, on a real GPU: against the reference, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    # Before triton is imported, which tests of other parts may not expect in their process.
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from tests.kernels.gpu.fragment_cases import check_linear, check_moe, repack_layer
from tests.kernels.mixed_moe_cases import make_inputs, make_layer
from tests.kernels.test_mixed_linear import make_linear
from vllm_ext.kernels.arena import BlockFormat
from vllm_ext.kernels.gpu import selfcheck
from vllm_ext.kernels.gpu.configurations import (
    CORRECT_SUMS,
    SCALE_PRODUCTS,
    SCALE_WEIGHTS,
    SHIPPED_TILES,
    Tile,
)
from vllm_ext.kernels.gpu.layout import GROUP_SIZES
from vllm_ext.kernels.mixed_moe import mixed_moe, triton
from vllm_ext.kernels.packing import CODE_BITS

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
SCALINGS = (SCALE_WEIGHTS, SCALE_PRODUCTS, CORRECT_SUMS)


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_at_every_group_and_scaling(bits: int, act_bits: int, dtype: torch.dtype) -> None:
    for group_size in GROUP_SIZES:
        block = BlockFormat(bits, act_bits, group_size, symmetric=bits % 2 == 0)
        layer = make_linear([(block, 200)], 512, seed=bits)
        x = torch.randn(20, 512, generator=torch.Generator().manual_seed(bits)).to(dtype)
        for scaling in SCALINGS if act_bits == 16 else (SCALE_PRODUCTS,):
            check_linear(layer, x, tile=Tile(64, 16, 4, 4, scaling), device="cuda")
            check_linear(layer, x, tile=Tile(64, 16, 4, 4, scaling), split=2, device="cuda")


#: What `shipped.DECODE_VARIANTS` has, without loading it.
NARROW_TILES = [Tile(64, 8, 2, 4, scaling) for scaling in (SCALE_PRODUCTS, CORRECT_SUMS)]


@pytest.mark.parametrize(
    "tile", [*SHIPPED_TILES, *NARROW_TILES], ids=lambda tile: f"{tile.block_n}x{tile.block_tokens}_c{tile.scaling}"
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_experts_in_every_tile(tile: Tile, dtype: torch.dtype) -> None:
    formats = [
        (BlockFormat(2, 16, 64), BlockFormat(8, 8, 32)),
        (BlockFormat(4, 8, 128), BlockFormat.full_precision(torch.bfloat16)),
        (BlockFormat.ternary(16, 32), BlockFormat(3, 16, -1)),
        (BlockFormat(6, 16, -1), BlockFormat(5, 8, 64)),
    ]
    layer = make_layer(formats, 512, 192)
    for weight_on_input in (False, True):
        inputs = make_inputs(3 * tile.block_tokens + 1, 512, 2, 4, dtype)
        check_moe(layer, inputs, tile, weight_on_input=weight_on_input, device="cuda")


def test_a_graph_replays_with_other_tokens_and_routing() -> None:
    block = BlockFormat(4, 16, 64)
    layer = repack_layer(make_layer([(block, block._replace(weight_bits=2))] * 8, 512, 192))
    arena, table = layer.arena.cuda(), layer.table.cuda()
    triton.warm_up(arena, table, 512, 192, 2, 16, torch.bfloat16)
    first, second = (make_inputs(16, 512, 2, 8, torch.bfloat16, seed) for seed in (0, 1))
    x, ids, weights = first.x.cuda(), first.topk_ids.cuda(), first.topk_weights.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mixed_moe(x, ids, weights, arena, table, None, 192)
    for inputs in (second, first):
        x.copy_(inputs.x)
        ids.copy_(inputs.topk_ids)
        weights.copy_(inputs.topk_weights)
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, mixed_moe(x, ids, weights, arena, table, None, 192))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_before_a_model_is_loaded_finds_no_fault(dtype: torch.dtype) -> None:
    assert selfcheck.ask_child(torch.device("cuda"), dtype) is None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_another_gpu_than_the_current_one_serves_its_own_tensors() -> None:
    block = BlockFormat(4, 16, 64)
    layer = repack_layer(make_layer([(block, block)] * 2, 256, 128))
    inputs = make_inputs(5, 256, 2, 2, torch.bfloat16)
    arguments = (inputs.x, inputs.topk_ids, inputs.topk_weights, layer.arena, layer.table)
    first, second = ([value.to(f"cuda:{index}") for value in arguments] for index in (0, 1))
    assert torch.equal(mixed_moe(*first, None, 128).cpu(), mixed_moe(*second, None, 128).cpu())


def test_results_are_the_same_every_time() -> None:
    block = BlockFormat(3, 8, 64)
    layer = repack_layer(make_layer([(block, block)] * 8, 512, 192))
    inputs = make_inputs(700, 512, 4, 8, torch.bfloat16)
    arguments = (inputs.x, inputs.topk_ids, inputs.topk_weights, layer.arena, layer.table)
    moved = [value.cuda() for value in arguments]
    expected = mixed_moe(*moved, None, 192)
    assert all(torch.equal(mixed_moe(*moved, None, 192), expected) for _ in range(5))
