# SPDX-License-Identifier: Apache-2.0
"""`vllm_ext::mixed_moe` on a GPU: sort, gate_up, down and sum, four launches for 16-bit activations and few tokens.

Imported at the first call with CUDA tensors; nothing else here imports triton.

Nothing is read from the device after the first call with a table, and all memory comes from torch, so a call can be
captured in a CUDA graph. The grids are those of the worst spread of tokens over experts.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from ..gpu import launch
from ..gpu.activations import prepare_activations, prepare_by_expert
from ..gpu.combine import sum_experts
from ..gpu.configurations import LayerTiles, choose_layer_tiles, choose_split, list_batch_sizes
from ..gpu.experts import down_kernel, gate_up_kernel
from ..gpu.fitting import FittingTiles
from ..gpu.formats import keep_int8
from ..gpu.layout import DEPTH, ROWS, count_blocks
from ..gpu.sorting import FEW_PAIRS, sort_pairs
from ..gpu.tables import BlockFacts, TableFacts, derive_facts
from .arguments import check_arguments
from .layout import Block, block_shape

#: Tokens of a tile up to which the experts' results are kept in float32; with more, writing and reading them would be
#: a good part of the time, and they are rounded to x's type before they are summed, as stock does.
FLOAT32_TOKENS = 16


class LayerFacts(NamedTuple):
    """What the host knows of a layer's table; None for a layout that these kernels do not read."""

    gate_up: BlockFacts | None
    down: BlockFacts | None


def _derive(rows: list[list[list[int]]], arena: torch.Tensor, hidden_size: int, intermediate_size: int) -> LayerFacts:
    found: list[BlockFacts | None] = []
    for block in Block:
        block_rows = [expert[block] for expert in rows]
        shape = block_shape(block, hidden_size, intermediate_size)
        found.append(derive_facts(block_rows, arena, [shape] * len(rows), block == Block.GATE_UP))
    return LayerFacts(*found)


_facts: TableFacts[LayerFacts] = TableFacts("mixed_moe", _derive)

#: What this process has learned of tiles that do not fit, by device, dtype, facts and sizes.
_fitting: FittingTiles[LayerTiles] = FittingTiles("mixed_moe", lambda tile: LayerTiles(tile, tile))

#: What this process has warmed up; layers of a model are mostly equal.
_warm: set[tuple[object, ...]] = set()


def mixed_moe(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    expert_map: torch.Tensor | None,
    intermediate_size: int,
    activation: str,
    weight_on_input: bool,
    tiles: LayerTiles | None = None,
    split: int | None = None,
) -> torch.Tensor | None:
    """Same arguments, result and errors as `vllm_ext.kernels.mixed_moe.mixed_moe`; None where a block's layout is not
    one of these kernels' (GPU_FRAGMENT and the plain 16- and 32-bit ones).

    x is bf16 or fp16. Differs from the reference: an id past the last expert counts as none, since finding it would
    wait for the device; the intermediate is rounded to x's type, also before it is rounded to 8 bits; so are weights
    where SCALE_WEIGHTS (gpu/accumulate.py) applies, and an expert's results where many tokens share its weights. Sums
    are float32, part by part of K and in the order of the slots.

    tiles, split: instead of those that `gpu/configurations.py` chooses. Given tiles that do not fit the GPU raise
    Triton's OutOfResources; chosen ones are replaced by smaller ones (gpu/fitting.py).
    """
    check_arguments(x, topk_ids, topk_weights, arena, table, expert_map, intermediate_size, activation)
    hidden_size = x.shape[1]
    num_experts, num_pairs = table.shape[0], topk_ids.numel()
    if num_pairs == 0 or num_experts == 0:
        # In the order of elements that the fake implementation promises.
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    facts = _facts.find(table, arena, (hidden_size, intermediate_size))
    if facts.gate_up is None or facts.down is None:
        return None

    num_global = _count_experts(table, expert_map)
    x, table, topk_ids, topk_weights = (tensor.contiguous() for tensor in (x, table, topk_ids, topk_weights))
    expert_map = None if expert_map is None else expert_map.contiguous()
    routed = (x, topk_ids, topk_weights)
    launches = partial(
        _launch, *routed, arena, table, expert_map, intermediate_size, weight_on_input, facts.gate_up, facts.down, split
    )
    if tiles is not None:
        return launches(tiles)
    int8 = keep_int8(facts.gate_up.kinds | facts.down.kinds) != 0
    tiles = choose_layer_tiles(num_pairs, num_global, int8, launch.describe_device(x.device))
    return _fitting.run((x.device, x.dtype, facts, hidden_size, intermediate_size), tiles, launches)


def _launch(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    expert_map: torch.Tensor | None,
    intermediate_size: int,
    weight_on_input: bool,
    gate_up: BlockFacts,
    down: BlockFacts,
    split: int | None,
    tiles: LayerTiles,
) -> torch.Tensor:
    num_tokens, hidden_size = x.shape
    num_experts, num_pairs = table.shape[0], topk_ids.numel()
    order = sort_pairs(topk_ids, expert_map, num_experts, tiles.block_tokens)
    lists = (order.pairs, order.tile_experts, order.tile_starts, order.segment_ends, order.num_tiles, topk_weights)

    kinds = gate_up.kinds_for(tiles.gate_up)
    stride = gate_up.pieces_stride(hidden_size)
    prepared = prepare_activations(x, kinds, stride)
    hidden = torch.empty((num_pairs, intermediate_size), dtype=x.dtype, device=x.device)
    row_tiles, _ = count_blocks(2 * intermediate_size, hidden_size, gate_up=True)
    gate_up_kernel[(-(-row_tiles * ROWS // tiles.gate_up.block_n) * order.max_tiles,)](
        x,
        *prepared,
        arena,
        table,
        *lists,
        hidden,
        num_tokens,
        topk_ids.shape[1],
        stride,
        hidden_size,
        intermediate_size,
        WEIGHT_ON_INPUT=weight_on_input,
        FORMATS=gate_up.formats,
        KINDS=kinds,
        EVEN_K=hidden_size % DEPTH == 0,
        **launch.tile_options(tiles.gate_up),
    )

    stride = down.pieces_stride(intermediate_size)
    prepared = prepare_by_expert(hidden, table, order, down.kinds_for(tiles.down), stride)
    blocks = -(-hidden_size // tiles.down.block_n) * order.max_tiles
    split = split or choose_split(blocks, intermediate_size, launch.describe_device(x.device))
    parts_dtype = torch.float32 if split > 1 or tiles.block_tokens <= FLOAT32_TOKENS else x.dtype
    parts = torch.empty((split, num_pairs, hidden_size), dtype=parts_dtype, device=x.device)
    down_kernel[(blocks * split,)](
        hidden,
        *prepared,
        arena,
        table,
        *lists,
        parts,
        num_pairs,
        split,
        stride,
        intermediate_size,
        hidden_size,
        WEIGHT_ON_INPUT=weight_on_input,
        FORMATS=down.formats,
        # Every row was prepared for its own expert, in the same place.
        KINDS=0,
        EVEN_K=intermediate_size % DEPTH == 0,
        **launch.tile_options(tiles.down),
    )
    out = torch.empty_like(x)
    sum_experts(parts, topk_ids, expert_map, num_experts, out, not launch.IS_INTERPRETED)
    return out


def warm_up(
    arena: torch.Tensor,
    table: torch.Tensor,
    hidden_size: int,
    intermediate_size: int,
    top_k: int,
    max_tokens: int,
    dtype: torch.dtype,
    expert_map: torch.Tensor | None = None,
    weight_on_input: bool = False,
) -> list[int]:
    """Compile every kernel that batches of up to `max_tokens` tokens of a layer can get, and read its table.

    To be called before CUDA graphs are captured, with what the layer's calls will have. Returns the numbers of tokens
    that it ran, on zeros: none where this process did so for an equal layer, of which only the table is read. Raises
    ValueError for a layout that these kernels do not read, OutOfResources where no tile fits the GPU.
    """
    facts = _facts.find(table, arena, (hidden_size, intermediate_size))
    if facts.gate_up is None or facts.down is None:
        raise ValueError("a block of the table is in a layout that the Triton kernels do not read: nothing to warm up")
    num_global = _count_experts(table, expert_map)
    sizes = (hidden_size, intermediate_size, table.shape[0], num_global, top_k, max_tokens)
    key = (arena.device, dtype, facts, sizes, expert_map is None, weight_on_input)
    if key in _warm:
        return []
    borders = [*list_batch_sizes(max_tokens * top_k, num_global), FEW_PAIRS + 1]
    batches = sorted({min(max_tokens, -(-rows // top_k)) for rows in borders})
    for num_tokens in batches:
        x = torch.zeros((num_tokens, hidden_size), dtype=dtype, device=arena.device)
        ids = torch.arange(num_tokens * top_k, dtype=torch.int32, device=arena.device) % num_global
        # Loaders set torch's default type to the model's.
        weights = torch.zeros((num_tokens, top_k), dtype=torch.float32, device=arena.device)
        routed = (ids.view(num_tokens, top_k), weights)
        # A tile's fewest tokens have the most parts: with more there are as many, fewer, or one.
        rest = (arena, table, expert_map, intermediate_size, "silu", weight_on_input)
        with launch.use_device(arena.device):
            for split in (None, 1):
                mixed_moe(x, *routed, *rest, split=split)
    _warm.add(key)
    return batches


def _count_experts(table: torch.Tensor, expert_map: torch.Tensor | None) -> int:
    """Experts over which the tokens are spread: under expert parallelism, those of all ranks."""
    return table.shape[0] if expert_map is None else expert_map.numel()
