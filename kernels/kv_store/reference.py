# SPDX-License-Identifier: Apache-2.0
"""The specification of storing keys and values into quantized pages, in plain torch. `layout.py` draws the pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .arguments import check_cache, check_rows
from .codec import CodecTensors, Quantized, list_clips, pack_side, quantize, to_stored
from .layout import CellLayout, Codec, Section, SideSections, view_section
from .recent import gather_recent, list_completed_groups


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
    if slots.numel() and int(slots.max()) >= cache.shape[0] * layout.block_size:
        raise ValueError(f"slot {int(slots.max())} is past the cache's {cache.shape[0]} blocks of {layout.block_size}")
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
    """Code whole groups of keys per channel (KIVI) and write their codes and scales.

    keys: float [groups, group_size tokens, kv heads, D]. first_slots: int [groups], slot of each group's first token,
    -1 to skip; a group starts on a multiple of group_size and stays inside one page. Raises ValueError for a layout
    with per-token keys, shapes that do not fit, and a slot that starts no group.
    """
    check_cache(cache, layout)
    codec = layout.key
    if not codec.per_channel:
        raise ValueError("store_key_groups needs per-channel keys; store_kv stores per-token ones")
    expected = (first_slots.numel(), codec.group_size, cache.shape[1], layout.head_dim)
    if keys.shape != expected:
        raise ValueError(f"keys must be {list(expected)}, got {list(keys.shape)}")
    rows = (first_slots >= 0).nonzero().squeeze(-1)
    slots = first_slots[rows].long()
    if slots.numel() and int((slots % codec.group_size).max()):
        raise ValueError(f"slots {slots.tolist()} must be multiples of the group of {codec.group_size} tokens")
    block, token = slots // layout.block_size, slots % layout.block_size
    coded = quantize_key_groups(to_stored(keys[rows], key_tensors), codec, key_tensors, clips)
    within = torch.arange(codec.group_size, device=cache.device)
    packed = pack_side(coded.codes.permute(0, 3, 1, 2), codec.bits)
    _write(cache, layout.key_sections.codes, block[:, None], token[:, None] + within, packed)
    _write_scales(cache, layout.key_sections, block, token // codec.group_size, coded)


def store_completed_groups(
    step: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    recent: torch.Tensor,
    recent_table: torch.Tensor,
    layout: CellLayout,
    key_tensors: CodecTensors,
    clips: Sequence[float],
) -> None:
    """Find the groups that this step completes, collect their keys, and store them.

    step: [tokens, kv heads, 2*D], this step's keys (as they are stored) and values; block_table: int [requests,
    blocks] of `cache`; the rest as `gather_recent`. A group is coded from its whole content, so its cells depend on
    the tokens alone, not on how a prompt was cut. Raises ValueError where a key of a completed group is in neither:
    the window of recent pages must reach group_size - 1 tokens behind the step.
    """
    group_size = layout.key.group_size
    request, first = list_completed_groups(query_start_loc, seq_lens, group_size)
    position = first[:, None] + torch.arange(group_size, device=first.device)
    keys, kept = gather_recent(
        step, query_start_loc, seq_lens, recent, recent_table, request[:, None].expand_as(position), position
    )
    if not bool(kept.all()):
        missing = int((~kept).nonzero()[0, 0])
        raise ValueError(
            f"request {int(request[missing])} has no full-precision key for its group at {int(first[missing])}: "
            f"keep {group_size - 1} tokens beyond the window"
        )
    slots = block_table.long()[request, first // layout.block_size] * layout.block_size + first % layout.block_size
    store_key_groups(keys[..., : layout.head_dim], cache, slots, layout, key_tensors, clips)


def quantize_key_groups(keys: torch.Tensor, codec: Codec, tensors: CodecTensors, clips: Sequence[float]) -> Quantized:
    """Codes [groups, heads, D, group_size] and scales [groups, heads, D, 1] of keys [groups, tokens, heads, D]."""
    return quantize(keys.permute(0, 2, 3, 1), codec, list_clips(codec, tensors, clips), tensors.levels)


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
