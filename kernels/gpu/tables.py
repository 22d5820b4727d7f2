# SPDX-License-Identifier: Apache-2.0
"""What the host must know of a table that lies on the device: read once, and kept for as long as the table lives.

Which loops to compile depends on the formats in the table. Reading them waits for the device, which a step must not and
a CUDA graph cannot; so the first call with a table reads it, in vLLM the profile run before any capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..arena import view_block
from .configurations import CORRECT_SUMS, Tile
from .formats import collect_formats, collect_kinds, finest_depth, keep_int8
from .launch import is_capturing
from .layout import DEPTH

Facts = TypeVar("Facts")


class BlockFacts(NamedTuple):
    """Formats of some blocks, and the kinds of activations that they can ask for (formats.py)."""

    formats: int
    kinds: int

    def kinds_for(self, tile: Tile) -> int:
        """What is prepared for a tile: sums for 16-bit activations only where it corrects with them."""
        return self.kinds if tile.scaling == CORRECT_SUMS else keep_int8(self.kinds)

    def pieces_stride(self, K: int) -> int:
        """Pieces of a row, at the finest of the formats; a multiple of four, for loads of 16 bytes."""
        pieces = -(-K // DEPTH) * (DEPTH // finest_depth(self.formats))
        return -(-pieces // 4) * 4


def derive_facts(
    rows: Sequence[Sequence[int]], arena: torch.Tensor, shapes: Sequence[tuple[int, int]], gate_up: bool = False
) -> BlockFacts | None:
    """The facts of rows of a table; None where the kernels do not read the layout of one.

    shapes: (N, K) of each. Raises ValueError for a row that points outside the arena or describes another shape.
    """
    formats = collect_formats(rows)
    if formats is None:
        return None
    for row, shape in zip(rows, shapes, strict=True):
        view_block(arena, row, *shape, gate_up)
    return BlockFacts(formats, collect_kinds(rows))


class TableFacts(Generic[Facts]):
    """Facts that `derive` computes from the rows of a table, once per table and shape."""

    def __init__(self, name: str, derive: Callable[..., Facts]) -> None:
        """name: of the op, for messages. derive: called with (rows, arena, *shape), rows as nested lists."""
        self._name = name
        self._derive = derive
        # By the tensor object, not by its address: another table may get that later.
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def find(self, table: torch.Tensor, arena: torch.Tensor, shape: Sequence[int]) -> Facts:
        """The facts of a table. Raises RuntimeError where it would have to be read during the capture of a graph, and
        what `derive` raises."""
        key = (table.data_ptr(), _version(table), arena.numel(), *shape)
        known = self._known.get(table)
        if known is not None and known[0] == key:
            return known[1]
        if is_capturing(table.device):
            raise RuntimeError(
                f"vllm_ext::{self._name} meets a table {list(table.shape)} for the first time while a CUDA graph is "
                f"being captured, when it cannot be read: call the op, or its warm_up, once before the capture"
            )
        facts = self._derive(table.tolist(), arena, *shape)
        self._known[table] = (key, facts)
        return facts


def _version(table: torch.Tensor) -> int:
    """Counts changes in place; tensors made in inference mode do not count."""
    return -1 if table.is_inference() else table._version
