# SPDX-License-Identifier: Apache-2.0
"""`vllm_ext::mixed_linear` on a GPU: the GEMM of `mixed_moe` without experts, in one launch for 16-bit activations.

Imported at the first call with CUDA tensors. As capturable as `mixed_moe`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from ..gpu import launch
from ..gpu.activations import prepare_activations
from ..gpu.combine import sum_parts
from ..gpu.configurations import Tile, choose_split, choose_tile, list_batch_sizes
from ..gpu.fitting import FittingTiles
from ..gpu.formats import keep_int8
from ..gpu.layout import DEPTH
from ..gpu.linear import linear_kernel
from ..gpu.tables import BlockFacts, TableFacts, derive_facts
from .arguments import check_arguments, check_rows
from .layout import NUM_ROWS


class LinearFacts(NamedTuple):
    """What the host knows of a layer's table: the formats (None: a layout that these kernels do not read), and the
    outputs of its row blocks."""

    blocks: BlockFacts | None
    num_rows: list[int]


def _derive(rows: list[list[int]], arena: torch.Tensor, K: int, out_features: int) -> LinearFacts:
    check_rows(rows, out_features)
    num_rows = [row[NUM_ROWS] for row in rows]
    return LinearFacts(derive_facts(rows, arena, [(N, K) for N in num_rows]), num_rows)


_facts: TableFacts[LinearFacts] = TableFacts("mixed_linear", _derive)

#: What this process has learned of tiles that do not fit, by device, dtype, facts, sizes and bias.
_fitting: FittingTiles[Tile] = FittingTiles("mixed_linear", lambda tile: tile)

#: What this process has warmed up; layers of a model are mostly equal.
_warm: set[tuple[object, ...]] = set()


def mixed_linear(
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    tile: Tile | None = None,
    split: int | None = None,
) -> torch.Tensor | None:
    """Same arguments, result and errors as `vllm_ext.kernels.mixed_linear.mixed_linear`; None where a row block has a
    layout that is not one of these kernels' (GPU_FRAGMENT and the plain 16- and 32-bit ones).

    x is bf16 or fp16. Differs from the reference: weights are rounded to x's type where SCALE_WEIGHTS
    (gpu/accumulate.py) applies.

    tile, split: instead of those that `gpu/configurations.py` chooses. A given tile that does not fit the GPU raises
    Triton's OutOfResources; a chosen one is replaced by a smaller one (gpu/fitting.py).
    """
    check_arguments(x, arena, table, out_features, bias)
    K = x.shape[-1]
    inputs = x.reshape(-1, K).contiguous()
    facts = _facts.find(table, arena, (K, out_features))
    if facts.blocks is None:
        return None
    shape = (*x.shape[:-1], out_features)
    if len(inputs) == 0:
        return x.new_empty(shape)

    launches = partial(
        _launch, inputs, arena, table.contiguous(), out_features, bias, facts.blocks, facts.num_rows, split
    )
    if tile is not None:
        return launches(tile).view(shape)
    tile = choose_tile(len(inputs), 1, keep_int8(facts.blocks.kinds) != 0, launch.describe_device(x.device))
    bias_dtype = None if bias is None else bias.dtype
    kernels = (x.device, x.dtype, facts.blocks, tuple(facts.num_rows), K, bias_dtype)
    return _fitting.run(kernels, tile, launches).view(shape)


def _launch(
    inputs: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    blocks: BlockFacts,
    num_rows: list[int],
    split: int | None,
    tile: Tile,
) -> torch.Tensor:
    K = inputs.shape[1]
    out = torch.empty((len(inputs), out_features), dtype=inputs.dtype, device=inputs.device)
    tiles_n = sum(-(-N // tile.block_n) for N in num_rows)
    tiles = tiles_n * -(-len(inputs) // tile.block_tokens)
    split = split or choose_split(tiles, K, launch.describe_device(inputs.device))
    kinds = blocks.kinds_for(tile)
    stride = blocks.pieces_stride(K)
    prepared = prepare_activations(inputs, kinds, stride)
    parts = out
    if split > 1:
        parts = torch.empty((split, *out.shape), dtype=torch.float32, device=inputs.device)
    linear_kernel[(tiles * split,)](
        inputs,
        *prepared,
        arena,
        table,
        bias,
        parts,
        len(inputs),
        split,
        tiles_n,
        stride,
        K,
        out_features,
        NUM_BLOCKS=len(num_rows),
        HAS_BIAS=bias is not None and split == 1,
        FORMATS=blocks.formats,
        KINDS=kinds,
        EVEN_K=K % DEPTH == 0,
        **launch.tile_options(tile),
    )
    if split > 1:
        sum_parts(parts, bias, out, not launch.IS_INTERPRETED)
    return out


def warm_up(
    arena: torch.Tensor,
    table: torch.Tensor,
    K: int,
    out_features: int,
    max_tokens: int,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> list[int]:
    """Compile every kernel that batches of up to `max_tokens` tokens of a layer can get, and read its table.

    To be called before CUDA graphs are captured, with what the layer's calls will have. Returns the numbers of tokens
    that it ran, on zeros: none where this process did so for an equal layer, of which only the table is read. Raises
    ValueError for a layout that these kernels do not read, OutOfResources where no tile fits the GPU.
    """
    facts = _facts.find(table, arena, (K, out_features))
    if facts.blocks is None:
        raise ValueError("a block of the table is in a layout that the Triton kernels do not read: nothing to warm up")
    bias_dtype = None if bias is None else bias.dtype
    key = (arena.device, dtype, facts.blocks, tuple(facts.num_rows), K, max_tokens, bias_dtype)
    if key in _warm:
        return []
    batches = list_batch_sizes(max_tokens, 1)
    for num_tokens in batches:
        x = torch.zeros((num_tokens, K), dtype=dtype, device=arena.device)
        # A tile's fewest tokens have the most parts: with more there are as many, fewer, or one.
        with launch.use_device(arena.device):
            for split in (None, 1):
                mixed_linear(x, arena, table, out_features, bias, split=split)
    _warm.add(key)
    return batches
