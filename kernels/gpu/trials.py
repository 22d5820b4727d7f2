# SPDX-License-Identifier: Apache-2.0
"""Layers with inputs, to be run with chosen tiles and timed: for tuning and benchmarks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

import torch

from ..arena import BlockFormat
from ..mixed_linear.triton import mixed_linear
from ..mixed_moe.triton import mixed_moe
from . import samples
from .configurations import LayerTiles, Tile, bound_tiles
from .layout import DEPTH

#: Bytes of the copies of a layer that calls go through: more than any GPU's cache.
COLD_BYTES = 400_000_000
MOST_COPIES = 64


class Trial(Protocol):
    """A layer with inputs. copies: of its weights, in memory of their own."""

    name: str
    copies: int

    def run(self, index: int, tiles: tuple[Tile, ...] | None = None, split: int | None = None) -> torch.Tensor:
        """The op on copy `index`, with the tiles of a tuning step, or with those that the launcher chooses."""
        ...

    def count_blocks(self, tiles: tuple[Tile, ...]) -> tuple[int, int]:
        """(thread blocks, chunks of K) of the launch that `split` divides."""
        ...


class MoeTrial:
    """A MoE layer, one pair of formats for each expert, and tokens for it."""

    def __init__(
        self,
        formats: list[tuple[BlockFormat, BlockFormat]],
        hidden_size: int,
        intermediate_size: int,
        num_tokens: int,
        top_k: int,
        dtype: torch.dtype,
        device: torch.device,
        cold_bytes: int = COLD_BYTES,
    ) -> None:
        """cold_bytes: 0 for one copy of the weights."""
        widths = ",".join(sorted({f"w{block.weight_bits}a{block.act_bits}" for pair in formats for block in pair}))
        self.name = f"{len(formats)}x{top_k}x{hidden_size}x{intermediate_size} {widths}"
        self.layer = samples.make_moe(formats, hidden_size, intermediate_size, device)
        # Few tokens touch few experts: the others are as good as copies.
        touched = min(1.0, num_tokens * top_k / len(formats))
        self.arenas = _copy(self.layer.arena, cold_bytes, touched)
        self.copies = len(self.arenas)
        self.num_pairs = num_tokens * top_k
        self.routings = [
            samples.make_routing(num_tokens, hidden_size, top_k, len(formats), dtype, device, seed)
            for seed in range(self.copies)
        ]

    def run(self, index: int, tiles: tuple[Tile, ...] | None = None, split: int | None = None) -> torch.Tensor:
        """As `Trial.run`; tiles: (gate_up, down)."""
        copy = index % self.copies
        x, ids, weights = self.routings[copy]
        rest = (None, self.layer.intermediate_size, "silu", False)
        chosen = None if tiles is None else LayerTiles(*tiles)
        out = mixed_moe(x, ids, weights, self.arenas[copy], self.layer.table, *rest, tiles=chosen, split=split)
        assert out is not None
        return out

    def count_blocks(self, tiles: tuple[Tile, ...]) -> tuple[int, int]:
        """Of down, whose K is the intermediate size."""
        tile = tiles[-1]
        most = bound_tiles(self.num_pairs, self.layer.table.shape[0], tile.block_tokens)
        return -(-self.layer.hidden_size // tile.block_n) * most, -(-self.layer.intermediate_size // DEPTH)


class LinearTrial:
    """A linear layer of one format, and rows of activations for it."""

    def __init__(
        self,
        block: BlockFormat,
        K: int,
        out_features: int,
        num_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        cold_bytes: int = COLD_BYTES,
    ) -> None:
        """cold_bytes: 0 for one copy of the weights."""
        self.name = f"{K}x{out_features} w{block.weight_bits}a{block.act_bits}"
        self.layer = samples.make_linear([(block, out_features)], K, device)
        self.arenas = _copy(self.layer.arena, cold_bytes, 1.0)
        self.copies = len(self.arenas)
        self.x = torch.randn(num_rows, K, device=device).to(dtype)

    def run(self, index: int, tiles: tuple[Tile, ...] | None = None, split: int | None = None) -> torch.Tensor:
        """As `Trial.run`."""
        arena, layer = self.arenas[index % self.copies], self.layer
        tile = None if tiles is None else tiles[0]
        out = mixed_linear(self.x, arena, layer.table, layer.out_features, None, tile=tile, split=split)
        assert out is not None
        return out

    def count_blocks(self, tiles: tuple[Tile, ...]) -> tuple[int, int]:
        """As `Trial.count_blocks`."""
        tile = tiles[0]
        row_tiles = -(-self.layer.out_features // tile.block_n)
        return row_tiles * -(-len(self.x) // tile.block_tokens), -(-self.layer.K // DEPTH)


class Timer:
    """Times a call again and again; run(index) goes through `copies` copies of its weights in turn.

    On a GPU `calls` calls are captured in a CUDA graph, so the time is the device's and not that of launching; the call
    before the capture compiles and loads what they need. The graph runs twice and its second run is timed: the first
    keeps the device busy while the host launches the second. On a CPU a measurement is one call by the clock.
    """

    def __init__(self, run: Callable[[int], object], copies: int, device: torch.device, calls: int = 8) -> None:
        self._run, self._device = run, device
        self._calls = max(calls, copies)
        self._count = 0
        run(0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                for index in range(self._calls):
                    run(index)
            self._graph.replay()

    def measure(self) -> float:
        """Seconds per call."""
        if self._device.type != "cuda":
            self._count += 1
            start = time.perf_counter()
            self._run(self._count)
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._graph.replay()
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self._calls


def _copy(arena: torch.Tensor, cold_bytes: int, touched: float) -> list[torch.Tensor]:
    count = min(MOST_COPIES, math.ceil(cold_bytes / max(1, round(arena.numel() * touched))))
    return [arena, *(arena.clone() for _ in range(count - 1))]
