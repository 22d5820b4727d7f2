# SPDX-License-Identifier: Apache-2.0
"""`store_kv` and `store_key_groups` on the CPU: cpu.cpp and key_groups.cpp where the compiled kernels know the layout,
the reference elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ..native.load import load_ops
from . import reference
from .arguments import check_cache, check_groups, check_rows
from .codec import CodecTensors
from .layout import CellLayout, Codec, SideSections

#: Widths of codes that the compiled kernels read and write.
WIDTHS = (1.5, 2, 3, 4, 8)

#: Tokens that a compiled kernel reads at a time.
TILE_TOKENS = 128


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: CellLayout,
    key_tensors: CodecTensors,
    value_tensors: CodecTensors,
    clips: Sequence[float],
) -> None:
    """Same arguments, result and errors as `vllm_ext.kernels.kv_store.store_kv`.

    The compiled kernel writes the same bytes as the reference, except where two clips of a group are equally good up
    to the last bits of their error. The reference runs for layouts that `knows` does not know.
    """
    check_cache(cache, layout)
    check_rows("key", key, cache, layout)
    check_rows("value", value, cache, layout)
    ops = load_ops() if knows(layout, key_tensors, value_tensors) else None
    if ops is None:
        reference.store_kv(key, value, cache, slot_mapping, layout, key_tensors, value_tensors, clips)
        return
    ops.kv_store(
        key, value, cache, slot_mapping, list_fields(layout), key_tensors.order, key_tensors.smooth, key_tensors.shift,
        key_tensors.clip, value_tensors.order, value_tensors.smooth, value_tensors.shift, value_tensors.clip, clips,
    )  # fmt: skip


def store_key_groups(
    keys: torch.Tensor,
    cache: torch.Tensor,
    first_slots: torch.Tensor,
    layout: CellLayout,
    key_tensors: CodecTensors,
    clips: Sequence[float],
) -> None:
    """Same arguments, result and errors as `vllm_ext.kernels.kv_store.store_key_groups`; otherwise as `store_kv`."""
    check_groups(keys, cache, first_slots, layout)
    ops = load_ops() if knows(layout, key_tensors) else None
    if ops is None:
        reference.store_key_groups(keys, cache, first_slots, layout, key_tensors, clips)
        return
    ops.kv_store_key_groups(
        keys, cache, first_slots, list_fields(layout), key_tensors.order, key_tensors.smooth, key_tensors.shift,
        key_tensors.clip, clips,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def list_fields(layout: CellLayout) -> tuple[int, ...] | None:
    """A layout as cells.h reads it; None for one that the compiled kernels do not know.

    They know uniform codes of `WIDTHS` without outliers, head sizes that are multiples of 16, and groups of tokens
    that are multiples of 16 and fit a tile of 128 a whole number of times, or the other way round; of keys alone.
    """
    if (
        layout.head_dim % 16
        or layout.value.per_channel
        or not all(_knows_codec(codec) for codec in (layout.key, layout.value))
    ):
        return None
    sides = [
        *_list_side(layout.key, layout.key_sections),
        *_list_side(layout.value, layout.value_sections),
    ]
    return (layout.head_dim, layout.block_size, layout.cell_bytes, *sides)


def knows(layout: CellLayout, *tensors: CodecTensors) -> bool:
    """Whether the compiled kernels can be used: a known layout and no codebook."""
    return list_fields(layout) is not None and all(side.levels is None for side in tensors)


def _knows_codec(codec: Codec) -> bool:
    if codec.bits not in WIDTHS or codec.outliers:
        return False
    size = codec.group_size
    return not codec.per_channel or (size % 16 == 0 and (TILE_TOKENS % size == 0 or size % TILE_TOKENS == 0))


def _list_side(codec: Codec, sections: SideSections) -> list[int]:
    return [
        int(2 * codec.bits),
        codec.group_size,
        int(codec.per_channel),
        int(codec.scale_dtype == torch.float8_e4m3fn),
        sections.codes.offset,
        sections.codes.row_bytes,
        sections.scales.offset,
        sections.scales.row_bytes,
        sections.lows.offset,
    ]
