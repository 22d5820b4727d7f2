# SPDX-License-Identifier: Apache-2.0
"""The specification of storing keys and values into quantized pages, in plain torch. `layout.py` draws the pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .arguments import check_cache, check_groups, check_rows
from .codec import CodecTensors, Quantized, list_clips, pack_side, quantize, to_stored
from .layout import CellLayout, Codec, Section, SideSections, view_section


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
    """Same arguments, result and errors as `vllm_ext.kernels.kv_store.store_kv`."""
    check_cache(cache, layout)
    check_rows("key", key, cache, layout)
    check_rows("value", value, cache, layout)
    rows = (slot_mapping >= 0).nonzero().squeeze(-1)
    slots = slot_mapping[rows].long()
    _check_last(slots, cache, layout)
    block, token = slots // layout.block_size, slots % layout.block_size
    sides = [(value, layout.value, layout.value_sections, value_tensors)]
    if not layout.key.per_channel:
        sides.append((key, layout.key, layout.key_sections, key_tensors))
    for x, codec, sections, tensors in sides:
        coded = quantize(to_stored(x[rows], tensors), codec, list_clips(codec, tensors, clips), tensors.levels)
        _write(cache, sections.codes, block, token, pack_side(coded.codes, codec.bits))
        _write_scales(cache, sections, block, token, coded)
        _write(cache, sections.outlier_channels, block, token, coded.outlier_channels)
        _write(cache, sections.outlier_values, block, token, _as_bytes(coded.outlier_values))


def store_key_groups(
    keys: torch.Tensor,
    cache: torch.Tensor,
    first_slots: torch.Tensor,
    layout: CellLayout,
    key_tensors: CodecTensors,
    clips: Sequence[float],
) -> None:
    """Same arguments, result and errors as `vllm_ext.kernels.kv_store.store_key_groups`."""
    check_groups(keys, cache, first_slots, layout)
    codec = layout.key
    rows = (first_slots >= 0).nonzero().squeeze(-1)
    slots = first_slots[rows].long()
    if slots.numel() and int((slots % codec.group_size).max()):
        raise ValueError(f"slots {slots.tolist()} must be multiples of the group of {codec.group_size} tokens")
    _check_last(slots, cache, layout)
    block, token = slots // layout.block_size, slots % layout.block_size
    coded = quantize_key_groups(to_stored(keys[rows], key_tensors), codec, key_tensors, clips)
    within = torch.arange(codec.group_size, device=cache.device)
    packed = pack_side(coded.codes.permute(0, 3, 1, 2), codec.bits)
    _write(cache, layout.key_sections.codes, block[:, None], token[:, None] + within, packed)
    _write_scales(cache, layout.key_sections, block, token // codec.group_size, coded)


def quantize_key_groups(keys: torch.Tensor, codec: Codec, tensors: CodecTensors, clips: Sequence[float]) -> Quantized:
    """Codes [groups, heads, D, group_size] and scales [groups, heads, D, 1] of keys [groups, tokens, heads, D]."""
    return quantize(keys.permute(0, 2, 3, 1), codec, list_clips(codec, tensors, clips), tensors.levels)


def _check_last(slots: torch.Tensor, cache: torch.Tensor, layout: CellLayout) -> None:
    if slots.numel() and int(slots.max()) >= cache.shape[0] * layout.block_size:
        raise ValueError(f"slot {int(slots.max())} is past the cache's {cache.shape[0]} blocks of {layout.block_size}")


def _write_scales(
    cache: torch.Tensor, sections: SideSections, block: torch.Tensor, row: torch.Tensor, coded: Quantized
) -> None:
    _write(cache, sections.scales, block, row, _as_bytes(coded.scales.flatten(2)))
    _write(cache, sections.lows, block, row, _as_bytes(coded.lows.flatten(2)))


def _write(cache: torch.Tensor, section: Section, block: torch.Tensor, row: torch.Tensor, data: torch.Tensor) -> None:
    """data: [..., kv heads, row_bytes] for block, row [...]."""
    if section.row_bytes:
        view_section(cache, section)[block, :, row] = data


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    if x.numel():
        return x.contiguous().view(torch.uint8)
    # Nothing to look at, in the shape that its bytes would have.
    return x.new_empty((*x.shape[:-1], x.shape[-1] * x.itemsize), dtype=torch.uint8)
