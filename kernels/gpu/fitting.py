# SPDX-License-Identifier: Apache-2.0
"""Tiles that need more shared memory or threads than a GPU has, and the smaller ones that run in their place.

Neither the rule nor a tuning table can promise that a tile fits: a table is measured on layers of one width, and a
layer of many widths takes more; another Triton keeps other buffers. Triton finds out when it loads the kernel on the
GPU, before it launches it. In vLLM that is in `warm_up`, before any request and any CUDA graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from triton.runtime.errors import OutOfResources

from .configurations import DECODE_TILE, SHIPPED_TILES, LayerTiles, Tile

logger = logging.getLogger("vllm.vllm_ext.kernels")

Tiles = TypeVar("Tiles", Tile, LayerTiles)


class FittingTiles(Generic[Tiles]):
    """What an op has learned of the tiles that do not fit, for as long as the process lives."""

    def __init__(self, op: str, make: Callable[[Tile], Tiles]) -> None:
        """op: its name, for messages. make: the op's tiles from one tile of the rule."""
        self._op = op
        self._make: Callable[[Tile], Tiles] = make
        self._smaller: dict[tuple[Hashable, Tiles], Tiles] = {}

    def run(self, kernels: Hashable, tiles: Tiles, launch: Callable[[Tiles], torch.Tensor]) -> torch.Tensor:
        """launch(tiles), or launch of the largest smaller tiles that fit, which later calls begin with.

        kernels: all that what is compiled depends on, but for the tiles. Raises Triton's OutOfResources where not even
        the smallest tile of the rule fits.
        """
        while True:
            while self._smaller and (kernels, tiles) in self._smaller:
                tiles = self._smaller[kernels, tiles]
            try:
                return launch(tiles)
            except OutOfResources as error:
                smaller = find_smaller(*_list_tiles(tiles))
                if smaller is None:
                    raise
                self._smaller[kernels, tiles] = self._make(smaller)
                logger.warning(
                    "vllm_ext: %s: %s do not fit this GPU for the formats of a layer (%s), so %s serve it, more slowly",
                    self._op,
                    _describe(tiles),
                    error,
                    _describe(self._smaller[kernels, tiles]),
                )


def find_smaller(*tiles: Tile) -> Tile | None:
    """The largest tile of the rule that is no larger than the largest of `tiles`, and not all of them; None where there
    is none. The rule's smallest takes the place of still smaller ones, too: they may have more stages or other sums.
    """
    largest = max(_count_outputs(tile) for tile in tiles)
    for tile in reversed(SHIPPED_TILES):
        if _count_outputs(tile) <= largest and set(tiles) != {tile}:
            return tile
    return DECODE_TILE if largest < _count_outputs(DECODE_TILE) else None


def _count_outputs(tile: Tile) -> int:
    return tile.block_n * tile.block_tokens


def _list_tiles(tiles: Tile | LayerTiles) -> tuple[Tile, ...]:
    return (tiles.gate_up, tiles.down) if isinstance(tiles, LayerTiles) else (tiles,)


def _describe(tiles: Tile | LayerTiles) -> str:
    listed = dict.fromkeys(
        f"{one.block_n} by {one.block_tokens} ({one.num_warps} warps, {one.num_stages} stages)"
        for one in _list_tiles(tiles)
    )
    return f"tiles of {' and '.join(listed)}"
